"""Checkpoints: the trained tensors, the optimiser, the generators and the position in the data.

checkpoints/step-N/ holds trained.safetensors (the trained tensors only: a frozen base is not copied),
optimizer.safetensors, random.safetensors and progress.json; no file that could run code when it is read. checksums.json
has the size and SHA-256 of each, so that a damaged one is found before it is used. `latest` and `best` are links to
such folders. Learning rates and the order of the data follow from the step, the epoch and the configuration.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_dir

from ..checks import file_sum

MEMBERS = ("trained.safetensors", "optimizer.safetensors", "random.safetensors", "progress.json")
SUMS = "checksums.json"
TABLES = ("qmap1", "qmap2")  # bitsandbytes' values for 8 bits, which are the same for all parameters


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the trained parameters by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


class Checkpoints:
    """The checkpoints/ folder of a run, with the checkpoints that `latest` and `best` point at."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], best: bool) -> Path:
        """Writes step-N whole, then moves the links: an interruption at any moment leaves the older one usable."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{progress['step']}"
        with atomic_dir(path) as temporary:
            save_file(
                {k: t.contiguous().cpu() for k, t in trained_tensors(model).items()}, temporary / "trained.safetensors"
            )
            save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
            save_file(_generators(), temporary / "random.safetensors")
            (temporary / "progress.json").write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")
            sums = {name: file_sum(temporary / name) for name in MEMBERS}
            (temporary / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
        if best:
            self._link("best", path.name)
        self._link("latest", path.name)
        self._prune()
        return path

    def path(self, which: str) -> Path | None:
        """Returns the folder that ``latest`` or ``best`` points at, or None."""
        path = self.folder / which
        return path.resolve() if path.exists() else None

    def whole(self, *links: str) -> tuple[Path | None, list[str]]:
        """Returns (the first whole checkpoint, lines on damaged ones before it): of ``links``, then the newest.

        A line also tells where only the formats of its files could be checked, since it has no checksums. Returns
        (None, []) where there is no checkpoint. Raises InputError where all are damaged.
        """
        return while_it_trains(lambda: self._whole(links), self.there, lambda found: bool(found[1]))

    def _whole(self, links: tuple[str, ...]) -> tuple[Path | None, list[str]]:
        lines, damaged = [], {}
        for path in dict.fromkeys([*map(self._target, links), *self.there()]):
            if path is None:
                continue
            if not (problem := damage(path)):
                lines = [f"{line}; {path.name} is used, the newest that is whole" for line in lines]
                return path, lines if (path / SUMS).is_file() else [*lines, _unproven(path)]
            damaged[path] = problem
            lines.append(f"checkpoint {path}: {problem}")
        if lines:
            raise InputError(f"{lines[0]}; no other is whole, expected a new run, or a copy of these files")
        return None, []

    def _target(self, link: str) -> Path | None:
        """Returns the place that ``link`` points at, whether or not something is there."""
        path = self.folder / link
        return self.folder.resolve() / os.readlink(path) if path.is_symlink() else self.path(link)

    def there(self) -> list[Path]:
        """Returns all checkpoints, the newest first."""
        steps = [path for path in self.folder.resolve().glob("step-*") if path.name[5:].isdigit()]
        return sorted(steps, key=lambda path: -int(path.name[5:]))

    def load_trained(self, path: Path, model: nn.Module) -> None:
        """Copies the tensors of a checkpoint into ``model``. Raises InputError unless names and shapes are the same."""
        saved = self.read_trained(path, model)
        with torch.no_grad():
            for name, tensor in trained_tensors(model).items():
                tensor.copy_(saved[name])

    def read_trained(self, path: Path, model: nn.Module) -> dict[str, torch.Tensor]:
        """Returns the trained tensors of a checkpoint by name, as views into its file, which take no memory.

        Raises InputError unless names and shapes are those of the trained tensors of ``model``.
        """
        ours = trained_tensors(model)
        try:
            saved = load_file(path / "trained.safetensors")
        except Exception as error:
            raise InputError(f"checkpoint {path}: unreadable: {error}") from None
        wrong = sorted(set(ours) ^ set(saved)) or [k for k in ours if ours[k].shape != saved[k].shape]
        if wrong:
            raise InputError(f"checkpoint {path}: {wrong[0]} does not fit the model; it is of another run")
        return saved

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Restores everything; returns the progress that was saved. Raises InputError for what cannot be read."""
        self.load_trained(path, model)
        try:
            _load_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
            _set_generators(load_file(path / "random.safetensors"))
        except Exception as error:  # of safetensors, PyTorch or Python, by what is wrong
            raise InputError(f"checkpoint {path}: unreadable: {error}") from None
        return read_progress(path)

    def _link(self, name: str, target: str) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        os.symlink(target, temporary)
        os.replace(temporary, self.folder / name)

    def _prune(self) -> None:
        kept = {os.readlink(self.folder / name) for name in ("latest", "best") if (self.folder / name).is_symlink()}
        for path in [*self.folder.glob("step-*"), *self.folder.glob(".step-*.tmp")]:  # .tmp: left by a killed run
            if path.name not in kept:
                shutil.rmtree(path)


