"""Time each C++ operator against torch: `python -m bench.operators [--threads 2] [--tokens 690]`.

Runs bench/micro with pytest-benchmark. A second baseline copies as many bytes as the operator must move. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.results import save, table

MICRO = Path(__file__).parent / "micro"


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each operator of pytest-benchmark's report: medians in seconds, GB/s."""
    found: dict[str, dict[str, Any]] = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        row = found.setdefault(info["operator"], {"operator": info["operator"], "moved": info["moved"], "seconds": {}})
        row["threads"] = info["threads"]
        row["seconds"][info["way"]] = {"median": entry["stats"]["median"], "rounds": entry["stats"]["rounds"]}
    for row in found.values():
        ours, copy = (row["seconds"][way]["median"] for way in ("ours", "copy"))
        row |= {"gb_per_s": row["moved"] / ours / 1e9, "of_copy": copy / ours}
    return list(found.values())


def render(listed: list[dict[str, Any]]) -> str:
    """Return the operators' table of docs/cpu.md."""
    cells = [
        [
            r["operator"],
            *(f"{1e3 * r['seconds'][way]['median']:.3f} ms" for way in ("ours", "torch", "copy")),
            f"{r['seconds']['torch']['median'] / r['seconds']['ours']['median']:.1f}",
            f"{r['gb_per_s']:.1f}",
            f"{r['of_copy']:.2f}",
        ]
        for r in listed
    ]
    threads = listed[0]["threads"]
    header = [
        f"operator, threads: {threads}",
        "ours",
        "torch",
        "copying its bytes",
        "times torch",
        "GB/s",
        "of copying",
    ]
    return table(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=690, help="latent frames; 690 are 32 s")
    parser.add_argument("--name", default="cpu-operators", help="bench/results/NAME.json; '-' writes no file")
    a = parser.parse_args()
    environment = {"PRESTO_RT_BENCH_THREADS": str(a.threads), "PRESTO_RT_BENCH_TOKENS": str(a.tokens)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        limits = ("--benchmark-max-time=0.5", "--benchmark-warmup=on", "--benchmark-warmup-iterations=5")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(MICRO),
            f"--benchmark-json={path}",
            *limits,
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(
            command, env=os.environ | environment, cwd=MICRO.parent.parent, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        listed = rows(json.loads(path.read_text()))
    print(render(listed))
    if a.name != "-":
        print(save(a.name, listed))


if __name__ == "__main__":
    main()
