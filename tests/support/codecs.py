"""Small codecs with random weights whose features lie in the range of real ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from presto_rt.models.codec import Codec, CodecConfig

SMALL = CodecConfig(decoder_width=72, decoder_blocks=3, frame_width=40, frame_blocks=2, griffin_lim=0)


def random_codec(config: CodecConfig = SMALL, griffin_lim: int = 0) -> Codec:
    """Return a codec in which nothing of the decoder is zero, drawn from torch's global generator."""
    codec = Codec(replace(config, griffin_lim=griffin_lim)).eval().requires_grad_(False)
    for p in codec.decoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    codec.latent_mean.normal_()
    codec.latent_scale.uniform_(0.3, 0.7)
    codec.feature_mean.normal_(-8, 2)
    codec.max_log_magnitude.normal_(-7, 1)
    return codec


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Return the RMS of the error over the RMS of what is wanted."""
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
