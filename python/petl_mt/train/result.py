"""The end of a run: scores, the adapter or model, result.json and the model card."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.files import atomic_write
from petl_kernels.interop.plain import write_merged

from ..checks import names_of
from ..evaluate import BatchLimit, translate
from ..json_file import write_json
from ..memory_meter import process_bytes
from ..runs.model_card import write_card
from ..scores import Scores, score_lines
from .evaluation import within_budget
from .setup import Setup


@dataclass
class RunResult:
    """The figures of a run, which result.json holds as well."""

    out: str
    method: str
    steps: int
    best_step: int
    valid_loss: float | None
    scores: dict[str, Scores]  # by pair, on the validation text
    trained_parameters: int  # that the optimiser has
    stored_parameters: int  # of the adapter or model that is written; fewer where training uses another form
    total_parameters: int  # of the model without what was added to it
    seconds_per_step: float
    target_tokens_per_second: float
    saved_bytes_per_token: float | None  # kept for backward, per token of source and target, padding too
    plain_saved_bytes_per_token: float | None  # the same with the model's own layers and loss
    peak_memory_bytes: int | None  # of what a budget counts; None where nothing counts it
    peak_process_bytes: int  # host memory of the process: Python and its libraries too
    data: list[dict[str, Any]] = field(default_factory=list)
    overflows: int = 0  # updates that were skipped, in fp16
    losses: list[float] = field(default_factory=list, repr=False)

    @property
    def trained_share(self) -> float:
        """The parameters that the method adds to the model or changes in it, over the model's parameters."""
        return self.stored_parameters / self.total_parameters

    @property
    def bleu(self) -> float | None:
        """BLEU of the first validation pair."""
        return next((scores.bleu for scores in self.scores.values()), None)

    @property
    def chrf(self) -> float | None:
        """chrF of the first validation pair."""
        return next((scores.chrf for scores in self.scores.values()), None)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["losses"]
        return {**values, "trained_share": self.trained_share}


def write_result(run: Setup) -> RunResult:
    """Goes back to the best checkpoint, writes its weights, scores the validation text, and writes result and card."""
    run.update.drop_graphs()
    best, damaged = run.checkpoints.whole("best")
    for line in damaged:
        run.log.say(line)
    if best is not None:
        run.checkpoints.load_trained(best, run.model)
    run.model.eval()
    _write_weights(run)
    scores = _scores_or_why_not(run)
    run.step_log.tell_turned_down()
    result = _result(run, scores)
    write_json(run.folder.path / "result.json", result.to_dict())
    write_card(run.folder, run.config, result)
    run.log.say(f"written: {run.config.out}")
    return result


def score_validation_text(run: Setup) -> dict[str, Scores]:
    """Translates the validation text and returns the scores by pair.

    The translations are written to valid.best.hyp, or to valid.best.<pair>.hyp for each of several pairs.
    """
    config, scores = run.config, {}
    for name, (pair, source, target) in zip(names_of(config.valid), run.text.valid_lines, strict=True):
        language = run.text.languages[pair.name]
        with run.log.searching(f"search {name}", len(source)) as watch:

            def search(limit: BatchLimit, language=language, source=source, told=watch.at) -> tuple[list[str], int]:
                given = run.model, language, source, config.beam, config.max_length, limit
                return translate(*given, run.accelerator.autocast, told)

            lines, cut = within_budget(run, search)
        if cut:
            run.log.say(f"{name}: {cut} validation sources cut to {config.max_length} tokens")
        scores[name] = result = score_lines(lines, target, pair.tgt_lang, config.bleu_tokenize)
        for line in result.lines():
            run.log.say(f"{name}: {line}")
        run.log.metrics(run.progress.step, pair=name, bleu=result.bleu, chrf=result.chrf)
        hypotheses = "valid.best.hyp" if len(run.text.valid_lines) == 1 else f"valid.best.{name}.hyp"
        with atomic_write(run.folder.path / hypotheses) as file:
            file.write("".join(line + "\n" for line in lines))
    return scores


def _scores_or_why_not(run: Setup) -> dict[str, Scores]:
    """Returns no scores where they have no room: the weights are written, and the run still comes to its end."""
    try:
        return score_validation_text(run)
    except InputError as error:
        run.log.say(f"the run ends without scores: {error}")
        return {}


def _write_weights(run: Setup) -> None:
    if run.config.method == "full":
        write_merged(run.model, run.tokenizer, run.folder.model)
    else:
        pk.save_adapter(run.model, run.folder.adapter)


def _result(run: Setup, scores: dict[str, Scores]) -> RunResult:
    progress, durations = run.progress, run.step_log.durations
    steady = durations[min(5, len(durations) // 2) :] or [progress.seconds / max(1, progress.step)]
    return RunResult(
        out=run.config.out,
        method=run.config.method,
        steps=progress.step,
        best_step=progress.best_step,
        valid_loss=progress.best_loss,
        scores=scores,
        trained_parameters=sum(p.numel() for p in run.update.parameters),
        stored_parameters=run.stored_parameters,
        total_parameters=run.total_parameters,
        seconds_per_step=statistics.median(steady),
        target_tokens_per_second=progress.target_tokens / progress.seconds if progress.seconds else 0.0,
        saved_bytes_per_token=progress.saved_bytes_per_token,
        plain_saved_bytes_per_token=progress.plain_saved_bytes_per_token,
        peak_memory_bytes=run.meter.memory(),
        peak_process_bytes=process_bytes(),
        data=[dataclasses.asdict(count) for count in run.text.counts],
        overflows=progress.overflows,
        losses=run.step_log.losses,
    )