def while_it_trains(
    read: Callable[[], Any], there: Callable[[], list[Path]], doubtful: Callable[[Any], bool] = lambda found: False
) -> Any:
    """Returns ``read()``, repeated where it fails or its result is ``doubtful`` and ``there()`` has changed meanwhile.

    A run that is training removes checkpoints. After ten times the last result counts, or its error is raised.
    """
    for last in [False] * 9 + [True]:
        before = there()
        try:
            found = read()
        except (InputError, OSError):
            if last or there() == before:
                raise
            continue
        if last or not doubtful(found) or there() == before:
            return found


def read_progress(path: Path) -> dict[str, Any]:
    """Returns the progress that a checkpoint has saved. Raises InputError where it cannot be read."""
    try:
        values = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        _ = values["step"] + 0
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"checkpoint {path}: unreadable: progress.json: {error}") from None
    return values


def damage(path: Path) -> str:
    """Returns what is wrong with the files of a checkpoint; empty when nothing is."""
    missing = [name for name in MEMBERS if not (path / name).is_file()]
    if missing:
        return f"damaged, {missing[0] if path.is_dir() else 'the folder'} is missing"
    if not (path / SUMS).is_file():  # written by an earlier version
        return _unreadable(path)
    try:
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
        expected = {name: (sums[name]["bytes"], sums[name]["sha256"]) for name in MEMBERS}
    except (ValueError, KeyError, TypeError):
        return f"damaged, {SUMS} cannot be read"
    for name, (size, checksum) in expected.items():
        if (found := (path / name).stat().st_size) != size:
            return f"damaged, {name} has {found:,} of {size:,} bytes"
        if file_sum(path / name)["sha256"] != checksum:
            return f"damaged, {name} is not what was written (checksum)"
    return ""


def _unproven(path: Path) -> str:
    return (
        f"checkpoint {path}: has no {SUMS}, as those of an earlier version; its files can be read, whether they are "
        "what was written cannot be told"
    )


def _unreadable(path: Path) -> str:
    """Returns what ``damage`` finds without checksums: files that are cut, or not of their format."""
    for name in MEMBERS:
        try:
            if name.endswith(".json"):
                read_progress(path)
                continue
            with safe_open(path / name, "pt"):
                pass
        except Exception as error:  # of safetensors, of the disk, of JSON
            return f"damaged, {name} cannot be read ({error})"
    return ""


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns Adam's moments and step counts, as "<index of the parameter>.<name>"; tables by name alone."""
    return {
        name if name in TABLES else f"{i}.{name}": torch.as_tensor(value).contiguous().cpu()
        for i, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = _parameters(optimizer)
    tables = {name: tensors.pop(name).to(parameters[0].device) for name in TABLES if name in tensors}
    states: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".")
        # bitsandbytes counts steps with a Python number, PyTorch with a float tensor
        states.setdefault(int(index), {})[name] = tensor.item() if tensor.dtype == torch.int64 else tensor
    for state in states.values():
        state |= tables if "absmax1" in state else {}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _generators() -> dict[str, torch.Tensor]:
    """Returns the states of PyTorch's generators, the only ones that training draws from in order."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states.pop("cpu"))
    for name, state in states.items():
        index = int(name.removeprefix("cuda"))
        if index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, index)
