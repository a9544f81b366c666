"""Host memory beside a CUDA device: counted in plans, shown as a line, refused with the least number."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from petl_mt.models.streamed_layers import folder_for_layers
from transformers import M2M100Config

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import skeleton
from petl_kernels.planning.plan import INPUTS, LOADING, Plan, host_peak
from petl_kernels.planning.planner import host_limit, plan_search
from petl_kernels.units import parse_size

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def adapted() -> torch.nn.Module:
    shape = {"vocab_size": 5000, "d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
    return pk.adapt(skeleton(M2M100Config(**shape, **heads)), pk.LoRA(rank=2))


def planned(host_memory: str | None = None, **more) -> Plan:
    return pk.plan(adapted(), "2GiB", 256, max_length=32, device="cuda", tier=1, host_memory=host_memory, **more)


@pytest.mark.slow
def test_bytes_of_the_host_are_counted_and_shown():
    plan = planned(host_data=1000)
    model, table = adapted(), 4 * 5000 * 128
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    # the text, all weights, and one tensor of the files beside them
    assert plan.host == {"text": 1000, "while loading": whole + table + 1000}
    assert host_peak(plan.host) == plan.host["while loading"] and plan.host_memory is None
    assert re.search(r"^host memory: .* while loading; then text 1000 B$", str(plan), re.MULTILINE)


@pytest.mark.slow
def test_too_little_of_the_host_is_refused_and_the_bytes_are_in_the_file(tmp_path):
    with pytest.raises(InputError, match=r"host_memory 1 MiB: .* take .*; expected at least that") as refused:
        planned("1MiB")
    least = re.search(r"take ([\d.]+ \w+);", str(refused.value))
    assert least is not None
    found = planned(least[1].replace(" ", ""))
    assert host_peak(found.host) <= parse_size(least[1]) == found.host_memory
    found.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == found
    values = json.loads((tmp_path / "plan.json").read_text())
    older = {key: value for key, value in values.items() if not key.startswith("host")}  # of an earlier version
    (tmp_path / "plan.json").write_text(json.dumps(older))
    assert Plan.load(tmp_path / "plan.json").host == {}
    (tmp_path / "plan.json").write_text(json.dumps(values | {"host": {"text": "much"}}))
    with pytest.raises(InputError, match="host is .* expected bytes by purpose"):
        Plan.load(tmp_path / "plan.json")


def test_a_tighter_plan_is_counted_anew_and_stays_within_the_bound():
    plan = dataclasses.replace(planned(), tiers=(1,) * 4, rows=8, micro_tokens=8 * 32, micro_batches=1)
    one = plan.input_bytes
    assert one == 32 * 128 * 4  # a sentence of 32 tokens, d 128, fp32
    loading = plan.host.pop(LOADING)
    assert plan.host == {}
    plan.host[LOADING] = 0
    found, seen = plan, []
    while (found := found.tighter()) is not None:
        seen.append((found.rows, found.tiers[0], found.host.get(INPUTS, 0)))
    assert seen[:4] == [(4, 1, 0), (2, 1, 0), (1, 1, 0), (1, 5, 4 * one)]
    assert {row[2] for row in seen[3:]} == {4 * one}
    on_host = dataclasses.replace(plan, tiers=(5,) * 4, host={INPUTS: 32 * one, LOADING: 0})
    halved = on_host.tighter()
    assert halved is not None and halved.host == {INPUTS: 16 * one, LOADING: 0}
    bound = dataclasses.replace(plan, rows=1, host_memory=4 * one - 1, host={LOADING: 4 * one - 1})
    found = bound.tighter()
    assert found is not None and found.tiers == (4,) * 4 and INPUTS not in found.host
    assert found.tighter() is None or found.tighter().tiers == (4,) * 4
    assert loading > 0


@pytest.mark.slow
def test_a_translation_counts_weights_as_training_does():
    model = adapted()
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    given = model, 2**30, ("dense", "dense"), 2, 32, CUDA
    plan = plan_search(*given)
    assert plan.streamed == 0 and plan.host == {LOADING: whole + 4 * 5000 * 128}
    assert plan_search(*given, host_memory=host_peak(plan.host)) == plan
    for refuse in (True, False):
        with pytest.raises(InputError, match=r"host_memory 1 MiB: loading the model, .* take .*; expected at least"):
            plan_search(*given, refuse=refuse, host_memory=2**20)
    assert plan_search(*given[:-1], CPU).host == {}


def test_on_a_cpu_memory_is_host_memory(monkeypatch):
    assert host_limit(CPU, 2**30) is None and host_limit(CPU, 2**30, "2GiB") is None
    with pytest.raises(InputError, match=r"host_memory 1\.00 MiB|host_memory 1 MiB: below memory 1 GiB, which is host"):
        host_limit(CPU, 2**30, "1MiB")
    assert host_limit(CUDA, 2**30, "3MiB") == 3 * 2**20
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("petl_kernels.planning.planner.available_bytes", lambda: 500)
    assert host_limit(CUDA, 2**30, None, 20) == 520


def test_a_disk_without_room_for_streamed_layers_is_refused(tmp_path, monkeypatch):
    plan = SimpleNamespace(streamed=4, device="cpu")
    with folder_for_layers(plan, adapted(), tmp_path / "run") as folder:
        assert folder is not None and folder.parent == tmp_path
    free = SimpleNamespace(total=2**20, used=0, free=2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with (
        pytest.raises(InputError, match=r"1 MiB are free on its disk; expected .* for the file of streamed layers"),
        folder_for_layers(plan, adapted(), tmp_path / "run"),
    ):
        pass
