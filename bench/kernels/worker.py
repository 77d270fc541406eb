"""One operator, timed in a process of its own, so that what goes wrong there stays there.

    python -m bench.kernels.worker FILE JOB

JOB is JSON: {"operator", "device", "presets", "own", "compile", "ceiling", "seconds"}. Each row goes to FILE as a line
of JSON the moment it is known: what was measured before a crash or a time limit stays. The operator "ceiling" measures
the machine itself.
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
    # every baseline gets what torch offers
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
    """Rows of one case; a way that cannot run here (a peer that is not installed, say) gives a row that says why."""
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
    """torch.compile of the eager way for fixed shapes. mode: "aot_eager" traces and generates no code (dry runs)."""
    torch._dynamo.reset()
    if mode == "aot_eager":
        return torch.compile(eager, backend="aot_eager", dynamic=False)
    return torch.compile(eager, mode=mode, dynamic=False)


def chosen(operator: str) -> dict[Any, str]:
    """What backend="auto" has measured to be fastest so far, in the operators that choose."""
    module = importlib.import_module(f"presto_rt.kernels.{operator}")
    return dict(module.selector.selected) if hasattr(module, "selector") else {}


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
