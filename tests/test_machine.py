from __future__ import annotations

import torch

from petl_kernels import machine


def test_what_is_told_of_this_machine():
    assert machine.processor() and machine.cores() >= 1
    assert machine.threads() == torch.get_num_threads()
    assert 0 < machine.available_bytes() <= machine.total_bytes()
    assert machine.version("torch") == torch.__version__ and machine.version("no-such-package") is None


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert machine.device_name("cuda") == "NVIDIA H100 80GB HBM3" and machine.device_name("cpu") == "cpu"


def test_a_system_without_files_about_itself(monkeypatch):
    def none(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(machine.Path, "read_text", none)
    assert machine.available_bytes() is None
    assert machine.processor() == (machine.platform.processor() or machine.platform.machine())
