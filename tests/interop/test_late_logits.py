"""Logits without values: read in every way they are the model's, and nobody pays who does not read them."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from petl_kernels.layers.loss.late_logits import LateLogits
from petl_kernels.layers.loss.lean_loss import lean_loss

from .loss_models import WORDS, assert_same_gradients, gradients, labelled, tiny

MBART, T5GEMMA = "MBartForConditionalGeneration", "T5GemmaForConditionalGeneration"


@pytest.fixture(scope="module", params=[MBART, T5GEMMA])
def models(request):
    return lean_loss(tiny(request.param)), tiny(request.param)


class Wide(TorchDispatchMode):
    """Notes which operators make tensors as wide as the vocabulary, of more than one row."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[-1] == WORDS:
                self.made.append(function)
        return result


def saved(output) -> object:
    file = io.BytesIO()
    torch.save(output, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "index": lambda output: output[1],
    "slice": lambda output: output[:2][1],
    "last of a slice": lambda output: output[1 - len(output) :][0],
    "name": lambda output: output["logits"],
    "attribute": lambda output: output.logits,
    "get": lambda output: output.get("logits"),
    "tuple": lambda output: output.to_tuple()[1],
    "values": lambda output: list(output.values())[1],
    "items": lambda output: dict(output.items())["logits"],
    "iteration": lambda output: output[list(output)[1]],
    "dict": lambda output: dict(output)["logits"],
    "pytree": lambda output: pytree.tree_leaves(output)[1],
    "pytree map": lambda output: pytree.tree_map(lambda each: each * 1, output).logits,
    "copy": lambda output: copy.copy(output).logits,
    "pickle": lambda output: pickle.loads(pickle.dumps(output)).logits,
    "deepcopy": lambda output: copy.deepcopy(output).logits,
    "file": lambda output: saved(output).logits,
    "numpy": lambda output: torch.from_numpy(output.logits.numpy()),
    "asarray": lambda output: torch.from_numpy(np.asarray(output.logits)),
    "list": lambda output: torch.tensor(output.logits.tolist(), dtype=torch.float64),
    "rows": lambda output: torch.stack(list(output.logits)),
    "cat": lambda output: torch.cat([output.logits]),
    "out": lambda output: torch.add(output.logits, 0, out=torch.empty(2, 4, WORDS, dtype=torch.float64)),
    "cpu": lambda output: output.logits.cpu(),
    "copy_": lambda output: torch.empty(2, 4, WORDS, dtype=torch.float64).copy_(output.logits),
    "C++": lambda output: in_cpp(torch.cat, [output.logits, output.logits])[:2],
    "in place": lambda output: output.logits.mul_(2) / 2,
    "assignment": lambda output: assigned(output.logits),
    "vmap": lambda output: torch.vmap(lambda row: row * 1)(output.logits),
}


def in_cpp(function, *args):
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args)


def assigned(logits):
    whole = logits.clone()
    logits[:, 0] = 0
    assert not logits[:, 0].any() and logits[:, 1].any()
    logits[:, 0] = whole[:, 0]
    return logits


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_looking(models, way):
    with torch.no_grad():
        found, expected = (WAYS[way](model(**labelled())) for model in models)
    assert torch.equal(found, expected)
    assert type(found) is torch.Tensor or torch.equal(found + 0, expected)


def test_questions_that_need_no_values(models):
    lean, plain = (model(**labelled()) for model in models)
    with Wide() as wide:
        assert "logits" in lean and len(lean) == len(plain) and list(lean.keys()) == list(plain.keys())
        for ask in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "is_cuda", "itemsize", "nbytes"):
            assert getattr(lean.logits, ask) == getattr(plain.logits, ask), ask
        assert lean.logits.size(-1) == WORDS and len(lean.logits) == 2 and lean.logits.numel() == plain.logits.numel()
        assert isinstance(lean.logits, torch.Tensor) and {lean.logits: 1}[lean.logits] == 1
    assert wide.made == [] and "tensor(" in repr(lean.logits)


def test_the_output_is_of_the_models_class(models):
    lean, plain = (model(**labelled()) for model in models)
    assert type(lean) is type(plain)


# ---- gradients -------------------------------------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    """Hands its input on without any of Python's functions, and half of the gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


LOSSES = {
    "cross-entropy": lambda output: F.cross_entropy(output.logits.view(-1, WORDS), labelled()["labels"].flatten()),
    "both": lambda output: output.loss + output[1].square().mean(),
    "a function": lambda output: Squares.apply(output.logits),
    "functions": lambda output: Squares.apply(Halved.apply(output.logits)) + Halved.apply(output.logits).sum(),
    "float": lambda output: output.logits.float().double().square().sum(),
    "twice": lambda output: output.logits.sum() + (output.logits * output.logits.detach()).sum(),
    "in place": lambda output: (output.logits.mul_(3) * output.logits).sum(),
    "after no_grad": lambda output: looked_at(output).square().sum(),
}


def looked_at(output):
    with torch.no_grad():
        output.logits.argmax(-1)
    return output.logits


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_flow_through_them(models, loss):
    lean, plain = models
    found, expected = (LOSSES[loss](model(**labelled())) for model in models)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(gradients(lean, found), gradients(plain, expected))


