from __future__ import annotations

import errno
import os

import pytest
import safetensors.torch
import torch

from petl_kernels.files import atomic_dir, atomic_path, atomic_write

resource = pytest.importorskip("resource")


@pytest.fixture
def small_disk():
    """Lets no file grow over 4 KiB, so that a write in the middle fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_write_replaces_whole_files(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one\n", "zwei: groß\n"):
        with atomic_write(path) as file:
            file.write(text)
        assert path.read_bytes() == text.encode()
    with atomic_write(path, "wb") as file:
        file.write(b"\xff")
    assert path.read_bytes() == b"\xff" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("old", [None, "old"])
def test_error_in_the_block_leaves_the_old_file(tmp_path, old):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write("half")
        raise KeyError
    assert os.listdir(tmp_path) == (["a.txt"] if old else [])
    assert not old or path.read_text() == old


def test_full_disk_names_the_target(tmp_path, small_disk):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError) as error, atomic_write(path, "wb") as file:
        file.write(bytes(10_000))
    assert error.value.filename == str(path) and str(path) in str(error.value) and error.value.errno == errno.EFBIG
    with pytest.raises(OSError) as error, atomic_path(path) as temporary:
        safetensors.torch.save_file({"w": torch.zeros(5000)}, temporary)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_full_disk_while_flushing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="a.txt") as error, atomic_write(tmp_path / "a.txt") as file:
        file.write("x")
    assert error.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_errors_of_other_files_keep_their_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "a.txt"):
        open(tmp_path / "other")


def test_missing_folder_names_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/a\.txt"), atomic_write(tmp_path / "none" / "a.txt"):
        pass


@pytest.mark.parametrize("exchange", [True, False])
def test_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("petl_kernels.files._exchange", lambda one, other: False)
    path = tmp_path / "run"
    for name in ("one", "two"):
        with atomic_dir(path) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / name).write_text(name)
        assert [p.name for p in path.rglob("*") if p.is_file()] == [name]
        assert os.listdir(tmp_path) == ["run"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file"), atomic_dir(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "file").unlink()
    with pytest.raises(OSError) as error, atomic_dir(path) as folder:
        (folder / "three").write_text("3")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "three"))
    assert error.value.filename == str(path)
    assert (path / "deep" / "two").read_text() == "two" and os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    """safetensors makes its files 0600, so that a team could not read a run that one of it has made."""
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a.safetensors") as temporary:
            safetensors.torch.save_file({"w": torch.zeros(3)}, temporary)
        with atomic_dir(tmp_path / "folder") as folder:
            (folder / "deep").mkdir()
            safetensors.torch.save_file({"w": torch.zeros(3)}, folder / "deep" / "b.safetensors")
        with atomic_write(tmp_path / "c.txt") as file:
            file.write("x")
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    files, folders = 0o666 & ~umask, 0o777 & ~umask
    wanted = {"a.safetensors": files, "folder": folders, "deep": folders, "b.safetensors": files, "c.txt": files}
    assert found == wanted
