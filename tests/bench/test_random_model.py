"""Models with random weights: made once, shared by those that train beside them, and written as checkpoints."""

from __future__ import annotations

import pytest
import torch
from transformers import M2M100ForConditionalGeneration

import petl_kernels as pk
from bench.random_model import frozen_model, random_weights, write_checkpoint
from bench.shapes import m2m_config
from petl_kernels.interop.hf import load_weights, skeleton

CONFIG = m2m_config(2, 32, 64, 2, 200)


@pytest.fixture
def weights():
    return random_weights(CONFIG, "cpu")


def test_models_share_their_frozen_weights_and_nothing_else(weights):
    ours, plain = (frozen_model(CONFIG, weights) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in weights.items()}
    pk.lean(pk.adapt(ours, pk.LoRA(rank=2)), 1)
    ids = torch.randint(4, 200, (2, 5))
    loss = ours.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    parameters = pk.trainable_parameters(ours)
    loss.backward()
    torch.optim.SGD(parameters, 1.0).step()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert not any(".lora" in name or parameter.requires_grad for name, parameter in plain.named_parameters())
    assert plain.lm_head.weight is plain.model.shared.weight is plain.model.encoder.embed_tokens.weight
    assert plain.model.shared.weight.data_ptr() == ours.model.shared.weight.data_ptr()


def test_all_of_it_is_in_the_weights_dtype(weights):
    """Positions are a buffer: in fp32 they would make all that follows fp32."""
    model = frozen_model(CONFIG, weights)
    assert {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()} == {torch.bfloat16}
    assert model.model.encoder(input_ids=torch.ones(1, 3, dtype=torch.long)).last_hidden_state.dtype == torch.bfloat16


def test_a_checkpoint_has_the_same_weights(weights, tmp_path):
    write_checkpoint(CONFIG, tmp_path)
    models = [load_weights(tmp_path, skeleton(CONFIG), lambda name, tensor: tensor)]
    models.append(M2M100ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16))
    for model in models:
        assert {name for name, _ in model.named_parameters()} == set(weights)
        assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    matrix = weights["model.shared.weight"].float()
    assert 0.019 < matrix.std() < 0.021 and not torch.equal(matrix[0], matrix[1])
