"""Streamed layers compute what the same layers in memory do, bit for bit, and hold what they promise."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
from layers.lean_cases import adapted, ragged, step
from methods.models import batch, build
from safetensors.torch import load_file, save_file
from torch import nn

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.layers import border
from petl_kernels.methods.owner import owner
from petl_kernels.methods.state import adapter_state
from petl_kernels.models.structure import describe
from petl_kernels.ops.quantized import quantize
from petl_kernels.weights import streamed as stream
from petl_kernels.weights.mapped import FILE, mapped_weights
from petl_kernels.weights.slots import Slots
from petl_kernels.weights.streamed import copies_hide, stream_layers, unstream

_C = pytest.importorskip("petl_kernels._C")
TIERS = (0, 1, 2, 3, 4, 5)
METHODS = ("lora", "dora", "adapter", "prefix", "bitfit")


class Copies:
    """``SlotCopies`` on the CPU: slots are plain memory, and a copy is made at the last moment that is allowed."""

    def __init__(self, most: int = 1 << 40):
        self.left, self.filled, self.waiting = most, [], {}

    def pinned(self, size: int) -> torch.Tensor:
        if size > self.left:
            raise RuntimeError("out of memory")
        self.left -= size
        return torch.empty(size, dtype=torch.uint8)

    def open(self, slots: list[int]) -> None:
        self.slots, self.in_use = slots, dict.fromkeys(range(len(slots)), True)

    def fill(self, slot: int, pieces: list[tuple[int, int, int]]) -> None:
        assert not self.in_use[slot], "a slot is overwritten before its release"
        self.waiting[slot] = pieces
        for _, offset, size in pieces:
            ctypes.memset(self.slots[slot] + offset, 0xFF, size)  # NaN until the copy has arrived
        self.filled.append(slot)

    def acquire(self, slot: int) -> None:
        self.in_use[slot] = True
        for host, offset, size in self.waiting.pop(slot, ()):
            ctypes.memmove(self.slots[slot] + offset, host, size)

    def release(self, slot: int) -> None:
        self.in_use[slot] = False


@pytest.fixture(params=["file", "slots"])
def streamed(request, monkeypatch, tmp_path):
    """stream_layers through a mapped file, and through slots as on CUDA."""

    def run(model: nn.Module, slots: int = 2, **options):
        if request.param == "slots":
            monkeypatch.setattr(
                stream, "_store", lambda weights, slots, device, *_: Slots(weights, slots, device, Copies())
            )
        return stream_layers(model, slots=slots, folder=tmp_path, **options)

    run.kind = request.param
    return run


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["m2m100", pytest.param("marian", marks=pytest.mark.slow), "t5"])
def test_loss_and_gradients_are_those_of_the_model_in_memory(family, method, streamed):
    plain = adapted(family, method, dtype=torch.float32)
    other = copy.deepcopy(plain)
    streamed(other)
    inputs = ragged(plain)
    for tier in TIERS:
        pk.lean(plain, tier), pk.lean(other, tier)
        assert_same(step(other, inputs), step(plain, inputs))


@pytest.mark.parametrize("slots", [2, 3, 9])
def test_two_steps_accumulation_and_generation_between(slots, streamed):
    plain = pk.lean(adapted("m2m100", "lora", dtype=torch.float32), [1, 2, 3, 5])
    other = copy.deepcopy(plain)
    streamed(other, slots)
    assert_same(*(_run(model) for model in (other, plain)))


def _run(model: nn.Module) -> dict[str, torch.Tensor]:
    inputs = ragged(model, rows=4)
    optimizer = torch.optim.SGD(pk.trainable_parameters(model), lr=0.1)
    found = {}
    for k in range(2):
        optimizer.zero_grad()
        for rows in (slice(0, 1), slice(1, 4)):
            part = {name: value[rows] for name, value in inputs.items()}
            model(**part, reduction="sum").loss.backward()
        optimizer.step()
        model.eval()
        source = {key: value for key, value in batch(model).items() if key != "decoder_input_ids"}
        found[f"generated {k}"] = model.generate(**source, num_beams=2, max_new_tokens=6)
        with torch.no_grad():
            found[f"loss {k}"] = model(**inputs).loss
        model.train()
    return found | dict(adapter_state(model, "default"))


def test_backward_twice_and_checkpointing_of_transformers(streamed):
    plain = adapted("m2m100", "lora", dtype=torch.float32)
    other = copy.deepcopy(plain)
    streamed(other)
    inputs = ragged(plain)
    for model in (plain, other):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward(retain_graph=True)
        loss.backward()
    for one, two in zip(pk.trainable_parameters(other), pk.trainable_parameters(plain), strict=True):
        assert torch.equal(one.grad, two.grad)
    for model in (plain, other):
        model.gradient_checkpointing_enable()
    assert_same(step(other, inputs), step(plain, inputs))


def test_autocast_and_inference_mode(streamed):
    plain = pk.lean(adapted("t5", "lora", dtype=torch.float32), 2)
    other = copy.deepcopy(plain)
    streamed(other)
    inputs = ragged(plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(other, inputs), step(plain, inputs))
    with torch.inference_mode():
        assert torch.equal(other(**inputs).loss, plain(**inputs).loss)
    assert_same(step(other, inputs), step(plain, inputs))


def test_merging_and_other_adapters(tmp_path):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    pk.adapt(model, pk.Adapter(bottleneck=4), name="other")
    pk.use_adapter(model, "default")
    inputs = ragged(model)

    def run() -> dict:
        found = step(model, inputs)
        pk.use_adapter(model, "other")
        found |= {f"other {name}": value for name, value in step(model, inputs).items()}
        pk.use_adapter(model, "default")
        pk.merge(model)
        found["merged"] = model(**inputs).loss.detach()
        pk.unmerge(model)
        return found

    expected = run()
    stream_layers(model, folder=tmp_path)
    assert_same(run(), expected)


@pytest.mark.parametrize("kind", ["file", "slots"])
def test_a_store_leaves_weights_where_they_are_until_it_takes_them(kind, tmp_path):
    weights = [{name: torch.randn(8)} for name in "ab"]
    values = {name: tensor.clone() for own in weights for name, tensor in own.items()}
    places = [tensor.data_ptr() for own in weights for tensor in own.values()]
    if kind == "file":
        store = mapped_weights(weights, tmp_path, (), unread=False)
    else:
        store = Slots(weights, 2, torch.device("cpu"), Copies())
    assert places == [tensor.data_ptr() for own in weights for tensor in own.values()]
    store.take()
    for i, own in enumerate(weights):
        store.use(i, [])
        for name, tensor in own.items():
            assert tensor.data_ptr() not in places and torch.equal(tensor, values[name])


def test_bf16_and_some_layers_only(streamed):
    plain = pk.lean(adapted("t5", "adapter", dtype=torch.float32).to(torch.bfloat16), 2)
    other = copy.deepcopy(plain)
    paths = [layer.path for layer in describe(other).layers]
    found = streamed(other, layers=[paths[3], paths[0]])
    assert found.paths == [paths[0], paths[3]]
    assert_same(step(other, ragged(plain)), step(plain, ragged(plain)))


def test_each_layer_travels_once_a_pass():
    """Forward and backward over 4 layers in 2 slots: 4 copies there, 2 back (the last two layers are still in)."""
    model, copies = adapted("m2m100", "lora", dtype=torch.float32), Copies()
    store = stream._store
    stream._store = lambda weights, slots, device, *_: Slots(weights, slots, device, copies)
    try:
        stream_layers(model)
    finally:
        stream._store = store
    for expected in (6, 10):
        step(model, ragged(model))
        assert len(copies.filled) == expected  # layers 0 and 1 are in when the next step starts


def test_state_dict_has_the_weights_and_unstream_puts_them_back(streamed, tmp_path):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = ragged(model)
    before = step(model, inputs)
    streamed(model)
    step(model, inputs)
    assert_same(model.state_dict(), expected)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert_same(saved, {name: expected[name] for name in saved})
    assert sum("layers" in name for name in saved) == 16 * 2 + 26 * 2
    with pytest.raises(InputError, match="streamed, so no state dict can be loaded into it"):
        model.load_state_dict(expected)
    with pytest.raises(InputError, match="unstream it before it is copied"):
        copy.deepcopy(model)
    with pytest.raises(InputError, match="the model is streamed already"):
        streamed(model)
    assert unstream(model) is model
    (tmp_path / FILE).unlink(missing_ok=True)
    assert_same(step(model, inputs), before)
    model.load_state_dict(expected)
    assert not any(layer._forward_hooks for layer in model.model.encoder.layers)
    with pytest.raises(InputError, match="not streamed"):
        unstream(model)


def test_trained_weights_norms_and_biases_stay(streamed):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    trained = model.model.encoder.layers[0].fc1.weight.requires_grad_()
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    found = streamed(model)
    for own in found._weights:
        assert all(name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) for name in own)
        for name in own:
            del addresses[name]
    assert all(model.get_parameter(name).data_ptr() == address for name, address in addresses.items())
    assert any(model.get_parameter(name) is trained for name in addresses)
    assert found.bytes < sum(p.nbytes for p in model.parameters()) and found.layer_bytes <= found.bytes / 4 * 2


def test_a_weight_that_is_changed_while_streamed_is_noticed(streamed):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    streamed(model)
    step(model, ragged(model))
    weight = model.model.encoder.layers[0].fc1.weight  # one of the two that are in
    with torch.no_grad():
        weight.add_(1)
    changed = weight.detach().clone()
    with pytest.raises(InputError, match=r"encoder.layers.0.fc1.weight: changed in place while it is streamed"):
        step(model, ragged(model))
    if streamed.kind == "file":
        assert torch.equal(unstream(model).model.encoder.layers[0].fc1.weight, changed)


def test_reading_what_is_out_of_the_device_says_so(monkeypatch):
    monkeypatch.setattr(stream, "_store", lambda weights, slots, device, *_: Slots(weights, slots, device, Copies()))
    model = adapted("m2m100", "lora", dtype=torch.float32)
    stream_layers(model)
    with pytest.raises(RuntimeError, match="encoder.layers.1.fc1.weight: streamed, and read outside of its layer"):
        model.model.encoder.layers[1].fc1.weight.sum()


def test_a_parameter_of_several_plain_tensors(streamed):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    held = []
    for layer in model.model.encoder.layers:
        layer.fc1.weight = nn.Parameter(quantize(torch.randn(57, 31), "int8"), requires_grad=False)
        held += layer.fc1.weight.parts()  # an odd number of bytes
    expected = [tensor.clone() for tensor in held]
    found = streamed(model, layers=["model.encoder.layers.0", "model.encoder.layers.1"])
    assert {f"model.encoder.layers.0.fc1.weight.{k}" for k in (0, 1)} < set(found._weights[0])
    found._use(0, backward=False)
    found._use(1, backward=False)
    assert all(torch.equal(one, two) for one, two in zip(held, expected, strict=True))
    unstream(model)
    assert all(torch.equal(one, two) for one, two in zip(held, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(_C, "SlotRing"), reason="the extension was built without CUDA")
@pytest.mark.parametrize("slots", [2, 3])
def test_on_a_card(slots, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(border, "DEVICES", set())  # q, k and v that stay would be one product, rounded otherwise
    sizes = {"d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    plain = adapted("m2m100", "lora", dtype=torch.float32, **sizes)
    other = copy.deepcopy(plain)
    inputs = {name: value.cuda() for name, value in ragged(plain, rows=64).items()}
    plain.cuda()
    streamed = stream_layers(other, slots=slots, device="cuda")
    other.cuda()
    assert streamed.resident_bytes() < streamed.bytes
    for tier in TIERS:
        pk.lean(plain, tier), pk.lean(other, tier)
        for _ in range(2):
            assert_same(step(other, inputs), step(plain, inputs))
    assert_same({name: value.cuda() for name, value in other.state_dict().items()}, plain.state_dict())
    unstream(other)
    assert_same(step(other, inputs), step(plain, inputs))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_checkpoints_own_files(tmp_path):
    model = build("m2m100")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    pk.adapt(model, pk.LoRA(rank=2))
    before = step(model, ragged(model))
    stream_layers(model, files=files)
    assert_same(step(model, ragged(model)), before)
    assert not list(tmp_path.glob(FILE))


def test_weights_that_were_never_loaded(tmp_path, streamed):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    expected = step(model, ragged(model))
    model.save_pretrained(tmp_path)
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
    found = streamed(model, files=[tmp_path / "model.safetensors"])
    if streamed.kind == "file":
        assert found.resident_bytes() == 0
    assert_same(step(model, ragged(model)), expected)
    assert_same(step(unstream(model), ragged(model)), expected)


def test_the_file_is_written_once(tmp_path):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    stream_layers(model, folder=tmp_path / "new")
    path = tmp_path / "new" / FILE
    written = path.stat().st_mtime_ns, path.stat().st_ino
    assert_same(load_file(path), {name: model.state_dict()[name] for name in load_file(path)})
    unstream(model)
    stream_layers(model, folder=tmp_path / "new")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written
    unstream(model)
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight.add_(1)
    changed = model.model.encoder.layers[0].fc1.weight.clone()
    stream_layers(model, folder=tmp_path / "new")
    assert path.stat().st_ino != written[1]
    assert torch.equal(model.model.encoder.layers[0].fc1.weight, changed)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("model.encoder.layers.0.fc1.weight"), "is not there, so it is another model's"),
        (lambda t: t.update({"model.encoder.layers.0.fc1.weight": torch.ones(3, 2)}), r"F32 \(3, 2\), expected F32 \("),
        (
            lambda t: t.update({"model.encoder.layers.0.fc1.weight": t["model.encoder.layers.0.fc1.weight"].half()}),
            r"is F16 \(56, 32\), expected F32 \(56, 32\) as the model has it",
        ),
        (lambda t: t["model.encoder.layers.0.fc1.weight"].add_(1), "has other values than the model's"),
    ],
)
def test_files_of_another_model_are_refused(tmp_path, damage, message):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    before = step(model, ragged(model))
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if "layers." in n}
    damage(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=message) as error:
        stream_layers(model, files=[tmp_path / "other.safetensors"])
    assert "\n" not in str(error.value)
    assert_same(step(model, ragged(model)), before)


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x10" + b"\0" * 7 + b'{"a": 3}' + b" " * 8, b"\xff" * 40])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="is damaged or no safetensors file"):
        stream_layers(adapted("m2m100", "lora"), files=[tmp_path / "a.safetensors"])


def test_wrong_input(tmp_path):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    for arguments, message in (
        ({"slots": 1}, "slots 1: expected a whole number of at least 2"),
        ({"slots": 2.5}, "slots 2.5: expected"),
        ({"layers": ["model.encoder.layers.7"]}, "layer 'model.encoder.layers.7': not one of the model's 4, such as"),
        ({"layers": []}, r"layers \[\]: expected at least one"),
        ({}, "expected the checkpoint's safetensors files, or a folder"),
        ({"files": [tmp_path / "none"]}, "none cannot be read: No such file"),
        ({"device": "meta"}, "device 'meta', expected the CPU, or CUDA"),
    ):
        with pytest.raises(InputError, match=message) as error:
            stream_layers(model, **arguments)
        assert "\n" not in str(error.value)
    assert owner(model).streamed is None
    with pytest.raises(InputError, match="on the meta device; expected the checkpoint's files, or load it"):
        stream_layers(copy.deepcopy(model).to("meta"), folder=tmp_path)
    half = copy.deepcopy(model)
    half.model.decoder.to("meta")
    with pytest.raises(InputError, match="the layers are on cpu, meta; expected one device"):
        stream_layers(half, folder=tmp_path)
    full = adapted("m2m100", "full")
    with pytest.raises(InputError, match="layer 'model.encoder.layers.0': no frozen weight in it"):
        stream_layers(full, folder=tmp_path)


def test_too_little_pinned_memory_leaves_the_model_as_it_was(monkeypatch):
    model = adapted("m2m100", "lora", dtype=torch.float32)
    before = step(model, ragged(model))
    monkeypatch.setattr(
        stream, "_store", lambda weights, slots, device, *_: Slots(weights, slots, device, Copies(60_000))
    )
    with pytest.raises(InputError, match=r"\d KiB of pinned host memory cannot be had \(out of memory\); expected"):
        stream_layers(model)
    assert_same(step(model, ragged(model)), before)


# ---- bounds ----------------------------------------------------------------------------------------------------------

LARGE_PAGE = 2 << 20


@pytest.mark.parametrize("slots", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_resident_set_is_bounded_by_the_slots(slots, tmp_path, monkeypatch):
    model = build("m2m100", d_model=512, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=2048, decoder_ffn_dim=2048)
    pk.lean(pk.adapt(model, pk.LoRA(rank=2)), 2).train()
    streamed = stream_layers(model, slots=slots, folder=tmp_path)
    assert streamed.bytes > 150e6 and streamed.layer_bytes < 17e6
    bound = slots * streamed.layer_bytes + 2 * LARGE_PAGE

    def most() -> int:
        found, counting = (
            [],
            [
                module.register_forward_hook(lambda *_: found.append(streamed.resident_bytes()))
                for path in streamed.paths
                for module in [model.get_submodule(path)]
            ],
        )
        use = streamed._use

        def counted(*args, **options):
            found.append(streamed.resident_bytes())  # before the pages of the layer before are given back
            use(*args, **options)

        streamed._use = counted
        step(model, ragged(model))
        for handle in counting:
            handle.remove()
        del streamed._use
        assert len(found) == 12 + 2 * 12
        return max(found)

    assert streamed.layer_bytes <= most() <= bound
    monkeypatch.setattr(streamed._store, "use", lambda *_: None)
    assert most() > 2 * bound


def test_when_copies_hide():
    # 2 bytes and 2 operations a weight: at 4,096 tokens a card with 100 TFLOP/s hides copies at 25 GB/s, just
    weights = 12 * 1024**2
    assert copies_hide(2 * weights, 4096, 2 * weights, 25e9, 100e12)
    assert not copies_hide(2 * weights, 3999, 2 * weights, 25e9, 100e12)
    assert copies_hide(weights // 2, 1024, 2 * weights, 25e9, 100e12)
