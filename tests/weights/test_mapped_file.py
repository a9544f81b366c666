"""Files in memory: values, reading ahead, giving pages back, and errors of the system."""

from __future__ import annotations

import os

import pytest
import torch

_C = pytest.importorskip("petl_kernels._C")
PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 1024 * PAGE + 100  # the last page is short


@pytest.fixture
def content() -> torch.Tensor:
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path, content) -> str:
    file = tmp_path / "weights"
    file.write_bytes(content.numpy())
    return str(file)


@pytest.mark.parametrize("offset, size", [(0, SIZE), (3, 17), (PAGE - 1, 2 * PAGE), (SIZE - 5, 5), (SIZE, 0), (7, 0)])
def test_values(path, content, offset, size):
    file = _C.MappedFile(path)
    assert file.size() == SIZE
    file.will_need(offset, size)
    assert torch.equal(file.tensor(offset, size), content[offset : offset + size])
    file.drop(offset, size)
    assert torch.equal(file.tensor(offset, size), content[offset : offset + size])


def test_tensors_share_memory_but_no_storage_and_outlive_the_file(path, content):
    file = _C.MappedFile(path)
    one, two = file.tensor(0, 64), file.tensor(0, 64)
    assert one.data_ptr() == two.data_ptr()
    assert one.untyped_storage()._cdata != two.untyped_storage()._cdata
    assert file.tensor(64, 16).data_ptr() == one.data_ptr() + 64
    del file
    os.unlink(path)
    assert torch.equal(one, content[:64])


def test_pages_come_when_read_and_go_when_dropped(path):
    file = _C.MappedFile(path)
    assert file.resident(0, SIZE) == 0
    assert file.tensor(0, SIZE).sum() > 0
    assert file.resident(0, SIZE) == 1025 * PAGE
    file.drop(PAGE + 1, 3 * PAGE)  # of four pages that it touches, two lie within; a large page goes as a whole
    assert file.resident(2 * PAGE, 2 * PAGE) == 0 and file.resident(0, SIZE) <= 1023 * PAGE
    file.drop(512 * PAGE, SIZE - 512 * PAGE)  # with the short page at the end
    assert file.resident(512 * PAGE, SIZE - 512 * PAGE) == 0
    file.drop(0, SIZE)
    assert file.resident(0, SIZE) == 0


def test_writes_stay_in_this_process_until_dropped(path, content):
    file = _C.MappedFile(path)
    view = file.tensor(0, PAGE)
    view.zero_()
    assert not file.tensor(0, PAGE).any() and torch.equal(_C.MappedFile(path).tensor(0, PAGE), content[:PAGE])
    file.drop(1, 2 * PAGE - 2)  # inwards: neither page lies within
    assert not view.any()
    file.drop(0, PAGE)
    assert torch.equal(view, content[:PAGE])


def test_errors(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        _C.MappedFile(str(tmp_path / "none"))
    with pytest.raises(OSError):
        _C.MappedFile(str(tmp_path))
    file = _C.MappedFile(path)
    for offset, size in ((-1, 2), (0, SIZE + 1), (SIZE, 1), (0, -1), (2**62, 2**62)):
        for call in (file.tensor, file.will_need, file.drop, file.resident):
            with pytest.raises(IndexError, match=f"it has {SIZE}"):
                call(offset, size)
    (tmp_path / "empty").write_bytes(b"")
    assert _C.MappedFile(str(tmp_path / "empty")).size() == 0


def test_a_tensor_changes_its_place_for_all_its_views():
    one, two = torch.arange(6.0), torch.arange(6.0, 12.0)
    tensor = torch.empty(6)
    view, alias, version = tensor.view(2, 3).T, tensor.detach(), tensor._version
    for values in (one, two):
        _C.place(tensor, values.data_ptr())
        assert torch.equal(tensor, values) and torch.equal(alias, values) and torch.equal(view, values.view(2, 3).T)
    _C.take_away(tensor, "gone")
    for other in (tensor, view, alias):
        with pytest.raises(RuntimeError, match="gone"):
            other.sum()
    _C.place(tensor, one.data_ptr())
    assert torch.equal(tensor, one) and tensor._version == version
