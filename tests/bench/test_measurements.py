"""Result files as records: what is read, what follows, what is refused."""

from __future__ import annotations

import json
from dataclasses import astuple, replace

import pytest
from result_files import CHECKOUT, entry

from bench.show import figures, medians
from bench.show.measurements import Times
from bench.show.medians import load, load_folder
from bench.show.table import case_table, render
from petl_kernels.errors import InputError


def test_figures_that_follow(result_file):
    run = load(result_file("ops.json", [entry("ours", 0.02, iqr=0.001), entry("limit", 0.01, flops=None)]))
    ours, limit = run.measurements
    assert ours.spread == pytest.approx(0.05)
    assert ours.flop_rate() == pytest.approx(1e11)
    assert ours.byte_rate() == pytest.approx(5e8)
    assert ours.intensity() == pytest.approx(200)
    # 2 GFLOP at 200 GFLOP/s take 10 ms, 10 MB at 20 GB/s 0.5 ms: the products are the roof, of a copy the bytes are.
    assert run.roofline(ours) == pytest.approx(0.5)
    assert run.roofline(limit) == pytest.approx(0.05)
    assert limit.intensity() is None


def test_roofline_without_rates_is_unknown(result_file):
    run = load(result_file("ops.json", [entry("ours", 0.02)], rates={}))
    assert run.roofline(run.measurements[0]) is None


def test_kinds(result_file):
    names = ["limit", "ours", "ours, graphs", "tier 2", "nf4", "PEFT, defaults", "eager", "Liger"]
    run = load(result_file("ops.json", [entry(name, 1.0) for name in names]))
    assert [one.kind for one in run.measurements] == ["limit", "ours", "ours", "ours", "ours", "peer", "peer", "peer"]


def test_the_repository_s_results_are_read():
    runs = load_folder(CHECKOUT / "bench" / "results" / "cpu")
    assert [run.name for run in runs] == ["ops", "layers", "step", "host"]
    assert all(one.median > 0 and one.group and one.op for run in runs for one in run.measurements)


def test_the_table_gives_back_what_was_measured(result_file):
    """Times to six digits, all else as it was: work, walls, figures of single benchmarks, machine, rates, commit."""
    walls = [0.05, 0.04, 0.06, 0.09, 0.05]
    odd = entry("PEFT, defaults", 1 / 3, tokens=None, case='a, "b"', group="by hand", of_peers={"PEFT, fp32": 1.5})
    entries = [entry("ours", 0.02, wall_seconds=0.05, wall_samples=walls, launches=7), entry("limit", 0.01), odd]
    run = load(result_file("ops.json", entries, dirty=True))
    folder = result_file("ops.json", entries).parent
    medians.add(folder, run)
    (found,) = medians.read(folder)
    assert (found.name, found.date, found.commit, found.rates) == ("ops", run.date, run.commit, run.rates)
    assert found.machine == {name: run.machine[name] for name in medians.MACHINE if name in run.machine}
    third = found.measurements[2]
    assert third.median == 0.333333 and third.of_peers == {"PEFT, fp32": 1.5} and third.group == "by hand"
    for one, expected in zip(found.measurements[:2], run.measurements, strict=False):
        assert astuple(one.times) == pytest.approx(astuple(expected.times), rel=1e-5)
        assert replace(one, times=expected.times) == expected


def test_the_table_has_the_history(result_file):
    """A later run is added and is the one that is shown; the same again takes its own place."""
    path = result_file("ops.json", [entry("ours", 0.02)])
    first = load(path)
    later = replace(load(result_file("later.json", [entry("ours", 0.03)])), name="ops", date="2026-11-22T10:00:00")
    later = replace(later, commit={**later.commit, "id": "fedcba9876543210"})
    for run in (first, later, first):
        table = medians.add(path.parent, run)
    assert len(medians.read(path.parent)) == 2
    medians.add(path.parent, later)
    assert [one.median for run in load_folder(path.parent) for one in run.measurements] == [0.03]
    assert [load(f"{table}{at}").measurements[0].median for at in ("", "@0123", "@fedcba987")] == [0.03, 0.02, 0.03]
    with pytest.raises(InputError, match="no run at commit 'abc'"):
        load(f"{table}@abc")


def test_a_table_without_its_runs_is_refused(result_file):
    path = result_file("ops.json", [entry("ours", 0.02)])
    table = medians.add(path.parent, load(path))
    (path.parent / "runs.jsonl").unlink()
    with pytest.raises(InputError, match="medians.csv: .*; expected a table that petl-mt bench has written"):
        load(table)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"benchmarks": [{}]}', '"text"', "\x00"])
