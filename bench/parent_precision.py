"""BLEU of the demo's parent trained in fp32 and in fp16, from the same text and the same seeds.

    python -m bench.parent_precision                                        from the start, as parent.yaml says: hours
    python -m bench.parent_precision --shipped --pairs en-fi --steps 120    the parent that ships, all of it trained on

Each seed is one start of the model and one order of the text. A line for each run has BLEU of every direction on test
lines whose combinations are in no training line, with the 95% interval that sacreBLEU's resampling of the lines gives;
the last lines have, of each direction, fp16's mean less fp32's, beside what seeds alone differ by.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petl_mt.config import OF_A_NEW_MODEL, TrainConfig
from petl_mt.config_file import load_yaml
from petl_mt.demo.demo import Plan
from petl_mt.demo.make_parent import parent_folder
from petl_mt.demo.text import LANGUAGES, write_pair, write_vocabulary_text
from petl_mt.inference import Translator
from petl_mt.scores import bleu_metric
from petl_mt.train import train

from bench.run.machine import described
from bench.where import ROOT, commit

RECIPE = ROOT / "python" / "petl_mt" / "demo" / "parent.yaml"
PRECISIONS = ("fp32", "fp16")
TEXT_SEED = 1  # that of parent.yaml

# (precision, seed) -> direction -> BLEU
Found = dict[tuple[str, int], dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shipped", action="store_true", help="train the parent that ships, on one pair")
    parser.add_argument("--pairs", default="en-de,en-fr,en-cs,en-ru", help="a new parent learns each both ways")
    parser.add_argument("--steps", type=int, help="updates; an eighth of them warm up (default: parent.yaml's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args(argv)
    settings = of_shipped(load_yaml(RECIPE)) if given.shipped else load_yaml(RECIPE)
    if given.steps is not None:
        settings |= {"steps": given.steps, "warmup": given.steps // 8}
    machine = described("cpu")
    print(f"{machine['cpu_name']}, {machine['threads']} threads, torch {machine['torch']}, commit {commit()[:7]}")
    with tempfile.TemporaryDirectory(prefix="petl-parent-") as folder:
        compare(Path(folder), given.pairs.split(","), given.seeds, settings)
    return 0


def of_shipped(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a new parent as those of full fine-tuning in the demo."""
    kept = {name: value for name, value in settings.items() if name not in OF_A_NEW_MODEL}
    return kept | {"model": str(parent_folder()), "method": "full", "lr": Plan().lr["full"]}


def compare(folder: Path, pairs: Sequence[str], seeds: Sequence[int], settings: dict[str, Any], lines: int = 5000,
            tests: int = 200) -> Found:  # fmt: skip
    """Trains in each precision with each seed and prints the lines above; returns the BLEU of each run.

    settings: those of parent.yaml, whose text is the one made here. lines, tests: training and test lines of each pair.
    """
    texts = {pair: write_pair(folder, pair, lines, 100, tests, TEXT_SEED) for pair in pairs}
    ways = 1
    if settings["model"] == "new":
        ways = 2
        words = write_vocabulary_text(folder, LANGUAGES, lines, TEXT_SEED)
        settings = settings | {"vocab_text": [str(path) for path in words]}
    found: Found = {}
    for seed in seeds:
        for precision in PRECISIONS:
            config = TrainConfig.from_dict({
                **settings,
                "train": _directions(texts, "train", ways),
                "valid": [],
                "out": str(folder / f"{precision}-{seed}"),
                "precision": precision,
                "seed": seed,
            })  # fmt: skip
            result = train(config, quiet=True)
            title = f"{precision} seed {seed}, {result.overflows} skipped"
            found[precision, seed] = _scores(config.out, _directions(texts, "test", ways), title)
    for direction in next(iter(found.values())):
        print(_difference(found, direction, seeds), flush=True)
    return found


def _directions(texts: dict[str, dict[str, tuple[Path, Path]]], split: str, ways: int) -> list[dict[str, str]]:
    """Returns the pairs of a split, each in one direction or in both."""
    found = []
    for pair, files in texts.items():
        sides = list(zip(pair.split("-"), map(str, files[split]), strict=True))
        for (src, source), (tgt, target) in (sides, sides[::-1])[:ways]:
            found.append({"src_lang": src, "tgt_lang": tgt, "source": source, "target": target})
    return found


def _scores(run: str, directions: list[dict[str, str]], title: str) -> dict[str, float]:
    """Returns the BLEU of each direction, and prints it."""
    found: dict[str, float] = {}
    shown, signatures = [], set()
    for way in directions:
        source, references = (Path(way[side]).read_text(encoding="utf-8").splitlines() for side in ("source", "target"))
        output = list(Translator(run, way["src_lang"], way["tgt_lang"]).stream(source))
        metric = bleu_metric(way["tgt_lang"])
        score = metric.corpus_score(output, [references], n_bootstrap=1000)
        direction = f"{way['src_lang']}-{way['tgt_lang']}"
        found[direction] = score.score
        shown.append(f"{direction} {score.score:.2f} ± {score._ci:.2f}")
        signatures.add(str(metric.get_signature()))
    print(f"{title}: BLEU {', '.join(shown)}  {' '.join(sorted(signatures))}", flush=True)
    return found


def _difference(found: Found, direction: str, seeds: Sequence[int]) -> str:
    of = {kind: [found[kind, seed][direction] for seed in seeds] for kind in PRECISIONS}
    apart = sum(of["fp16"]) / len(seeds) - sum(of["fp32"]) / len(seeds)
    spread = max(max(values) - min(values) for values in of.values())
    return f"{direction}: fp16 - fp32 {apart:+.2f}, between seeds of one precision up to {spread:.2f}"


if __name__ == "__main__":
    sys.exit(main())
