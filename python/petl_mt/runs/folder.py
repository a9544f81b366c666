"""The folder of a run and the paths in it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_write

from ..config import TrainConfig
from ..config_file import load_yaml
from .lock import NAME as LOCK


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run's folder, which is the --out of its training.

    Each run has config.yaml, text.json, metrics.jsonl and checkpoints/; a run that has finished has result.json,
    README.md, valid.best.hyp, and adapter/ or model/ as well.
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def vocabulary(self) -> Path:
        """The place of the tokenizer of a new model."""
        return self.path / "vocab"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def plan(self) -> Path:
        """The place of the plan of a run with a budget of memory."""
        return self.path / "plan.json"

    @property
    def text(self) -> Path:
        """The place of sizes and checksums of the files that the run reads."""
        return self.path / "text.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def finished_step(self) -> int | None:
        """Returns the step at which the run has ended, with an adapter or a model written; None where it has not."""
        if not (self.adapter.is_dir() or self.model.is_dir()):
            return None
        try:
            return int(json.loads((self.path / "result.json").read_text(encoding="utf-8"))["steps"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def check_free(self) -> None:
        """Raises InputError for a folder that holds anything, another run above all."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out {self.path}: is a file; expected a folder for the run")
        if self.config.exists():
            raise InputError(f"out {self.path}: holds another run; expected an empty folder, or --resume")
        own = (LOCK, self.text.name)  # of a run that was killed before it had its config.yaml
        if self.path.is_dir() and any(path.name not in own for path in self.path.iterdir()):
            raise InputError(f"out {self.path}: is not empty; expected an empty folder")

    def check_same(self, config: TrainConfig) -> None:
        """Raises InputError where the run has another configuration than ``config``, with the keys that differ.

        The end of the run may be another, and whether steps are captured as CUDA graphs, which changes dropout's masks.
        """
        old, new = self.read_config().to_dict(), config.to_dict()
        for values in (old, new):  # earlier versions wrote a plan's path as it was given
            values["plan"] = values["plan"] and absolute(values["plan"])
        differing = [
            key for key in new if key not in ("out", "steps", "patience", "cuda_graphs") and old[key] != new[key]
        ]
        if differing:
            shown = ", ".join(f"{key} ({_short(old[key])} -> {_short(new[key])})" for key in differing)
            raise InputError(f"out {self.path}: cannot resume with another configuration: {shown}")

    def read_config(self) -> TrainConfig:
        """Returns the configuration of the run. Raises InputError where there is no run."""
        if not self.config.exists():
            raise InputError(f"run {self.path}: no config.yaml in it; expected the --out folder of petl-mt train")
        return TrainConfig.from_dict(load_yaml(self.config), str(self.config))

    def write_config(self, config: TrainConfig) -> None:
        with atomic_write(self.config) as file:
            yaml.safe_dump(config.to_dict(), file, sort_keys=False, allow_unicode=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def absolute(path: str) -> str:
    """Returns ``path`` from the root on, so that it holds when the run is resumed from another folder."""
    return os.path.abspath(os.path.expanduser(path))
