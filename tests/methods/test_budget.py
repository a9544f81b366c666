from __future__ import annotations

import pytest

from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS, LoRA, budget_parameters, parse_budget, total_parameters

from .models import build

SIZED = ("adapter", "adapter-sublayer", "pfeiffer", "parallel", "lora", "prefix")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("10%", 0.1),
        ("0.1%", 0.001),
        ("100%", 1.0),
        (" 12.5 % ", 0.125),
        ("0.25", 0.25),
        ("1.0", 1.0),
        ("2M", 2_000_000),
        ("1.5k", 1500),
        ("1B", 10**9),
        ("40000", 40_000),
        ("1e3", 1000),
        (0.1, 0.1),
        (1.0, 1.0),
        (40_000, 40_000),
    ],
)
def test_parses(given, expected):
    parsed = parse_budget(given)
    assert parsed == expected and type(parsed) is type(expected)


OUT_OF_RANGE = ("0%", "0", 0, 0.0, "-5%", -0.1, -7, "101%", 1.5, "1.5", 1, "1")
NO_BUDGET = ("ten", "", "5x", "%", True, None, "nan", "inf", float("nan"))


@pytest.mark.parametrize("given", OUT_OF_RANGE + NO_BUDGET, ids=repr)
def test_refuses(given):
    with pytest.raises(InputError, match="parameter budget .*: expected a share") as error:
        parse_budget(given)
    assert repr(given) in str(error.value)


def test_budget_is_of_the_plain_model(model):
    total = total_parameters(model)
    assert budget_parameters(model, "10%") == int(0.1 * total)
    assert budget_parameters(model, total) == total
    with pytest.raises(InputError, match=f"parameter budget {total + 1}: more than 100% of the model's {total:,}"):
        budget_parameters(model, total + 1)


@pytest.mark.parametrize("key", SIZED)
@pytest.mark.parametrize("budget", ("20%", 0.037, 9_000))
def test_takes_the_largest_size_that_fits(model, key, budget):
    limit = budget_parameters(model, budget)
    config = METHODS[key].for_budget(model, budget)
    assert config.label == key
    size = getattr(config, config.size_field)
    count = config.count(model)
    smallest = METHODS[key](**{config.size_field: 1}).count(model)
    assert count <= limit or (size == 1 and count == smallest <= 1.05 * limit)
    assert METHODS[key](**{config.size_field: size + 1}).count(model) > limit


def test_lora_scales_its_alpha_with_the_rank(model):
    config = LoRA.for_budget(model, 0.2)
    assert config.rank > 2 and config.alpha == 2 * config.rank
    assert LoRA.for_budget(model, 0.2, alpha=5.0, targets="all-linear").alpha == 5.0


@pytest.mark.parametrize(
    ("key", "budget", "nearest"),
    [
        ("adapter", 100, "the nearest it can is 644 parameters, 1.537% (bottleneck 1)"),
        ("lora", 500, "the nearest it can is 768 parameters, 1.833% (rank 1)"),
        ("bitfit-biases", "50%", "the nearest it can is 1,472 parameters, 3.514%"),
        ("cross-attention", "1%", "the nearest it can is 8,576 parameters, 20.474%"),
        ("full", "10%", "the nearest it can is 41,888 parameters, 100.000%"),
    ],
)
def test_refuses_what_it_cannot_reach_with_the_nearest(key, budget, nearest):
    with pytest.raises(InputError) as error:
        METHODS[key].for_budget(build("m2m100"), budget)
    assert f"parameter budget {budget!r}" in str(error.value)
    assert f"{key} cannot reach it; {nearest}" in str(error.value)


def test_refuses_more_than_its_largest_size_reaches():
    model = build("m2m100")
    assert LoRA.for_budget(model, "100%").rank == 32  # 59%
    with pytest.raises(InputError, match=r"lora cannot reach it; .* 12,288 parameters, 29.335% \(rank 32\)"):
        LoRA.for_budget(model, "100%", targets=("q_proj",))


def test_bounds_of_what_is_reached():
    model = build("m2m100")
    count = METHODS["cross-attention"]().count(model)
    for limit in (2 * count, count, int(count / 1.05) + 1):
        assert METHODS["cross-attention"].for_budget(model, limit).count(model) == count
    for limit in (2 * count + 2, int(count / 1.05) - 1):
        with pytest.raises(InputError, match="cannot reach"):
            METHODS["cross-attention"].for_budget(model, limit)


def test_refuses_a_size_beside_a_budget_and_unknown_settings():
    model = build("m2m100")
    with pytest.raises(InputError, match="lora rank 4: a parameter budget sets it"):
        METHODS["lora"].for_budget(model, "10%", rank=4)
    with pytest.raises(InputError, match="method lora: unknown setting 'droput', expected dropout"):
        METHODS["lora"].for_budget(model, "10%", droput=0.1)
    with pytest.raises(InputError, match="method adapter: unknown setting 'rank'"):
        METHODS["adapter"](rank=4)
