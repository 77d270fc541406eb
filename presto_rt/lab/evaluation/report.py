"""From sets of clips to one table: every judge on every set, controls beside, with 95 % intervals, as JSON and
markdown.
"""

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
from .distances import fad, gaussian_kernel, kid, level_distances, prdc
from .listen import Listening, listen, take
from .musicnn import MTT_TAGS
from .statistics import Estimate, mean
from .tonality import key_scores

Meta = dict[str, Any]
SHUFFLED = ", captions shuffled"


def evaluate(
    sets: Mapping[str, Sequence[np.ndarray]],
    meta: Sequence[Meta],
    reference: Sequence[np.ndarray],
    *,
    reference_meta: Sequence[Meta] | None = None,
    rate: int = 44100,
    workers: int | None = None,
    keep: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Judge every set of clips against the reference and against its captions.

    sets: name -> clips (2, n) float32, clip i of every set made for record i of `meta` (`prompt`, `instruments`,
    `bpm`, `key`, `mode`); a set may be shorter than `meta`. Sequences may load clips lazily. Every set is also judged
    with its captions shuffled. reference: real clips of other compositions; with their `reference_meta` the
    caption-aware kernel distance is reported too. Returns {"environment", "reference", "sets": {name: measures}},
    ready for JSON. `keep` and `workers`: see `listen`. Raises InvalidInputError when a set is empty or longer than `meta`.
    """
    for name, clips in sets.items():
        if not 0 < len(clips) <= len(meta):
            raise InvalidInputError(
                f"set {name!r} has {len(clips)} clips for {len(meta)} captions; give each clip its caption"
            )
    options: dict[str, Any] = {"rate": rate, "workers": workers, "keep": keep, "progress": progress}
    real = listen(reference, notes=False, **options)
    probe = None if reference_meta is None else adherence.Probe(real.embedding, reference_meta)
    results: dict[str, Any] = {}
    for name, clips in sets.items():
        heard = listen(clips, **options)
        own = list(meta[: len(clips)])
        moved = adherence.shuffled(own) if len(own) > 1 else own
        results[name] = {
            "clips": len(clips),
            **distances(real, heard),
            **joint_distance(real, heard, reference_meta, own),
            **agreement(heard, own, probe),
            "by_kind": by_kind(heard, own, probe),
            "shuffled": {**joint_distance(real, heard, reference_meta, moved), **agreement(heard, moved, probe)},
        }
    return {
        "environment": environment(),
        "reference": {"clips": len(reference), "windows": len(real.clip)},
        "sets": _plain(results),
    }


def distances(real: Listening, heard: Listening) -> dict[str, Any]:
    """Every distance of a set from the reference, and the set's own spread."""
    few = min(len(real.clip), len(heard.clip))
    windows = (real.penultimate, heard.penultimate, real.clip, heard.clip)
    return {
        "kid": kid(*windows),
        "mmd": kid(*windows, kernel=gaussian_kernel(real.penultimate)),
        "fad16": fad(real.penultimate, heard.penultimate, heard.clip, dims=16) if few > 32 else None,
        "fad64": fad(real.penultimate, heard.penultimate, heard.clip, dims=64) if few > 256 else None,
        "prdc": prdc(real.embedding, heard.embedding) if min(len(real.embedding), len(heard.embedding)) > 6 else None,
        "levels": level_distances(list(real.levels), list(heard.levels)),
        "density": mean(heard.density),
        "diversity": adherence.diversity(heard.embedding),
    }


def joint_distance(
    real: Listening, heard: Listening, reference_meta: Sequence[Meta] | None, meta: Sequence[Meta]
) -> dict[str, Estimate]:
    """The kernel distance between (sound, caption) pairs, when the reference has captions."""
    if reference_meta is None:
        return {}
    names = sorted({name for m in reference_meta for name in m.get("instruments") or ()})
    pairs = (caption_vectors(reference_meta, names), caption_vectors(meta, names))
    kernel = gaussian_kernel(real.penultimate)
    return {
        "mmd_captions": kid(real.penultimate, heard.penultimate, real.clip, heard.clip, captions=pairs, kernel=kernel)
    }


def agreement(heard: Listening, meta: Sequence[Meta], probe: adherence.Probe | None) -> dict[str, Any]:
    """Instruments, tempo and key against what the prompts ask for."""
    scores = np.stack([key_scores(c) for c in heard.chroma])
    return {
        "instruments": adherence.instrument_auc(heard.tags, MTT_TAGS, meta),
        "probe": probe.auc(heard.embedding, meta) if probe else None,
        "tempo": adherence.tempo_accuracy(heard.tempo, meta),
        "key": adherence.key_accuracy(scores, meta),
    }


def by_kind(heard: Listening, meta: Sequence[Meta], probe: adherence.Probe | None) -> dict[str, Any]:
    """`agreement` for each kind of piece (solo, duo, band) on its own."""
    kinds = np.array([str(m.get("kind")) for m in meta])
    parts = {kind: np.flatnonzero(kinds == kind) for kind in sorted(set(kinds))}
    return {kind: agreement(take(heard, i), [meta[int(j)] for j in i], probe) for kind, i in parts.items()}


def caption_vectors(meta: Sequence[Meta], names: Sequence[str]) -> np.ndarray:
    """Which of the instruments `names` each record has, as a vector of length 1 per clip: (clips, len(names));
    zeros for none.
    """
    rows = np.array([[name in (m.get("instruments") or ()) for name in names] for m in meta], dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-9)


def environment() -> dict[str, Any]:
    """Machine, versions and command, without paths of this machine."""
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


def _plain(value: Any) -> Any:
    """Estimates and arrays as what JSON knows; NaN as null."""
    if isinstance(value, Estimate):
        return value.as_dict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
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
    """Two tables: agreement with the captions, and distances from the reference."""
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


def write(result: dict[str, Any], folder: Path, name: str = "evaluation") -> tuple[Path, Path]:
    """Write NAME.json and NAME.md into `folder`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, text = folder / f"{name}.json", folder / f"{name}.md"
    numbers.write_text(json.dumps(result, indent=1) + "\n")
    text.write_text(markdown(result))
    return numbers, text
