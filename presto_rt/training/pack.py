"""From run folders to a weights folder that `presto_rt.load` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .. import weights
from ..errors import WeightsError
from ..models.codec import Codec, CodecConfig
from .common import load_checkpoint


def load_codec(run: str | Path) -> Codec:
    """The averaged codec of a finished run: `run`/final. Raises WeightsError when there is none."""
    folder = Path(run) / "final"
    try:
        config = CodecConfig.from_dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise WeightsError(f"no trained codec in {folder} ({error}); run `presto-rt train codec` first") from error
    codec = Codec(config)
    codec.load_state_dict(load_checkpoint(folder / "codec.safetensors")[0])
    return codec.eval().requires_grad_(False)


def pack(output: str | Path, *, codec_run: str | Path, base_run: str | Path, defaults: dict[str, Any]) -> None:
    """Write `output` from a codec run and a base run's averaged weights; matrices as bfloat16.

    defaults: sampling settings that `presto_rt.pipeline.Defaults` knows. Raises WeightsError, OutputError.
    """
    codec = load_codec(codec_run)
    tensors, meta = load_checkpoint(Path(base_run) / "checkpoint.safetensors")
    state = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    training = {"steps": meta["step"], "minutes": round(meta["used_seconds"] / 60, 1),
                "latent_frames_seen": meta["frames_seen"], "options": meta["options"]}  # fmt: skip
    config = {"model": meta["config"], "codec": codec.config.to_dict(), "defaults": defaults, "training": training}
    parts = {"dit": state, "codec": codec.state_dict()}
    weights.save(output, config, parts, dtype=torch.bfloat16)
