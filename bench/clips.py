"""Time whole clips on a CPU: `python -m bench.clips [--seconds 8 32 95] [--repeats 20]`.

Each length is measured in a process of its own: loading, first clip, stages, peak memory. Then ten threads on one model
are compared with the same ten clips in sequence, and two processes at once with one process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from typing import Any

from bench.results import ROOT, save, spread, table

PROMPT = "calm piano with warm strings, 84 bpm"
STAGES = ("text", "denoise", "decode", "total")


def settings(a: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling settings as `Pipeline.generate` takes them."""
    return {"steps": a.steps, "sampler": a.sampler, "guidance": a.guidance}


def one(a: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return the row of one length; runs in a new process, so that loading and peak memory are its own."""
    begin = time.perf_counter()
    import presto_rt

    pipeline = presto_rt.load(a.model, device="cpu", dtype=a.dtype, threads=a.threads)
    loaded = time.perf_counter() - begin
    pipeline.generate(PROMPT, seconds=seconds, seed=0, **settings(a))
    first = time.perf_counter() - begin
    runs = [pipeline.generate(PROMPT, seconds=seconds, seed=i, **settings(a)).timings for i in range(1, a.repeats + 1)]
    plan = pipeline.plan(seconds, **settings(a))
    return {
        "seconds": seconds,
        "steps": plan.steps,
        "sampler": plan.sampler,
        "guidance": plan.guidance.scale,
        "threads": a.threads,
        "dtype": pipeline.backend.precision.name,
        "load_s": loaded,
        "first_clip_s": first,
        "stages": {s: spread([r[s] for r in runs]) for s in STAGES},
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def crowd(a: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Time ten threads on one model and the same clips in sequence, interleaved; runs in a new process.

    "equal" is True if every clip has the same samples, to the bit, both ways.
    """
    import numpy as np

    import presto_rt

    pipeline, count = presto_rt.load(a.model, device="cpu", dtype=a.dtype, threads=a.threads), 10
    sounds: dict[str, dict[int, Any]] = {"alone": {}, "together": {}}

    def make(kind: str, i: int) -> None:
        sounds[kind][i] = np.asarray(pipeline.generate(PROMPT, seconds=seconds, seed=i, **settings(a)).samples)

    def alone() -> None:
        for i in range(count):
            make("alone", i)

    def together() -> None:
        workers = [threading.Thread(target=make, args=("together", i)) for i in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    alone()
    together()
    times: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(max(3, a.repeats // 4)):
        for kind, function in (("alone", alone), ("together", together)):
            begin = time.perf_counter()
            function()
            times[kind].append(time.perf_counter() - begin)
    equal = all(np.array_equal(sounds["alone"][i], sounds["together"][i]) for i in range(count))
    return {"seconds": seconds, "threads": count, "equal": equal, **{kind: spread(t) for kind, t in times.items()}}


def in_process(flags: list[str], mode: str, seconds: float, processes: int = 1) -> list[dict[str, Any]]:
    """Run this program in new processes, all at once, and return the JSON object that each prints."""
    command = [sys.executable, "-m", "bench.clips", *flags, "--mode", mode, "--seconds", str(seconds)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{' '.join(command)} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seconds", type=float, nargs="+", default=[8.0, 32.0, 95.0])
    parser.add_argument("--crowd-seconds", type=float, default=8.0, help="length of the clips of the ten threads")
    parser.add_argument("--steps", type=int, help="steps, sampler and guidance: the model's own by default")
    parser.add_argument("--sampler")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--name", default="cpu-clips", help="bench/results/NAME.json; '-' writes no file")
    parser.add_argument("--mode", choices=["all", "one", "crowd"], default="all", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.mode != "all":
        print(json.dumps((one if a.mode == "one" else crowd)(a, a.seconds[0])))
        return
    flags = [
        text
        for key in ("model", "dtype", "steps", "sampler", "guidance", "threads", "repeats")
        if getattr(a, key) is not None
        for text in (f"--{key}", str(getattr(a, key)))
    ]
    result: dict[str, Any] = {"clips": [in_process(flags, "one", seconds)[0] for seconds in a.seconds]}
    result["crowd"] = in_process(flags, "crowd", a.crowd_seconds)[0]
    middle = a.seconds[len(a.seconds) // 2]
    result["pair"] = {"seconds": middle, "each": in_process(flags, "one", middle, processes=2)}
    print(render(result))
    if a.name != "-":
        print(save(a.name, result))


def render(result: dict[str, Any]) -> str:
    """Return the tables of docs/cpu.md."""
    rows = result["clips"]
    header = ["clip", *STAGES, "total, p90", "first clip in a new process", "peak memory"]
    cells = [
        [
            f"{r['seconds']:g} s stereo",
            *(f"{1e3 * r['stages'][s]['median']:.0f} ms" for s in STAGES),
            f"{1e3 * r['stages']['total']['p90']:.0f} ms",
            f"{r['first_clip_s']:.1f} s",
            f"{r['peak_memory_mib']:.0f} MiB",
        ]
        for r in rows
    ]
    c, pair = result["crowd"], result["pair"]
    lone = next(r for r in rows if r["seconds"] == pair["seconds"])["stages"]["total"]["median"]
    each = [r["stages"]["total"]["median"] for r in pair["each"]]
    share = sum(lone / t for t in each)
    alone, together = c["alone"]["median"], c["together"]["median"]
    return "\n\n".join(
        [
            f"{rows[0]['steps']} steps of {rows[0]['sampler']}, guidance {rows[0]['guidance']:g}, {rows[0]['threads']} "
            f"threads, {rows[0].get('dtype', 'bfloat16')}; medians of {rows[0]['stages']['total']['n']}.",
            table(header, cells),
            f"Ten threads on one model, {c['seconds']:g} s each: {together:.2f} s, in sequence {alone:.2f} s "
            f"({alone / together:.2f} times the throughput); the sounds are {'equal' if c['equal'] else 'NOT EQUAL'} "
            f"to the bit.",
            f"Two processes with {rows[0]['threads']} threads each at once, {pair['seconds']:g} s clips: "
            f"{1e3 * each[0]:.0f} and {1e3 * each[1]:.0f} ms a clip against {1e3 * lone:.0f} ms alone, {share:.2f} "
            f"times the throughput of one.",
        ]
    )


if __name__ == "__main__":
    main()
