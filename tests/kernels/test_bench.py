"""bench.kernels: no speed-up while tests fail, and a failing operator loses only its own rows."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from presto_rt.errors import InvalidInputError

ROOT = Path(__file__).parents[2]
TOP = {"bandwidth": 1e9, "product": 1e9}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.kernels.__main__ as module

    return module


def row(way, median):
    seconds = {"median": median, "p90": median}
    rates = {"gigabytes_per_second": 1.0, "teraflops": 1.0, "of_floor": 0.5}
    return {"operator": "pcm", "shape": "2x3", "way": way, "seconds": seconds, **rates}


@pytest.mark.parametrize(
    ("tests", "verdict"),
    [
        ({"test_pcm.py": "12 passed, 3 skipped in 1.00s"}, "2.00"),
        ({"test_pcm.py": "red: 1 failed, 11 passed in 1.00s; test_pcm.py::test_edges"}, "tests red"),
        ({"test_pcm.py": "3 skipped in 1.00s"}, "tests red"),
        ({"test_pcm.py": "no time left"}, "tests red"),
        ({"test_adaln.py": "12 passed in 1.00s"}, "untested"),
        ({}, "untested"),
    ],
)
def test_judge_gives_no_speed_up_unless_tests_are_green(bench, tests, verdict):
    rows = [row("eager", 2e-6), row("presto", 1e-6)]
    bench.judge(rows, tests)
    assert rows[1]["verdict"] == verdict
    assert rows[1]["speedup_over_eager"] == (2.0 if verdict == "2.00" else None)
    assert bench.line(rows[1])[-1] == verdict


def test_run_tests_reports_the_verdict_of_pytest(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "TESTS", tmp_path)
    bodies = {"pcm": "assert True", "adaln": "assert False, 'wrong number'", "gemm": "import pytest; pytest.skip('no')"}
    for operator, body in bodies.items():
        (tmp_path / f"test_{operator}.py").write_text(f"def test_it():\n    {body}\n")
    verdicts = bench.run_tests([*bodies, "attention"], "cpu", 300)
    green = [name for name in (*bodies, "attention") if bench.is_green(verdicts[f"test_{name}.py"])]
    assert green == ["pcm"]  # neither what fails, nor what is all skipped, nor what is not there
    assert "test_it" in verdicts["test_adaln.py"]  # says which


def test_time_all_reports_a_red_operator_and_continues(bench, monkeypatch, capsys):
    """One operator crashes half-way, another's tests are red: the third is timed, judged and written."""
    rows = {
        "adaln": [row("eager", 2e-6)],
        "gemm": [row("eager", 2e-6), row("presto", 1e-6)],
        "pcm": [row("eager", 2e-6), row("presto", 1e-6)],
    }
    rows = {operator: [found | {"operator": operator} for found in those] for operator, those in rows.items()}
    broken = {"adaln": "exit status 1: CUDA error: an illegal memory access was encountered"}

    def collect(job, limit):
        operator = job["operator"]
        return ([TOP], "") if operator == "ceiling" else (rows[operator], broken.get(operator, ""))

    saved = []
    monkeypatch.setattr(bench, "collect", collect)
    monkeypatch.setattr(bench, "save", lambda name, found: saved.append(json.loads(json.dumps(found))) or Path(name))
    tests = {"test_adaln.py": "4 passed in 1s", "test_gemm.py": "red: 1 failed in 1s", "test_pcm.py": "4 passed in 1s"}
    code = bench.time_all(list(rows), "cuda", ["small"], [(True, "")], tests, time.monotonic() + 60, "kernels-test")
    assert code == 1
    assert [len(found["table"]) for found in saved] == [1, 3, 5]  # written after every operator
    speedups = {(r["operator"], r["way"]): r["speedup_over_eager"] for r in saved[-1]["table"]}
    assert speedups[("pcm", "presto")] == 2.0
    assert speedups[("gemm", "presto")] is None
    printed = capsys.readouterr()
    assert "tests red" in printed.out
    assert "FAILED adaln: exit status 1: CUDA error" in printed.err


def test_collect_keeps_rows_after_a_crash_and_a_time_limit(bench, monkeypatch, tmp_path):
    """In the worker's process, with jobs that fail."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it would interpret a second of samples
    job = {"device": "cpu", "presets": ["tiny", "huge"], "own": True, "compile": "", "ceiling": TOP, "seconds": 0}
    found, why = bench.collect(job | {"operator": "pcm"}, 300)  # there is no preset "huge"
    assert [row["way"] for row in found] == ["eager", "presto"]
    assert why == "exit status 1: KeyError: 'huge'"
    assert bench.collect(job | {"operator": "pcm"}, 0.01) == ([], "no time left after 0 s")
    assert bench.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) == (None, "")


def test_time_case_keeps_other_ways_when_one_fails(bench, tmp_path):
    import torch

    from bench.kernels.harness import Case, Ceiling
    from bench.kernels.worker import time_case

    def broken(x):
        raise InvalidInputError("no such peer")

    ways = {"eager": torch.neg, "peer": broken, "presto": torch.neg}
    case = Case("pcm", "3", lambda: (torch.ones(3),), ways, 24, 3)
    options = {"device": "cpu", "own": True, "compile": "", "seconds": 0}
    time_case(case, Ceiling(**TOP), tmp_path / "rows", options)
    rows = [json.loads(text) for text in (tmp_path / "rows").read_text().splitlines()]
    assert [r["way"] for r in rows] == ["eager", "peer", "presto"]
    assert rows[1]["left_out"] == "InvalidInputError: no such peer"
    assert rows[0]["seconds"]["n"] >= 5
