"""The model card, which is README.md in a run's folder."""

from __future__ import annotations

from pathlib import Path

from petl_kernels.files import atomic_write
from petl_kernels.methods import METHODS

from ..config import ResolvedConfig
from ..memory_meter import memory_text
from .folder import RunFolder


def write_card(run: RunFolder, config: ResolvedConfig, result) -> None:
    """Writes the card of a finished run; result: its ``RunResult``."""
    with atomic_write(run.path / "README.md") as file:
        file.write(card(config, result))


def card(config: ResolvedConfig, result) -> str:
    """Returns the card as Markdown: use, quality, data and training."""
    pairs = sorted({pair.name for pair in config.train})
    languages = sorted({code for pair in config.train for code in (pair.src_lang, pair.tgt_lang)})
    base = "trained from scratch" if config.is_new else f"base model `{_name(config.model)}`"
    whole = config.method == "full"
    lines = [
        "---",
        "language:",
        *(f"- {code}" for code in languages),
        "pipeline_tag: translation",
        *([] if config.is_new or Path(config.model).is_absolute() else [f"base_model: {config.model}"]),
        "---",
        f"# Translation {', '.join(pairs)}",
        "",
        f"{base[0].upper()}{base[1:]}, method `{config.method}`: {result.stored_parameters:,} of "
        f"{result.total_parameters:,} parameters ({result.trained_share:.3%}).",
        "",
        "## Use",
        "```",
        "petl-mt translate --run . < input.txt > output.txt",
        *([] if METHODS[config.method].config.cannot_merge else ["petl-mt merge --run . --out merged"]),
        "```",
        ("`model/` is a plain `transformers` folder." if whole else "`adapter/` holds the trained tensors only."),
        "",
        "## Quality",
    ]
    if result.scores:
        lines += [
            "Validation text, beam search:",
            "",
            "| pair | BLEU | chrF | sentences |",
            "| --- | --- | --- | --- |",
        ]
        lines += [f"| {name} | {s.bleu:.2f} | {s.chrf:.2f} | {s.sentences} |" for name, s in result.scores.items()]
        first = next(iter(result.scores.values()))
        signatures = sorted({s.bleu_signature for s in result.scores.values()})
        lines += ["", *(f"- BLEU `{signature}`" for signature in signatures), f"- chrF `{first.chrf_signature}`"]
        lines += [
            "",
            f"Beam {config.beam}; validation loss {result.valid_loss:.4f} nats a token at step "
            f"{result.best_step}. Translations: `valid.best*.hyp`.",
        ]
    else:
        lines += ["The validation text was not scored." if config.valid else "No validation text was given."]
    lines += [
        "",
        "## Data",
        "| text | lines | kept | empty | over-long | target tokens |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {d['name']} | {d['lines']:,} | {d['lines'] - d['empty'] - d['too_long']:,} | {d['empty']:,} | "
            f"{d['too_long']:,} | {d['tokens']:,} |"
            for d in result.data
        ),
        "",
        "## Training",
        f"{result.steps:,} updates of {config.accumulate} × {config.batch_tokens:,} padded tokens, learning rate "
        f"{config.lr:g} ({config.schedule}, {config.warmup:,} warm-up), label smoothing {config.label_smoothing:g}, "
        f"{config.precision}, seed {config.seed}. {result.seconds_per_step:.3f} s an update, "
        f"{result.target_tokens_per_second:,.0f} target tokens/s, "
        f"{memory_text(result.peak_memory_bytes, result.peak_process_bytes)}"
        + (
            f", {result.saved_bytes_per_token:,.0f} bytes a token kept for the backward pass."
            if result.saved_bytes_per_token
            else "."
        ),
        "Everything else stands in `config.yaml`; `metrics.jsonl` has the curves.",
        "",
    ]
    return "\n".join(lines)


def _name(model: str) -> str:
    """Returns a hub id as it is, and the last two names of a folder's path."""
    return "/".join(Path(model).parts[-2:]) if Path(model).is_absolute() else model
