"""Attention masks for which the host does not wait.

transformers reads three times a step from the device whether a mask hides anything, and waits for the answer. It takes
a mask of four dimensions as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petl_kernels.layers.masks import as_causal
from petl_kernels.models.transformers_names import attention_implementation, cache_in

WAITED_FOR = ("cuda",)  # on a CPU the answer is there at once, and a mask that hides nothing is best left out


def without_waiting(model: nn.Module, inputs: dict) -> dict:
    """Returns ``inputs`` of a training step with bool masks of four dimensions in the place of those of two.

    The source's is (rows, 1, 1, source tokens), the target's (1, 1, target tokens, target tokens). A decoder's mask
    that is given stays; all stay for an attention function other than sdpa's, and under ``torch.compile``.
    """
    ids = inputs.get("decoder_input_ids")
    if ids is None and inputs.get("decoder_inputs_embeds") is None:
        ids = inputs.get("labels")  # the model makes decoder inputs of them
    if ids is None or ids.device.type not in WAITED_FOR or torch.compiler.is_compiling():
        return inputs
    if cache_in(inputs) is not None:  # it makes the decoder's masks longer
        return inputs
    if attention_implementation(model.config) != "sdpa":
        return inputs
    changed = dict(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        changed["attention_mask"] = mask[:, None, None, :].bool()
    if inputs.get("decoder_attention_mask") is None:
        changed["decoder_attention_mask"] = _causal(ids)
    return changed


def _causal(ids: Tensor) -> Tensor:
    length = ids.shape[1]
    return as_causal(torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).tril_())