def test_wrong_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(InputError, match="wrong.json: no "):
        load(path)


def test_a_median_of_nothing_is_refused(tmp_path, result_file):
    path = result_file("ops.json", [entry("ours", 1.0)])
    broken = json.loads(path.read_text())
    broken["benchmarks"][0]["stats"]["median"] = float("nan")
    path.write_text(json.dumps(broken))
    with pytest.raises(InputError, match="ops.json"):
        load(path)


def test_a_folder_without_results_is_refused(tmp_path):
    (tmp_path / "budget.json").write_text("[]")
    with pytest.raises(InputError, match="no result of petl-mt bench"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00 ns"),
        (2.5e-9, "2.50 ns"),
        (9.996e-6, "10.0 µs"),
        (6.78e-3, "6.78 ms"),
        (61.25, "61.2 s"),
    ],
)
def test_seconds(value, text):
    assert figures.seconds(value) == text


def test_sizes_and_rates():
    assert [figures.size(n) for n in (12, 1536, 3 << 20, 5 << 30)] == ["12 B", "1.50 KiB", "3.00 MiB", "5.00 GiB"]
    assert figures.rate(215e9, "FLOP/s") == "215 GFLOP/s"
    assert figures.rate(3.35e12, "B/s") == "3.35 TB/s"


def test_table_of_a_case(result_file):
    times = {"PEFT, defaults": 0.04, "ours": 0.02, "limit": 0.01}
    run = load(result_file("ops.json", [entry(name, time) for name, time in times.items()]))
    head, rows = case_table(run.measurements, run)
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert [row[0] for row in rows] == ["limit", "ours", "PEFT, defaults"]  # fastest first
    assert by_name["ours"] == {
        "implementation": "ours",
        "median": "20.0 ms",
        "spread": "1.0%",
        "/ limit": "2.00",
        "/ PEFT, defaults": "0.50",
        "GFLOP/s": "100",
        "GB/s": "0.50",
        "roofline": "50%",
        "peak memory": "3.00 MiB",
    }


def test_steps_in_turn_stand_beside_peft_by_their_rounds(result_file):
    """Medians of a machine that drifts say something else."""
    ours = entry("ours", 0.02, of_peers={"PEFT, defaults": 0.7})
    run = load(result_file("step.json", [ours, entry("PEFT, defaults", 0.04), entry("PEFT, fp32", 0.05)]))
    head, rows = case_table(run.measurements, run)
    first = dict(zip(head, rows[0], strict=True))
    assert (first["/ PEFT, defaults"], first["/ PEFT, fp32"]) == ("0.70", "0.40")


def test_table_of_a_card_has_the_wall_beside_the_device(result_file):
    """Twice PEFT's time by the wall in half of its time on the device: both ratios stand there."""
    times = {"ours": (0.01, 0.08), "PEFT, defaults": (0.02, 0.04), "limit": (0.005, 0.02)}
    entries = [entry(name, device, wall_seconds=wall) for name, (device, wall) in times.items()]
    run = load(result_file("ops.json", entries + [entry("eager", 0.03)]))
    head, rows = case_table(run.measurements, run)
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    ours = by_name["ours"]
    assert (ours["device"], ours["wall"]) == ("10.0 ms", "80.0 ms")
    assert (ours["/ PEFT, defaults"], ours["wall / PEFT, defaults"]) == ("0.50", "2.00")
    assert (ours["/ limit"], ours["wall / limit"]) == ("2.00", "4.00")
    assert by_name["eager"]["wall"] == by_name["eager"]["wall / limit"] == ""
    assert "median" not in head


def test_the_wall_as_a_measurement_of_its_own(result_file):
    walls = [0.05, 0.04, 0.06, 0.09, 0.05]
    entries = [entry("ours", 0.01, wall_seconds=0.05, wall_samples=walls), entry("eager", 0.02, wall_seconds=0.03)]
    ours, eager = load(result_file("ops.json", entries)).measurements
    wall = ours.by_the_wall()
    assert wall.times == Times(0.05, 0.05, 0.06, 0.04, 0.09, 5)
    assert wall.key == ours.key and eager.wall == 0.03 and eager.by_the_wall() is None


def test_plain_text_has_no_escapes_and_terminals_fit():
    head, rows = ["name", "time", "empty"], [["ours", "1.00 ms", ""], ["a long name of a peer", "2.00 ms", ""]]
    plain = render("title", head, rows, terminal=False, width=20)
    assert (
        plain
        == "title\nname                      time\nours                   1.00 ms\na long name of a peer  2.00 ms\n"
    )
    assert "\x1b[" in render("title", head, rows, terminal=True, width=80)
