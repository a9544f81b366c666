"""The bytes of beam search beside the weights, found without a weight: transformers' own ``generate`` on fake tensors.

    bytes = always + sentences · (sentence + source · S + output · L)          S source tokens, L output tokens

The four coefficients come from simulations of a few shapes, between which the bytes are affine. A simulation runs the
first two steps of the search and then its last one, for which the caches of self-attention are replaced by ones of
their final length. All that a step allocates is counted when it is allocated: caches that are concatenated and copied
when beams change places, logits in the model's dtype and in fp32, log-probabilities of two steps, the running beams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from petl_kernels.models.transformers_names import cache_in, lengthen, self_attention_caches
from petl_kernels.planning import simulate
from petl_kernels.planning.peak import Ledger

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SENTENCES, _SHORT = 8, 8  # sentences of the simulated batches, and tokens of the short ones


def output_length(source: int, max_length: int) -> int:
    """Returns how many tokens a translation of ``source`` tokens may have."""
    return min(max_length, 2 * source + 32)


@dataclass(frozen=True)
class SearchBytes:
    """Bytes that beam search may take, ``memory``, and those that it takes.

    always: for a batch of any size. sentence: for each sentence, all of its beams together; source and output: for each
    padded token of the sentence and of its translation, again for all beams.
    """

    memory: float
    always: float
    sentence: float
    source: float
    output: float

    @overload
    def of(self, width: float, output: float) -> float: ...

    @overload
    def of(self, width: NDArray[Any], output: NDArray[Any]) -> NDArray[Any]: ...

    def of(self, width: Any, output: Any) -> Any:
        """Returns the bytes of a sentence of ``width`` tokens with ``output`` tokens of translation.

        Both are numbers, or arrays with an element for each sentence.
        """
        return self.sentence + self.source * width + self.output * output

    def rows(self, width: int, output: int) -> int:
        """Returns how many such sentences fit into a batch; 0 where not even one does."""
        return max(0, int((self.memory - self.always) / self.of(width, output)))

    def halved(self) -> SearchBytes:
        """Returns the same for batches of half the size."""
        return dataclasses.replace(self, memory=self.always + (self.memory - self.always) / 2)


class Search:
    """Beam search of a model, adapted and possibly on the meta device, with ``beam`` beams (1: greedy).

    tier: of the layers. autocast: the dtype of products, where the search runs inside ``torch.autocast``.
    """

    def __init__(self, model: nn.Module, beam: int, tier: int, autocast: torch.dtype | None, storage: str = "dense"):
        self.beam, self.autocast = beam, autocast
        self._depths = simulate.depths(model.config)
        self._mode = simulate.fake_mode()
        self._models: dict[int, Any] = {}
        with self._mode:
            for depth in (1, 2):
                like: Any = simulate.shallow(model, depth, depth, storage)
                simulate.set_tiers(like, [tier] * 2 * depth)
                like.generation_config = model.generation_config
                self._models[depth] = like.eval()

    def peak(self, sentences: int, source: int, output: int) -> int:
        """Returns the most bytes beside weights, for ``sentences`` of that many tokens each, and of translation."""
        return self._counted(sentences, source, output)[0]

    def bytes(self, memory: float, longest: int) -> SearchBytes:
        """Returns the bytes for sentences of up to ``longest`` tokens and translations of up to twice as many and 32.

        memory: those that the search may take.
        """
        longest = max(longest, _SHORT + 1)
        most = 2 * longest + 32
        short, _ = self._counted(_SENTENCES, _SHORT, output_length(_SHORT, most))
        long, cached = self._counted(_SENTENCES, longest, output_length(longest, most))
        # by a source token, which brings two output tokens
        slope = (long - short) / _SENTENCES / (longest - _SHORT)
        output = min(slope / 2, cached * self._depths[1])  # at least the cache's: the rest counts for the source
        source = slope - 2 * output
        each, always = short / _SENTENCES, 0.0
        if self.autocast is not None:  # casts of trained weights live as long as the search
            one, _ = self._counted(1, _SHORT, output_length(_SHORT, most))
            each = (short - one) / (_SENTENCES - 1)
            always = max(0.0, one - each)
        sentence = each - source * _SHORT - output * output_length(_SHORT, most)
        return SearchBytes(memory, always, max(0.0, sentence), source, output)

    def _counted(self, sentences: int, source: int, output: int) -> tuple[int, float]:
        """Returns (peak of the whole depth, bytes that a layer caches for an output token of one sentence)."""
        (one, _), (two, cached) = (self._simulated(self._models[d], sentences, source, output) for d in (1, 2))
        encoder, decoder = self._depths
        layers = encoder, decoder, decoder
        return max(a + (n - 1) * (b - a) for a, b, n in zip(one, two, layers, strict=True)), cached / sentences

    def _simulated(self, model: Any, sentences: int, source: int, output: int) -> tuple[tuple[int, ...], int]:
        """Returns (peaks while encoding, in the first step and in the last ones; bytes cached for an output token)."""
        with self._mode, torch.no_grad(), torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            living = [*model.parameters(), *model.buffers()]
            with Ledger(living) as ledger:
                always = ledger.live
                steps = _Steps(ledger, max(1, output - 1))
                handle = model.register_forward_pre_hook(steps, with_kwargs=True)
                ids = torch.ones(sentences, source, dtype=torch.long)
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
        return tuple(peak - always for peak in steps.peaks), steps.token_bytes


class _Enough(Exception):
    """Ends a search of which all steps that count were seen."""


class _Steps:
    """A pre-hook of the model's forward, which notes the peak between its calls.

    Before the last step that counts it replaces the caches by ones as long as that step would find them.
    """

    def __init__(self, ledger: Ledger, length: int):
        """length: tokens in the caches before the last step."""
        self.ledger, self.length = ledger, length
        self.peaks: list[int] = []
        self.token_bytes = 0  # keys and values of one token in one layer

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.peaks.append(self.ledger.peak)
        if len(self.peaks) == 3:
            raise _Enough
        if len(self.peaks) == 2:
            for layer in self_attention_caches(cache_in(kwargs)):
                self.token_bytes = 2 * layer.keys.nbytes // layer.keys.shape[2]
                lengthen(layer, self.length)
        self.ledger.peak = self.ledger.live


class _Answers(TorchDispatchMode):
    """Gives ``answer`` where the search reads a value, which no fake tensor has; with the right one it goes on."""

    def __init__(self, answer: bool):
        super().__init__()  # pyright: ignore[reportUnknownMemberType]  # torch has no types for it
        self.answer = answer

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            return self.answer
        return function(*args, **(kwargs or {}))
