"""Speed of the kernels against eager torch, torch.compile and other libraries, in one table and one JSON file.

    python -m bench.kernels [--gpu] [--minutes 7] [--operators adaln gemm ...] [--compile] [--untested]

Without --gpu: the CPU rows (plain torch) at the shapes of nano, and a list of the rows that need a GPU. With --gpu: the
GPU tests, then the Triton kernels at the shapes of small and medium, torch.compile last. On a machine without a GPU,
--gpu is a dry run: it compiles every kernel, collects the tests and runs every step at a tiny shape, without timing.

Each test file and operator runs in a separate process with a time limit, so one that fails, hangs or breaks the GPU's
context loses only its own rows. The JSON file is written after every operator. Requires torch, Triton, pytest and
hypothesis.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.kernels.harness import Ceiling, cases, presets
from bench.results import machine, save, table
from presto_rt.kernels import OPERATORS

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "kernels"
TEST_FILES = {"snake_conv1d": "test_convolutions.py", "conv_transpose1d": "test_convolutions.py"}
#: an H200 as measured: bytes/s of a copy, bf16 operations/s of a large product
H200 = Ceiling(4.3e12, 790e12)
NOTHING = "nothing to run here"  # verdict of a file without tests for this device
TEST_SHARE = 0.45  # of the minutes; the rest is for timing
OPERATOR_SECONDS = 90


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark of the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Speed of the kernels.")
    parser.add_argument("--gpu", action="store_true", help="the GPU rows; a dry run where there is no GPU")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which nothing new starts on a GPU (7)")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--compile", action="store_true", help="torch.compile rows on the CPU too (slow to build)")
    parser.add_argument("--untested", action="store_true", help="skip the tests; then no speed-up is printed")
    parser.add_argument("--floors", action="store_true", help="only print floors and what is reached")
    options = parser.parse_args(arguments)
    if options.floors:
        print(floors(options.operators))
        return 0
    if options.gpu and not torch.cuda.is_available():
        return dry_run(options.operators)
    device = "cuda" if options.gpu else "cpu"
    end = time.monotonic() + (60 * options.minutes if options.gpu else 1e9)
    tests = {} if options.untested else run_tests(options.operators, device, TEST_SHARE * (end - time.monotonic()))
    passes = [(True, "default" if options.compile else "")]
    if options.gpu:  # torch.compile of everything last: it takes longest
        passes = [(True, ""), (False, "max-autotune-no-cudagraphs")]
    name = "kernels-" + "-".join(str(machine()["device"]).replace("(R)", "").replace(",", "").split())
    return time_all(options.operators, device, presets(device), passes, tests, end, name)


def time_all(
    operators: Sequence[str],
    device: str,
    sizes: Sequence[str],
    passes: Sequence[tuple[bool, str]],
    tests: dict[str, str],
    end: float,
    name: str,
    dry: bool = False,
) -> int:
    """Time all operators, print the table and update bench/results/NAME.json after each; return 1 if any fails.

    Args:
        operators: names from OPERATORS.
        device: "cpu" or "cuda".
        sizes: presets that give the shapes.
        passes: passes over all operators, each (True for the case's listed ways, mode of torch.compile or "").
        tests: verdict of pytest by file.
        end: time.monotonic() after which nothing starts.
        name: of the JSON file.
        dry: neither print nor write results.
    """
    job: dict[str, Any] = {"device": device, "presets": list(sizes), "seconds": 0 if dry else 0.5}
    measured, why = collect(job | {"operator": "ceiling", "size": "dry" if dry else device}, end - time.monotonic())
    if not measured:
        print(f"the machine's own rates could not be measured: {why}", file=sys.stderr)
        return 1
    (top,) = measured
    rates = f"copy {top['bandwidth'] / 1e9:.0f} GB/s, bf16 product {top['product'] / 1e12:.3g} TFLOP/s"
    print("ready: the machine's own rates" if dry else f"{machine()['device']}: {rates}", flush=True)
    rows: list[dict[str, Any]] = []
    failures = [f"{file}: {said}" for file, said in tests.items() if not is_green(said) and said != NOTHING]
    for own, mode in passes:
        for operator in operators:
            work = job | {"operator": operator, "own": own, "compile": mode, "ceiling": top}
            limit = min(end - time.monotonic(), OPERATOR_SECONDS if device == "cuda" else 3600)
            found, why = collect(work, limit)
            rows += found
            failures += [f"{operator}{'' if own else ' compiled'}: {why}"] if why else []
            failures += [" ".join(line(row)[:4]) for row in found if "left_out" in row and row["way"] in OWN]
            if dry:
                ways = [row["way"] for row in found if "left_out" not in row]
                print(f"ready: {operator}: {', '.join(dict.fromkeys(ways))}", flush=True)
                continue
            judge(rows, tests)
            for row in found:
                print("  ".join(line(row)), flush=True)
            path = save(name, {"ceiling": top, "tests": tests, "failures": failures, "table": rows})
    if not dry:
        ordered = sorted(rows, key=lambda row: (row["operator"], row["shape"]))  # stable: ways stay in order
        print(table(HEADER, [line(row) for row in ordered]), f"written to {path}", sep="\n")
        if device == "cpu":
            print("Needs a GPU (--gpu): the Triton rows of every operator, SDPA's flash and cuDNN kernels, flash-attn.")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def collect(job: dict[str, Any], limit: float) -> tuple[list[dict[str, Any]], str]:
    """Run a worker on `job` for at most `limit` seconds; return its rows and the reason of a failure, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        code, output = run([sys.executable, "-m", "bench.kernels.worker", str(file), json.dumps(job)], limit)
        rows = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    if code == 0:
        return rows, ""
    last = (output.strip().splitlines() or ["it said nothing"])[-1]
    return rows, f"no time left after {limit:.0f} s" if code is None else f"exit status {code}: {last[:300]}"


def run(command: list[str], limit: float) -> tuple[int | None, str]:
    """Run a command in the repository's root; return (exit status, output), status None after `limit` seconds."""
    if limit <= 0:
        return None, ""
    # A new session, so that processes that it started (compilers) are stopped with it.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run_tests(operators: Sequence[str], device: str, limit: float) -> dict[str, str]:
    """Return pytest's summary line by file: the operators' files on a CPU, all kernel tests in parallel on a GPU.

    No speed-up is printed for an operator whose file is not green.
    """
    files = sorted({test_file(operator) for operator in operators})
    if device == "cuda":
        files = sorted({*files, *(path.name for path in TESTS.glob("test_*.py"))})
    end = time.monotonic() + limit

    def verdict(file: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)]
        code, output = run(command + (["-m", "gpu"] if device == "cuda" else []), end - time.monotonic())
        if code in (None, 5):
            return "no time left" if code is None else NOTHING
        said = (output.strip().splitlines() or ["it said nothing"])[-1].strip("= ")
        failed = re.findall(r"^(?:FAILED|ERROR) (.*)", output, re.MULTILINE)
        return "; ".join([f"red: {said}", *failed])[:1000] if code else said

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2) if device == "cuda" else 1) as pool:
        found = dict(zip(files, pool.map(verdict, files), strict=True))
    for file, said in found.items():
        print(f"{file}: {said}", flush=True)
    return found


