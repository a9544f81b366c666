"""Names of earlier versions that users have in their code, command lines and files."""

from __future__ import annotations

import pytest
import torch
from petl_mt.cli import main
from petl_mt.config import TrainConfig

from petl_kernels import backends, dispatch, ops
from petl_kernels.errors import InputError
from petl_kernels.planning.plan import check_allow

pytestmark = pytest.mark.check


def test_quantise_is_quantize():
    weight = torch.randn(8, 64)
    quantized = ops.quantise(weight, "int8")
    assert isinstance(quantized, ops.QuantisedTensor) and ops.QuantisedTensor is ops.QuantizedTensor
    assert torch.equal(quantized.dequantise(), ops.quantize(weight, "int8").dequantize())
    assert ops.quantised_embedding is ops.quantized_embedding


def test_allow_quantised_is_allow_quantized():
    assert check_allow(["quantised", "bf16-gradients"]) == ("quantized", "bf16-gradients")
    with pytest.raises(InputError, match="quantisied"):
        check_allow(["quantisied"])


def test_a_run_that_allowed_quantised_goes_on_as_quantized():
    config = TrainConfig(memory="1GiB", allow=["quantised"])
    config.check_settings()
    assert config.allow == ["quantized"]


def test_merge_into_quantised_is_understood(tmp_path, capsys):
    assert main(["merge", "--run", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--into", "quantised"]) == 2
    assert "no config.yaml in it" in capsys.readouterr().err  # what is wrong is the run, and not the word


def test_a_backend_is_found_under_its_older_module():
    assert backends.use is dispatch.use and backends.turned_down is dispatch.turned_down
