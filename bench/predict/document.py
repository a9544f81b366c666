"""The tables of docs/PERFORMANCE.md: what is asked for, predicted and measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from bench.predict import counts, lean_step
from bench.predict.against import REPLACED, against
from bench.predict.cards import DEVICES, Device, seconds_of
from bench.predict.cases import entries, lora_limit, work
from bench.shapes import TOKENS, shape
from bench.show import markdown
from bench.show.figures import seconds as spelled
from bench.show.measurements import LIMIT, Measurement, Run, by_op
from bench.show.medians import run_of
from bench.where import RESULTS, ROOT

DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"
H200_RESULTS = RESULTS / "nvidia-h200"


def rows() -> Iterator[tuple[str, ...]]:
    """Yields a row for each op and size: models of the same size stand together."""
    names = defaultdict(list)
    for entry in entries():
        names[entry._replace(shape="")].append(entry.shape)
    for entry, shapes in names.items():
        cells = []
        for device in DEVICES.values():
            ours, limit = seconds_of(entry.ours, device), seconds_of(entry.limit, device)
            cells.append(f"{_time(ours)} ({ours / limit:.2f})")
        yield entry.op, ", ".join(shapes), entry.case, *cells


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


# Targets on an H200: microseconds, or times the limit ("×").
ASKED = (
    ("lora_border", "nllb-600m", "r=16 q/v", 1.20, "×"),
    ("lora_border", "nllb-3.3b", "r=16 q/v", 1.10, "×"),
    ("lora_border", "wide", "r=16 q/v", 1.06, "×"),
    ("lora_linear", "nllb-600m", "r=16", 1.50, "×"),
    ("lora_linear", "nllb-3.3b", "r=16", 1.25, "×"),
    ("lora_linear", "wide", "r=16", 1.12, "×"),
    ("frozen_ffn", "nllb-600m", "relu", 430, "µs"),
    ("frozen_ffn", "nllb-600m", "gelu", 480, "µs"),
    ("attention", "nllb-600m", "64x128 dropout 0.1", 90, "µs"),
    ("bottleneck_adapter", "nllb-600m", "m=64 fwd", 25, "µs"),
    ("bottleneck_adapter", "nllb-600m", "m=64 fwd+bwd", 90, "µs"),
    ("bottleneck_adapter", "nllb-600m", "m=256 fwd+bwd", 140, "µs"),
    ("bottleneck_adapter", "nllb-600m", "m=1024 fwd+bwd", 240, "µs"),
    ("layer_norm", "nllb-600m", "trained", 60, "µs"),
    ("quantized_project", "nllb-600m", "int8 d x d", 1.15, "×"),
    ("quantized_project", "nllb-600m", "nf4 d x d", 1.15, "×"),
    ("quantized_project", "nllb-600m", "int8 ffn x d", 1.10, "×"),
    ("quantized_project", "nllb-600m", "nf4 ffn x d", 1.10, "×"),
    ("linear_cross_entropy", "nllb-600m", "smoothing 0.1, 300 MiB of logits", 15e3, "µs"),
    ("linear_cross_entropy", "nllb-600m", "smoothing 0.1, 32 MiB of logits", 18e3, "µs"),
)
LORA_RANKS = {"lora_border": (16, 0, 16), "lora_linear": (16,)}


def targets() -> Iterator[tuple[str, ...]]:
    """Returns what is asked for, the limit, what is predicted now, and what the H200 took with its run's kernels."""
    h200, t = DEVICES["H200"], TOKENS["cuda"]
    run = (one for one in run_of(H200_RESULTS, "ops").measurements if one.tokens == t)
    timed = {(*one.key[:3], one.implementation): one.median for one in run}
    for op, name, case, asked, unit in ASKED:
        ours, limit = (seconds_of(each, h200) for each in work(op, name, case, t, 2))
        of_run = ((op, name, *_as_measured(case)), (op, name, case.split(",")[0], LIMIT))
        then, its_limit = (timed.get(key) for key in of_run)
        if unit == "×":
            least = lora_limit(h200, t, shape(name, "cuda").d, LORA_RANKS[op]) if op in LORA_RANKS else 1
            over = f"{then / its_limit:.2f}" if then and its_limit else ""
            figures = f"≤ {asked:.2f}", f"{least:.2f}", f"{ours / limit:.2f}", over
        else:
            figures = f"≤ {_time(asked / 1e6)}", _time(limit), _time(ours), _time(then) if then else ""
        yield op, name, case, *figures
    yield from _small_work(h200)
    for what, asked, seconds, then in _layers_and_steps(h200, t):
        yield what, "nllb-600m", "tier 1, LoRA r = 16 on q and v", f"≤ {asked}", "", _time(seconds), then


def _small_work(device: Device) -> Iterator[tuple[str, ...]]:
    """The targets of a token over a quantized weight (bitsandbytes' time) and of quantizing a weight (three copies)."""
    run = run_of(H200_RESULTS, "ops").measurements
    of_run = {(one.op, one.case, one.tokens): one.median for one in run if one.implementation == "ours"}
    for storage, asked in (("int8", 39), ("nf4", 19)):
        op, case = "quantized_project", f"{storage} d x d"
        ours, limit = (seconds_of(each, device) for each in work(op, "nllb-600m", case, 1, 2))
        figures = f"≤ {asked} µs", _time(limit), _time(ours), _time(of_run[op, case, 1])
        yield op, "nllb-600m", f"{case}, one token", *figures
    copy = seconds_of(counts.streams(2, 4096 * 1024, 2), device)
    for storage in ("int8", "nf4"):
        ours = seconds_of(counts.quantize(4096, 1024, storage, 2), device)
        then = next(
            one.median for one in run if (one.op, one.case, one.implementation) == ("quantize", storage, "ours")
        )
        yield "quantize", "nllb-600m", storage, "≤ 24 µs", _time(copy), _time(ours), _time(then)


