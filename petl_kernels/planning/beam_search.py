"""The bytes of beam search beside the weights, found without a weight: transformers' own ``generate`` on fake tensors.

    bytes = always + rows · (sentence + source · S + output · L)          a plane that counted shapes lie on

Its first steps run, and then its last one: before that the caches of self-attention are made as long as they will be.
What a step takes is counted as it comes: caches grown by concatenation and copied when beams are reordered, logits in
the model's dtype and in fp32, log-probabilities of this step and of the one before, the running beams.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from petl_kernels.models.transformers_names import cache_in, self_attention_caches
from petl_kernels.planning import simulate
from petl_kernels.planning.peak import Ledger

_ROWS, _SHORT = 8, 8  # of the shapes that are counted


def output_length(source: int, max_length: int) -> int:
    """Tokens that a translation of ``source`` tokens may have."""
    return min(max_length, 2 * source + 32)


@dataclass(frozen=True)
class SearchBytes:
    """What beam search may take, ``memory``, and what it takes: ``always``, and of each sentence.

    All in bytes; source and output are those of one padded token, for all beams of a sentence.
    """

    memory: float
    always: float
    sentence: float
    source: float
    output: float

    def of(self, width, output):
        """Of one sentence: numbers, or arrays of them."""
        return self.sentence + self.source * width + self.output * output

    def rows(self, width: int, output: int) -> int:
        """Sentences that fit into a batch; 0 where not even one does."""
        return max(0, int((self.memory - self.always) / self.of(width, output)))

    def halved(self) -> SearchBytes:
        """For batches of half the size."""
        return dataclasses.replace(self, memory=self.always + (self.memory - self.always) / 2)


class Search:
    """Beam search of a model, adapted and possibly on the meta device, with ``beam`` beams (1: greedy).

    tier: of the layers; autocast: the dtype of products, where the search runs inside ``torch.autocast``.
    """

    def __init__(self, model: nn.Module, beam: int, tier: int, autocast: torch.dtype | None, storage: str = "dense"):
        self.beam, self.autocast = beam, autocast
        self.depths = tuple(int(getattr(model.config, name)) for name in simulate._depth_names(model.config))
        self._cached = 0.0
        self.mode = simulate.fake_mode()
        self._models = {}
        with self.mode:
            for depth in (1, 2):
                like = simulate.shallow(model, depth, depth, storage)
                simulate.set_tiers(like, [tier] * 2 * depth)
                like.generation_config = model.generation_config
                self._models[depth] = like.eval()

    def peak(self, rows: int, source: int, output: int) -> int:
        """The most bytes beside weights, for ``rows`` sentences of ``source`` tokens and translations of ``output``."""
        one, two = (self._phases(self._models[depth], rows, source, output) for depth in (1, 2))
        encoder, decoder = self.depths
        layers = encoder, decoder, decoder
        return max(a + (n - 1) * (b - a) for a, b, n in zip(one, two, layers, strict=True))

    def bytes(self, memory: float, longest: int) -> SearchBytes:
        """For sentences of up to ``longest`` tokens and translations of up to twice as many."""
        longest = max(longest, _SHORT + 1)
        short, long = (self.peak(_ROWS, n, output_length(n, 2 * longest + 32)) for n in (_SHORT, longest))
        both = (long - short) / _ROWS / (longest - _SHORT)  # of a source token and the two output tokens it brings
        output = min(both / 2, self._cached * self.depths[1])  # at least: the rest of the slope falls to the source
        source = both - 2 * output
        row = short / _ROWS
        always = 0.0
        if self.autocast is not None:  # casts of trained weights live as long as the search
            one = self.peak(1, _SHORT, output_length(_SHORT, 2 * longest + 32))
            row = (short - one) / (_ROWS - 1)
            always = max(0.0, one - row)
        sentence = row - source * _SHORT - output * output_length(_SHORT, 2 * longest + 32)
        return SearchBytes(memory, always, max(0.0, sentence), source, output)

    def _phases(self, model: nn.Module, rows: int, source: int, output: int) -> tuple[int, int, int]:
        """The most while encoding, in the first step, and in the last ones."""
        with self.mode, torch.no_grad(), torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            living = [*model.parameters(), *model.buffers()]
            with Ledger(living) as ledger:
                always = ledger.live
                steps = _Steps(ledger, max(1, output - 1))
                handle = model.register_forward_pre_hook(steps, with_kwargs=True)
                ids = torch.ones(rows, source, dtype=torch.long)
                try:
                    with _Answers(self.beam > 1):
                        model.generate(
                            input_ids=ids,
                            attention_mask=torch.ones_like(ids),
                            num_beams=self.beam,
                            early_stopping=self.beam > 1,
                            do_sample=False,
                            max_length=None,
                            max_new_tokens=max(output, 3),
                        )
                except _Enough:
                    pass
                finally:
                    handle.remove()
        self._cached = steps.token_bytes / rows
        return tuple(peak - always for peak in steps.peaks)


class _Enough(Exception):
    """All that has to be seen was seen."""


class _Steps:
    """A pre-hook of the model's forward: peaks between its calls, and the caches grown before the last."""

    def __init__(self, ledger: Ledger, cached: int):
        self.ledger, self.cached, self.peaks = ledger, cached, []
        self.token_bytes = 0  # keys and values of one token in one layer

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.peaks.append(self.ledger.peak)
        if len(self.peaks) == 3:
            raise _Enough
        if len(self.peaks) == 2:
            for layer in self_attention_caches(cache_in(kwargs)):
                self.token_bytes = 2 * layer.keys.nbytes // layer.keys.shape[2]
                layer.keys, layer.values = self._grown(layer.keys), self._grown(layer.values)
        self.ledger.peak = self.ledger.live

    def _grown(self, cache: Tensor) -> Tensor:
        """One shorter than it will be: the step adds the last token's."""
        return cache.new_empty(*cache.shape[:2], self.cached, cache.shape[3])


class _Answers(TorchDispatchMode):
    """What the search asks of values that no fake tensor has: ``answer``, such that it goes on."""

    def __init__(self, answer: bool):
        super().__init__()
        self.answer = answer

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            return self.answer
        return function(*args, **(kwargs or {}))
