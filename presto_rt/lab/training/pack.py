"""From run folders to a weights folder that `presto_rt.load` takes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints import cast_matrices, load_folder, save_folder
from ...errors import InvalidInputError
from ...models.codec import load_codec
from .common import load_checkpoint
from .loop import part


def pack(output: str | Path, *, codec_run: str | Path, base_run: str | Path, defaults: dict[str, Any],
         quality: list[dict[str, Any]] | None = None, share_codec: bool = False) -> None:  # fmt: skip
    """Write `output` from a codec and the averaged weights of a training or distillation run.

    codec_run: a codec run's folder, or its final/, or a weights folder or shipped model whose codec is taken over;
    base_run: a run's folder, or a weights folder (`pack_network`'s). The codec's matrices as float16, in which the data
    set was encoded; the transformer's as bfloat16. defaults: sampling settings
    that `presto_rt.pipeline.Defaults` knows, over those that the run itself names; its layer schedules go along.
    quality: measured figures of plans, which `deadline_ms` goes by. share_codec: leave the codec's files in the
    weights folder `codec_run`, for both. Raises InvalidInputError, WeightsError or OutputError.
    """
    _check(defaults, quality or [])
    dit, config = _network(base_run)
    config |= {"defaults": {**config["defaults"], **defaults}, "quality": quality or []}
    run = Path(codec_run)
    if ((run / "final").is_dir() or (run / "codec.safetensors").is_file()) and not share_codec:
        codec = load_codec(run)
        config["codec"] = codec.config.to_dict()
        save_folder(output, config, {"dit": dit, "codec": cast_matrices(codec.state_dict(), torch.float16)})
    else:
        config["codec"] = load_folder(codec_run).config["codec"]  # its files are checked here
        taken = {"codec": codec_run}
        save_folder(output, config, {"dit": dit}, **{"shared" if share_codec else "copied": taken})


def _check(defaults: Any, quality: Any) -> None:
    """Raises InvalidInputError for what a loaded model would pass over in silence, or stumble on with its first deadline."""
    from ...pipeline import Defaults

    known = [f.name for f in fields(Defaults)]
    if not isinstance(defaults, dict) or set(defaults) - set(known):
        raise InvalidInputError(f"defaults must be an object with some of {', '.join(known)}, not {defaults!r}")
    rows = quality if isinstance(quality, list) else [None]
    if not all(isinstance(row, dict) and {"steps", "kid"} <= row.keys() for row in rows):
        raise InvalidInputError("quality must be a list of objects with steps, layers and kid")


def pack_network(output: str | Path, run: str | Path) -> None:
    """Write the transformer of a run alone: small to carry about, a teacher for others, and good for `pack` again."""
    dit, config = _network(run)
    save_folder(output, config, {"dit": dit})


def _network(run: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Averaged weights of a run folder in bfloat16, or those of a weights folder, and their part of config.json."""
    checkpoint = Path(run) / "checkpoint.safetensors"
    if not checkpoint.is_file():
        loaded = load_folder(run)
        known = {name: loaded.config.get(name, {}) for name in ("model", "defaults", "layers", "training")}
        return loaded.parts["dit"], known
    tensors, meta = load_checkpoint(checkpoint)
    training = {"steps": meta["step"], "minutes": round(meta["used_seconds"] / 60, 1),
                "latent_frames_seen": meta["frames_seen"], "options": meta["options"]}  # fmt: skip
    config = {"model": meta["config"], "defaults": meta.get("defaults", {}), "layers": meta.get("layers", {}),
              "training": training}  # fmt: skip
    return cast_matrices(part(tensors, "ema"), torch.bfloat16), config
