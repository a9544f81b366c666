"""Every command: help for each option with its default, groups, and an end without noise when nobody reads."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

import pytest
from petl_mt import cli
from petl_mt.config import TrainConfig

from petl_kernels.methods import METHODS

pytestmark = pytest.mark.check

COMMANDS = ("train", "finish", "plan", "fits", "translate", "score", "merge", "quantize", "methods", "demo", "bench")
COMMANDS += ("study",)
COMMANDS += ("doctor",)
# What has no default: it has to be given, or goes with something that has.
GIVEN = {"--model", "--out", "--train", "--test", "--run", "run_folder", "--src-lang", "--tgt-lang"}


def parser_of(command: str) -> argparse.ArgumentParser:
    (commands,) = (a for a in cli.parser_for(command)._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) >= set(COMMANDS)
    return commands.choices[command]


def options(command: str) -> list[argparse.Action]:
    return [action for action in parser_of(command)._actions if action.dest != "help"]


def name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_line_with_its_default(command):
    for action in options(command):
        assert action.help and action.help[0] != " ", name(action)
        assert "(default: " in action.help or name(action) in GIVEN, f"{command} {name(action)}: {action.help}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_a_group_of_its_own(command):
    parser = parser_of(command)
    assert [a.dest for a in parser._optionals._group_actions] == ["help"] and not parser._positionals._group_actions
    assert max(map(len, parser.format_help().splitlines())) <= 80


@pytest.mark.parametrize("command", ["train", "plan", "study"])
def test_the_defaults_in_the_help_are_those_of_the_configuration(command):
    defaults = vars(TrainConfig())
    for action in options(command):
        value = defaults.get(action.dest)
        if value in (None, "", [], {}, False):
            continue
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert f"(default: {shown})" in action.help, name(action)
    flags = {action.dest for action in options("train")} | {"method_args"}
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= flags  # and there is one for each


def test_methods_are_told_in_80_columns(capsys):
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(variant.trains in " ".join(shown.split()) and variant.trains for variant in METHODS.values())
    for method, variant in METHODS.items():
        _, _, part = f"\n{shown}".partition(f"\n{method}: ")
        part = part.partition("\n\n")[0]
        for field in dataclasses.fields(variant.config):
            assert f"  {field.name}=" in part and field.metadata["meaning"], f"{method} {field.name}"
    assert "rank=16  (whole number, solved by --params)" in shown and "dropout=0.0  (number)" in shown
    assert "scale=null  (number)" in shown and "parallel=true" in shown
    assert all(method in parser_of("train").format_help().replace("\n", " ") for method in METHODS)


@pytest.fixture
def written_to(monkeypatch):
    """Replaces standard output by a descriptor, with a buffer like Python's own."""

    def use(descriptor: int) -> None:
        monkeypatch.setattr(sys, "stdout", open(descriptor, "w"))  # noqa: SIM115

    return use


@pytest.mark.parametrize("flags", [["methods"], ["--help"], ["train", "--help"], ["--version"]])
def test_a_reader_that_has_gone_is_no_error(written_to, capsys, flags):
    read, write = os.pipe()
    os.close(read)
    written_to(write)
    assert cli.main(flags) == 141
    sys.stdout.close()  # as Python does at its end: nothing is left to write
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full disk to write to")
def test_a_full_disk_is_one_line(written_to, capsys):
    written_to(os.open("/dev/full", os.O_WRONLY))
    assert cli.main(["methods"]) == 2
    sys.stdout.close()
    assert capsys.readouterr().err == "petl-mt methods: No space left on device\n"
