"""Cases of the ops: inputs on which their kernels are compared with the reference, one file an op or a family.

``CASES`` has all of them by op. Each file is found by being in this folder and holds a dictionary ``CASES`` of its own.
"""

from __future__ import annotations

import importlib
import pkgutil

from petl_kernels.ops.cases.case import OpCases

CASES: dict[str, OpCases] = {}
for _file in pkgutil.iter_modules(__path__):
    CASES.update(getattr(importlib.import_module(f"{__name__}.{_file.name}"), "CASES", {}))
