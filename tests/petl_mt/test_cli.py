"""The program from end to end: train, translate, score, merge, doctor."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys

import pytest
import torch
import yaml
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.inference import quantize_as_trained
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import petl_kernels as pk
from petl_kernels.interop.hf import load_pretrained
from petl_kernels.ops.quantized import QuantizedTensor, quantize
from petl_kernels.weights.quantized import quantize_model


@pytest.fixture(scope="module")
def lora_run(parent, text, tmp_path_factory):
    """A run made by the program with LoRA."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    train, valid = text["train"], text["valid"]
    code = main(
        ["train", "--model", str(parent / "model"), "--train", train.source, train.target, "--valid", valid.source,
         valid.target, "--src-lang", "en", "--tgt-lang", "de", "--method", "lora", "--params", "10%", "--steps", "6",
         "--batch-tokens", "256", "--max-length", "40", "--lr", "0.01", "--beam", "2", "--out", str(out)]
    )  # fmt: skip
    assert code == 0
    return out


def feed(monkeypatch, data: bytes) -> io.BytesIO:
    """Feeds bytes to standard input; returns the buffer of standard output."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    return out


def test_the_budget_was_reached(lora_run):
    result = json.loads((lora_run / "result.json").read_text())
    assert 0.05 < result["trained_share"] <= 0.1
    assert (lora_run / "adapter" / "adapter_config.json").exists()


def test_progress_is_reported(lora_run, text, parent, tmp_path, capfd):
    train = text["train"]
    main(
        ["train", "--model", str(parent / "model"), "--train", train.source, train.target, "--src-lang", "en",
         "--tgt-lang", "de", "--steps", "2", "--batch-tokens", "256", "--max-length", "6", "--out", str(tmp_path / "x")]
    )  # fmt: skip
    report = capfd.readouterr().err
    assert "train en-de: " in report and " over-long" in report and "0 empty" in report
    assert "target tokens/s" in report and "min left" in report and "adapter: " in report


def test_translate_keeps_lines_and_order(lora_run, monkeypatch):
    lines = ["one two three", "", "river", "one two three", "big house"]
    out = feed(monkeypatch, "\n".join(lines).encode())  # no newline at the end
    assert main(["translate", "--run", str(lora_run), "--beam", "2", "--max-length", "12"]) == 0
    found = out.getvalue().decode().split("\n")
    assert len(found) == 6 and found[-1] == "" and found[1] == "" and found[0] == found[3] != ""
    single = feed(monkeypatch, b"river\n")
    assert main(["translate", "--run", str(lora_run), "--beam", "2", "--max-length", "12"]) == 0
    assert single.getvalue().decode() == found[2] + "\n"


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n"])
def test_translate_nothing(lora_run, monkeypatch, data):
    out = feed(monkeypatch, data)
    assert main(["translate", "--run", str(lora_run)]) == 0
    assert out.getvalue() == data


def test_a_line_comes_out_before_the_next_goes_in(lora_run, monkeypatch):
    read, write = os.pipe()
    waiting = [b"river\n", b"big house\none\n"]

    class Reader(io.BytesIO):
        """Gives the next input when a translation has arrived, and the end after the last."""

        def write(self, data: bytes) -> int:
            os.write(write, waiting.pop(0)) if waiting else os.close(write)
            return super().write(data)

    out = Reader()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(open(read, "rb")))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, write_through=True))
    os.write(write, b"one two\n")
    assert main(["translate", "--run", str(lora_run), "--beam", "1", "--max-length", "12"]) == 0
    assert out.getvalue().count(b"\n") == 4 and not waiting


def test_translate_into_a_file(lora_run, tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("one two\nriver\n")
    flags = ["translate", "--run", str(lora_run), "--beam", "1", "--in", str(text)]
    assert main([*flags, "--out", str(out)]) == 0
    assert out.read_text().count("\n") == 2 and sorted(os.listdir(tmp_path)) == ["out", "text"]
    for where, message in (("no/out", "there is no such folder"), ("text", "is what is read")):
        assert main([*flags, "--out", str(tmp_path / where)]) == 2
        assert message in capsys.readouterr().err
    assert main([*flags[:-1], str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == f"petl-mt translate: {tmp_path / 'nothing'}: No such file or directory\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full disk to write to")
def test_scores_are_said_where_translations_cannot_be_written(lora_run, text, capsys):
    test = text["test"]
    flags = ["score", "--run", str(lora_run), "--test", test.source, test.target, "--beam", "1"]
    assert main([*flags, "--hypotheses", "/dev/full"]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("BLEU ") and "chrF" in shown.out
    assert shown.err == "petl-mt score: /dev/full: No space left on device\n"


def test_translate_says_what_it_cut(lora_run, monkeypatch, capsys):
    feed(monkeypatch, b"one " * 30 + b"\ntwo\n")
    assert main(["translate", "--run", str(lora_run), "--max-length", "8"]) == 0
    assert "1 sources were longer than 8 tokens and were cut" in capsys.readouterr().err


def test_score(lora_run, text, tmp_path, capsys):
    test, hypotheses = text["test"], tmp_path / "test.hyp"
    flags = ["score", "--run", str(lora_run), "--test", test.source, test.target, "--beam", "1"]
    assert main([*flags, "--hypotheses", str(hypotheses)]) == 0
    bleu, chrf = capsys.readouterr().out.splitlines()
    assert bleu.startswith("BLEU ") and "tok:13a" in bleu and chrf.startswith("chrF ")
    assert len(hypotheses.read_text(encoding="utf-8").splitlines()) == 11
    assert main([*flags, "--bleu-tokenize", "char"]) == 0
    assert "tok:char" in capsys.readouterr().out


def test_score_of_validation_text_is_what_training_said(lora_run, text, capsys):
    valid = text["valid"]
    assert main(["score", "--run", str(lora_run), "--test", valid.source, valid.target]) == 0
    said = json.loads((lora_run / "result.json").read_text())["scores"]["en-de"]
    assert f"BLEU {said['bleu']:.2f} {said['bleu_signature']}" in capsys.readouterr().out


def test_merge_gives_a_folder_for_transformers(lora_run, parent, tmp_path):
    assert main(["merge", "--run", str(lora_run), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    base, tokenizer = load_pretrained(parent / "model")
    words = AutoTokenizer.from_pretrained(tmp_path / "merged", src_lang="en", tgt_lang="de")
    inputs = words(["one two", "river"], text_target=["eins zwei", "Fluss"], padding=True, return_tensors="pt")
    plain = base(**inputs).logits
    adapted = pk.load_adapter(base, lora_run / "adapter").eval()(**inputs).logits
    torch.testing.assert_close(merged(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - plain).abs().max() > 1e-2


def test_merge_keeps_the_dtype_of_the_checkpoint(lora_run, parent, tmp_path, capsys):
    """Another dtype can be named; a line then tells the error of rounding."""
    flags = ["merge", "--run", str(lora_run), "--out"]
    assert main([*flags, str(tmp_path / "half"), "--dtype", "fp16"]) == 0
    assert re.search(r"^rounded to float16: a relative error of at most [\de.-]+ in a weight, [\d.]+% of what",
                     capsys.readouterr().err, re.M)  # fmt: skip
    assert {p.dtype for p in merged_weights(tmp_path / "half").values()} == {torch.float16}
    shutil.copytree(lora_run, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    shutil.copytree(parent / "model", tmp_path / "parent")
    model = AutoModelForSeq2SeqLM.from_pretrained(parent / "model").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "parent")  # a run that began with 16 bits
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config | {"model": str(tmp_path / "parent")}))
    assert main(["merge", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "as-it-was")]) == 0
    assert "rounded to bfloat16" in capsys.readouterr().err
    assert {p.dtype for p in merged_weights(tmp_path / "as-it-was").values()} == {torch.bfloat16}


@pytest.fixture
def quantized_run(parent, text, tmp_path):
    """A run that a plan made train beside NF4 weights."""
    out, plan, train = tmp_path / "quantized", tmp_path / "plan.json", text["train"]
    flags = ["--model", str(parent / "model"), "--src-lang", "en", "--tgt-lang", "de", "--method", "lora"]
    flags += ["--steps", "2", "--batch-tokens", "256", "--max-length", "40", "--lr", "0.01", "--memory", "64MiB"]
    assert main(["plan", *flags, "--json", str(plan), "--device", "cpu"]) == 0
    plan.write_text(
        json.dumps({**json.loads(plan.read_text()), "storage": "nf4", "tables": "nf4", "approximations": ["quantized"]})
    )
    flags += ["--train", train.source, train.target, "--plan", str(plan), "--out", str(out)]
    assert main(["train", *flags]) == 2 and not out.exists()  # what is rounded has to be allowed
    assert main(["train", *flags, "--allow", "quantized"]) == 0
    return out


def merged_weights(folder) -> dict[str, torch.Tensor]:
    return dict(AutoModelForSeq2SeqLM.from_pretrained(folder).named_parameters())


@pytest.mark.slow
def test_merge_of_a_quantized_run_into_the_original_or_the_quantized(quantized_run, parent, tmp_path, capsys):
    capsys.readouterr()
    assert main(["merge", "--run", str(quantized_run), "--out", str(tmp_path / "original")]) == 0
    assert "the adapter was trained beside nf4 weights; merged into the original ones" in capsys.readouterr().err
    assert main(["merge", "--run", str(quantized_run), "--out", str(tmp_path / "original")]) == 2
    refused = f"petl-mt merge: output {str(tmp_path / 'original')!r} exists and is not empty\n"
    assert capsys.readouterr().err == refused  # and nothing before it
    assert main(["merge", "--run", str(quantized_run), "--out", str(tmp_path / "q"), "--into", "quantized"]) == 0
    said = re.search(r"merged into nf4 weights with a relative error of at most ([\d.]+)%", capsys.readouterr().err)
    assert 0 < float(said[1]) < 6

    model = pk.load_adapter(load_pretrained(parent / "model")[0], quantized_run / "adapter")
    exact = {name: p.detach().clone() for name, p in pk.merge(model).named_parameters()}
    original, quantized = merged_weights(tmp_path / "original"), merged_weights(tmp_path / "q")
    assert all(torch.equal(original[name], exact[name]) for name in original)
    pk.merge(quantize_model(pk.unmerge(model), "nf4"))
    for name, weight in quantized.items():
        held = model.get_parameter(name)
        assert torch.equal(weight, held.dequantize() if isinstance(held, QuantizedTensor) else held), name
    assert any(not torch.equal(original[name], quantized[name]) for name in original)


def test_weights_of_a_16_bit_run_are_rounded_from_those_of_the_checkpoint(parent):
    model = pk.adapt(load_pretrained(parent / "model")[0], pk.LoRA(rank=2))
    weight = model.model.encoder.layers[0].fc1.weight.detach().clone()
    quantize_as_trained(model, TrainConfig(precision="bf16"), ("int8", "int8"))
    held = model.model.encoder.layers[0].fc1.weight
    assert held.dtype == torch.bfloat16 and all(map(torch.equal, held.parts(), quantize(weight, "int8").parts()))


def test_merge_into_quantized_weights_that_a_run_did_not_have(lora_run, tmp_path, capsys):
    assert main(["merge", "--run", str(lora_run), "--out", str(tmp_path / "q"), "--into", "quantized"]) == 2
    message = (
        "petl-mt merge: into quantized: the run was trained beside weights that were not; expected --into original"
    )
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert not (tmp_path / "q").exists()


def test_merge_of_a_fully_trained_run_is_the_model(parent, tmp_path):
    assert main(["merge", "--run", str(parent), "--out", str(tmp_path / "merged")]) == 0
    merged, trained = (AutoModelForSeq2SeqLM.from_pretrained(path) for path in (tmp_path / "merged", parent / "model"))
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), trained.parameters(), strict=True))


def test_a_run_of_several_pairs_asks_which(parent, monkeypatch, capsys):
    feed(monkeypatch, b"one\n")
    assert main(["translate", "--run", str(parent)]) == 2
    assert "the run has the pairs en-de, de-en: expected --src-lang and --tgt-lang" in capsys.readouterr().err
    out = feed(monkeypatch, b"eins\n")
    assert main(["translate", "--run", str(parent), "--src-lang", "de", "--tgt-lang", "en"]) == 0
    assert out.getvalue().count(b"\n") == 1


@pytest.mark.parametrize("command", ["train", "translate", "score", "merge", "bench", "doctor", "demo", "study"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and f"petl-mt {command}" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["trian"], ["train", "--stepps", "3"], ["train", "--steps", "x"]])
def test_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as end:
        main(flags)
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(error) == 1 and error[0].startswith("petl-mt")


@pytest.mark.parametrize(
    "flags",
    [
        "train --steps 3 --steps 4",
        "train --batch-tokens 3 --batch-tok 4",  # the short form is the same option
        "train --resume --resume",
        "plan --memory 8GiB --memory 9GiB",
        "translate --run a --beam 1 --run b",
        "score --run a --test a b --test c d",
        "merge --run a --out b --out c",
        "study --steps 3 --steps 3",
        "demo --minutes 3 --minutes 4",
        "bench --only a --only b",
    ],
)
def test_an_option_given_twice_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        main(flags.split())
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(error) == 1 and "given twice; expected it once" in error[0]


@pytest.mark.parametrize("command", ["score", "plan", "study", "demo", "methods", "bench", "doctor"])
def test_a_result_that_nobody_could_read_is_not_computed(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", None)
    assert main([command]) == 2
    assert f"petl-mt {command}: standard output: is closed" in capsys.readouterr().err


def test_the_same_settings_of_a_method_twice_are_refused(capsys):
    for settings in (["rank=4", "rank=8"], ["rank_pattern={a: 1, a: 2}"]):
        flags = [word for setting in settings for word in ("--method-arg", setting)]
        assert main(["train", *flags]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "petl-mt train: method-arg rank: given twice; expected it once" and len(errors) == 2
    assert "rank_pattern" in errors[1]