def test_file(operator: str) -> str:
    """Return the name of an operator's test file."""
    return TEST_FILES.get(operator, f"test_{operator}.py")


def is_green(verdict: str) -> bool:
    """Return True if tests passed and none failed; a file whose tests were all skipped is not green."""
    return re.match(r"[1-9]\d* passed", verdict) is not None


def judge(rows: list[dict[str, Any]], tests: dict[str, str]) -> None:
    """Add to each row its speed-up over the eager row of the same shape, or the reason why it has none."""
    timed = [row for row in rows if "seconds" in row]
    eager = {(row["operator"], row["shape"]): row["seconds"]["median"] for row in timed if row["way"] == "eager"}
    for row in timed:
        said, base = tests.get(test_file(row["operator"])), eager.get((row["operator"], row["shape"]))
        row["speedup_over_eager"] = None
        if said is None or not is_green(said):
            row["verdict"] = "untested" if said is None else "tests red"
        elif base is None:
            row["verdict"] = "-"
        else:
            row["speedup_over_eager"] = base / row["seconds"]["median"]
            row["verdict"] = f"{row['speedup_over_eager']:.2f}"


OWN = ("eager", "presto")  # the ways that must run; a peer may be missing
HEADER = ["operator", "shape", "way", "median us", "p90 us", "GB/s", "TFLOP/s", "of floor", "x eager"]


