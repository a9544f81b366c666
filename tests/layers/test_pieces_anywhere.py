"""A piece has its effect wherever it stands in a model: lean layers run it, or their own forward does."""

from __future__ import annotations

import pytest
import torch
from methods.models import FAMILIES, build
from torch import nn

import petl_kernels as pk
from petl_kernels.layers.hooks import hooks_on
from petl_kernels.methods.pieces import Piece, attach, run_pieces

from .lean_cases import exact_rms_norms, ragged, step, worst


class Gain(Piece):
    """Multiplies what the host reads, and what it returns, each by a trained number."""

    what = "gain"

    def __init__(self):
        super().__init__()
        self.read = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
        self.returned = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def before(self, host, args):
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
            return None
        return args[0] * self.read, *args[1:]

    def after(self, host, args, output):
        return output * self.returned


def hosts(model: nn.Module) -> list[str]:
    """Returns the paths of modules that return a tensor, or a tuple that begins with one: of one layer a side."""
    found: list[str] = []

    def note(path: str):
        def hook(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                found.append(path)

        return hook

    handles = [
        module.register_forward_hook(note(path))
        for path, module in model.named_modules()
        if not {"layers.1", "block.1"} & {".".join(path.split(".")[i : i + 2]) for i in range(4)}
    ]
    with torch.no_grad():
        model(**ragged(model))
    for handle in handles:
        handle.remove()
    return sorted(set(found))


@pytest.mark.parametrize(
    "family", [name if name == "m2m100" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_piece_on_each_module(family):
    model = build(family).double().requires_grad_(False)
    exact_rms_norms(model)
    inputs = ragged(model)
    paths = hosts(model)
    assert len(paths) > 25, paths
    for path in paths:
        host = model.get_submodule(path)
        attach(host, "gain", Gain())
        run_pieces(model, "gain")
        plain = step(pk.lean(model, 0), inputs)
        for tier in (1, 4):
            difference, name = worst(step(pk.lean(model, tier), inputs), plain)
            assert difference < 1e-9, (path, tier, name, difference)
        run_pieces(model, None)
        pk.lean(model, 0)
        for hook in (host._forward_hooks, host._forward_pre_hooks):
            hook.clear()
        del host.petl
        assert not hooks_on(host)


def test_the_report_names_a_piece_that_lean_layers_do_not_run():
    model = pk.lean(build("m2m100"), 1)
    attach(model.model.encoder.layers[0].activation_fn, "gain", Gain())
    run_pieces(model, "gain")
    line = "a Gain on activation_fn, where lean layers run none"
    assert line in str(pk.report(model))
    run_pieces(model, None)
    assert line not in str(pk.report(model))
