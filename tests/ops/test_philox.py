from __future__ import annotations

import math
import threading

import pytest
import torch

from petl_kernels import dispatch, ops
from petl_kernels.errors import InputError
from petl_kernels.ops import philox


@pytest.mark.parametrize(
    ("counter", "key", "outputs"),
    [
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_known_answers(counter, key, outputs):
    """Random123's kat_vectors for philox4x32-7."""
    found = philox.rounds(*(tuple(torch.tensor([number]) for number in numbers) for numbers in (counter, key)))
    assert [int(part) for part in found] == outputs


def test_against_plain_integers():
    seed = -0x123456789ABCDEF  # a negative int64 is the bit pattern of an unsigned key
    index = torch.tensor([0, 1, 77, 2**31, 2**32 - 1])
    computed = philox.philox(torch.tensor([seed]), index)
    for i, value in enumerate(index.tolist()):
        assert tuple(int(part[i]) for part in computed) == _philox(seed & (2**64 - 1), value)


def _philox(seed: int, index: int) -> tuple[int, ...]:
    low = 2**32 - 1
    counter, key = [index, 0, 0, 0], [seed & low, seed >> 32]
    for _ in range(7):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(right >> 32) ^ counter[1] ^ key[0], right & low, (left >> 32) ^ counter[3] ^ key[1], left & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return tuple(counter)


def test_the_kept_share_and_the_scale():
    ones = torch.ones(1000, 1000)
    dropped = philox.dropout(ones, 0.3, torch.tensor([5]))
    assert dropped.unique().tolist() == [0.0, pytest.approx(65536 / (65536 - 19661))]  # 0.3 * 65536 = 19660.8
    assert (dropped > 0).double().mean().item() == pytest.approx(0.7, abs=0.002)
    assert dropped.double().mean().item() == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize("p", [1 / 65536, 0.5, 65535 / 65536])
def test_the_mean_stays_at_either_end_of_the_rates(p):
    """Within 5 standard deviations: the share that is kept times its scale is 1 exactly."""
    kept = philox.keep_mask(torch.tensor([11]), (1024, 1024), p)
    share = 1 - philox.threshold(p) / 65536
    assert share * philox.keep_scale(p) == 1
    deviation = (share * (1 - share) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - share) < 5 * deviation


def test_neighbours_are_independent():
    """Correlations of the masks of elements that lie up to 40 columns, or a row, apart; and between the bits of one
    counter's numbers: of 2^20 pairs each, within 5 standard deviations, 2^-10."""
    kept = philox.keep_mask(torch.tensor([3]), (1025, 1064), 0.5).double() * 2 - 1
    base = kept[:1024, :1024]
    for rows, columns in [*((0, j) for j in range(1, 41)), *((1, j) for j in range(9))]:
        other = kept[rows : rows + 1024, columns : columns + 1024]
        assert abs((base * other).mean().item()) < 5 * 2**-10, (rows, columns)
    by_place = kept[:1024, :1024].reshape(-1, 8)
    correlations = by_place.T @ by_place / by_place.shape[0] - torch.eye(8)
    assert correlations.abs().max() < 5 * by_place.shape[0] ** -0.5
    assert by_place.mean(0).abs().max() < 5 * by_place.shape[0] ** -0.5


@pytest.mark.parametrize("shape", [(1, 1), (7, 11), (3, 8), (0, 4), (2, 3, 19)])
def test_a_row_begins_with_a_counter_of_which_eight_neighbours_take_the_halves(shape):
    seed, length = 0x0123456789ABCDEF, shape[-1]
    kept = philox.keep_mask(torch.tensor([seed]), shape, 0.4).flatten().tolist()

    def number(row: int, column: int) -> int:
        word = _philox(seed, row * -(-length // 8) + column // 8)[column % 8 // 2]
        return word >> 16 if column % 2 else word & 0xFFFF

    rows = math.prod(shape[:-1])
    assert kept == [number(i, j) >= round(0.4 * 65536) for i in range(rows) for j in range(length)]


def test_places_of_probabilities():
    """Each group of 32 keeps its own; pairs of columns 8 apart have one counter."""
    columns = torch.arange(96)
    places = philox.place(columns)
    assert sorted(places.tolist()) == columns.tolist() and torch.equal(places // 32, columns // 32)
    assert torch.equal(philox.place(places), columns)
    assert (places.view(3, 4, 4, 2) // 8 % 4 == torch.arange(4)[:, None]).all()


def test_chunks_leave_no_seam(monkeypatch):
    seed = torch.tensor([9])
    whole = philox.keep_mask(seed, (7, 11), 0.5)
    monkeypatch.setattr(philox, "_CHUNK", 5)
    assert torch.equal(philox.keep_mask(seed, (7, 11), 0.5), whole)


def test_elements_anywhere_stay_as_in_the_whole(monkeypatch):
    monkeypatch.setattr(philox, "_CHUNK", 16)
    seed = torch.tensor([9])
    whole = philox.keep_mask(seed, (7, 11), 0.5)
    rows, columns = torch.tensor([[3, 0], [6, 6]]), torch.tensor([10, 0, 7, 8])
    kept = philox.keep_elements(seed, rows, columns, 11, 0.5)
    assert torch.equal(kept, whole[rows[..., None], columns])
    assert philox.keep_elements(seed, rows[:0], columns, 11, 0.5).shape == (0, 2, 4)


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


@pytest.mark.skipif(dispatch.load_error("cpu") is not None, reason="the extension is not built")
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
        (torch.ones(2), 7e-6, None, "op: dropout is 7e-06: expected 0, or a number that is 1 to 65535 when rounded to"),
        (torch.ones(2), 0.999995, None, "op: dropout is 0.999995: expected 0, or a number that is 1 to 65535"),
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
