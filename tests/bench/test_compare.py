"""What became slower: pairs, noise, threshold, warnings, exit codes."""

from __future__ import annotations

import pytest
from petl_mt.cli import main
from result_files import entry

from bench.show import medians
from bench.show.compare import compare, differences, paired
from bench.show.medians import load

BASE = [entry("limit", 0.010), entry("ours", 0.020), entry("eager", 0.030)]


def test_a_raw_result_beside_a_table(result_file, capsys):
    """Six digits are enough to find nothing changed, and the wall's quartiles stand in the table."""
    path = result_file("ops.json", [entry("ours", 0.02, wall_seconds=0.1, wall_samples=[0.1, 0.11, 0.1, 0.09, 0.1])])
    slow = result_file("slow.json", [entry("ours", 0.02, wall_seconds=0.2, wall_samples=[0.2] * 5)])
    table = medians.add(path.parent, load(path))
    assert main(["bench", "compare", str(table), str(path)]) == 0
    assert main(["bench", "compare", f"{table}@01234", str(slow)]) == 1
    assert "wall" in capsys.readouterr().out


def test_equal_runs(result_file, capsys):
    a, b = result_file("a.json", BASE), result_file("b.json", BASE)
    assert main(["bench", "compare", str(a), str(b)]) == 0
    out, err = capsys.readouterr()
    assert "3 compared; of ours, 0 slower" in out and err == ""


def test_ours_slower_is_an_error_and_comes_first(result_file, capsys):
    a = result_file("a.json", BASE)
    b = result_file("b.json", [entry("limit", 0.010), entry("ours", 0.024), entry("eager", 0.015)])
    assert main(["bench", "compare", str(a), str(b)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[-2:] == ["1.200", "slower"] and "ours" in lines[2]
    assert lines[4].split()[-2:] == ["0.500", "faster"] and "eager" in lines[4]
    assert main(["bench", "compare", str(a), str(b), "--threshold", "25%"]) == 0
    assert main(["bench", "compare", str(b), str(a)]) == 0  # the other way round, ours became faster


@pytest.mark.parametrize(("implementation", "code"), [("ours", 1), ("tier 2", 1), ("eager", 0), ("limit", 0)])
def test_only_what_is_ours_counts(result_file, implementation, code):
    a = result_file("a.json", [entry(implementation, 0.020)])
    b = result_file("b.json", [entry(implementation, 0.040)])
    assert compare(a, b) == code


@pytest.mark.parametrize(("iqr", "rounds", "code"), [(0.001, 15, 1), (0.005, 15, 0), (0.001, 4, 1), (0.002, 4, 0)])
def test_noise(result_file, iqr, rounds, code):
    """20 against 24 ms: quartiles 0.5 ms to either side are apart, 2.5 ms are not; of few samples the extremes."""
    a = result_file("a.json", [entry("ours", 0.020, iqr=iqr, rounds=rounds)])
    b = result_file("b.json", [entry("ours", 0.024, iqr=iqr, rounds=rounds)])
    assert compare(a, b) == code


def test_what_is_slower_by_the_wall_alone_counts(result_file, capsys):
    def run(name: str, wall: float):
        samples = [wall, 1.01 * wall, 0.99 * wall, wall, wall]
        return result_file(name, [entry("ours", 0.02, wall_seconds=wall, wall_samples=samples)])

    a, slow = run("a.json", 0.1), run("slow.json", 0.2)
    assert main(["bench", "compare", str(a), str(slow)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "wall" in lines[2] and lines[2].split()[-2:] == ["2.000", "slower"]
    assert "device" in lines[3] and lines[3].split()[-2:] == ["1.000", "noise"]
    assert compare(a, run("same.json", 0.1)) == 0
    # a file from before samples were kept says nothing of the wall
    assert compare(a, result_file("old.json", [entry("ours", 0.02, wall_seconds=0.9)])) == 0
    assert "wall" not in capsys.readouterr().out.splitlines()[-2]


def test_pairs_by_every_key(result_file, capsys):
    a = result_file("a.json", [entry("ours", 0.02), entry("ours", 0.03, case="r=8"), entry("ours", 0.03, tokens=1)])
    b = result_file(
        "b.json", [entry("ours", 0.02), entry("ours", 0.03, dtype="float32"), entry("ours", 0.03, tokens=1)]
    )
    pairs, only_a, only_b = paired(load(a), load(b))
    assert len(pairs) == 2
    assert [one.case for one in only_a] == ["r=8"] and [one.dtype for one in only_b] == ["float32"]
    compare(a, b)
    out = capsys.readouterr().out
    assert f"only in {a}: 1: lora_linear nllb-600m r=8" in out and f"only in {b}: 1: " in out


def test_old_files_pair_by_their_group(result_file):
    old = entry("ours", 0.02)
    for name in ("shape", "case", "dtype", "tokens"):
        del old["extra_info"][name]
    a, b = result_file("a.json", [old]), result_file("b.json", [entry("ours", 0.04)])
    assert compare(a, b) == 1 and compare(a, result_file("same.json", [old])) == 0


def test_warns_in_one_line(result_file, capsys):
    a, b = result_file("a.json", BASE), result_file("b.json", BASE, threads=2, torch="2.14.0", dirty=True)
    assert differences(load(a), load(a)) == ""
    compare(a, b)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "threads 1 and 2, torch 2.13.0 and 2.14.0; B ran on a tree with changes" in err


def test_wrong_input_is_one_line_and_two(result_file, tmp_path, capsys):
    a = str(result_file("a.json", BASE))
    other = str(result_file("other.json", [entry("ours", 0.1, op="attention")]))
    text = tmp_path / "text.json"
    text.write_text("no JSON")
    wrong = {
        (a, str(tmp_path / "missing.json")): "missing.json: no such file",
        (a, str(text)): "text.json: no JSON",
        (a, a): f"{a} and {a}: the same file; expected those of two runs",
        (a, other): "no measurement in common",
        (a,): "compare: 1 files; expected two",
        (a, a, "--threshold", "5"): "--threshold '5': expected a percentage",
        (a, a, "--only", "x"): "--only belongs to",
    }
    for words, message in wrong.items():
        assert main(["bench", "compare", *words]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
