"""The study on a tiny parent: rows, files, resuming, budgets out of reach, wrong input."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from petl_mt import cli
from petl_mt.config import Pair, TrainConfig
from petl_mt.demo.text import parallel_lines, write_pair
from petl_mt.models.new_model import make_model, train_vocabulary
from petl_mt.runs.lock import locked
from petl_mt.study import Entry, Row, StudyConfig, parse_grid, run_study
from petl_mt.study.command import study_config
from petl_mt.study.rows import _fingerprint, finished_row, run, write_json
from petl_mt.study.tables import notes
from petl_mt.train import train

from petl_kernels.errors import InputError
from petl_kernels.units import parse_size

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """An untrained model with a vocabulary of the demo's text."""
    folder = tmp_path_factory.mktemp("parent")
    lines = [line for row in parallel_lines(("en", "fi"), "train", 400, 1) for line in row]
    tokenizer = train_vocabulary(lines, 300, 1.0, seed=1)
    torch.manual_seed(0)
    model = make_model(TrainConfig(d_model=16, layers=1, heads=2, ffn=32), tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(parent, tmp_path):
    files = write_pair(tmp_path / "text", "en-fi", 40, 3, 4, seed=1)
    pairs = {split: Pair("en", "fi", *map(str, files[split])) for split in files}
    base = TrainConfig(
        model=str(parent),
        out=str(tmp_path / "out"),
        train=[pairs["train"]],
        steps=2,
        batch_tokens=256,
        max_length=64,
        beam=1,
        dropout=0.0,
    )
    return StudyConfig(base, pairs["test"], ["full", "lora=2%,0.0001%", "bitfit"], {"lora": 0.02})


def test_rows_and_files(config, tmp_path):
    seen = []
    rows = run_study(config, quiet=True, on_row=seen.append)
    assert seen == rows
    assert [row.name for row in rows] == ["no adaptation", "full", "lora 2%", "lora 0.0001%", "bitfit"]
    assert [row.status for row in rows] == ["done", "done", "done", "unreachable", "done"]
    parent, full, lora, _, bitfit = rows
    assert (parent.trained_parameters, parent.trained_share, full.trained_share) == (0, 0.0, 1.0)
    assert 0.01 < lora.trained_share <= 0.021 and 0 < bitfit.trained_share < 0.2
    assert lora.lr == 0.02 and full.lr != 0.02
    for row in (full, lora, bitfit):
        assert row.steps == 2 and row.seconds_per_step > 0 and row.saved_bytes_per_token > 0
        assert 0 <= row.scores.bleu < 100 and 0 <= row.scores.chrf < 100 and row.scores.sentences == 4
        assert "version:" in row.scores.bleu_signature and "nc:6" in row.scores.chrf_signature
    assert bitfit.saved_bytes_per_token < full.saved_bytes_per_token

    out = tmp_path / "out"
    assert not list(out.glob("rows/*/checkpoints"))
    for name in ("parent", "full", "lora-2pct", "bitfit"):
        assert len((out / "rows" / name / "test.hyp").read_text().splitlines()) == 4
    stored = json.loads((out / "study.json").read_text())
    assert [Row.from_dict(row) for row in stored["rows"]] == rows
    assert stored["seed"] == 1 and {"processor", "torch", "sacrebleu"} <= set(stored["machine"])
    table = (out / "study.md").read_text()
    assert "- lora 0.0001%: unreachable: the nearest it can is" in table and lora.scores.bleu_signature in table
    assert (out / "study.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_row_has_its_own_memory_and_keeps_the_budget(config):
    """The figures of a row, also of the parent's, have nothing of the rows before."""
    config.grid = ["full", "bitfit"]
    config.base = dataclasses.replace(config.base, memory="1MiB", tier=2)  # one, since a plan counts each
    parent, full, bitfit = run_study(config, quiet=True)
    budget = parse_size(config.base.memory)
    weights = 4 * full.trained_parameters
    assert weights < parent.peak_memory_bytes <= budget
    assert 4 * weights < full.peak_memory_bytes <= budget  # and gradients, and AdamW's moments
    assert weights < bitfit.peak_memory_bytes <= budget
    assert all(row.peak_process_bytes > 50 << 20 for row in (parent, full, bitfit))


@pytest.mark.slow
def test_finished_rows_are_not_run_again_and_interrupted_ones_go_on(config, monkeypatch, capsys):
    grid = list(config.grid)
    config.grid = ["full"]
    run_study(config, quiet=True)

    def interrupted(run, **options):
        started.append(run.method)
        result = train(run, **options)
        if run.method == "lora":
            raise KeyboardInterrupt  # after training, before the row is written
        return result

    started = []
    monkeypatch.setattr("petl_mt.study.rows.train", interrupted)
    config.grid = grid
    with pytest.raises(KeyboardInterrupt):
        run_study(config, quiet=True)
    assert started == ["lora"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(
        "interrupted in .*rows/lora-2pct, .*the same command goes on there", said
    )
    monkeypatch.setattr(
        "petl_mt.study.rows.train", lambda run, **options: started.append(run.method) or train(run, **options)
    )
    rows = run_study(config, quiet=True)
    assert started == ["lora", "lora", "bitfit"] and len(rows) == 5
    assert run_study(config, quiet=True) == rows and len(started) == 3


@pytest.mark.slow
def test_another_configuration_in_the_same_folder_is_refused(config):
    config.grid = ["bitfit"]
    run_study(config, quiet=True)
    config.base = dataclasses.replace(config.base, steps=3)
    with pytest.raises(InputError, match=r"bitfit: holds a row of another study: steps \(2 -> 3\)"):
        run_study(config, quiet=True)


def test_the_parents_row_is_of_one_budget(config):
    """Rows of earlier versions have no budget in them, and stay."""
    path = config.folder(None) / "row.json"

    def finished(**changes):
        return finished_row(dataclasses.replace(config, base=dataclasses.replace(config.base, **changes)), None)

    def write(config, *without):
        fingerprint = {k: v for k, v in _fingerprint(config, None).items() if k not in without}
        write_json(path, Row("parent", config=fingerprint).to_dict())

    budget = dataclasses.replace(config, base=dataclasses.replace(config.base, memory="1MiB"))
    write(budget)
    assert finished(memory="1MiB")
    for changes, words in (
        ({"memory": "2MiB"}, r"memory \(1MiB -> 2MiB\)"),
        ({"memory": None}, r"memory \(1MiB -> None\)"),
        ({"memory": "1MiB", "precision": "bf16"}, r"precision \(fp32 -> bf16\)"),
    ):
        with pytest.raises(InputError, match=f"holds a row of another study: {words}"):
            finished(**changes)
    write(config)
    assert finished() and finished(precision="bf16")  # which needs a budget to be of effect
    with pytest.raises(InputError, match=r"memory \(None -> 1MiB\)"):
        finished(memory="1MiB")
    write(config, "memory", "precision")
    assert finished() and finished(memory="1MiB", precision="bf16")


@pytest.mark.slow
def test_another_text_under_the_same_name_is_refused(config):
    config.grid = ["bitfit"]
    run_study(config, quiet=True)
    with open(config.base.train[0].target, "r+", encoding="utf-8") as file:
        file.write("X")
    with pytest.raises(InputError, match="bitfit: holds a row of another study: digests"):
        run_study(config, quiet=True)


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_and_not_the_end(config):
    config.grid, config.lr = ["full", "bitfit"], {"full": 1e30}
    config.base = dataclasses.replace(config.base, steps=4)
    rows = run_study(config, quiet=True)
    assert [row.status for row in rows] == ["done", "stopped", "done"] and "training stopped at step" in rows[1].note


@pytest.mark.parametrize("content", ["", '{"method": "bitf', "[]", '{"scores": null}', "5"])
def test_a_damaged_row_is_one_line(config, content):
    path = config.folder(Entry("bitfit")) / "row.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(InputError, match="row.json: damaged; remove it"):
        finished_row(config, Entry("bitfit"))


def test_one_study_at_a_time(config, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(InputError, match="study .*out: process .* works in it"):
        run_study(config, quiet=True)


@pytest.mark.slow
def test_a_row_that_fails_is_said_and_the_others_are_run(config, monkeypatch):
    def fail(config, entry, *others):
        if entry.method == "full":
            raise InputError("memory 1MiB: needs 2 MiB")
        return run(config, entry, *others)

    monkeypatch.setattr("petl_mt.study.run.run", fail)
    config.grid = ["full", "bitfit"]
    rows = run_study(config, quiet=True)
    assert [row.status for row in rows] == ["done", "failed", "done"] and "needs 2 MiB" in notes(rows)[0]
    assert finished_row(config, Entry("full")) is None  # it is tried again


@pytest.mark.parametrize("grid, message", [
    (["adaptor=10%"], "unknown method 'adaptor', expected one of adapter, "),
    (["adapter=0%"], "budget '0%': expected a share"),
    (["adapter=120%"], "budget '120%': expected a share"),
    (["adapter="], "no budget after ="),
    ([], "grid: empty"),
])  # fmt: skip
def test_wrong_grids_are_refused(grid, message):
    with pytest.raises(InputError, match=message):
        parse_grid(grid)


def test_grid():
    assert parse_grid(["adapter=10%,0.1%", "full", "full", "lora=2M"]) == [
        Entry("adapter", "10%"), Entry("adapter", "0.1%"), Entry("full"), Entry("lora", "2M"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("grid: full", "grid 'full': expected a list"),
        ("grid: [{adapter: 10%}]", "expected a list such as"),
        ("lr: {adapter: fast}", "lr adapter=fast: expected a rate above 0"),
        ("lr: {adapter: null}", "lr adapter=None: expected a rate above 0"),
        ("lr: {adapter: .nan}", "lr adapter=nan: expected a rate above 0"),
        ("grid: [full]\nlr: {adapter: 1.0e-3}", "lr adapter=0.001: no effect, since the grid has no adapter"),
        ("test: a", "test 'a': expected two files"),
        ("test: []", "test: 0 pairs; expected one"),
        ("test: [a]", "test: expected two files"),
        ("method: lora", "method 'lora': no effect on a study; expected grid"),
        ("params: 10%", "params '10%': no effect on a study"),
    ],
)
def test_options_of_a_study_that_cannot_work(tmp_path, line, message):
    values = "" if line.startswith("test") else "test: [a, b]\n"
    (tmp_path / "study.yaml").write_text(f"{values}{line}\nsrc_lang: en\ntgt_lang: fi\n")
    arguments = cli.parser_for("study").parse_args(["study", "--config", str(tmp_path / "study.yaml")])
    with pytest.raises(InputError, match=re.escape(message)):
        study_config(arguments)


def test_a_rate_that_is_given_twice_is_refused():
    flags = ["study", "--test", "a", "b", "--src-lang", "en", "--tgt-lang", "fi", "--lr", "full=1e-3", "full=2e-3"]
    with pytest.raises(InputError, match="lr full: given twice"):
        study_config(cli.parser_for("study").parse_args(flags))


def test_unequal_test_files_are_refused_before_anything_is_written(config, tmp_path):
    with open(config.test.source, "a", encoding="utf-8") as file:
        file.write("one more\n")
    with pytest.raises(InputError, match="has 5 lines and .* has 4"):
        run_study(config, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command(config, capsys):
    base = config.base
    arguments = [
        "study", "--model", base.model, "--out", base.out, "--train", base.train[0].source, base.train[0].target,
        "--test", config.test.source, config.test.target, "--src-lang", "en", "--tgt-lang", "fi", "--grid", "bitfit",
        "--lr", "bitfit=0.01", "--steps", "2", "--batch-tokens", "256", "--max-length", "64", "--beam", "1",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "bitfit" in shown and "BLEU nrefs:1" in shown and "0.01" in shown
