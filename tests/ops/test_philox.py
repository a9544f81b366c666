from __future__ import annotations

import pytest
import torch

from petl_kernels import backends, ops
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


def test_chunks_leave_no_seam(monkeypatch):
    seed = torch.tensor([9])
    whole = philox.keep_mask(seed, (7, 11), 0.5)
    monkeypatch.setattr(philox, "_CHUNK", 5)
    assert torch.equal(philox.keep_mask(seed, (7, 11), 0.5), whole)


def test_manual_seed_reproduces():
    torch.manual_seed(3)
    first = philox.draw_seed(torch.device("cpu"))
    second = philox.draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(philox.draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second) and first.shape == (1,)


@pytest.mark.skipif(backends.load_error("cpu") is not None, reason="the extension is not built")
@pytest.mark.parametrize("features", [1, 3, 8, 13, 1024])
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
