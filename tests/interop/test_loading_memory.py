"""Loading holds one tensor beside what stays: the resident set of a process that loads a checkpoint of 128 MiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("petl_kernels._C")
if not Path("/proc/self/clear_refs").exists():
    pytest.skip("the system does not tell the resident set", allow_module_level=True)

MIB = 2**20
# Prints the growth of the resident set in bytes: the most while loading, pages of files included.
LOADING = """
import sys, torch
from petl_kernels.interop.hf import load_skeleton, load_weights
from petl_kernels.interop.quantize_checkpoint import quantize_checkpoint
from petl_kernels.ops.quantized import quantize

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def load(path, place):
    model, _ = load_skeleton(path)
    return load_weights(path, model, place)

small, large, out, name = sys.argv[1:]
ways = {
    "bf16": lambda path, out: load(path, lambda _, tensor: tensor.to(torch.bfloat16, copy=True)),
    "int8": lambda path, out: load(path, lambda _, t: quantize(t, "int8") if t.dim() == 2 else t.clone()),
    "kept": lambda path, out: quantize_checkpoint(path, out, "int8"),
}
way = ways[name]
way(small, f"{out}/{name}-small")  # what is imported and allocated once
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
made = way(large, f"{out}/{name}-large")
print(status("VmHWM") - before)
"""


@pytest.fixture
def checkpoints(make, tmp_path) -> tuple[Path, Path, int, int]:
    """Folders of a tiny model and of one of 128 MiB, whose bytes and whose largest tensor's are given, too."""
    model, tokenizer = make("m2m100")
    model.save_pretrained(tmp_path / "small")
    model.config.update({"d_model": 512, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096})
    model.config.update({"encoder_layers": 3, "decoder_layers": 3})
    large = type(model)(model.config)
    large.save_pretrained(tmp_path / "large")
    for name in ("small", "large"):
        tokenizer.save_pretrained(tmp_path / name)
    sizes = [p.nbytes for p in large.parameters()]
    return tmp_path / "small", tmp_path / "large", sum(sizes), max(sizes)


@pytest.mark.slow
def test_one_tensor_beside_what_stays(checkpoints, tmp_path):
    small, large, size, largest = checkpoints
    assert size > 128 * MIB and torch.finfo(torch.float32).bits == 32
    grown = {}
    for name in ("bf16", "int8", "kept"):  # in processes of their own: freed memory of one would serve the next
        arguments = [sys.executable, "-c", LOADING, str(small), str(large), str(tmp_path), name]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        grown[name] = int(done.stdout)
    beside = largest + 24 * MIB  # of Python, of the allocator, and of one fp32 tile
    assert 0.4 * size < grown["bf16"] < size // 2 + beside
    assert 0.2 * size < grown["int8"] < size // 4 + beside
    assert grown["kept"] < beside
