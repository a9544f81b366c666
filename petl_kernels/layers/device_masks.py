"""Attention masks that the host does not look into.

transformers asks the device three times a step whether a mask hides anything, and waits for the answer. A mask of four
dimensions it takes as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petl_kernels.layers.blocks import as_causal
from petl_kernels.models.transformers_names import attention_implementation, cache_in

WAITED_FOR = ("cuda",)  # on a CPU the answer is there at once, and a mask that hides nothing is best left out


def without_waiting(model: nn.Module, inputs: dict) -> dict:
    """``inputs`` of a training step with masks (rows, 1, 1 | target, source | target), bool, in the place of 2-D ones.

    As they are: those for attentions other than sdpa's, masks of the decoder that somebody has given, and all of them
    under ``torch.compile``.
    """
    ids = inputs.get("decoder_input_ids")
    if ids is None and inputs.get("decoder_inputs_embeds") is None:
        ids = inputs.get("labels")  # which the model makes them of
    if ids is None or ids.device.type not in WAITED_FOR or torch.compiler.is_compiling():
        return inputs
    if cache_in(inputs) is not None:  # which makes the decoder's masks longer
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
