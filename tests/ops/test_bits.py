from __future__ import annotations

import pytest
import torch

from petl_kernels.ops.bits import pack_bits, packed_width, unpack_bits


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 8), (17, 131), (0, 9)], ids=str)
def test_round_trip(shape):
    rows = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(rows)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], packed_width(shape[-1]))
    assert torch.equal(unpack_bits(packed, shape[-1]), rows)


def test_the_first_element_is_the_lowest_bit_and_rows_end_with_zeros():
    rows = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 0, 1], [1] * 10]).bool()
    assert pack_bits(rows).tolist() == [[0b10000101, 0b10], [0b11111111, 0b11]]
