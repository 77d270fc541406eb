"""Any set of models and settings, judged alike: the same captions, seeds and judges; quality, diversity and latency.

A row is written NAME=MODEL[,steps=4][,layers=70%][,sampler=...][,guidance=1]; MODEL is a shipped model or a weights
folder, or "real" for the held-out clips themselves. Rows collect in one JSON file, so that each can be its own command;
a file holds rows of one set of settings only.
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

from ...diffusion.samplers import evaluated_sigmas
from ...errors import InvalidInputError
from ..data.dataset import items, load_manifest
from .report import environment, evaluate
from .run import RENDERED, choose, generated, real_clips

log = logging.getLogger("presto_rt")

REAL = "real"
OPTIONS = {"steps": int, "guidance": float, "layers": str, "sampler": str}
STAGES = ("text", "denoise", "decode", "total")
PROMPT = "calm piano with warm strings, 84 bpm"


@dataclass(frozen=True)
class Row:
    """A model and how it is run; options are those of `Pipeline.generate`."""

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


def parse_row(text: str) -> Row:
    """A row from its command-line form. Raises InvalidInputError."""
    name, equals, rest = text.partition("=")
    model, *settings = rest.split(",")
    if not (name.strip() and equals and model.strip()):
        raise InvalidInputError(f"a row is NAME=MODEL[,steps=4][,layers=70%], not {text!r}")
    options: dict[str, Any] = {}
    for setting in settings:
        option, equals, value = setting.strip().partition("=")
        if not equals or option not in OPTIONS:
            raise InvalidInputError(f"row {name!r}: {setting!r} is none of {', '.join(o + '=' for o in OPTIONS)}")
        try:
            options[option] = OPTIONS[option](value)
        except ValueError as error:
            raise InvalidInputError(f"row {name!r}: {option} cannot be {value!r}") from error
    return Row(name.strip(), model.strip(), options)


def plan_facts(model: Any, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Steps, sampler, evaluations of the denoiser (NFE), passes of the network (a guided evaluation takes two), and the
    share of blocks that run in them."""
    plan = model.plan(seconds, **options)
    levels = evaluated_sigmas(plan.sampler, plan.levels)
    branches = [2 if plan.guidance.active(s) else 1 for s in levels]
    run = sum(n * len(plan.layers.blocks(s)) for n, s in zip(branches, levels, strict=True))
    passes = sum(branches)
    return {"steps": len(plan.levels) - 1, "sampler": plan.sampler, "guidance": plan.guidance.scale,
            "nfe": len(levels), "passes": passes, "blocks": run / (passes * model.config.blocks)}  # fmt: skip


def latencies(plans: Sequence[tuple[Any, dict[str, Any]]], seconds: float, repeats: int) -> list[dict[str, Any]]:
    """Seconds from prompt to samples of every (model, options of generate), by stage: median, and p90 of the total.

    One warm-up each, then turn about, so that what else the machine does falls on all alike.
    """
    runs: list[list[dict[str, float]]] = [[] for _ in plans]
    for i in range(repeats + 1):
        for (model, options), mine in zip(plans, runs, strict=True):
            mine.append(model.generate(PROMPT, seconds=seconds, seed=i, **options).timings)
    found = []
    for mine in (times[1:] for times in runs):
        totals = sorted(run["total"] for run in mine)
        stages = {stage: statistics.median(run[stage] for run in mine) for stage in STAGES}
        p90 = totals[min(repeats - 1, int(0.9 * repeats))]
        found.append({"seconds": seconds, "repeats": repeats, "p90": p90, **stages})
    return found


def compare(rows: Sequence[Row], data_root: str | Path, out: str | Path, *, results: str | Path | None = None,
            count: int = 200, seconds: float = 10.0, reference_count: int = 400, seed: int = 0, split: str = "test",
            batch: int = 8, workers: int | None = None, latency_seconds: float = 32.0, repeats: int = 5,
            device: str = "auto") -> dict[str, Any]:  # fmt: skip
    """Judge rows and add them to `results` (default `out`/comparison.json); returns the whole file's content.

    Prompts, crops and noise depend on `seed` and the data alone, so rows of different calls are comparable; the file
    refuses rows of other settings. Clips are kept below `out`. latency_seconds: length of the clips that are timed,
    `repeats` times; 0: not here (`bench/distillation.py latency` times all rows turn about).
    """
    from ...pipeline import load

    root, file = Path(data_root), Path(results) if results is not None else Path(out) / "comparison.json"
    manifest = load_manifest(root)
    settings = {"count": count, "seconds": seconds, "reference": reference_count, "seed": seed, "split": split,
                "data": manifest.hash}  # fmt: skip
    table = read(file)
    if table["rows"] and table["settings"] != settings:
        raise InvalidInputError(f"{file} holds rows of other settings ({table['settings']}); choose another file")
    records = choose(items(manifest, split, RENDERED), count, seconds, seed)
    rest = [i for i in items(manifest, ("train", "val"), RENDERED) if i.split != split]
    reference_records = choose(rest, reference_count, seconds, seed + 1)
    reference = real_clips(reference_records, root, seconds)
    for row in rows:
        entry: dict[str, Any] = {"model": Path(row.model).name, "options": row.options}
        if row.model == REAL:
            clips = real_clips(records, root, seconds)
        else:
            model = load(row.model, device=device)
            entry |= {"digest": model.digest, "plan": plan_facts(model, row.options, seconds)}
            folder = Path(out) / "clips" / "".join(c if c.isalnum() else "-" for c in row.name)
            prompts = [record["prompt"] for record in records]
            clips = generated(model, prompts, folder, seconds=seconds, seed=seed, batch=batch, **row.options)
            if repeats:
                entry["latency"] = latencies([(model, row.options)], latency_seconds, repeats)[0]
        judged = evaluate({row.name: clips}, records, reference, reference_meta=reference_records, workers=workers,
                          keep=root / "heard")  # fmt: skip
        entry |= {"measures": judged["sets"][row.name], "environment": environment()}
        log.info("judged %s", row.name)
        table = read(file)  # another call may have added rows meanwhile
        table = {"settings": settings, "rows": {**table["rows"], row.name: entry}}
        write(table, file)
    return table


