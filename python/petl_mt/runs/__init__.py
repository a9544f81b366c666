"""A run on disk: its folder, lock, checkpoints, log and model card."""

from .folder import RunFolder

__all__ = ["RunFolder"]
