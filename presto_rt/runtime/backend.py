"""`Backend`: runs a job, from host inputs to samples. A backend is chosen once, when a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..audio.pcm import to_pcm
from ..conditioning.ports import Conditioning, HostInputs
from ..diffusion.trajectory import NetworkCall
from ..errors import InvalidInputError
from .plan import LatentEdit
from .precision import Precision

SAMPLE_FORMATS = {"float32": torch.float32, "int16": torch.int16}
MAX_BATCH_FRAMES = 32_768  # latent frames of one batch on a GPU

#: Called with (step, steps) after each sampler step.
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """B clips of one length that share a trajectory.

    Args:
        calls: network calls of the trajectory.
        inputs: from the model's conditioner, on the CPU.
        seeds: one for each clip.
        samples: audio samples of each clip.
        frames: latent frames of each clip.
        edit: latents that are kept, on the CPU, or None.
        sample_format: "float32", or "int16", dithered by the seeds.
    """

    calls: tuple[NetworkCall, ...]
    inputs: HostInputs
    seeds: Sequence[int]
    samples: int
    frames: int
    edit: LatentEdit | None = None
    sample_format: str = "float32"

    def __post_init__(self) -> None:
        clips = len(self.seeds)
        if not clips or not self.calls or not self.samples > 0:
            raise InvalidInputError("a job needs at least one clip, one network call and one sample")
        if any(len(value) != clips for value in self.inputs.values()):
            counts = {name: len(value) for name, value in self.inputs.items()}
            raise InvalidInputError(f"{clips} seeds need inputs of as many clips, got {counts}")
        if self.edit is not None:
            for name, given in (("init", self.edit.init), ("keep", self.edit.keep)):
                if tuple(given.shape[:2]) != (clips, self.frames):
                    raise InvalidInputError(
                        f"{name} must have the shape ({clips}, {self.frames}, ...), not {tuple(given.shape)}"
                    )
        if self.sample_format not in SAMPLE_FORMATS:
            formats = ", ".join(SAMPLE_FORMATS)
            raise InvalidInputError(f"unknown sample format {self.sample_format!r}; choose from: {formats}")


@dataclass(frozen=True)
class Result:
    """Clips of a job.

    samples: (B, 2, N) float32, or (B, N, 2) int16. latents: (B, T, C) fp32 on the CPU. stage_seconds: "text", "denoise"
    and "decode". captured: seconds that recording a graph took, 0 where it existed.
    """

    samples: np.ndarray
    latents: Tensor
    stage_seconds: dict[str, float] = field(default_factory=dict)
    captured: float = 0.0


class Network(Protocol):
    """The raw network of a model, in plain torch."""

    def raw(self, x: Tensor, time: Tensor, conditioning: Conditioning, blocks: Sequence[int], budget: float) -> Tensor:
        """Return the raw output (N, T, C).

        Args:
            x: (N, T, C) fp32, scaled by c_in.
            time: (N,) fp32 noise-level input.
            conditioning: of the N inputs.
            blocks: indices of the blocks that run, in order.
            budget: layer-budget input.
        """


class Autoencoder(Protocol):
    """Stereo samples <-> latents, in plain torch."""

    def encode(self, samples: Tensor) -> Tensor:
        """Return latents (B, T, C) fp32 of samples (B, 2 or 1, N) fp32."""

    def decode(self, latents: Tensor, frames: int, *, clamp: bool = ...) -> Tensor:
        """Return `frames` samples (B, 2, frames) fp32 of latents (B, T, C), limited to [-1, 1] if `clamp`."""


class Backend(Protocol):
    """A model on a device, ready to run. Any number of threads may call it."""

    name: str
    device: torch.device
    precision: Precision

    def run(self, job: Job, on_step: OnStep | None = None) -> Result:
        """Return the clips of a job. Raises GenerationError and OutOfMemoryError."""

    def decode(self, latents: Tensor, samples: int) -> Tensor:
        """Return stereo samples (B, 2, samples) fp32 of latents (B, T, C), not limited to full scale."""

    def max_batch(self, frames: int) -> int:
        """Return how many clips of `frames` latent frames run as one batch."""

    def fingerprint(self) -> dict[str, str | int]:
        """Return what timings depend on besides weights and versions: device, backend, precision, threads."""


def gpu_batch(frames: int) -> int:
    """Return the largest power of two of clips that stays within MAX_BATCH_FRAMES."""
    return int(1 << (max(1, MAX_BATCH_FRAMES // frames).bit_length() - 1))


def to_sample_format(samples: Tensor, seeds: Sequence[int], sample_format: str) -> np.ndarray:
    """Return samples (B, 2, N) fp32 on the CPU as float32, or as dithered int16 (B, N, 2)."""
    if sample_format == "float32":
        return samples.numpy()
    return np.stack(
        [to_pcm(clip, 16, dither=True, seed=seed).numpy() for clip, seed in zip(samples, seeds, strict=True)]
    )
