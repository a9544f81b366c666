"""The bounds of each tier: bytes that lean layers save and work that they do, over PEFT's defaults.

One encoder and one decoder layer of M2M-100's size, bf16, LoRA of rank 16 on q and v. Bytes are those of the storages
that live after the forward pass only because of it. Work is that of the matrix products outside of attention.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration

import petl_kernels as pk
from petl_kernels.accounting.live import Born
from petl_kernels.accounting.saved import saved_bytes
from petl_kernels.accounting.work import linear_flops

D, FFN, HEADS = 1024, 4096, 16
ROWS, LENGTH = 2, 32
TOKENS = ROWS * LENGTH
REPEAT = pytest.mark.repeat


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=64,
        d_model=D,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN,
        max_position_embeddings=LENGTH,
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    )
    return M2M100ForConditionalGeneration(config).to(torch.bfloat16).eval()


class Layers(torch.nn.Module):
    """The two layers alone: source and target (rows, length, d) to the decoder layer's output."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        (self.encoder,), (self.decoder,) = model.model.encoder.layers, model.model.decoder.layers

    def forward(self, source, target):
        memory = self.encoder(source, None)
        return self.decoder(target, None, memory)


def inputs(rows: int = ROWS) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, LENGTH, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]


def kept(layers: Layers, rows: int = ROWS) -> float:
    """Returns the bytes a token of source and target and a layer, the layers' inputs among them."""
    given = inputs(rows)
    with Born() as born:
        output = layers(*given)
    bytes_kept = born.alive() - output.untyped_storage().nbytes()
    return (bytes_kept + sum(tensor.untyped_storage().nbytes() for tensor in given)) / (2 * rows * LENGTH)


def flops(layers: Layers) -> int:
    """Returns the work of the products outside of attention, in fp32, which a CPU does 40 times as fast."""
    given = [tensor.detach().float().requires_grad_() for tensor in inputs()]
    return linear_flops(lambda: layers.float()(*given).sum().backward())


def lora(base, tier: int) -> Layers:
    model = pk.adapt(copy.deepcopy(base), pk.LoRA(rank=16))
    return Layers(pk.lean(model, tier).train())


@pytest.fixture(scope="module")
def peft_defaults(base):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), config).train()
    layers = Layers(model.base_model.model)
    return kept(layers), flops(layers)


@pytest.mark.parametrize(
    ("tier", "share", "work"),
    [pytest.param(1, 0.48, 0.0, marks=REPEAT), (2, 0.24, 0.17), pytest.param(3, 0.17, 0.22, marks=REPEAT)],
)
def test_lora_against_peft(base, peft_defaults, tier, share, work):
    layers, (their_bytes, their_flops) = lora(base, tier), peft_defaults
    assert kept(layers) <= share * their_bytes
    # 12 d² weights in the encoder layer, 16 d² in the decoder layer; 2 FLOPs each in forward, 2 in the gradient
    linear = 4 * 28 * D * D * TOKENS
    more = (flops(layers) - their_flops) / linear
    assert work - 0.02 < more <= work + 1e-4  # the bound is near: nothing is skipped by accident


@pytest.mark.parametrize(("tier", "allowed"), [(1, 12_960), (2, 6_850), (3, 4_800), (4, 2_048)])
def test_encoder_layer(base, tier, allowed):
    layers = lora(base, tier)
    x = torch.randn(ROWS, LENGTH, D, dtype=torch.bfloat16, requires_grad=True)
    with Born() as born:
        y = layers.encoder(x, None)
    bytes_kept = born.alive() - y.untyped_storage().nbytes() + x.untyped_storage().nbytes()
    assert bytes_kept / TOKENS <= allowed + 8 / TOKENS * 16  # a few seeds, whatever the batch


def test_tier_4_keeps_the_inputs(base):
    assert kept(lora(base, 4)) <= (3 * 2 * D) / 2 + 50  # source, its encoding, target; nothing else


def test_tier_5_keeps_the_encoding(base):
    host = 2 * 2 * D  # the layers' inputs, which on the CPU are copied to where everything is
    given = 2 * 2 * D  # the inputs themselves, which the test holds
    assert kept(lora(base, 5)) <= (given + host + 2 * D) / 2 + 50


@pytest.mark.parametrize("tier", [1, 2, 3, 4])
def test_saved_bytes_sees_what_lean_layers_keep(base, tier):
    layers = lora(base, tier)
    source, target = (torch.randn(ROWS, LENGTH, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with Born() as born, saved_bytes(exclude=[*layers.parameters(), source, target]) as saved:
        output = layers(source, target)
    counted = saved.bytes
    saved._alive.clear()
    alive = born.alive() - output.untyped_storage().nbytes()
    assert counted == pytest.approx(alive, rel=0.01)


def test_the_encoding_is_kept_once_under_autocast(base):
    """A second decoder layer that reads the source saves no copy of it, in either dtype."""
    model = pk.lean(pk.adapt(copy.deepcopy(base).float(), pk.LoRA(rank=16)), 4).train()
    decoder = model.model.decoder.layers[0]
    target = torch.randn(ROWS, LENGTH, D, requires_grad=True)

    def bytes_kept(layers: int, source_length: int) -> int:
        memory = torch.randn(ROWS, source_length, D, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), Born() as born:
            outputs = [decoder(target, None, memory) for _ in range(layers)]
        kept = born.alive()
        del outputs
        return kept

    once = bytes_kept(1, 2 * LENGTH) - bytes_kept(1, LENGTH)
    assert once == pytest.approx(TOKENS * 2 * D, rel=0.01)  # in bf16
    assert bytes_kept(3, 2 * LENGTH) - bytes_kept(3, LENGTH) == pytest.approx(once, rel=0.01)


BESIDE_LORA = {
    "bitfit": (pk.BitFit, 100),
    "dora": (lambda: pk.LoRA(rank=16, dora=True), 0),
    "prefix": (lambda: pk.PrefixTuning(length=4), 100),
    "layer": (lambda: pk.Adapter(bottleneck=64), 2150),
    "ssf": (pk.SSF, 5_030),
    "sublayer": (lambda: pk.Adapter(bottleneck=64, placement="sublayer"), 2200),
}


@pytest.mark.parametrize(
    "method", [name if name == "ssf" else pytest.param(name, marks=pytest.mark.slow) for name in BESIDE_LORA]
)
def test_other_methods_against_lora(base, method):
    """Bytes a token and layer over LoRA's tier 2: the slope over two batches, since prefixes save some for no token."""
    make, allowed = BESIDE_LORA[method]
    layers = Layers(pk.lean(pk.adapt(copy.deepcopy(base), make()), 2).train())

    def slope(of: Layers) -> float:
        return 2 * kept(of, 2) - kept(of, 1)

    assert slope(layers) - slope(lora(base, 2)) <= allowed