def read(file: str | Path) -> dict[str, Any]:
    """A comparison file; an empty table where there is none."""
    path = Path(file)
    return json.loads(path.read_text()) if path.is_file() else {"settings": {}, "rows": {}}


def write(table: dict[str, Any], file: Path) -> None:
    """A comparison file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(json.dumps(table, indent=1) + "\n")
    fresh.replace(file)


HEADER = ["row", "NFE", "network passes", "blocks, %", "KID x1000", "MMD x1000", "instruments, AUC", "tempo, %",
          "key, %", "recall", "density / coverage", "diversity", "latency, s", "real-time factor"]  # fmt: skip
MISSING = "not measured"


def markdown(table: dict[str, Any], names: Sequence[str] | None = None) -> str:
    """Quality, diversity and latency of the named rows (None: all), in order; rows that are missing say so."""
    lines = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    for name in names if names is not None else list(table["rows"]):
        row = table["rows"].get(name)
        cells = [MISSING] + [""] * (len(HEADER) - 2) if row is None else _cells(row)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    m, plan = row["measures"], row.get("plan")
    time, spread = row.get("latency"), m["prdc"]
    return [
        str(plan["nfe"]) if plan else "-",
        str(plan["passes"]) if plan else "-",
        f"{100 * plan['blocks']:.0f}" if plan else "-",
        _estimate(m["kid"], 1000, 1),
        _estimate(m["mmd"], 1000, 1),
        _estimate(m["probe"]["mean"] if m["probe"] else None, 1, 3),
        _estimate(m["tempo"], 100, 0),
        _estimate(m["key"]["exact"], 100, 0),
        f"{spread['recall']:.2f}" if spread else "-",
        f"{spread['density']:.2f} / {spread['coverage']:.2f}" if spread else "-",
        _estimate(m["diversity"], 1, 1),
        f"{time['total']:.3f}" if time else "-",
        f"{time['seconds'] / time['total']:.1f}" if time else "-",
    ]


def _estimate(value: dict[str, Any] | None, scale: float, digits: int) -> str:
    if not value or value["value"] is None:
        return "-"
    middle, low, high = (
        f"{value[k] * scale:.{digits}f}" if value[k] is not None else "?" for k in ("value", "low", "high")
    )
    return f"{middle} ({low} to {high})"


def plot(table: dict[str, Any], groups: dict[str, Sequence[str]], by: str, path: str | Path) -> bool:
    """Quality (KID, lower is better, with 95 % intervals) against `by`: "nfe" or "latency". One line for each group
    of row names. Returns False, and draws nothing, where no row was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def place(row: dict[str, Any]) -> float:
        return float(row["plan"]["nfe"] if by == "nfe" else row["latency"]["total"])

    needed = "plan" if by == "nfe" else "latency"
    measured = {
        group: sorted((table["rows"][n] for n in names if needed in table["rows"].get(n, {})), key=place)
        for group, names in groups.items()
    }
    if not any(measured.values()):
        return False
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for group, rows in measured.items():
        if rows:
            kid = [row["measures"]["kid"] for row in rows]
            value = [1000 * k["value"] for k in kid]
            error = [[1000 * (k["value"] - k["low"]) for k in kid], [1000 * (k["high"] - k["value"]) for k in kid]]
            axis.errorbar([place(row) for row in rows], value, error, marker="o", capsize=2, label=group)
    label = "evaluations of the denoiser (NFE)"
    if by == "latency":
        seconds = next(row["latency"]["seconds"] for rows in measured.values() for row in rows)
        label = f"latency of {seconds:g} s of stereo, s"
    axis.set(xscale="log", xlabel=label, ylabel="KID x1000 (lower is better)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
