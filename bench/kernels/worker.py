"""Worker process that times one operator, so that a failure affects no other operator.

    python -m bench.kernels.worker FILE JOB

JOB is JSON: {"operator", "device", "presets", "own", "compile", "ceiling", "seconds"}. Each row is
appended to FILE as a line of JSON as soon as it is measured, so rows before a crash or a time limit are kept. The
operator "ceiling" measures the machine's rates.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.kernels.harness import Case, Ceiling, cases, ceiling, copies, measure, result


def main(file: str, job: str) -> None:
    """Time the operator of `job` and append its rows to `file`."""
    # Every baseline gets the fastest settings of torch.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    options = json.loads(job)
    path = Path(file)
    if options["operator"] == "ceiling":
        large = {"cuda": (1 << 28, 8192), "cpu": (1 << 24, 2048), "dry": (1 << 16, 64)}[options["size"]]
        append(path, dataclasses.asdict(ceiling(options["device"], *large)))
        return
    top = Ceiling(**options["ceiling"])
    for preset in options["presets"]:
        for case in cases(options["operator"], options["device"], preset):
            time_case(case, top, path, options)


def time_case(case: Case, top: Ceiling, path: Path, options: dict[str, Any]) -> None:
    """Append the rows of one case; a way that cannot run here gives a row with the reason."""
    device, seconds = options["device"], options["seconds"]
    ways = dict(case.ways) if options["own"] else {}
    if options["compile"]:
        ways["compile"] = compiled(case.ways["eager"], options["compile"])
    inputs = copies(case, device, limit=32 if seconds else 2)
    for name, way in ways.items():
        before = chosen(case.operator)
        try:
            with torch.inference_mode():
                row = result(case, name, measure(way, inputs, device, seconds), top)
        except Exception as error:  # whatever a peer, a compiler or a driver raises: the other ways go on
            said = (str(error).splitlines() or [""])[0]
            row = {"operator": case.operator, "shape": case.shape, "way": name}
            row["left_out"] = f"{type(error).__name__}: {said}"[:300]
        picked = [backend for key, backend in chosen(case.operator).items() if key not in before]
        append(path, row | ({"chosen": picked[-1]} if picked else {}))
        if device == "cuda":
            torch.cuda.synchronize()  # a broken context ends this process here; the rows stay


def compiled(eager: Any, mode: str) -> Any:
    """Return the eager way under torch.compile for fixed shapes; mode "aot_eager" only traces, for dry runs."""
    torch._dynamo.reset()
    if mode == "aot_eager":
        return torch.compile(eager, backend="aot_eager", dynamic=False)
    return torch.compile(eager, mode=mode, dynamic=False)


def chosen(operator: str) -> dict[Any, str]:
    """Return the selections of backend="auto" so far; empty for operators without a selector."""
    module = importlib.import_module(f"presto_rt.kernels.{operator}")
    return dict(module.selector.selected) if hasattr(module, "selector") else {}


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
