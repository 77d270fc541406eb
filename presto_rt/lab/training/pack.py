"""Packing of trained models into the weights folders that `presto_rt.load` reads."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints import cast_matrices, load_folder, save_folder
from ...checkpoints.house import load_codec
from ...errors import InvalidInputError
from .checkpoint import load_checkpoint, run_checkpoint, without_prefix


def pack(
    output: str | Path,
    *,
    codec_run: str | Path,
    base_run: str | Path,
    defaults: dict[str, Any],
    quality: list[dict[str, Any]] | None = None,
    share_codec: bool = False,
) -> None:
    """Write a weights folder from a codec and the averaged weights of a training or distillation run.

    Matrices of the codec are stored as float16, the precision in which the data set was encoded, those of the
    transformer as bfloat16.

    Args:
        output: the weights folder to write.
        codec_run: run folder of a codec or its final/; or a weights folder or shipped model whose codec files are
            copied.
        base_run: run folder of the transformer, or a weights folder such as `pack_network` writes. Its layer schedules
            are included.
        defaults: sampling defaults, fields of `presto_rt.pipeline.Defaults`; they override those of the run.
        quality: measured quality of sampling plans for `deadline_ms`: objects with steps, layers and kid.
        share_codec: refer to the codec files in the weights folder `codec_run` instead of copying them.

    Raises:
        InvalidInputError: malformed `defaults` or `quality`.
        WeightsError: a source is missing or damaged.
        OutputError: `output` cannot be written.
    """
    _check(defaults, quality or [])
    dit, config = _network(base_run)
    config |= {"defaults": {**config["defaults"], **defaults}, "quality": quality or []}
    run = Path(codec_run)
    if ((run / "final").is_dir() or (run / "codec.safetensors").is_file()) and not share_codec:
        codec = load_codec(run)
        config["codec"] = codec.config.to_dict()
        save_folder(output, config, {"dit": dit, "codec": cast_matrices(codec.state_dict(), torch.float16)})
        return
    config["codec"] = load_folder(codec_run).config["codec"]  # loading also verifies the files
    if share_codec:
        save_folder(output, config, {"dit": dit}, shared={"codec": codec_run})
    else:
        save_folder(output, config, {"dit": dit}, copied={"codec": codec_run})


def _check(defaults: Any, quality: Any) -> None:
    """Raise InvalidInputError for keys that a loaded model would ignore or for rows that a deadline cannot rank."""
    from ...request import Defaults

    known = [f.name for f in fields(Defaults)]
    if not isinstance(defaults, dict) or set(defaults) - set(known):
        raise InvalidInputError(f"defaults must be an object with keys among {', '.join(known)}, not {defaults!r}")
    rows = quality if isinstance(quality, list) else [None]
    if not all(isinstance(row, dict) and {"steps", "kid"} <= row.keys() for row in rows):
        raise InvalidInputError(f"quality must be a list of objects with steps, layers and kid, not {quality!r}")


def pack_network(output: str | Path, run: str | Path) -> None:
    """Write a weights folder with the transformer of a run only, for use as a teacher or as `base_run` of `pack`."""
    dit, config = _network(run)
    save_folder(output, config, {"dit": dit})


def _network(run: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and their part of config.json: a run's averages in bfloat16, or those of a weights folder."""
    checkpoint = run_checkpoint(run)
    if not checkpoint.is_file():
        loaded = load_folder(run)
        config = {name: loaded.config.get(name, {}) for name in ("model", "defaults", "layers", "training")}
        return loaded.parts["dit"], config
    tensors, meta = load_checkpoint(checkpoint)
    training = {
        "steps": meta["step"],
        "minutes": round(meta["used_seconds"] / 60, 1),
        "latent_frames_seen": meta["frames_seen"],
        "options": meta["options"],
    }
    config = {
        "model": meta["config"],
        "defaults": meta.get("defaults", {}),
        "layers": meta.get("layers", {}),
        "training": training,
    }
    return cast_matrices(without_prefix("ema", tensors), torch.bfloat16), config
