"""JSON files that are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from petl_kernels.files import atomic_write


def write_json(path: Path, values: Any) -> None:
    """Writes ``values`` to the file ``path``, and makes its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
