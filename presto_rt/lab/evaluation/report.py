"""Evaluate sets of clips with all metrics and their controls, and write the results as JSON and markdown tables."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InvalidInputError
from . import adherence
from .adherence import ClipRecord
from .distances import fad, gaussian_kernel, kid, level_distances, prdc
from .features import ClipFeatures, extract_features
from .musicnn import TAGS
from .statistics import Estimate, mean
from .tonality import key_scores

SHUFFLED = ", captions shuffled"


def evaluate(
    sets: Mapping[str, Sequence[np.ndarray]],
    records: Sequence[ClipRecord],
    reference: Sequence[np.ndarray],
    *,
    reference_records: Sequence[ClipRecord] | None = None,
    rate: int = 44100,
    workers: int | None = None,
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate sets of clips against a reference and against their captions, also with the captions shuffled.

    Args:
        sets: clips (2, n) float32 by name of the set. Clip i of each set belongs to record i; a set may have fewer
            clips than there are records. Sequences may load clips lazily.
        records: `prompt`, `instruments`, `bpm`, `key`, `mode` and `kind` of each clip.
        reference: real clips of other compositions.
        reference_records: records of the reference, which enable the probe and the distance between (sound, caption)
            pairs.
        rate: sample rate in Hz.
        workers: threads of `extract_features`; None uses all cores.
        cache: folder of cached features; see `extract_features`.
        progress: called with 1 after each clip.

    Returns:
        {"environment", "reference", "sets": {name: metrics}}, ready for JSON.

    Raises:
        InvalidInputError: a set is empty or has more clips than there are records.
        MissingDependencyError: the package of a metric is not installed.
    """
    for name, clips in sets.items():
        if not 0 < len(clips) <= len(records):
            raise InvalidInputError(
                f"set {name!r} has {len(clips)} clips for {len(records)} captions; pass one caption for each clip"
            )
    options: dict[str, Any] = {"rate": rate, "workers": workers, "cache": cache, "progress": progress}
    real = extract_features(reference, notes=False, **options)
    probe = None if reference_records is None else adherence.Probe(real.embedding, reference_records)
    results: dict[str, Any] = {}
    for name, clips in sets.items():
        features = extract_features(clips, **options)
        paired = list(records[: len(clips)])
        mismatched = adherence.shuffled(paired) if len(paired) > 1 else paired
        results[name] = {
            "clips": len(clips),
            **distances(real, features),
            **joint_distance(real, features, reference_records, paired),
            **agreement(features, paired, probe),
            "by_kind": by_kind(features, paired, probe),
            "shuffled": {
                **joint_distance(real, features, reference_records, mismatched),
                **agreement(features, mismatched, probe),
            },
        }
    return {
        "environment": environment(),
        "reference": {"clips": len(reference), "windows": len(real.clip)},
        "sets": _to_json(results),
    }


def distances(real: ClipFeatures, features: ClipFeatures) -> dict[str, Any]:
    """Distances of a set from the reference, and its note density and diversity; None where a set is too small."""
    window_count = min(len(real.clip), len(features.clip))
    windows = (real.penultimate, features.penultimate, real.clip, features.clip)
    return {
        "kid": kid(*windows),
        "mmd": kid(*windows, kernel=gaussian_kernel(real.penultimate)),
        "fad16": fad(real.penultimate, features.penultimate, features.clip, dims=16) if window_count > 32 else None,
        "fad64": fad(real.penultimate, features.penultimate, features.clip, dims=64) if window_count > 256 else None,
        "prdc": prdc(real.embedding, features.embedding)
        if min(len(real.embedding), len(features.embedding)) > 6
        else None,
        "levels": level_distances(real.levels, features.levels),
        "density": mean(features.density),
        "diversity": adherence.diversity(features.embedding),
    }


def joint_distance(
    real: ClipFeatures,
    features: ClipFeatures,
    reference_records: Sequence[ClipRecord] | None,
    records: Sequence[ClipRecord],
) -> dict[str, Estimate]:
    """Kernel distance between (sound, caption) pairs of a set and the reference; empty without reference records."""
    if reference_records is None:
        return {}
    names = sorted({name for record in reference_records for name in record.get("instruments") or ()})
    pairs = (caption_vectors(reference_records, names), caption_vectors(records, names))
    kernel = gaussian_kernel(real.penultimate)
    return {
        "mmd_captions": kid(
            real.penultimate, features.penultimate, real.clip, features.clip, captions=pairs, kernel=kernel
        )
    }


def agreement(features: ClipFeatures, records: Sequence[ClipRecord], probe: adherence.Probe | None) -> dict[str, Any]:
    """Adherence of clips to the instruments, tempo and key in their prompts."""
    scores = np.stack([key_scores(c) for c in features.chroma])
    return {
        "instruments": adherence.instrument_auc(features.tags, TAGS, records),
        "probe": probe.auc(features.embedding, records) if probe else None,
        "tempo": adherence.tempo_accuracy(features.tempo, records),
        "key": adherence.key_accuracy(scores, records),
    }


