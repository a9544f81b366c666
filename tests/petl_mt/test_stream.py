"""Lines of a file or a pipe in windows; where translations go."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from petl_mt.checks import check_folder
from petl_mt.commands.input_lines import FIRST, LineWindows, check_other
from petl_mt.commands.output_lines import OutputLines
from petl_mt.commands.standard_streams import hold_closed_descriptors
from petl_mt.terminal import EVERY, Watch, say, time_left

from petl_kernels.errors import InputError


def test_a_file_comes_in_windows_that_double(tmp_path):
    path, lines = tmp_path / "text", [f"{i}" for i in range(100)]
    path.write_text("\n".join(lines))  # no end behind the last
    source = LineWindows(str(path))
    assert (source.total, source.size) == (100, path.stat().st_size)
    windows = list(source.windows(40))
    assert [len(window) for window in windows] == [FIRST, 2 * FIRST, 40, 100 - 3 * FIRST - 40]
    assert sum(windows, []) == lines


@pytest.mark.parametrize("data, lines", [
    (b"", []), (b"\n", [""]), (b"a", ["a"]), (b"a\n\nb\r\n", ["a", "", "b"]), (b"\xef\xbb\xbfa\n", ["a"]),
])  # fmt: skip
def test_what_a_line_is(tmp_path, data, lines):
    path = tmp_path / "text"
    path.write_bytes(data)
    source = LineWindows(str(path))
    assert sum(source.windows(64), []) == lines and source.total == len(lines)


@pytest.fixture
def pipe():
    """Returns (path to read, descriptor to write)."""
    read, write = os.pipe()
    yield f"/dev/fd/{read}", write
    os.close(read)


def test_a_pause_closes_a_window(pipe):
    path, write = pipe
    source = LineWindows(path)
    assert source.total is None
    windows = source.windows(64)
    for text in (b"one\n", b"two\nthree\n", b"fo"):
        os.write(write, text)
        if text.endswith(b"\n"):
            assert next(windows) == text.decode().split()  # and nothing more has been written
    os.write(write, b"ur\nfive")
    assert next(windows) == ["four"]  # a line is one when it has ended
    os.close(write)
    assert list(windows) == [["five"]]


def test_a_line_that_is_not_text_is_named_by_its_place_in_all(pipe):
    path, write = pipe
    windows = LineWindows(path).windows(64)
    os.write(write, b"one\ntwo\n")
    assert next(windows) == ["one", "two"]
    os.write(write, b"three\n\xff\n")
    os.close(write)
    with pytest.raises(InputError, match=r"/dev/fd/\d+: line 4 is not UTF-8 \(byte 0xff\)"):
        next(windows)


def test_carriage_returns_alone_are_refused_as_in_training(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"one\rtwo")
    with pytest.raises(InputError, match="its lines end with carriage returns alone"):
        list(LineWindows(str(path)).windows(64))
    path.write_bytes(b"one\rtwo\nthree")
    assert list(LineWindows(str(path)).windows(64)) == [["one\rtwo", "three"]]


def test_what_is_read_is_not_written_over(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_text("one\n")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InputError, match="--out .*link is what is read"):
        check_other(str(path), str(tmp_path / "link"))
    check_other(str(path), str(tmp_path / "other"))
    check_other(None, str(path))
    with open(path) as file:
        monkeypatch.setattr("sys.stdin", file)
        with pytest.raises(InputError, match="--out .*text is what is read"):
            check_other(None, str(path))
    part = tmp_path / "whole.part"  # of a run that was cut short, and the next one writes there first
    part.write_text("one\n")
    with pytest.raises(InputError, match="whole.part is what is read"):
        check_other(str(part), str(tmp_path / "whole"))


def test_lines_for_a_reader_that_is_not_there_go_nowhere(monkeypatch, capsys):
    """They do not go to standard output, which ``print`` takes for None; and no work ends because of them."""
    monkeypatch.setattr("sys.stderr", None)
    say("one")
    with Watch("score", 5, "lines") as watch:
        monkeypatch.setattr("petl_mt.terminal.EVERY", 0.0)
        watch.at(3)
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr("sys.stderr", open(writer, "w", buffering=1))  # noqa: SIM115
    say("two")
    assert capsys.readouterr().out == ""


def test_no_file_gets_the_number_of_a_closed_standard_stream():
    kept = os.dup(0)
    try:
        os.close(0)
        hold_closed_descriptors()
        assert os.path.samestat(os.fstat(0), os.stat(os.devnull))
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_lines_are_in_a_part_until_all_are_there(tmp_path, capsys):
    path = str(tmp_path / "out")
    with OutputLines("--out", path) as sink:
        sink.write(["one", "zwei"])
        assert Path(path + ".part").read_text() == "one\nzwei\n" and not os.path.exists(path)
    assert os.listdir(tmp_path) == ["out"] and Path(path).read_text() == "one\nzwei\n"
    with pytest.raises(KeyboardInterrupt), OutputLines("--out", path) as sink:
        sink.write(["un"])
        raise KeyboardInterrupt
    assert Path(path).read_text() == "one\nzwei\n" and Path(path + ".part").read_text() == "un\n"
    assert capsys.readouterr().err == f"1 lines are in {path}.part\n"
    with pytest.raises(InputError, match=r"^--out .*/out: .*out.part holds lines of a run that was stopped"):
        OutputLines("--out", path)
    assert Path(path + ".part").read_text() == "un\n"


def test_a_link_leads_to_the_file_that_is_written(tmp_path):
    (tmp_path / "link").symlink_to("there/file")
    (tmp_path / "there").mkdir()
    for lines in (["one"], ["two"]):  # a link to nothing yet, and to a file
        with OutputLines("--out", str(tmp_path / "link")) as sink:
            sink.write(lines)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there/file").read_text() == f"{lines[0]}\n"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"] and os.listdir(tmp_path / "there") == ["file"]
    part = tmp_path / "there/file.part"
    part.write_text("one\n")
    with pytest.raises(InputError, match="file.part is what is read"):
        check_other(str(part), str(tmp_path / "link"))


def test_what_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--out .*/nowhere/out: .*nowhere: there is no such folder"):
        OutputLines("--out", str(tmp_path / "nowhere" / "out"))
    with pytest.raises(InputError, match="is a folder; expected a file to write"):
        OutputLines("--out", str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is no folder"):
        OutputLines("--out", str(tmp_path / "file" / "out"))
    with pytest.raises(InputError, match="is no folder"):
        check_folder("out", tmp_path / "file" / "a" / "b")
    check_folder("out", tmp_path / "a" / "b")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="1 B are free on its disk; expected 2 B"):
        OutputLines("--out", str(tmp_path / "out"), 2)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InputError, match="standard output: is closed"):
        OutputLines("--out", None)
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_others_read_keeps_its_lines(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with OutputLines("--out", str(tmp_path / "fifo")) as sink:
        sink.write(["one"])
        assert os.read(reader, 10) == b"one\n"
    os.close(reader)


def test_time_left():
    assert time_left(10, 1, 5) == "about 40 s left" and time_left(60, 1, 5) == "about 4 min left"
    assert time_left(10, 0, 5) == time_left(10, 5, 5) == time_left(10, 1, None) == ""


def test_progress_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Watch("score", 500, "lines") as watch:
        for second in range(25):
            now[0] = float(second)
            watch.at(10 * second)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["score: 100 of 500 lines, about 40 s left", "score: 200 of 500 lines, about 30 s left"]
    assert EVERY == 10
    with Watch("translate", None, "lines") as watch:
        now[0] += 60
        watch.at(3)
        watch.at(4)
    assert capsys.readouterr().err == "translate: 3 lines\n"
    with Watch("score", 5, "lines", quiet=True) as watch:
        now[0] += 60
        watch.at(3)
    assert capsys.readouterr().err == ""
