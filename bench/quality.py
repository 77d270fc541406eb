"""Measure the quality of a model's clips: `python -m bench.quality [--model nano] [--count 200]`.

Adherence to held-out captions, distances from real music with controls, and the denoising error with that of the best
linear denoiser, all as `presto-rt lab eval` measures them. Needs the data set of `presto-rt lab data build` and its
latents. Writes bench/results/quality-NAME.json; clips are kept in runs/quality-NAME, so a stopped run can continue.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.results import machine, table, write
from presto_rt.lab.evaluation.denoising import model_errors
from presto_rt.lab.evaluation.report import markdown
from presto_rt.lab.evaluation.run import evaluate_model
from presto_rt.loading import load

ROWS = {
    "real, held out": "real music",
    "codec reconstruction": "real music through the codec",
    "generated": "**generated**",
    "generated, captions shuffled": "generated, against other captions",
    "shaped noise": "noise of the same spectrum",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano", help="name of a shipped model, or a weights folder")
    parser.add_argument("--data", default="data")
    parser.add_argument("--count", type=int, default=200, help="held-out captions")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each clip")
    parser.add_argument("--dtype", default="auto", help="if it is not auto, it becomes part of the file's name")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load(a.model, dtype=a.dtype)
    name = Path(a.model).name + ("" if a.dtype == "auto" else f"-{a.dtype}")
    plan = model.plan(a.seconds)
    result = evaluate_model(model, a.data, a.count, a.seconds, Path("runs") / f"quality-{name}")
    result["denoising"] = [asdict(row) for row in model_errors(model, a.data)]
    result["plan"] = {
        "steps": plan.steps,
        "sampler": plan.sampler,
        "guidance": plan.guidance.scale,
        "precision": model.backend.precision.name,
    }
    result["machine"] = machine()
    write(f"quality-{name}", result)
    print(markdown(result), denoising(result), sep="\n")


def render(result: dict[str, Any]) -> str:
    """Return the short table: adherence to the captions and distance from real music, with 95 % intervals."""
    sets = {**result["sets"], **{f"{k}, captions shuffled": v["shuffled"] for k, v in result["sets"].items()}}
    rows = []
    for name, title in ROWS.items():
        m = sets[name]
        distances = ["as above", "as above"]
        if "prdc" in m:
            distances = [_cell(m["mmd"], 1000, 1), f"{m['prdc']['recall']:.2f}" if m["prdc"] else "-"]
        rows.append(
            [
                title,
                _cell(m["instruments"]["mean"], 1, 2),
                _cell(m["tempo"], 100, 0),
                _cell(m["key"]["exact"], 100, 0),
                *distances,
            ]
        )
    header = ["", "instruments, AUC", "tempo, %", "key, %", "MMD x1000", "recall"]
    plan, count = result["plan"], result["sets"]["generated"]["clips"]
    note = (
        f"{count} held-out captions, clips of {result['settings']['seconds']:g} s, {plan['steps']} steps of "
        f"{plan['sampler']}, guidance {plan['guidance']:g}, {plan.get('precision', 'bfloat16')}; 95 % intervals in "
        f"parentheses."
    )
    return f"{note}\n\n{table(header, rows)}"


def by_precision(results: list[dict[str, Any]]) -> str:
    """Return a table of the scores for the same captions and seeds, one row for each precision of the model."""
    rows = []
    for result in results:
        m = result["sets"]["generated"]
        rows.append(
            [
                result["plan"].get("precision", "bfloat16"),
                _cell(m["kid"], 1000, 1),
                _cell(m["mmd"], 1000, 1),
                _cell(m["instruments"]["mean"], 1, 2),
                _cell(m["tempo"], 100, 0),
                _cell(m["key"]["exact"], 100, 0),
                f"{m['prdc']['recall']:.2f}",
                f"{m['prdc']['coverage']:.2f}",
            ]
        )
    header = ["", "KID x1000", "MMD x1000", "instruments, AUC", "tempo, %", "key, %", "recall", "coverage"]
    return table(header, rows)


def denoising(result: dict[str, Any]) -> str:
    """Return a table of denoising error / sigma_data^2 on the test split, of the best linear denoiser and the model."""
    rows = result["denoising"]
    header = ["sigma / sigma_data", *(f"{r['sigma']:g}" for r in rows)]
    lines = [
        [title, *(f"{r[key]['value']:.3g}" for r in rows)]
        for title, key in (("best linear (Wiener)", "linear"), ("model", "model"))
    ]
    return table(header, lines)


def _cell(estimate: dict[str, Any] | None, scale: float, digits: int) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    value, low, high = (f"{scale * estimate[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    main()
