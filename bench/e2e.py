"""How long does a prompt take to become sound? `python bench/e2e.py [--model nano] [--repeats 5]`

One process per clip length: loading, then generations with the model's default settings, split by stage; memory is
the process's peak. Times are wall clock, medians over the repeats after one warm-up.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

from results import save, spread, table

STAGES = ("text", "denoise", "decode", "total")
PROMPT = "calm piano with warm strings, 84 bpm"


def measure(model: str, seconds: float, repeats: int) -> dict[str, Any]:
    """Run in a fresh process: one row."""
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
        "model": model, "seconds": seconds, "dtype": pipeline.precision,
        "steps": len(plan.levels) - 1, "sampler": plan.sampler, "guidance": plan.guidance.scale,
        "load_s": loaded, "first_clip_s": first, "stages": stages,
        "real_time_factor": seconds / stages["total"]["median"],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--seconds", type=float, nargs="+", default=[8.0, 32.0, 95.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="e2e-cpu", help="bench/results/NAME.json")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)  # the measuring process itself
    a = parser.parse_args()
    if a.one is not None:
        print(json.dumps(measure(a.model, a.one, a.repeats)))
        return
    rows = []
    for seconds in a.seconds:
        command = [sys.executable, __file__, "--model", a.model, "--repeats", str(a.repeats), "--one", str(seconds)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    path = save(a.name, rows)
    print(render(rows))
    print(path)


def render(rows: list[dict[str, Any]]) -> str:
    """The table that the README shows."""
    header = ["clip", "text", "transformer", "decode", "total", "real-time factor", "first clip in a new process",
              "peak memory"]  # fmt: skip
    cells = []
    for r in rows:
        stages = [f"{r['stages'][s]['median']:.2f} s" for s in STAGES]
        cells.append([f"{r['seconds']:g} s stereo", *stages, f"{r['real_time_factor']:.1f}",
                      f"{r['first_clip_s']:.1f} s", f"{r['peak_memory_mib']:.0f} MiB"])  # fmt: skip
    return table(header, cells)


if __name__ == "__main__":
    main()
