"""The kernels' speed: ours, eager torch, torch.compile and the peers, one table and one JSON file.

    python -m bench.kernels [--gpu] [--operators adaln gemm ...] [--compile] [--untested]

Without --gpu: the CPU rows (what runs where there is no GPU: plain torch) at the shapes of nano, and a word on what
needs a GPU. With --gpu: the Triton kernels at the shapes of small and medium; on a machine without one it dry-runs:
inputs, references, every eager peer at a small shape and the ahead-of-time compile of every kernel, so that only the
timing itself is left.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch
from presto_rt.kernels import OPERATORS

from bench.kernels.harness import Case, Ceiling, ceiling, copies, measure, result, tests_are_green
from bench.results import machine, save, table

#: an H200 as measured: bytes/s of a copy, bf16 operations/s of a large product
H200 = Ceiling(4.3e12, 790e12)


def cases(operator: str, device: str, preset: str) -> list[Case]:
    """The cases of one operator's file."""
    return list(importlib.import_module(f"bench.kernels.{operator}").cases(device, preset))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Speed of the kernels.")
    parser.add_argument("--gpu", action="store_true", help="the GPU rows; a dry run where there is no GPU")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--compile", action="store_true", help="torch.compile rows on the CPU too (slow to build)")
    parser.add_argument("--untested", action="store_true", help="skip the tests; then no speed-up is printed")
    parser.add_argument("--floors", action="store_true", help="only print bytes, operations and floors")
    options = parser.parse_args(arguments)
    if options.floors:
        print(floors(options.operators))
        return 0
    # every baseline gets what torch offers
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    if options.gpu and not torch.cuda.is_available():
        return dry_run(options.operators)
    device = "cuda" if options.gpu else "cpu"
    top = ceiling(device)
    print(f"{machine()['device']}: copy {top.bandwidth / 1e9:.0f} GB/s, bf16 product {top.product / 1e12:.3g} TFLOP/s")
    header = ["operator", "shape", "way", "median us", "p90 us", "GB/s", "TFLOP/s", "of floor", "x eager"]
    rows, lines = [], []
    for operator in options.operators:
        green = not options.untested and tests_are_green(operator, device)
        for case in (case for preset in presets(device) for case in cases(operator, device, preset)):
            found = time_case(case, device, top, with_compile=options.gpu or options.compile)
            eager = next((row["seconds"]["median"] for row in found if row["way"] == "eager"), None)
            for row in found:
                faster = eager / row["seconds"]["median"] if eager else None
                verdict = (
                    "untested" if options.untested else "tests red" if not green else f"{faster:.2f}" if faster else "-"
                )
                row["speedup_over_eager"] = faster if green else None
                lines.append(line(row, verdict))
            rows += found
    print(table(header, lines))
    name = "kernels-" + "-".join(str(machine()["device"]).replace("(R)", "").replace(",", "").split())
    print(f"written to {save(name, {'ceiling': vars(top), 'table': rows})}")
    if device == "cpu":
        print("Needs a GPU (--gpu): the Triton rows of every operator, SDPA's flash and cuDNN kernels, flash-attn.")
    return 0


def floors(operators: Sequence[str], top: Ceiling = H200) -> str:
    """A table of bytes, operations and floors at small and medium, from the cases alone: nothing is run."""
    rows = []
    for operator in operators:
        for case in (case for preset in presets("cuda") for case in cases(operator, "meta", preset)):
            moved, computed = f"{case.moved / 1e6:.2f}", f"{case.operations / 1e9:.3g}"
            limit = "bytes" if case.moved / top.bandwidth > case.operations / top.product else "products"
            rows.append([operator, case.shape, moved, computed, f"{top.floor(case) * 1e6:.2f}", limit])
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]  # sizes that both presets share
    return table(["operator", "shape", "MB moved", "GFLOP", "floor us", "set by"], rows)


def presets(device: str) -> tuple[str, ...]:
    """GPU rows at the sizes that need one."""
    return ("small", "medium") if device == "cuda" else ("nano",)


def time_case(case: Case, device: str, top, *, with_compile: bool) -> list[dict]:  # type: ignore[no-untyped-def]
    """Rows of one case; a way that cannot run here (a peer that is not installed, say) is left out and named."""
    ways = dict(case.ways)
    if with_compile:
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
        ways["compile"] = torch.compile(ways["eager"], mode=mode)
    inputs, rows = copies(case, device), []
    for name, way in ways.items():
        try:
            with torch.inference_mode():
                rows.append(result(case, name, measure(way, inputs, device), top))
        except (RuntimeError, ImportError, TypeError, ValueError) as error:
            print(f"left out: {case.operator} {case.shape} {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return rows


def line(row: dict, verdict: str) -> list[str]:  # type: ignore[type-arg]
    seconds = row["seconds"]
    times = [f"{seconds['median'] * 1e6:.1f}", f"{seconds['p90'] * 1e6:.1f}"]
    rates = [f"{row['gigabytes_per_second']:.0f}", f"{row['teraflops']:.3g}", f"{row['of_floor']:.2f}"]
    return [row["operator"], row["shape"], row["way"], *times, *rates, verdict]


def dry_run(operators: Sequence[str]) -> int:
    """Everything of the GPU run that a CPU can do: each case's inputs and eager way, and the compile of each kernel."""
    from presto_rt.kernels import report

    print("No CUDA GPU here: dry run, nothing is timed.")
    failed = report.main(["--arch", "sm_90", *operators])
    for operator in operators:
        for case in cases(operator, "cpu", "tiny"):
            case.ways["eager"](*case.make())
            case.ways["presto"](*case.make())
            print(f"ready: {operator} {case.shape}: {', '.join(case.ways)}, torch.compile")
    return failed


if __name__ == "__main__":
    sys.exit(main())
