"""Time prompt to 16-bit samples in host memory on a CUDA GPU: `python -m bench.e2e_gpu [--minutes 5]`.

The ladder: eager torch, torch.compile, torch.compile(mode="max-autotune") with CUDA graphs, ours, and ours with each
optimization switched off, all on the same untrained weights (timing does not depend on training). Then lengths,
batches, steps, layers, precisions, the larger model, and the same model with 80 network calls and guidance.

Each group runs in a process of its own with a time limit, and each row is written as soon as it is known. Times are
wall clock from the call to the array; stages are timed by CUDA events. Without a GPU the program is a dry run: it
executes every step at a tiny size, times nothing and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu_ways import STAGES, Case, Clip, baseline, eager_clips, floor, graph_clips, job_of, ours
from bench.results import ROOT, load, replace_section, save, table
from presto_rt.checkpoints.house import load_model
from presto_rt.checkpoints.model import Model
from presto_rt.loading import find_device

GROUPS = {"ours": 150, "first": 60, "eager": 60, "compile": 120, "medium": 60, "range": 120, "max-autotune": 240}
NOT_MEASURED = "not measured"


def cases(group: str, tiny: bool) -> list[Case]:
    """Return the rows of a group, at a tiny size for a dry run."""
    base = Case("ours", "tiny-random", 0.5, steps=2) if tiny else Case("ours")
    if group == "ours":
        from presto_rt.runtime.cuda.ops import OPERATORS

        off = [replace(base, way=f"ours without {part}") for part in ("the graph", *OPERATORS)]
        paper = replace(base, way="ours, 80 network calls", sampler="dpmpp_2m", steps=40, guidance=3.0)
        return [base, *off, paper, replace(base, dtype="fp8"), replace(base, dtype="float16")]
    if group == "range":
        return [
            *(replace(base, seconds=s) for s in ((0.3,) if tiny else (5.0, 95.0))),
            *(replace(base, clips=n) for n in ((2,) if tiny else (4, 16))),
            *(replace(base, steps=n) for n in ((1,) if tiny else (1, 2, 8))),
            *(replace(base, layers=share) for share in (("67%",) if tiny else ("50%", "75%", "90%"))),
            replace(base, guidance=3.0),
        ]
    if group == "medium":
        return [replace(base, model="tiny-random" if tiny else "medium-random")]
    return [replace(base, way=group)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90, p99 and the number of values."""
    ordered = sorted(values)
    at = {
        name: ordered[min(len(ordered) - 1, int(q * len(ordered)))]
        for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    return at | {"n": len(ordered)}


def measure(case: Case, clip: Clip, floor_seconds: float, runs: int, limit: float) -> dict[str, Any]:
    """Time `runs` clips, or at least 5 and as many as fit into `limit` seconds; return the row."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for seed in range(3):  # the first captures or compiles
        clip(seed)
        if seed == 0:
            first = time.perf_counter() - begin
    totals: list[float] = []
    stages: list[dict[str, float]] = []
    end = time.perf_counter() + limit
    while len(totals) < runs and (len(totals) < 5 or time.perf_counter() < end):
        start = time.perf_counter()
        _, taken = clip(3 + len(totals))
        totals.append(time.perf_counter() - start)
        stages.append(taken)
    row: dict[str, Any] = vars(case) | {"total": percentiles(totals), "first_s": first}
    row["stages"] = {name: percentiles([s[name] for s in stages])["p50"] for name in STAGES if name in stages[0]}
    row["real_time_factor"] = case.clips * case.seconds / row["total"]["p50"]
    row["memory_mib"] = torch.cuda.max_memory_reserved() / 2**20 if cuda else 0.0
    row["floor_s"] = floor_seconds
    row["of_floor"] = row["floor_s"] / max(row["stages"].get("denoise", 0.0), 1e-9)
    return row


def profile(clip: Clip, count: int = 15) -> list[dict[str, Any]]:
    """Return the kernels with the most GPU time, in microseconds a clip."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for seed in range(3):
            clip(seed)
        torch.cuda.synchronize()
    rows = sorted(profiled.key_averages(), key=lambda e: -e.self_device_time_total)
    return [{"kernel": e.key[:90], "us": e.self_device_time_total / 3, "calls": e.count / 3} for e in rows[:count]]


def group(name: str, path: Path, tiny: bool, runs: int, top: Any) -> None:
    """Measure all rows of a group in this process; append each to `path` as a line of JSON."""
    begin = time.perf_counter()
    device = find_device("auto")
    models: dict[str, Model] = {}
    clip: Clip | None = None
    for number, case in enumerate(cases(name, tiny)):
        try:
            clip = None  # it refers to the previous backend, whose memory would be counted
            if case.model not in models:
                models.clear()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            model = models.setdefault(case.model, load_model(case.model, device))
            is_graph = case.way.startswith("ours") or name == "first"
            pipeline = (ours if is_graph else baseline)(model, case, device)
            clip = (graph_clips if is_graph else eager_clips)(pipeline, case)
            if name == "first":
                clip(0)
                append(path, {"first_clip_s": time.perf_counter() - begin})
                return
            floor_seconds = floor(model, job_of(pipeline, case, 0), device, top)
            append(path, measure(case, clip, floor_seconds, runs, 0.0 if tiny else 8.0))
            if name in ("ours", "medium") and number == 0 and not tiny:
                append(path, {"profile": profile(clip), "of": f"{case.way}, {case.model}"})
        except Exception as error:  # an error costs its own row alone
            message = (str(error).splitlines() or [""])[0]
            append(path, vars(case) | {"left_out": f"{type(error).__name__}: {message}"[:300]})
            if tiny:
                raise


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one line of JSON to a file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ladder, or a dry run; return 0 if every group succeeded."""
    parser = argparse.ArgumentParser(prog="python -m bench.e2e_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="after which no group starts (5)")
    parser.add_argument("--runs", type=int, default=200, help="clips of each row (200)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--name", default="e2e-gpu", help="bench/results/NAME.json")
    parser.add_argument("--add", action="store_true", help="keep the rows of the groups that are not measured now")
    parser.add_argument("--document", action="store_true", help="only write the measured table into docs/gpu.md")
    parser.add_argument("--worker", nargs=2, metavar=("GROUP", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--ceiling", type=json.loads, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.document:
        write_document()
        return 0
    from bench.kernels.harness import Ceiling, ceiling

    if a.worker:
        group(a.worker[0], Path(a.worker[1]), False, a.runs, Ceiling(**a.ceiling))
        return 0
    if not torch.cuda.is_available():
        return dry_run(a.groups)
    top = ceiling("cuda", 1 << 28, 8192)
    end, left_out = time.monotonic() + 60 * a.minutes, {}
    found = [row for row in earlier(a.name) if row["group"] not in a.groups] if a.add else []
    with tempfile.TemporaryDirectory() as folder:
        for name in a.groups:
            path, limit = Path(folder) / name, min(GROUPS[name], end - time.monotonic())
            command = [
                sys.executable,
                "-m",
                "bench.e2e_gpu",
                "--worker",
                name,
                str(path),
                "--runs",
                str(a.runs),
                "--ceiling",
                json.dumps(vars(top)),
            ]
            left_out[name] = run(command, limit)
            rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            rows = [row | {"group": name} for row in rows]
            found += rows
            save(a.name, {"rows": found, "left_out": left_out, "ceiling": vars(top)})
            print(f"{name}: {len(rows)} rows {left_out[name]}", flush=True)
    print(render(load(a.name)))
    return 1 if any(reason.startswith("exit") for reason in left_out.values()) else 0


def earlier(name: str) -> list[dict[str, Any]]:
    """Return the rows of an earlier run."""
    data = load(name)
    return [] if data is None else list(data["rows"]["rows"])


def run(command: list[str], limit: float) -> str:
    """Run a group in a process of its own; return the reason in one line if it failed, else an empty string."""
    if limit < 20:
        return "no time left"
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=limit, stderr=subprocess.PIPE, text=True, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return "" if not done.returncode else f"exit {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"


def dry_run(groups: Sequence[str]) -> int:
    """Run every group at a tiny size on the CPU, in this process."""
    from bench.kernels.harness import Ceiling

    print("No CUDA GPU here: dry run of the end-to-end ladder, nothing is timed.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in groups:
            path = Path(folder) / name
            group(name, path, True, 1, Ceiling(1e11, 1e12))
            print(f"ready: {name}, {len(path.read_text().splitlines())} rows", flush=True)
    return 0


def title(row: dict[str, Any]) -> str:
    """Return a row's name: its way, and each setting that differs from small in bf16 with all layers."""
    parts = [
        row["way"],
        *([] if row["model"] == "small-random" else [row["model"]]),
        *([] if row["dtype"] == "bfloat16" else [row["dtype"]]),
        *([] if row["layers"] == "100%" else [f"{row['layers']} of the layers"]),
        *([] if row["guidance"] == 1.0 else ["guided"]),
    ]
    return ", ".join(parts)


def render(data: dict[str, Any] | None) -> str:
    """Return the table of docs/gpu.md; without data, its rows without numbers."""
    header = [
        "",
        "clip",
        "steps",
        "p50",
        "p90",
        "p99",
        "text / transformer / decode",
        "real-time factor",
        "of the floor",
        "memory",
    ]
    if data is None:
        shown = [
            c
            for g in ("eager", "compile", "max-autotune", "ours", "medium")
            for c in cases(g, False)
            if not c.way.startswith("ours without")
        ]
        return table(header, [[title(vars(c)), f"{c.seconds:g} s", str(c.steps), *[NOT_MEASURED] * 7] for c in shown])
    cells = []
    measured = data["rows"]["rows"]
    for r in (row for row in measured if "total" in row):
        clip = f"{r['seconds']:g} s" if r["clips"] == 1 else f"{r['clips']} x {r['seconds']:g} s"
        times = [f"{1000 * r['total'][p]:.1f} ms" for p in ("p50", "p90", "p99")]
        stages = " / ".join(f"{1000 * r['stages'][s]:.2f}" for s in STAGES if s in r["stages"])
        cells.append(
            [
                title(r),
                clip,
                str(r["steps"]),
                *times,
                stages,
                f"{r['real_time_factor']:.0f}",
                f"{r['of_floor']:.0%}",
                f"{r['memory_mib']:.0f} MiB",
            ]
        )
    first = next((row["first_clip_s"] for row in measured if "first_clip_s" in row), None)
    note = "" if first is None else f"\n\nFirst clip in a new process: {first:.1f} s."
    return table(header, cells) + note


def write_document() -> None:
    """Write the measured table, or that nothing was measured, into docs/gpu.md."""
    data = load("e2e-gpu")
    note = "On a CUDA GPU: not measured yet; `make bench-gpu` fills this table."
    if data is not None:
        note = (
            f"Prompt to 16-bit sound in host memory on {data['machine']['device']}, untrained weights of the "
            f"preset's shape (`{data['machine']['command']}`). The floor is the transformer's operations and bytes "
            "at the machine's own rates."
        )
    replace_section(ROOT / "docs" / "gpu.md", "e2e-gpu", f"{note}\n\n{render(data)}")


if __name__ == "__main__":
    sys.exit(main())
