"""Compare models and settings on the same captions and seeds: quality, diversity and latency.

A row is written NAME=MODEL[,steps=4][,layers=70%][,sampler=...][,guidance=1]. MODEL is a shipped model, a weights
folder, or "real" for the held-out clips themselves. Rows accumulate in one JSON file, so each can be a command of its
own; all rows of a file share the same settings.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...diffusion.trajectory import evaluated_sigmas
from ...errors import InvalidInputError, MissingDependencyError
from ...loading import load
from ...pipeline import Pipeline
from ..data.dataset import items, load_manifest
from .clip_sets import RENDERED, choose_records, generated_clips, real_clips
from .report import environment, evaluate

log = logging.getLogger("presto_rt")

REAL = "real"
OPTIONS = {"steps": int, "guidance": float, "layers": str, "sampler": str}
STAGES = ("text", "denoise", "decode", "total")
PROMPT = "calm piano with warm strings, 84 bpm"


@dataclass(frozen=True)
class ComparisonRow:
    """A model and the arguments of `Pipeline.generate` it is evaluated with."""

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


def parse_row(text: str) -> ComparisonRow:
    """Parse a row NAME=MODEL[,option=value]...; raises InvalidInputError for other forms, options and values."""
    name, equals, rest = text.partition("=")
    model, *settings = rest.split(",")
    if not (name.strip() and equals and model.strip()):
        raise InvalidInputError(f"invalid row {text!r}; expected NAME=MODEL[,steps=4][,layers=70%]")
    options: dict[str, Any] = {}
    for setting in settings:
        option, equals, value = setting.strip().partition("=")
        if not equals or option not in OPTIONS:
            raise InvalidInputError(
                f"row {name!r}: unknown setting {setting!r}; choose from: {', '.join(o + '=' for o in OPTIONS)}"
            )
        try:
            options[option] = OPTIONS[option](value)
        except ValueError as error:
            kind = OPTIONS[option].__name__
            message = f"row {name!r}: invalid value {value!r} of {option}; expected {kind}"
            raise InvalidInputError(message) from error

    return ComparisonRow(name.strip(), model.strip(), options)


def plan_cost(model: Pipeline, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Cost of the sampling plan of a clip.

    Returns steps, sampler and guidance scale; "nfe", the evaluations of the denoiser; "passes", the passes of the
    network, two for each guided evaluation; and "blocks", the fraction of blocks that run in them.
    """
    plan = model.plan(seconds, **options)
    sigmas = evaluated_sigmas(plan.sampler, plan.sigmas)
    branches = [2 if plan.guidance.active(s) else 1 for s in sigmas]
    blocks = sum(n * len(plan.layers.blocks(s)) for n, s in zip(branches, sigmas, strict=True))
    passes = sum(branches)
    return {
        "steps": plan.steps,
        "sampler": plan.sampler,
        "guidance": plan.guidance.scale,
        "nfe": len(sigmas),
        "passes": passes,
        "blocks": blocks / (passes * model.model.spec.blocks),
    }


def latencies(plans: Sequence[tuple[Pipeline, dict[str, Any]]], seconds: float, repeats: int) -> list[dict[str, Any]]:
    """Measure the seconds from prompt to samples of each (model, arguments of generate).

    Each runs once to warm up; the `repeats` timed runs are interleaved, so that load on the machine affects all alike.
    Returns, for each, the median of each stage and of the total, and the 90th percentile of the total ("p90").
    """
    runs: list[list[dict[str, float]]] = [[] for _ in plans]
    for i in range(repeats + 1):
        for (model, options), timings in zip(plans, runs, strict=True):
            timings.append(model.generate(PROMPT, seconds=seconds, seed=i, **options).timings)
    results = []
    for _, *timings in runs:
        totals = sorted(run["total"] for run in timings)
        stages = {stage: statistics.median(run[stage] for run in timings) for stage in STAGES}
        p90 = totals[min(repeats - 1, int(0.9 * repeats))]
        results.append({"seconds": seconds, "repeats": repeats, "p90": p90, **stages})
    return results


