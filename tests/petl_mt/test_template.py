"""examples/train.yaml: what the options say, and a file that is read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from petl_mt.config import TrainConfig
from petl_mt.config_file import load_yaml
from petl_mt.template import EXAMPLE, template

FILE = Path(__file__).parents[2] / "examples/train.yaml"
needs_examples = pytest.mark.skipif(not FILE.exists(), reason="runs in a source tree")


@needs_examples
def test_the_file_is_what_the_options_say():
    assert FILE.read_text(encoding="utf-8") == template(), "python -m petl_mt.template > examples/train.yaml"


def test_the_example_is_read_as_it_is(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(template(), encoding="utf-8")
    config = TrainConfig.from_dict(load_yaml(path), str(path))
    config.check()
    assert (config.train[0].src_lang, config.train[0].target) == ("en", "examples/text/train.de")
    plain = EXAMPLE.keys() - {"train", "valid", "src_lang", "tgt_lang"}
    assert {name: getattr(config, name) for name in plain} == {name: EXAMPLE[name] for name in plain}


def test_every_option_without_its_mark_is_at_its_default(tmp_path):
    text, marks = re.subn(r"^#(?=\w+: )", "", template(), flags=re.M)
    path = tmp_path / "train.yaml"
    path.write_text(text, encoding="utf-8")
    values, defaults = load_yaml(path), vars(TrainConfig())
    assert set(values) == {field.name for field in dataclasses.fields(TrainConfig)} | {"src_lang", "tgt_lang"}
    assert marks == len(values) - len(EXAMPLE)
    config = TrainConfig.from_dict(values, str(path))
    config.check()
    assert all(getattr(config, name) == defaults[name] for name in defaults.keys() - EXAMPLE)
