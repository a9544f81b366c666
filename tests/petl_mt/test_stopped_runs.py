"""A stopped run can be used, ended and lengthened; damaged or changed files are noticed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from petl_mt import checks
from petl_mt.cli import main
from petl_mt.config import Pair, TrainConfig
from petl_mt.inference import Translator, load_run
from petl_mt.inference.trained_weights import trained_weights
from petl_mt.runs import RunFolder
from petl_mt.runs.checkpoint import Checkpoints, damage
from petl_mt.runs.lock import locked
from petl_mt.runs.log import RunLog
from petl_mt.train import _with_absolute_paths, finish, loop, train
from petl_mt.train.evaluation import save_checkpoint
from petl_mt.train.interrupts import stop_requests
from petl_mt.train.setup import set_up
from safetensors.torch import load_file

from petl_kernels.errors import InputError
from petl_kernels.interop import hf

LINES = ["one two", "red house tree", "blue river"]


class Killed(BaseException):
    pass


def stop_after(monkeypatch, step: int) -> None:
    """Kills a run before update ``step`` + 1."""
    update = loop.train_one_update

    def die(run):
        if run.progress.step == step:
            raise Killed
        update(run)

    monkeypatch.setattr(loop, "train_one_update", die)


def stopped(settings: dict, monkeypatch, step: int = 7, **changes) -> str:
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Killed):
            train(TrainConfig(**{**settings, **changes}), quiet=True)
    return settings["out"]


def step_of(out: str, link: str = "latest") -> int:
    return json.loads((Path(out) / "checkpoints" / link / "progress.json").read_text())["step"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# ---- used and ended


OTHERS = ("prefix", "cross-attention", "adapter", "ln", "ia3")


@pytest.mark.parametrize(
    "method",
    [
        "lora",
        *(pytest.param(other, marks=pytest.mark.slow) for other in ("bitfit", "full")),
        *(pytest.param(other, marks=pytest.mark.repeat) for other in OTHERS),
    ],
)
def test_a_stopped_run_translates_as_it_does_once_it_is_ended(settings, monkeypatch, capsys, method):
    out = stopped(settings, monkeypatch, method=method, method_args={}, lr=None)
    before = list(Translator(out).stream(LINES))
    said = capsys.readouterr().err.splitlines()
    best = step_of(out, "best")
    assert said == [
        f"run {out}: has not finished; step {best} of 8, the best so far, is used (petl-mt finish ends the run)"
    ]
    weights = {name: p.clone() for name, p in load_run(out)[0].named_parameters()}
    result = finish(out, quiet=True)
    assert result.steps == step_of(out) == 6 and result.best_step == best and result.bleu is not None
    assert RunFolder(Path(out)).finished_step() == 6
    capsys.readouterr()
    assert list(Translator(out).stream(LINES)) == before and capsys.readouterr().err == ""
    ended = dict(load_run(out)[0].named_parameters())
    assert all(torch.equal(weights[name], ended[name]) for name in ended)
    with pytest.raises(InputError, match="has finished, at step 6"):
        finish(out, quiet=True)


def test_a_stopped_new_model_translates(settings, monkeypatch):
    new = {"model": "new", "method": None, "method_args": {}, "vocab_size": 60, "d_model": 16, "layers": 1, "heads": 2}
    out = stopped(settings, monkeypatch, **new)
    before = list(Translator(out).stream(LINES))
    finish(out, quiet=True)
    assert list(Translator(out).stream(LINES)) == before


@pytest.mark.slow
def test_a_stopped_run_inside_a_budget(settings, monkeypatch, capsys):
    out = stopped(settings, monkeypatch, memory="20MiB", tier=1)
    before = list(Translator(out, memory="20MiB").stream(LINES))
    assert "has not finished" in capsys.readouterr().err
    finish(out, quiet=True)
    assert list(Translator(out, memory="20MiB").stream(LINES)) == before


def test_the_weights_of_a_stopped_full_run_are_not_loaded_outside_of_its_budget(settings, monkeypatch):
    out = RunFolder(Path(stopped(settings, monkeypatch, step=3, method="full", method_args={}, lr=None)))
    checkpoint = Checkpoints(out.checkpoints).path("best")
    read = hf._from_pretrained

    def skeletons_only(name, config, files, **options):
        assert files is None, "weights are loaded"
        return read(name, config, files, **options)

    monkeypatch.setattr(hf, "_from_pretrained", skeletons_only)
    with trained_weights(out, out.read_config()) as folder:
        ours, theirs = load_file(folder / "model.safetensors"), load_file(checkpoint / "trained.safetensors")
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_a_stopped_run_merges_and_scores(settings, text, monkeypatch, tmp_path, capsys):
    out = stopped(settings, monkeypatch)
    test = text["test"]
    assert main(["merge", "--run", out, "--out", str(tmp_path / "merged")]) == 0
    assert main(["score", "--run", out, "--test", test.source, test.target]) == 0
    assert capsys.readouterr().err.count("has not finished; step") == 2
    assert main(["finish", out]) == 0
    assert main(["finish", out]) == 2


def test_what_was_not_evaluated_is_at_the_end(settings, monkeypatch):
    """The run is stopped by Ctrl-C after step 4, which has not been evaluated."""
    update = loop.train_one_update

    def interrupt(run):
        update(run)
        if run.progress.step == 4:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_one_update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**settings), quiet=True)
    out = settings["out"]
    assert step_of(out) == 4 and step_of(out, "best") == 3
    result = finish(out, quiet=True)
    assert result.steps == 4 and result.best_step == step_of(out, "best")
    losses = [json.loads(line).get("valid_loss") for line in open(Path(out) / "metrics.jsonl")]
    assert sum(loss is not None for loss in losses) == 2


def test_without_a_checkpoint_there_is_nothing_to_use(settings, monkeypatch):
    out = stopped(settings, monkeypatch, step=1)
    for use in (Translator, finish):
        with pytest.raises(InputError, match="no checkpoint .*yet; expected train --resume"):
            use(out)


def test_what_a_signal_is_answered(settings, monkeypatch, capfd):
    said = []
    with pytest.raises(KeyboardInterrupt), stop_requests(said.append) as interrupted:
        os.kill(os.getpid(), 2)
        os.kill(os.getpid(), 15)  # at once: it is the same, as `timeout` sends it
        assert interrupted() and said == [False]
        monkeypatch.setattr("petl_mt.train.interrupts.ONE_SIGNAL", 0.0)
        os.kill(os.getpid(), 2)
    assert said == [False, True]
    run = set_up(TrainConfig(**settings), RunFolder(Path(settings["out"])), False, False)
    capfd.readouterr()
    loop.tell_interrupt(run, again=False)
    error = capfd.readouterr().err
    assert "stops after this update or evaluation" in error and "no step is on disk yet" in error
    save_checkpoint(run, best=True)
    loop.tell_interrupt(run, again=True)
    assert "stopped at once; step 0 is on disk, go on with --resume" in capfd.readouterr().err
    kept, (reader, writer) = os.dup(2), os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    try:
        loop.tell_interrupt(run, again=False)  # `2>&1 | tee`, which Ctrl-C ends first
    finally:
        os.dup2(kept, 2)
    for descriptor in (kept, writer):
        os.close(descriptor)
    run.log.close()


def test_checkpoints_that_a_run_removes_meanwhile(settings, tmp_path, monkeypatch):
    """The newest one is used then, without a line on damage; a checkpoint that stays damaged is an error."""
    checkpoints = Checkpoints(RunFolder(Path(settings["out"])).checkpoints)
    run = set_up(TrainConfig(**settings), RunFolder(Path(settings["out"])), False, True)
    checkpoints.save(run.model, run.optimizer, {"step": 1, "best_step": 1}, best=True)
    moments = []

    def goes_on(path: Path) -> str:
        if len(moments) < 3:
            moments.append(path.name)
            step = len(moments) + 1
            checkpoints.save(run.model, run.optimizer, {"step": step, "best_step": step}, best=True)
        return damage(path)

    monkeypatch.setattr("petl_mt.runs.checkpoint.damage", goes_on)
    assert checkpoints.whole("best") == (checkpoints.folder.resolve() / "step-4", [])
    moments.clear()
    folder, config = run.folder, run.config
    folder.write_config(config)
    read = Checkpoints.load_trained

    def removed(self, path, model):
        if not moments:
            moments.append(path.name)
            checkpoints.save(run.model, run.optimizer, {"step": 9, "best_step": 9}, best=True)
        return read(self, path, model)

    monkeypatch.setattr("petl_mt.runs.checkpoint.damage", damage)
    monkeypatch.setattr(Checkpoints, "load_trained", removed)
    with trained_weights(folder, config) as weights:
        assert moments == ["step-4"] and weights.is_dir()
    (checkpoints.folder / "step-9" / "trained.safetensors").unlink()
    with pytest.raises(InputError, match="step-9: damaged, trained.safetensors is missing"):
        checkpoints.whole("best")
    run.log.close()


def test_a_run_that_was_killed_before_its_first_step_begins_anew(settings):
    out = RunFolder(Path(settings["out"]))
    out.path.mkdir(parents=True)
    out.text.write_text("{}")
    out.check_free()
    (out.path / "other").touch()
    with pytest.raises(InputError, match="is not empty"):
        out.check_free()


# ---- longer and shorter


def test_a_plan_is_found_from_another_folder(settings, tmp_path, monkeypatch):
    """Runs of earlier versions wrote the path as it was given, and work, too."""
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(**settings, memory="1GiB", plan="plan.json")
    run = RunFolder(Path(settings["out"]))
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_config(config)
    run.check_same(_with_absolute_paths(config))
    run.write_config(_with_absolute_paths(config))
    monkeypatch.chdir("/")
    run.check_same(_with_absolute_paths(run.read_config()))
    assert run.read_config().plan == str(tmp_path / "plan.json")
    with pytest.raises(InputError, match="another configuration: plan"):
        run.check_same(_with_absolute_paths(config))


@pytest.mark.slow
def test_longer_is_the_longer_run(settings, tmp_path):
    """Where rates do not depend on the number of steps, 5 steps and then 8 end bit by bit as 8 do."""
    settings |= {"schedule": "inverse-sqrt", "warmup": 2, "eval_every": 8}
    train(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}), quiet=True)
    out = settings["out"]
    train(TrainConfig(**{**settings, "steps": 5}), quiet=True)
    train(TrainConfig(**settings), resume=True, quiet=True)
    assert files_of(Path(out, "checkpoints", "latest")) == files_of(tmp_path / "whole" / "checkpoints" / "latest")
    assert RunFolder(Path(out)).read_config().steps == 8 and RunFolder(Path(out)).finished_step() == 8


@pytest.mark.slow
def test_rates_follow_the_new_end_and_warmup_stays(settings, capsys):
    settings |= {"steps": 4}
    train(TrainConfig(**settings), quiet=True)
    out = settings["out"]
    assert main(["train", "--resume", "--out", out, "--steps", "6"]) == 0
    assert "steps 4 -> 6: from step 5 on, learning rates are those of a run of 6 steps (linear, warmup 0)" in (
        capsys.readouterr().err
    )
    rates = [json.loads(line).get("lr") for line in open(Path(out) / "metrics.jsonl")]
    assert [rate for rate in rates if rate is not None] == pytest.approx(
        [0.01 * left for left in (4 / 5, 3 / 5, 2 / 5, 1 / 5, 2 / 7, 1 / 7)], rel=1e-6
    )
    with pytest.raises(InputError, match="steps 5: the run has done 6; expected at least that, or petl-mt finish"):
        train(TrainConfig(**{**settings, "steps": 5}), resume=True, quiet=True)


def test_shorter_ends_where_it_says(settings, monkeypatch):
    stopped(settings, monkeypatch)
    assert train(TrainConfig(**{**settings, "steps": 7}), resume=True, quiet=True).steps == 7


def test_the_end_of_a_run_that_has_gone_on_is_named(settings, monkeypatch, capsys):
    train(TrainConfig(**{**settings, "steps": 3}), quiet=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Killed):
            train(TrainConfig(**{**settings, "steps": 9}), resume=True, quiet=True)
    load_run(settings["out"])
    assert "its end at step 3 is used; it is at step 6 since then" in capsys.readouterr().err


# ---- locked


def test_one_at_a_time(settings, tmp_path, capsys):
    train(TrainConfig(**settings), quiet=True)
    with locked(Path(settings["out"])):
        for use in (lambda: train(TrainConfig(**settings), resume=True, quiet=True), lambda: finish(settings["out"])):
            with pytest.raises(InputError, match=rf"process {os.getpid()} on \S+ works in it") as error:
                use()
            assert "\n" not in str(error.value)
    assert not (Path(settings["out"]) / ".lock").exists()


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    code = f"from petl_mt.runs.lock import locked; import os, pathlib\nwith locked(pathlib.Path({str(tmp_path)!r})): os.kill(os.getpid(), 9)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert (tmp_path / ".lock").read_text().startswith("process ")
    RunFolder(tmp_path).check_free()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("name", checks.COUNTS)
def test_one_process(settings, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    for use in (lambda: train(TrainConfig(**settings)), lambda: finish("x"), lambda: Translator("x")):
        with pytest.raises(InputError, match=f"{name} 2: petl-mt works in one process"):
            use()
    monkeypatch.setenv(name, "1")
    checks.check_one_process()


# ---- changed text, damaged checkpoints


def copied(text: dict, folder: Path) -> list[Pair]:
    pairs = []
    for name in ("train", "valid"):
        files = [shutil.copy(path, folder) for path in (text[name].source, text[name].target)]
        pairs.append(Pair("en", "de", *files))
    return pairs


def test_changed_text_is_noticed(settings, text, tmp_path, monkeypatch):
    settings["train"], settings["valid"] = ([pair] for pair in copied(text, tmp_path))
    stopped(settings, monkeypatch)
    for path in (settings["train"][0].target, settings["valid"][0].source):
        good = Path(path).read_bytes()
        for changed, why in ((good + b"x\n", "bytes then, "), (good.replace(b"e", b"o", 1), "other content")):
            Path(path).write_bytes(changed)
            with pytest.raises(InputError, match=f"^{path}: has changed since the run began .*{why}"):
                train(TrainConfig(**settings), resume=True, quiet=True)
        Path(path).write_bytes(good)
    assert train(TrainConfig(**settings), resume=True, quiet=True).steps == 8


def spoil_cut(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_bit(folder: Path) -> None:
    path = folder / "trained.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def spoil_progress(folder: Path) -> None:
    path = folder / "progress.json"
    path.write_text(path.read_text().replace("6", "7", 1))


DAMAGES = {
    "cut": (spoil_cut, "optimizer.safetensors has"),
    "bit": (spoil_bit, r"trained.safetensors is not what was written \(checksum\)"),
    "progress": (spoil_progress, "progress.json is not what was written"),
    "member": (lambda folder: (folder / "random.safetensors").unlink(), "random.safetensors is missing"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "trained.safetensors is missing"),
    "gone": (shutil.rmtree, "the folder is missing"),
    "sums": (lambda folder: (folder / "checksums.json").write_text("{"), "checksums.json cannot be read"),
}


FIRST, *MORE = DAMAGES


@pytest.mark.parametrize("kind", [FIRST, *(pytest.param(kind, marks=pytest.mark.repeat) for kind in MORE)])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(settings, monkeypatch, capsys, kind):
    spoil, message = DAMAGES[kind]
    losses = iter([1.0, 2.0, 3.0])  # the best is the first
    with monkeypatch.context() as patch:
        patch.setattr("petl_mt.train.evaluation.validation_loss", lambda *_: next(losses))
        out = stopped(settings, patch)
    assert (step_of(out, "best"), step_of(out)) == (3, 6)
    folder = Path(out) / "checkpoints"
    spoil((folder / "latest").resolve())
    train(TrainConfig(**settings), resume=True)
    said = capsys.readouterr().err
    assert re.search(f"damaged, {message}", said)
    assert "resumed after step 3" in said
    whole, lines = Checkpoints(folder).whole("latest")
    assert whole.name == "step-8" and not lines
    for path in folder.glob("step-*"):
        spoil_bit(path)
    for use in (lambda: train(TrainConfig(**settings), resume=True, quiet=True), lambda: finish(out)):
        with pytest.raises(InputError, match="damaged, .*no other is whole") as error:
            use()
        assert "\n" not in str(error.value)


def test_a_damaged_best_gives_way_to_the_newest(settings, monkeypatch, capsys):
    losses = iter([1.0, 2.0])
    with monkeypatch.context() as patch:
        patch.setattr("petl_mt.train.evaluation.validation_loss", lambda *_: next(losses))
        out = stopped(settings, patch)
    spoil_bit(Path(out) / "checkpoints" / "best")
    Translator(out)
    first, second = capsys.readouterr().err.splitlines()
    assert "step-3: damaged, trained.safetensors is not what was written" in first and "step-6 is used" in first
    assert "step 6 of 8, the newest, is used" in second


def test_each_damage_has_its_words(settings, monkeypatch, tmp_path):
    out = stopped(settings, monkeypatch)
    for kind, (spoil, message) in DAMAGES.items():
        folder = shutil.copytree((Path(out) / "checkpoints" / "latest").resolve(), tmp_path / kind)
        assert damage(folder) == ""
        spoil(folder)
        assert re.search(message, damage(folder)), kind


# ---- before any work


@pytest.mark.parametrize("damage", [b'{"step": 3, "lo', b"5\n", b'{"step": "x"}\n', b"\xff\x00\n"])
def test_damaged_lines_of_metrics_go(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 4}\n' + damage)
    RunLog(tmp_path, 5, start=3, quiet=True).close()
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"bytes": 1}}'])
def test_damaged_sums_of_text_are_one_line(tmp_path, content):
    (tmp_path / "text.json").write_text(content)
    with pytest.raises(InputError, match="text.json: damaged"):
        checks.check_same_text(tmp_path / "text.json", {"a": {"bytes": 1, "sha256": ""}})


@pytest.mark.slow
def test_one_file_twice(settings, text, tmp_path, capsys):
    pair = settings["train"][0]
    link = tmp_path / "link"
    link.symlink_to(pair.source)
    with pytest.raises(InputError, match="given as source and as target; expected two files"):
        train(TrainConfig(**{**settings, "train": [replace(pair, target=str(link))]}), quiet=True)
    assert not Path(settings["out"]).exists()
    assert "expected two files" in _refused(["score", "--run", "x", "--test", pair.source, pair.source], capsys)
    valid = [pair, replace(pair, target=str(link))]
    train(TrainConfig(**{**settings, "valid": valid, "train": [pair, pair], "steps": 1}))
    said = capsys.readouterr().err
    assert f"valid en-de: {pair.source} is its source and its target" in said
    assert "valid en-de: " in said and "is trained on, too" in said and "are given twice, and count twice" in said


def _refused(flags: list[str], capsys) -> str:
    assert main(flags) == 2
    return capsys.readouterr().err


def test_validation_sets_of_one_pair_have_names_of_their_own(settings, text):
    settings |= {"valid": [text["valid"], text["test"]], "steps": 1}
    result = train(TrainConfig(**settings), quiet=True)
    assert {name: scores.sentences for name, scores in result.scores.items()} == {"en-de.1": 17, "en-de.2": 11}
    files = sorted(Path(settings["out"]).glob("valid.best.*.hyp"))
    assert [len(path.read_text().splitlines()) for path in files] == [17, 11]
    assert [count["name"] for count in result.data[1:]] == ["valid en-de.1", "valid en-de.2"]


def test_places_that_cannot_be_written(settings, text, tmp_path, capsys):
    test = text["test"]
    file = tmp_path / "file"
    file.write_text("x")
    score = ["score", "--run", "no-run", "--test", test.source, test.target, "--hypotheses"]
    assert "no such folder" in _refused([*score, str(tmp_path / "none" / "hyp")], capsys)
    assert "is a folder" in _refused([*score, str(tmp_path)], capsys)
    assert "is read, too" in _refused([*score, test.target], capsys)
    assert "/proc/hyp" in _refused([*score, "/proc/hyp"], capsys)
    assert "is no folder" in _refused(["merge", "--run", "no-run", "--out", str(file / "merged")], capsys)
    assert "/proc/m" in _refused(["merge", "--run", "no-run", "--out", "/proc/m"], capsys)
    plan = ["plan", "--model", settings["model"], "--memory", "1GiB", "--json"]
    assert "no such folder" in _refused([*plan, str(tmp_path / "none" / "plan.json")], capsys)
    with pytest.raises(InputError, match="is no folder; expected one"):
        train(TrainConfig(**{**settings, "out": str(file / "run")}), quiet=True)


def test_what_a_short_run_sees_little_of(settings, capsys):
    train(TrainConfig(**{**settings, "steps": 2, "warmup": 2, "eval_every": 3, "patience": 1}), resume=True)
    said = capsys.readouterr().err
    for line in (
        "no run to resume; a new one begins",
        "warmup 2: the run of 2 steps ends before the rate is at lr 0.01",
        "eval_every 3: the run of 2 steps is evaluated once, at its end",
        "patience 1: no effect",
    ):
        assert line in said


def test_a_disk_without_room_is_refused_before_work(settings, monkeypatch, tmp_path, capsys):
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room._replace(free=1000))
    with pytest.raises(InputError, match=r"1000 B are free on its disk; expected [\d.]+ KiB for checkpoints"):
        train(TrainConfig(**settings), quiet=True)
    assert not Path(settings["out"]).exists()


def test_more_beams_than_words(settings, monkeypatch):
    with pytest.raises(InputError, match="beam 100000: expected 1 to "):
        train(TrainConfig(**{**settings, "beam": 100_000}), quiet=True)
    out = stopped(settings, monkeypatch)
    with pytest.raises(InputError, match="beam 100000: expected 1 to "):
        Translator(out, beam=100_000)


def test_scores_that_fail_do_not_lose_the_run(settings, monkeypatch, capsys):
    def too_large(*_):
        raise InputError("memory 8MiB: evaluation of one sentence does not fit")

    monkeypatch.setattr("petl_mt.train.result.translate", too_large)
    result = train(TrainConfig(**settings))
    assert result.scores == {} and RunFolder(Path(settings["out"])).finished_step() == 8
    assert "the run ends without scores: memory 8MiB" in capsys.readouterr().err
    assert "The validation text was not scored." in (Path(settings["out"]) / "README.md").read_text()
    assert load_file(Path(settings["out"]) / "adapter" / "adapter_model.safetensors")
