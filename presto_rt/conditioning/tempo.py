"""Tempo as an input for each latent frame: sine and cosine of beat and bar phase."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BEAT_CHANNELS = 5  # sin, cos of beat phase; sin, cos of bar phase; 1 where a tempo is given


def beat_features(
    frames: int,
    frame_seconds: float,
    bpm: float | Tensor | None,
    beats_per_bar: int | Tensor = 4,
    offset: float | Tensor = 0.0,
    start: float | Tensor = 0.0,
) -> Tensor:
    """Return the (frames, 5) fp32 beat-phase input: phases of beat and bar at the centre of each latent frame.

    Args:
        frames: number of latent frames.
        frame_seconds: duration of a latent frame in seconds.
        bpm: tempo in beats a minute; None gives zeros.
        beats_per_bar: beats of a bar.
        offset: time of the first downbeat in seconds.
        start: time of frame 0 in seconds, for crops.

    Returns:
        (frames, 5) fp32; with (B, 1) fp64 tensors in place of the numbers (B, frames, 5).
    """
    if bpm is None:
        return torch.zeros(frames, BEAT_CHANNELS)
    seconds = start + (torch.arange(frames, dtype=torch.float64) + 0.5) * frame_seconds - offset
    beat = 2 * math.pi * seconds * bpm / 60
    bar = beat / beats_per_bar
    return torch.stack([beat.sin(), beat.cos(), bar.sin(), bar.cos(), torch.ones_like(beat)], -1).float()
