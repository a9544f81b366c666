"""What a plan counts on fake tensors, counted once in a process for models that are alike: each takes a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

RATES = ("p", "dropout", "attention_dropout", "stored_dropout", "activation_dropout")


def kind_of(model: torch.nn.Module) -> str:
    """Returns all of ``model`` that its bytes depend on, as a key: class, configuration, tensors, rates, method."""
    from petl_kernels.layers.wide_linear import is_widened
    from petl_kernels.methods.owner import active_name, records

    tensors = [
        (name, tuple(t.shape), t.dtype, t.requires_grad, type(t))
        for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    ]
    rates = [(name, *(getattr(m, rate, None) for rate in RATES)) for name, m in model.named_modules()]
    method = None if active_name(model) is None else records(model)[active_name(model)].config
    return repr((type(model), model.config.to_json_string(), tensors, rates, method, is_widened(model)))


@contextmanager
def counted_once() -> Iterator[None]:
    """Within it, ``StepBytes`` and ``Search`` simulate a step or a search once for each kind of model and of batch."""
    from petl_kernels.planning import simulate
    from petl_kernels.planning.beam_search import Search
    from petl_kernels.planning.step_bytes import StepBytes

    made, count = Search.__init__, Search.bytes
    known: dict[tuple, object] = {}

    def once(counted):
        def counted_once(self, *given):
            self.kind = getattr(self, "kind", None) or kind_of(self.model)
            patched = simulate.step, simulate.shallow  # by some tests
            request = self.request
            training = request.longest, request.autocast, request.packed, request.device.type
            key = counted, self.kind, *training, torch.get_num_threads(), *patched, *given
            if key not in known:
                known[key] = counted(self, *given)
            return known[key]

        return counted_once

    def made_once(self, model, *given):
        self.kind = kind_of(model), model.generation_config.to_json_string(), torch.get_num_threads(), *given
        made(self, model, *given)

    def bytes_once(self, memory, longest):
        key = *self.kind, longest
        if key not in known:
            known[key] = count(self, memory, longest)
        return dataclasses.replace(known[key], memory=memory)

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(StepBytes, "phases", once(StepBytes.phases))
        changes.setattr(StepBytes, "kept", once(StepBytes.kept))
        changes.setattr(Search, "__init__", made_once)
        changes.setattr(Search, "bytes", bytes_once)
        yield
