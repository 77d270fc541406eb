"""From run folders to a weights folder that `presto_rt.load` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import weights
from ..models.codec import load_codec
from .common import load_checkpoint
from .loop import part


def pack(output: str | Path, *, codec_run: str | Path, base_run: str | Path, defaults: dict[str, Any],
         quality: list[dict[str, Any]] | None = None) -> None:  # fmt: skip
    """Write `output` from a codec and the averaged weights of a training or distillation run.

    codec_run: a codec run's folder, or a weights folder or shipped model whose codec is taken over. The codec's
    matrices as float16, in which the data set was encoded; the transformer's as bfloat16. defaults: sampling settings
    that `presto_rt.pipeline.Defaults` knows, over those that the run itself names; its layer schedules go along.
    quality: measured figures of plans, which `deadline_ms` goes by. Raises InvalidInput, WeightsError or OutputError.
    """
    codec_config, codec = _codec(codec_run)
    tensors, meta = load_checkpoint(Path(base_run) / "checkpoint.safetensors")
    training = {"steps": meta["step"], "minutes": round(meta["used_seconds"] / 60, 1),
                "latent_frames_seen": meta["frames_seen"], "options": meta["options"]}  # fmt: skip
    config = {"model": meta["config"], "codec": codec_config, "defaults": {**meta.get("defaults", {}), **defaults},
              "layers": meta.get("layers", {}), "quality": quality or [], "training": training}  # fmt: skip
    dit = weights.narrow(part(tensors, "ema"), torch.bfloat16)
    weights.save(output, config, {"dit": dit, "codec": codec})


def _codec(where: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if (Path(where) / "final").is_dir():
        codec = load_codec(Path(where) / "final")
        return codec.config.to_dict(), weights.narrow(codec.state_dict(), torch.float16)
    loaded = weights.load(where)
    return loaded.config["codec"], loaded.parts["codec"]
