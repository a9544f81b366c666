"""examples/finetune.ipynb runs offline as it is committed, with other parameters alone, and has no outputs."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat (extra dev)")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel (extra dev)")

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOK = FOLDER / "finetune.ipynb"
LINES = 4  # of the text that is scored
pytestmark = pytest.mark.skipif(not NOTEBOOK.is_file(), reason="runs in a source tree")


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def parameters(notebook):
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def printed(notebook) -> str:
    """Returns what the cells have printed."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_it_goes_from_two_text_files_to_a_scored_adapter(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    valid = [tmp_path / f"valid.{code}" for code in ("en", "de")]
    for path in valid:
        lines = (FOLDER / "text" / path.name).read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:LINES]), encoding="utf-8")
    given = {"OUT": str(tmp_path / "run"), "VALID": [*map(str, valid)], "TEST": [*map(str, valid)]}
    given |= {"STEPS": 12, "EVAL_EVERY": 12}
    names = set(re.findall(r"[A-Z_]+(?= =|, [A-Z_]+ =)", parameters(notebook).source))
    assert set(given) <= names
    parameters(notebook).source += "".join(f"\n{name} = {value!r}" for name, value in given.items())
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()

    text = printed(notebook)
    assert "M2M100ForConditionalGeneration" in text and "exact: the gradients of the plain model" in text  # the plan
    assert re.search(r"^BLEU \d", text, re.M) and re.search(r"^chrF \d", text, re.M), text  # the score
    assert "Mittwoch, den 4. März 2048" in text
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (tmp_path / "run/adapter").iterdir()
    }
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    with zipfile.ZipFile(tmp_path / "run/adapter.zip") as archive:
        assert "adapter_model.safetensors" in archive.namelist()


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    assert all(
        f'petl_mt("{command}"' in "".join(c.source for c in notebook.cells) for command in ("plan", "train", "score")
    )


def test_its_page_has_a_line():
    assert "`finetune.ipynb`" in (FOLDER / "README.md").read_text(encoding="utf-8")
