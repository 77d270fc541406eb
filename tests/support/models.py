"""A small random model in a weights folder: quick to run, every parameter random so that its output is not zero."""

from __future__ import annotations

from pathlib import Path

import torch

from presto_rt.checkpoints import save_folder
from presto_rt.models.codec import Codec, CodecConfig
from presto_rt.models.config import preset
from presto_rt.models.dit import DiT

CODEC = CodecConfig(
    encoder_width=32,
    encoder_blocks=1,
    decoder_width=32,
    decoder_blocks=1,
    frame_width=16,
    frame_blocks=1,
    griffin_lim=0,
)


def write_tiny_model(folder: Path) -> Path:
    torch.manual_seed(0)
    dit, codec = DiT(preset("tiny")), Codec(CODEC)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.05)
    config = {
        "model": dit.config.to_dict(),
        "codec": CODEC.to_dict(),
        "defaults": {"steps": 4, "sampler": "heun", "guidance": 2.0},
    }
    save_folder(folder, config, {"dit": dit.state_dict(), "codec": codec.state_dict()})
    return folder