def _as_measured(case: str) -> tuple[str, str]:
    """Returns (case, implementation) of a benchmark; that of the loss has its bytes in the implementation's name."""
    if case.endswith("300 MiB of logits"):
        return case.split(",")[0], "ours, 300 MiB of logits"
    return case.removesuffix(", 32 MiB of logits"), "ours"


def _layers_and_steps(device: Device, t: int) -> Iterator[tuple[str, str, float, str]]:
    """(what, asked, predicted seconds of the device, measured) of layers and of a step with a loss in 300 MiB."""
    layers = {(one.case, one.implementation): one for one in run_of(H200_RESULTS, "layers").measurements}
    s = shape("nllb-600m", "cuda")
    sides = {"encoder": lean_step.encoder_layer(s, t), "decoder": lean_step.decoder_layer(s, t, t)}
    for (side, ops), asked in zip(sides.items(), ("800 µs", "1.15 ms"), strict=True):
        then = layers[f"{side} LoRA r=16", "ours"].median
        yield f"one {side} layer", asked, seconds_of(lean_step.total(ops), device), _time(then)
    parts = lean_step.step("nllb-600m", t, t, 300 << 20)
    yield "a whole step, by the clock", "45 ms", sum(seconds_of(part, device) for part in parts.values()), ""


MEASURED_HEAD = (
    "op", "shape", "case", "limit", "ours", "ours / limit", "predicted now", "fastest other", "ours, wall",
    "the other, wall",
)  # fmt: skip


def measured_rows(run: Run) -> Iterator[tuple[str, ...]]:
    """Yields a row for each case of a card's run: the device's times, and with the host's ("wall")."""
    expected = {one.key: predicted_seconds for one, predicted_seconds in against(run)}
    for case in (case for cases in by_op(run.measurements).values() for case in cases):
        limit = next(one for one in case if one.kind == LIMIT)
        others = [one for one in case if one.kind == "peer"]
        other = min(others, key=lambda one: one.median) if others else None
        beside = (f"{spelled(other.median)} ({other.implementation})", spelled(_wall(other))) if other else ("", "")
        names = (limit.op, limit.shape, limit.case + (", one token" if limit.tokens == 1 else ""))
        ours = [one for one in case if one.is_ours]
        if not ours:
            yield *names, spelled(limit.median), "not timed", "", "", beside[0], "", beside[1]
        for one in ours:
            more = one.implementation.removeprefix("ours")
            now = spelled(expected[one.key]) if one.key in expected else ""
            figures = (spelled(one.median), f"{one.median / limit.median:.2f}", now, beside[0])
            yield *names[:2], names[2] + more, spelled(limit.median), *figures, spelled(_wall(one)), beside[1]


def _wall(one: Measurement) -> float:
    """Returns the seconds by the wall, which every measurement of a card has."""
    assert one.wall is not None, one.title
    return one.wall


LAYER_HEAD = ("layer", "implementation", "device", "over the frozen layer", "wall", "over the frozen layer's")


def layer_rows(run: Run) -> Iterator[tuple[str, ...]]:
    for case in by_op(run.measurements)["layer"]:
        limit = next(one for one in case if one.kind == LIMIT)
        for one in case:
            name = "frozen, the model's own" if one is limit else one.implementation
            ratios = (f"{one.median / limit.median:.2f}", f"{_wall(one) / _wall(limit):.2f}")
            times = (f"{one.median * 1e3:.2f} ms", f"{_wall(one) * 1e3:.1f} ms")
            yield f"{one.shape} {one.case}", name, times[0], ratios[0], times[1], ratios[1]


def write_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head = ("what", "shape", "case", "asked", "limit", "predicted", "measured at aaa4494")
    text = _filled(text, "targets", [head, *targets()], 4)
    ops, layers = (run_of(H200_RESULTS, name) for name in ("ops", "layers"))
    text = _filled(text, "layers", [LAYER_HEAD, *layer_rows(layers)], len(LAYER_HEAD) - 2)
    text = _filled(text, "measured", [MEASURED_HEAD, *measured_rows(ops)], len(MEASURED_HEAD) - 3)
    text = _filled(text, "replaced", [("op", "case", "what was measured at aaa4494", "now"), *REPLACED], 0)
    text = _filled(text, "predictions", [("op", "shape", "case", *DEVICES), *rows()], len(DEVICES))
    table: list[tuple[str, ...]] = [
        ("card", "bf16, TFLOP/s", "fp32, TFLOP/s", "memory, TB/s", "L2, MiB", "products reach", "copies reach")
    ]
    for name, device in DEVICES.items():
        rates = (device.bf16 / 1e12, device.fp32 / 1e12, device.bandwidth / 1e12, device.l2 >> 20)
        fractions = (f"{device.products:.0%}", f"{device.copies:.0%}")
        table.append((name, *(f"{rate:g}" for rate in rates), *fractions))
    DOCUMENT.write_text(_filled(text, "cards", table, 6), encoding="utf-8")


def _filled(text: str, name: str, lines: list[tuple[str, ...]], numbers: int) -> str:
    """Returns ``text`` with the table of ``name``; the last ``numbers`` columns are figures."""
    begin, end = f"<!-- {name}: python -m bench.model --markdown -->", f"<!-- end of {name} -->"
    return markdown.filled(text, begin, end, markdown.table(lines, numbers))
