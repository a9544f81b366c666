from __future__ import annotations

import threading

import pytest
import torch

from petl_kernels import backends, ops
from petl_kernels.errors import InputError
from petl_kernels.ops import philox


def test_known_answers():
    """The first vectors of Random123's kat_vectors for philox4x32-10 with counter 0."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(part) for part in philox.philox(zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_against_plain_integers():
    seed = -0x123456789ABCDEF  # a negative int64 is the bit pattern of an unsigned key
    index = torch.tensor([0, 1, 77, 2**31, 2**32 - 1])
    computed = philox.philox(torch.tensor([seed]), index)
    for i, value in enumerate(index.tolist()):
        assert tuple(int(part[i]) for part in computed) == _philox(seed & (2**64 - 1), value)


def _philox(seed: int, index: int) -> tuple[int, ...]:
    low = 2**32 - 1
    counter, key = [index, 0, 0, 0], [seed & low, seed >> 32]
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(right >> 32) ^ counter[1] ^ key[0], right & low, (left >> 32) ^ counter[3] ^ key[1], left & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return tuple(counter)


def test_the_kept_share_and_the_scale():
    ones = torch.ones(1000, 1000)
    dropped = philox.dropout(ones, 0.3, torch.tensor([5]))
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert (dropped > 0).double().mean().item() == pytest.approx(0.7, abs=0.002)


@pytest.mark.parametrize("shape", [(1, 1), (7, 11), (3, 8), (0, 4)])
def test_element_i_takes_output_i_mod_4_of_counter_i_div_4(shape):
    seed = 0x0123456789ABCDEF
    kept = philox.keep_mask(torch.tensor([seed]), shape, 0.4).flatten().tolist()
    assert kept == [_philox(seed, i // 4)[i % 4] >= int(0.4 * 2**32) for i in range(shape[0] * shape[1])]


def test_chunks_leave_no_seam(monkeypatch):
    seed = torch.tensor([9])
    whole = philox.keep_mask(seed, (7, 11), 0.5)
    monkeypatch.setattr(philox, "_CHUNK", 5)
    assert torch.equal(philox.keep_mask(seed, (7, 11), 0.5), whole)


def test_elements_anywhere_stay_as_in_the_whole(monkeypatch):
    monkeypatch.setattr(philox, "_CHUNK", 16)
    seed, index = torch.tensor([9]), torch.randint(0, 77, (5, 13), generator=torch.Generator().manual_seed(0))
    whole = philox.keep_mask(seed, (77,), 0.5)
    assert torch.equal(philox.keep_elements(seed, index, 0.5), whole[index])
    assert philox.keep_elements(seed, index[:0], 0.5).shape == (0, 13)


def test_dropped_elements_are_zero_whatever_they_were():
    seed = torch.tensor([4])
    dropped = philox.dropout(torch.full((5, 8), float("nan")), 0.5, seed)
    assert torch.equal(dropped.isnan(), philox.keep_mask(seed, (5, 8), 0.5)) and not dropped.isnan().all()


def test_manual_seed_reproduces():
    torch.manual_seed(3)
    first = philox.draw_seed(torch.device("cpu"))
    second = philox.draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(philox.draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second) and first.shape == (1,)


@pytest.mark.skipif(backends.load_error("cpu") is not None, reason="the extension is not built")
@pytest.mark.parametrize("features", [1, 2, 3, 8, 13, 1024])
def test_the_extension_draws_the_same_mask(features):
    """Read the mask off s = drop(x) Aᵀ with A the identity, for rows of several blocks."""
    x = torch.ones(300, features)
    eye, seed = torch.eye(features), torch.tensor([0x0123456789ABCDEF])
    weight = [torch.zeros(1, features)]
    with ops.use("cpu"):
        _, s = torch.ops.petl.lora_linear(
            x, weight, [x.new_empty(0)], [eye], [torch.zeros(1, features)], [1.0], 0.4, seed, "cpu"
        )
    assert torch.equal(s > 0, philox.keep_mask(seed, (300, features), 0.4))


def draw() -> torch.Tensor:
    return philox.draw_seed(torch.device("cpu"))


def test_a_recording_is_replayed_in_order():
    with philox.recording() as seeds:
        drawn = [draw() for _ in range(3)]
    assert all(a is b for a, b in zip(seeds, drawn, strict=True))
    state = torch.get_rng_state()
    with philox.replaying(seeds):
        again = [draw() for _ in range(3)]
    assert torch.equal(torch.cat(again), torch.cat(drawn)) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(), drawn[0])


def test_a_recording_reports_to_the_one_around_it():
    with philox.recording() as outer:
        first = draw()
        with philox.recording() as inner:
            second = draw()
        third = draw()
    assert inner == [second] and outer == [first, second, third]


def test_a_recording_inside_a_replay_records_what_is_replayed():
    seeds = [draw(), draw()]
    with philox.recording() as around, philox.replaying(seeds), philox.recording() as inner:
        assert draw() is seeds[0] and draw() is seeds[1]
    assert inner == seeds and around == []


def test_the_innermost_replay_serves():
    seeds = [draw() for _ in range(4)]
    with philox.replaying(seeds[:2]):
        assert draw() is seeds[0]
        with philox.replaying(seeds[2:]):
            assert draw() is seeds[2]
        assert draw() is seeds[1]


def test_a_replay_that_runs_out_stops():
    with philox.recording() as seeds:
        draw()
    with pytest.raises(RuntimeError, match="draws more seeds than were recorded"), philox.replaying(seeds):
        draw(), draw()
    assert draw() is not None  # the tape ended with its block, also by an exception


def test_tapes_are_a_threads_own():
    drawn = []
    with philox.recording() as seeds, philox.replaying([]):
        thread = threading.Thread(target=lambda: drawn.append(draw()))
        thread.start()
        thread.join()
    assert len(drawn) == 1 and seeds == []


def test_a_layer_with_dropout_repeats_itself():
    x, weight, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    with philox.recording() as seeds:
        first = ops.lora_linear(x, weight, None, a, b, 1.0, dropout=0.5)
    with philox.replaying(seeds):
        second = ops.lora_linear(x, weight, None, a, b, 1.0, dropout=0.5)
    assert len(seeds) == 1 and torch.equal(first, second)


def test_a_seed_that_is_given_is_not_drawn():
    given = torch.tensor([3])
    with philox.recording() as seeds:
        assert philox.seed_for("op", torch.ones(2), 0.5, given) is given
        assert philox.seed_for("op", torch.ones(2), 0.0, given) is None
    assert seeds == []


@pytest.mark.parametrize(
    ("x", "p", "seed", "message"),
    [
        (torch.ones(2), 1.0, None, r"op: dropout is 1.0: expected a number in \[0, 1\)"),
        (torch.ones(1).expand(2**32), 0.1, None, r"op: x has 4294967296 elements: expected fewer than 2\^32"),
        (torch.ones(2), 0.1, torch.ones(1), r"op: seed is torch.float32 of shape \(1,\): expected int64"),
        (torch.ones(2, device="meta"), 0.1, torch.tensor([1]), "op: seed is on cpu: expected the device of x, meta"),
    ],
)
def test_refuses(x, p, seed, message):
    with pytest.raises(InputError, match=message):
        philox.seed_for("op", x, p, seed)


def test_tapes_work_under_compile():
    one = torch.ones(1, dtype=torch.int64)
    compiled = torch.compile(lambda x: x * draw(), fullgraph=True, backend="aot_eager")
    compiled(one)
    with philox.recording() as seeds:
        drawn = compiled(one)
    with philox.replaying(seeds):
        assert torch.equal(compiled(one), drawn)
    assert torch.equal(torch.cat(seeds), drawn) and not torch.equal(compiled(one), drawn)
