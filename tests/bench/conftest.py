from __future__ import annotations

import json
from pathlib import Path

import pytest
from result_files import content


@pytest.fixture
def result_file(tmp_path):
    """Writes a result file and returns its path."""

    def write(name: str, entries: list[dict], **changes) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(content(entries, **changes)))
        return path

    return write
