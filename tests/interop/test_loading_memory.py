"""Loading holds one tensor beside what stays: the resident set of a process that loads a checkpoint of 105 MB."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import loading
from bench.shapes import m2m_config
from petl_kernels.interop.hf import skeleton

pytest.importorskip("petl_kernels._C")
if not Path("/proc/self/clear_refs").exists():
    pytest.skip("the system does not tell the resident set", allow_module_level=True)

MIB = 2**20


@pytest.mark.slow
def test_one_tensor_beside_what_stays(tmp_path, capsys):
    sizes = [p.nbytes for p in skeleton(m2m_config(*loading.SHAPES["small"])).parameters()]
    size, largest = sum(sizes), max(sizes)
    assert size > 99 * MIB
    grown = loading.report("small", tmp_path)
    beside = largest + 24 * MIB  # of Python, of the allocator, and of one fp32 tile
    assert 0.4 * size < grown["bf16"] < size // 2 + beside
    assert 0.2 * size < grown["int8"] < size // 4 + beside
    assert grown["quantize"] < beside
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["small", "bf16", "int8", "quantize"]
    assert " bytes written" in said[-1]


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch, capsys):
    free = SimpleNamespace(total=2**20, used=0, free=2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    assert loading.main(["nllb-3.3b", "--folder", str(tmp_path)]) == 2
    assert "1 MiB are free on its disk; expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
