"""Evaluate a model on held-out captions, beside real clips, codec reconstructions and noise."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.house import load_codec
from ...errors import MissingDependencyError
from ...pipeline import Pipeline
from ..data.dataset import items, load_manifest
from .clip_sets import RENDERED, choose_records, codec_controls, generated_clips, real_clips, shaped_noise
from .report import evaluate, write

log = logging.getLogger("presto_rt")
METRIC_PACKAGES = ("musicnn", "basic_pitch", "onnxruntime", "prdc", "scipy")


def check_metric_packages() -> None:
    """Raise MissingDependencyError if a package of the metrics is not installed, before clips are generated."""
    if missing := [name for name in METRIC_PACKAGES if importlib.util.find_spec(name) is None]:
        raise MissingDependencyError(
            f"the metrics need {', '.join(missing)}; run: pip install 'presto-rt[eval]', then pip install --no-deps "
            "musicnn==0.1.0 basic-pitch==0.4.0"
        )


def evaluate_model(
    model: Pipeline | None,
    data_root: str | Path,
    count: int = 200,
    seconds: float = 10.0,
    out: str | Path = "runs/evaluation",
    *,
    name: str = "generated",
    baselines: Mapping[str, Pipeline] | None = None,
    reference_count: int = 400,
    controls: int = 48,
    seed: int = 0,
    batch: int = 8,
    workers: int | None = None,
    split: str = "test",
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on held-out captions and write `evaluation.json` and `evaluation.md`.

    The controls are the held-out clips themselves, their codec reconstructions, decoded Gaussian latents, noise with
    the spectrum of the music, and each set with its captions shuffled. Generated clips are cached below `out`, features
    in `data_root`/features by the hash of the samples, so a run can be repeated or resumed.

    Args:
        model: loaded pipeline; None evaluates the data alone.
        data_root: folder of the data set.
        count: number of captions.
        seconds: length of each clip.
        out: folder of clips and results.
        name: name of the model's set.
        baselines: further models by name, evaluated on the same captions; the reconstructions use the codec of `model`.
        reference_count: clips of the other splits that form the reference.
        controls: clips of each noise control.
        seed: seed of captions, crops and noise.
        batch: clips that are generated at a time.
        workers: threads that extract features; None uses all cores.
        split: held-out split, "test" or "val".
        options: further arguments of `Pipeline.generate`.

    Returns:
        Results as written, see `report.evaluate`, with "settings" and "wall_seconds".

    Raises:
        InvalidInputError: the data set is missing or its clips are too short.
        MissingDependencyError: a package of the metrics is not installed; raised before clips are generated.
    """
    check_metric_packages()
    root, folder = Path(data_root), Path(out)
    manifest = load_manifest(root)
    records = choose_records(items(manifest, split, RENDERED), count, seconds, seed)
    rest = [i for i in items(manifest, ("train", "val"), RENDERED) if i.split != split]
    reference_records = choose_records(rest, reference_count, seconds, seed + 1)
    held_out, reference = real_clips(records, root, seconds), real_clips(reference_records, root, seconds)
    noise_count = min(controls, count)
    sets: dict[str, Sequence[np.ndarray]] = {"real, held out": held_out}
    if model is not None:
        prompts = [record["prompt"] for record in records]
        for label, pipeline in {name: model, **(baselines or {})}.items():
            sets[label] = generated_clips(
                pipeline, prompts, folder / "clips" / label, seconds=seconds, seed=seed, batch=batch, **options
            )
        sets |= codec_controls(
            load_codec(model.model.folder),
            held_out,
            records,
            root / "features" / "clips",
            noise_count=noise_count,
            seconds=seconds,
            seed=seed,
        )
    sets["shaped noise"] = shaped_noise(reference, noise_count, seconds, seed)
    total, finished, start_time = sum(map(len, sets.values())) + len(reference), 0, time.monotonic()

    def progress(clips: int) -> None:
        nonlocal finished
        finished += clips
        if finished % 100 == 0 or finished == total:
            log.info("features of %d of %d clips in %.0f s", finished, total, time.monotonic() - start_time)

    result = evaluate(
        sets,
        records,
        reference,
        reference_records=reference_records,
        workers=workers,
        cache=root / "features",
        progress=progress,
    )
    settings = {"count": count, "seconds": seconds, "seed": seed, "split": split, "data": manifest.hash}
    result["settings"] = {**settings, **options}
    result["wall_seconds"] = {"judging": round(time.monotonic() - start_time, 1)}
    write(result, folder)
    return result