def test_hooks_and_retained_gradients(models):
    seen = []
    for model in models:
        output = model(**labelled())
        output.logits.retain_grad()
        output.logits.register_hook(lambda gradient: seen.append(gradient.shape))
        output.logits.square().sum().backward()
        seen.append(output.logits.grad.sum().item())
    assert seen[0] == seen[2] == (2, 4, WORDS) and seen[1] == pytest.approx(seen[3], rel=1e-12)


def test_inference_and_autocast(models):
    lean, plain = (copy.deepcopy(model).float() for model in models)
    with torch.inference_mode():
        outputs = [model(**labelled()) for model in (lean, plain)]
    assert torch.equal(outputs[0].logits + 0, outputs[1].logits)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model(**labelled()) for model in (lean, plain)]
    assert outputs[0].logits.dtype == outputs[1].logits.dtype == (outputs[0].logits + 0).dtype
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    found, expected = lean(**labelled()).logits, plain(**labelled()).logits
    with torch.inference_mode():
        found.argmax(-1)
    assert_same_gradients(gradients(lean, found.sum()), gradients(plain, expected.sum()))


# ---- changed in between ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weight", "bias", "other memory"])
def test_logits_of_changed_weights_are_refused(what):
    model = lean_loss(tiny(MBART))
    output, read = model(**labelled()), model(**labelled())
    before = read.logits + 0
    with torch.no_grad():
        if what == "weight":
            model.lm_head.weight[3] += 1
        elif what == "bias":
            model.final_logits_bias[0, 3] += 1
        else:
            model.lm_head.weight.data = model.lm_head.weight.data * 2
    name = "bias" if what == "bias" else "weight"
    message = f"the {name} of the output projection changed since the forward pass; expected logits to be read before"
    with pytest.raises(RuntimeError, match=message):
        output.logits + 0
    assert torch.equal(read.logits, before)


# ---- nobody pays who does not read -----------------------------------------------------------------------------------


def test_a_training_step_makes_none(models):
    lean, plain = models
    for model, expected in ((lean, False), (plain, True)):
        with Wide() as wide:
            output = model(**labelled())
            output["loss"].backward()
        assert bool(wide.made) == expected
    assert isinstance(output.logits, torch.Tensor)


def test_what_wraps_a_model_makes_none(models):
    """Mixed precision converts all outputs to fp32, DistributedDataParallel clones them."""
    operations = pytest.importorskip("accelerate.utils.operations")
    lean, plain = (copy.deepcopy(model).bfloat16() for model in models)
    converted = []
    with Wide() as wide:
        for model in (lean, plain):
            output = operations.convert_outputs_to_fp32(model.forward)(**labelled())
            converted.append(pytree.tree_map_only(torch.Tensor, Halved.apply, output))
            if model is lean:
                output.loss.backward()
                assert wide.made == []
    assert converted[0].logits.dtype == converted[1].logits.dtype == torch.float32
    assert torch.equal(converted[0].logits, converted[1].logits)


def test_gathering_and_collectives(models):
    operations = pytest.importorskip("accelerate.utils.operations")
    lean, plain = (model(**labelled()) for model in models)
    for apply in (
        lambda output: operations.pad_across_processes(output.logits, dim=1),
        lambda output: operations.gather(output.logits),
        lambda output: operations.recursively_apply(lambda tensor: tensor.detach() * 1, dict(output))["logits"],
        lambda output: operations.concatenate([output.logits, output.logits]),
        lambda output: operations.send_to_device(output, "cpu")["logits"],
    ):
        torch.testing.assert_close(apply(lean), apply(plain))


# ---- Hugging Face's Trainer ------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = labelled(4)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.rows.items()}


def trainer(model: nn.Module, path, **settings):
    from transformers import Trainer, TrainingArguments

    seen = []
    own = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    arguments = TrainingArguments(str(path), **own, per_device_train_batch_size=2, max_steps=2, **settings)
    found = Trainer(
        model,
        arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )
    found.seen = seen
    return found


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_the_trainer(tmp_path, settings):
    name = "M2M100ForConditionalGeneration"
    losses, predictions = [], []
    for make in (lean_loss, lambda model: model):
        run = trainer(make(tiny(name).float()), tmp_path, **settings)
        wide = Wide()
        step = run.training_step

        def counted(*args, step=step, wide=wide, **kwargs):
            with wide:
                return step(*args, **kwargs)

        run.training_step = counted
        run.train()
        assert bool(wide.made) != isinstance(run.model(**labelled()).logits, LateLogits)
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        run.evaluate()
        (seen,) = run.seen
        predictions.append(seen[0] if isinstance(seen, tuple) else seen)
        losses.append(run.evaluate()["eval_loss"])
    tolerance = 2e-2 if settings.get("bf16") else 1e-5
    np.testing.assert_allclose(losses[0], losses[2], rtol=tolerance)
    np.testing.assert_allclose(losses[1], losses[3], rtol=tolerance)
    assert predictions[0].shape == predictions[1].shape == (4, 4, WORDS)
    np.testing.assert_allclose(predictions[0], predictions[1], rtol=tolerance, atol=tolerance)
