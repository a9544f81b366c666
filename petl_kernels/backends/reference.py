"""The reference as a backend: importing the ops registers it, beside each formula in ``petl_kernels/ops``."""

from __future__ import annotations

import petl_kernels.ops  # noqa: F401