def by_kind(features: ClipFeatures, records: Sequence[ClipRecord], probe: adherence.Probe | None) -> dict[str, Any]:
    """Return `agreement` for each kind of piece: solo, duo and band."""
    kinds = np.array([str(record.get("kind")) for record in records])
    parts = {kind: np.flatnonzero(kinds == kind) for kind in sorted(set(kinds))}
    return {kind: agreement(features.select(i), [records[int(j)] for j in i], probe) for kind, i in parts.items()}


def caption_vectors(records: Sequence[ClipRecord], names: Sequence[str]) -> np.ndarray:
    """Indicator vectors of the instruments `names` in each record, normalized to length 1: (clips, len(names)).

    Records without any of the instruments have zero vectors.
    """
    rows = np.array(
        [[name in (record.get("instruments") or ()) for name in names] for record in records], dtype=np.float64
    )
    vectors: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-9)
    return vectors


def environment() -> dict[str, Any]:
    """Describe machine, versions and command, with folders of absolute paths removed."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            cpu,
        )
    absolute = re.compile(r"(?<![\w.~-])/(?:[^/,=]+/(?=[^/,=]))*")  # also in NAME=/some/model,steps=4
    command = " ".join([Path(sys.argv[0]).name, *(absolute.sub("", a) for a in sys.argv[1:])])
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "command": command,
    }


def _to_json(value: Any) -> Any:
    """Convert estimates to dicts and NaN to None, recursively."""
    if isinstance(value, Estimate):
        return value.as_dict()
    if isinstance(value, dict):
        return {k: _to_json(v) for k, v in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _cell(estimate: dict[str, Any] | None, scale: float = 1.0, digits: int = 2) -> str:
    if not estimate or estimate["value"] is None:
        return "-"
    value, low, high = (
        f"{estimate[k] * scale:.{digits}f}" if estimate[k] is not None else "?" for k in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"


def _rows(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for name, measures in result["sets"].items():
        rows += [(name, measures), (name + SHUFFLED, measures["shuffled"])]
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Format two markdown tables: adherence to the captions, and distances from the reference."""
    agreement_rows = [
        "| set | instruments, AUC of tags | instruments, AUC of probe | tempo, % | key, % | key, MIREX |",
        "|" + "---|" * 6,
    ]
    for name, m in _rows(result):
        cells = [
            _cell(m["instruments"]["mean"], 1, 3),
            _cell(m["probe"]["mean"] if m["probe"] else None, 1, 3),
            _cell(m["tempo"], 100, 0),
            _cell(m["key"]["exact"], 100, 0),
            _cell(m["key"]["mirex"]),
        ]
        agreement_rows.append(f"| {name} | " + " | ".join(cells) + " |")
    header = [
        "set",
        "KID x1000",
        "MMD x1000",
        "MMD with captions x1000",
        "FAD, 16 dims",
        "precision / recall",
        "density / coverage",
    ]
    header += ["notes per s", "diversity", "level, dB", "side/mid, dB", "8-16 kHz, dB"]
    distance_rows = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, m in _rows(result):
        joint = _cell(m.get("mmd_captions"), 1000, 1)
        if name.endswith(SHUFFLED):
            distance_rows.append(f"| {name} | as above | as above | {joint} |" + " as above |" * (len(header) - 4))
            continue
        p = m["prdc"]
        pair = [f"{p[a]:.2f} / {p[b]:.2f}" if p else "-" for a, b in (("precision", "recall"), ("density", "coverage"))]
        cells = [
            _cell(m["kid"], 1000, 1),
            _cell(m["mmd"], 1000, 1),
            joint,
            _cell(m["fad16"]),
            *pair,
            _cell(m["density"], 1, 1),
            _cell(m["diversity"], 1, 1),
        ]
        cells += [_cell(m["levels"][k], 1, 1) for k in ("rms_db", "side_mid_db", "high_band_db")]
        distance_rows.append(f"| {name} | " + " | ".join(cells) + " |")
    e, sizes = result["environment"], ", ".join(f"{n} {m['clips']}" for n, m in result["sets"].items())
    note = (
        f"Clips: {sizes}; reference {result['reference']['clips']} clips. 95 % intervals in parentheses. "
        f"{e['cpu']}, {e['cores']} cores, torch {e['torch']}."
    )
    return "\n".join([*agreement_rows, "", *distance_rows, "", note, ""])


def write(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write `evaluation.json` and `evaluation.md` into `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    json_file, markdown_file = folder / "evaluation.json", folder / "evaluation.md"
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    markdown_file.write_text(markdown(result))
    return json_file, markdown_file