def compare(
    rows: Sequence[ComparisonRow],
    data_root: str | Path,
    out: str | Path,
    *,
    results: str | Path | None = None,
    count: int = 200,
    seconds: float = 10.0,
    reference_count: int = 400,
    seed: int = 0,
    split: str = "test",
    batch: int = 8,
    workers: int | None = None,
    latency_seconds: float = 32.0,
    repeats: int = 5,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate rows, add them to a results file, and return its content.

    Prompts, crops and noise depend on `seed` and the data alone, so rows of different calls are comparable.

    Args:
        rows: models with their settings.
        data_root: folder of the data set.
        out: folder below which the generated clips are cached.
        results: results file; None is `out`/comparison.json.
        count: number of captions.
        seconds: length of each clip.
        reference_count: clips of the other splits that form the reference.
        seed: seed of captions, crops and noise.
        split: held-out split, "test" or "val".
        batch: clips that are generated at a time.
        workers: threads that extract features; None uses all cores.
        latency_seconds: length of the timed clips.
        repeats: timed clips; 0 leaves out the latency.
        device: device of the models.

    Returns:
        {"settings", "rows": {name: row}} with all rows of the file.

    Raises:
        InvalidInputError: the results file holds rows of other settings.
        MissingDependencyError: the package of a metric is not installed.
    """
    root, file = Path(data_root), Path(results) if results is not None else Path(out) / "comparison.json"
    manifest = load_manifest(root)
    settings = {
        "count": count,
        "seconds": seconds,
        "reference": reference_count,
        "seed": seed,
        "split": split,
        "data": manifest.hash,
    }
    table = read(file)
    if table["rows"] and table["settings"] != settings:
        raise InvalidInputError(f"{file} holds rows of other settings ({table['settings']}); choose another file")
    records = choose_records(items(manifest, split, RENDERED), count, seconds, seed)
    rest = [i for i in items(manifest, ("train", "val"), RENDERED) if i.split != split]
    reference_records = choose_records(rest, reference_count, seconds, seed + 1)
    reference = real_clips(reference_records, root, seconds)
    for row in rows:
        entry: dict[str, Any] = {"model": Path(row.model).name, "options": row.options}
        if row.model == REAL:
            clips = real_clips(records, root, seconds)
        else:
            model = load(row.model, device=device)
            entry |= {"digest": model.model.digest, "plan": plan_cost(model, row.options, seconds)}
            folder = Path(out) / "clips" / "".join(c if c.isalnum() else "-" for c in row.name)
            prompts = [record["prompt"] for record in records]
            clips = generated_clips(model, prompts, folder, seconds=seconds, seed=seed, batch=batch, **row.options)
            if repeats:
                entry["latency"] = latencies([(model, row.options)], latency_seconds, repeats)[0]
        result = evaluate(
            {row.name: clips},
            records,
            reference,
            reference_records=reference_records,
            workers=workers,
            cache=root / "features",
        )
        entry |= {"measures": result["sets"][row.name], "environment": environment()}
        log.info("evaluated %s", row.name)
        table = read(file)  # another process may have added rows in the meantime
        table = {"settings": settings, "rows": {**table["rows"], row.name: entry}}
        write(table, file)
    return table


def read(file: str | Path) -> dict[str, Any]:
    """Read a results file; an empty table if it does not exist."""
    path = Path(file)
    if not path.is_file():
        return {"settings": {}, "rows": {}}
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def write(table: dict[str, Any], file: Path) -> None:
    """Write a results file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(file)


HEADER = (
    "row",
    "NFE",
    "network passes",
    "blocks, %",
    "KID x1000",
    "MMD x1000",
    "instruments, AUC",
    "tempo, %",
    "key, %",
    "recall",
    "density / coverage",
    "diversity",
    "latency, s",
    "real-time factor",
)
MISSING = "not measured"


def markdown(table: dict[str, Any], names: Sequence[str] | None = None) -> str:
    """Format a markdown table of the named rows in their order, all rows by default; missing rows are marked."""
    lines = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    for name in names if names is not None else list(table["rows"]):
        row = table["rows"].get(name)
        cells = [MISSING] + [""] * (len(HEADER) - 2) if row is None else _cells(row)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    m, plan = row["measures"], row.get("plan")
    latency, prdc = row.get("latency"), m["prdc"]
    return [
        str(plan["nfe"]) if plan else "-",
        str(plan["passes"]) if plan else "-",
        f"{100 * plan['blocks']:.0f}" if plan else "-",
        _estimate(m["kid"], 1000, 1),
        _estimate(m["mmd"], 1000, 1),
        _estimate(m["probe"]["mean"] if m["probe"] else None, 1, 3),
        _estimate(m["tempo"], 100, 0),
        _estimate(m["key"]["exact"], 100, 0),
        f"{prdc['recall']:.2f}" if prdc else "-",
        f"{prdc['density']:.2f} / {prdc['coverage']:.2f}" if prdc else "-",
        _estimate(m["diversity"], 1, 1),
        f"{latency['total']:.3f}" if latency else "-",
        f"{latency['seconds'] / latency['total']:.1f}" if latency else "-",
    ]


def _estimate(value: dict[str, Any] | None, scale: float, digits: int) -> str:
    if not value or value["value"] is None:
        return "-"
    center, low, high = (
        f"{value[k] * scale:.{digits}f}" if value[k] is not None else "?" for k in ("value", "low", "high")
    )
    return f"{center} ({low} to {high})"


def plot(table: dict[str, Any], groups: dict[str, Sequence[str]], by: str, path: str | Path) -> bool:
    """Plot quality (KID with 95 % intervals) against `by`, "nfe" or "latency", and save the figure.

    `groups` names the rows of each line. Returns False without drawing if no row was measured. Raises
    MissingDependencyError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib; run: pip install matplotlib") from error

    def position(row: dict[str, Any]) -> float:
        return float(row["plan"]["nfe"] if by == "nfe" else row["latency"]["total"])

    needed = "plan" if by == "nfe" else "latency"
    measured = {
        group: sorted((table["rows"][n] for n in names if needed in table["rows"].get(n, {})), key=position)
        for group, names in groups.items()
    }
    if not any(measured.values()):
        return False
    figure = Figure(figsize=(6.5, 4))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for group, rows in measured.items():
        if rows:
            kid = [row["measures"]["kid"] for row in rows]
            value = [1000 * k["value"] for k in kid]
            interval = [[1000 * (k["value"] - k["low"]) for k in kid], [1000 * (k["high"] - k["value"]) for k in kid]]
            axis.errorbar([position(row) for row in rows], value, interval, marker="o", capsize=2, label=group)
    label = "evaluations of the denoiser (NFE)"
    if by == "latency":
        seconds = next(row["latency"]["seconds"] for rows in measured.values() for row in rows)
        label = f"latency of {seconds:g} s of stereo, s"
    axis.set(xscale="log", xlabel=label, ylabel="KID x1000 (lower is better)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True
