"""Time prompt to samples with a model's default settings: `python -m bench.e2e [--model nano] [--repeats 5]`.

Each clip length is measured in a process of its own: loading, then one clip as warm-up, then the repeats. Times are
wall clock, medians, split by stage; memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

from bench.results import ROOT, save, spread, table

STAGES = ("text", "denoise", "decode", "total")
PROMPT = "calm piano with warm strings, 84 bpm"


def measure(model: str, seconds: float, repeats: int) -> dict[str, Any]:
    """Return the row of one length; runs in a new process, so that loading and peak memory are its own."""
    begin = time.perf_counter()
    import presto_rt

    pipeline = presto_rt.load(model)
    loaded = time.perf_counter() - begin
    pipeline.generate(PROMPT, seconds=seconds, seed=0)
    first = time.perf_counter() - begin
    runs = [pipeline.generate(PROMPT, seconds=seconds, seed=i).timings for i in range(1, repeats + 1)]
    stages = {s: spread([r[s] for r in runs]) for s in STAGES}
    plan = pipeline.plan(seconds)
    return {
        "model": model,
        "seconds": seconds,
        "dtype": pipeline.backend.precision.name,
        "steps": plan.steps,
        "sampler": plan.sampler,
        "guidance": plan.guidance.scale,
        "load_s": loaded,
        "first_clip_s": first,
        "stages": stages,
        "real_time_factor": seconds / stages["total"]["median"],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--seconds", type=float, nargs="+", default=[8.0, 32.0, 95.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="e2e-cpu", help="bench/results/NAME.json")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)  # in the process that measures
    a = parser.parse_args()
    if a.one is not None:
        print(json.dumps(measure(a.model, a.one, a.repeats)))
        return
    rows = []
    for seconds in a.seconds:
        command = [
            sys.executable,
            "-m",
            "bench.e2e",
            "--model",
            a.model,
            "--repeats",
            str(a.repeats),
            "--one",
            str(seconds),
        ]
        rows.append(json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout))
    path = save(a.name, rows)
    print(render(rows))
    print(path)


def render(rows: list[dict[str, Any]]) -> str:
    """Return the table of three clip lengths in docs/cpu.md."""
    header = [
        "clip",
        "text",
        "transformer",
        "decode",
        "total",
        "real-time factor",
        "first clip in a new process",
        "peak memory",
    ]
    cells = []
    for r in rows:
        stages = [f"{r['stages'][s]['median']:.2f} s" for s in STAGES]
        cells.append(
            [
                f"{r['seconds']:g} s stereo",
                *stages,
                f"{r['real_time_factor']:.1f}",
                f"{r['first_clip_s']:.1f} s",
                f"{r['peak_memory_mib']:.0f} MiB",
            ]
        )
    return table(header, cells)


if __name__ == "__main__":
    main()
