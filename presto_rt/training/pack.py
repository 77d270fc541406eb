"""From run folders to a weights folder that `presto_rt.load` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import weights
from ..models.codec import load_codec
from .common import load_checkpoint
from .loop import part


def pack(output: str | Path, *, codec_run: str | Path, base_run: str | Path, defaults: dict[str, Any]) -> None:
    """Write `output` from a codec run's final/ and a base run's averaged weights.

    The codec's matrices as float16, in which the data set was encoded; the transformer's as bfloat16.
    defaults: sampling settings that `presto_rt.pipeline.Defaults` knows. Raises InvalidInput, WeightsError or
    OutputError.
    """
    codec = load_codec(Path(codec_run) / "final")
    tensors, meta = load_checkpoint(Path(base_run) / "checkpoint.safetensors")
    training = {"steps": meta["step"], "minutes": round(meta["used_seconds"] / 60, 1),
                "latent_frames_seen": meta["frames_seen"], "options": meta["options"]}  # fmt: skip
    config = {"model": meta["config"], "codec": codec.config.to_dict(), "defaults": defaults, "training": training}
    dit = weights.narrow(part(tensors, "ema"), torch.bfloat16)
    weights.save(output, config, {"dit": dit, "codec": weights.narrow(codec.state_dict(), torch.float16)})
