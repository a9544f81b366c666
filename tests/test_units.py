from __future__ import annotations

import pytest

from petl_kernels.errors import InputError
from petl_kernels.units import format_size, parse_size


@pytest.mark.parametrize(
    "text, size",
    [("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("512mib", 2**29), ("1024", 1024)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "eight", "8 apples", "GiB", "-1GiB", "0GiB", "nan", "inf"])
def test_what_is_no_size_is_refused_by_its_text(text):
    with pytest.raises(InputError, match="memory size") as error:
        parse_size(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "size, text",
    [(12, "12 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 * 2**29, "1.5 GiB"), (1010 * 2**20, "1010 MiB")],
)
def test_sizes_read_back(size, text):
    assert format_size(size) == text