def line(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row."""
    way = row["way"] + (f" ({row['chosen']})" if "chosen" in row else "")
    if "left_out" in row:
        return [row["operator"], row["shape"], way, f"left out: {row['left_out']}", *["-"] * 5]
    times = [f"{row['seconds'][key] * 1e6:.1f}" for key in ("median", "p90")]
    rates = [f"{row['gigabytes_per_second']:.0f}", f"{row['teraflops']:.3g}", f"{row['of_floor']:.2f}"]
    return [row["operator"], row["shape"], way, *times, *rates, row["verdict"]]


def floors(operators: Sequence[str], top: Ceiling = H200) -> str:
    """Return a table of bytes, operations and floors at small and medium, with measured times from bench/results."""
    reached: dict[str, dict[tuple[str, str], float]] = {}
    for path in sorted((ROOT / "bench" / "results").glob("kernels-NVIDIA-*.json")):
        ours = [
            row for row in json.loads(path.read_text())["rows"]["table"] if row["way"] == "presto" and "seconds" in row
        ]
        gpu = path.stem.removeprefix("kernels-")
        reached[gpu] = {(row["operator"], row["shape"]): row["seconds"]["median"] for row in ours}
    rows = []
    for operator in operators:
        for case in (case for preset in presets("cuda") for case in cases(operator, "meta", preset)):
            moved, computed = f"{case.moved / 1e6:.2f}", f"{case.operations / 1e9:.3g}"
            limit = "bytes" if top.floor(case) == case.moved / top.bandwidth else "products"
            row = [operator, case.shape, moved, computed, f"{top.floor(case) * 1e6:.2f}", limit]
            seconds = [found.get((operator, case.shape)) for found in reached.values()] or [None]
            rows.append([*row, *("not measured" if s is None else f"{s * 1e6:.2f}" for s in seconds)])
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]  # sizes that both presets share
    columns = [f"us on {gpu}" for gpu in reached] or ["us on a GPU"]
    return table(["operator", "shape", "MB moved", "GFLOP", "floor us", "set by", *columns], rows)


def dry_run(operators: Sequence[str]) -> int:
    """Run all parts of the GPU run that a CPU can do; return 1 if any fails."""
    print("No CUDA GPU here: dry run, nothing is timed.", flush=True)
    code, output = run([sys.executable, "-m", "presto_rt.kernels.report", "--arch", "sm_90", *operators], 1800)
    print(output if code else f"ready: {output.count('sm_90')} kernels compile for sm_90, none spills", flush=True)
    listed, output = run([sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", str(TESTS)], 600)
    print(f"{'ready' if not listed else 'FAILED'}: tests: {(output.strip().splitlines() or [''])[-1]}", flush=True)
    timed = time_all(operators, "cpu", ["tiny"], [(True, "aot_eager")], {}, time.monotonic() + 3600, "", dry=True)
    return 1 if code or listed or timed else 0


if __name__ == "__main__":
    sys.exit(main())
