"""Audio clips: samples with their rate and origin; saving, playing and loading."""

from __future__ import annotations

import base64
import html
import logging
import os
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..diffusion.noise import check_seed
from ..errors import InvalidInputError
from . import files
from .pcm import to_pcm
from .resample import resample

if TYPE_CHECKING:
    from numpy.typing import DTypeLike
    from torch import Tensor

DEFAULT_SAMPLE_RATE = 44_100  # Hz
MAX_SAMPLE_RATE = 384_000  # Hz

log = logging.getLogger("presto_rt")


@dataclass(frozen=True, eq=False)
class Audio:
    """An audio clip and the request that it was generated from.

    Attributes:
        samples: (channels, frames), 1 or 2 channels: float32, nominally in [-1, 1], or int16 at full scale 32768,
            which sample_format="int16" generates. Other floating-point samples become float32.
        sample_rate: Hz.
        seed: Seed of the generation, also of the dither; None if the clip was not generated.
        prompt: Text of the generation; None if the clip was not generated.
        timings: Seconds by stage of the generation, and "total".
        latents: Latents that the samples were decoded from, float32 (T, C); None if the clip was not generated.

    Raises:
        InvalidInputError: An attribute has another type, shape or range.
    """

    samples: np.ndarray
    sample_rate: int = DEFAULT_SAMPLE_RATE
    seed: int | None = None
    prompt: str | None = None
    timings: dict[str, float] = field(default_factory=dict)
    latents: Tensor | None = None

    def __post_init__(self) -> None:
        samples = np.asarray(self.samples)
        if not np.issubdtype(samples.dtype, np.floating) and samples.dtype != np.int16:
            raise InvalidInputError(f"samples must be floating point in [-1, 1] or int16, got {samples.dtype}")
        if samples.ndim != 2 or samples.shape[0] not in (1, 2) or samples.shape[1] < 1:
            raise InvalidInputError(f"samples must have the shape (1 or 2 channels, frames), got {samples.shape}")
        rate: object = self.sample_rate
        if isinstance(rate, bool) or not isinstance(rate, Integral) or not 1 <= int(rate) <= MAX_SAMPLE_RATE:
            raise InvalidInputError(f"sample_rate must be an integer from 1 to {MAX_SAMPLE_RATE} Hz, got {rate!r}")
        if self.seed is not None:
            check_seed(self.seed)
        latents = self.latents
        if latents is not None and (latents.ndim != 2 or latents.dtype != torch.float32):
            raise InvalidInputError(f"latents must be float32 (T, C), got {latents.dtype} {tuple(latents.shape)}")
        dtype = np.int16 if samples.dtype == np.int16 else np.float32
        object.__setattr__(self, "samples", np.require(samples, dtype, ["C", "W"]))
        object.__setattr__(self, "sample_rate", int(rate))

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return float(self.samples.shape[1] / self.sample_rate)

    def to_int16(self, dither: bool = True) -> np.ndarray:
        """Return interleaved 16-bit samples, int16 (frames, channels).

        The seed determines the dither. int16 samples are returned unchanged.
        """
        if self.samples.dtype == np.int16:
            return self.samples.T.copy()
        integers: np.ndarray = to_pcm(torch.from_numpy(self.samples), 16, dither=dither, seed=self.seed or 0).numpy()
        return integers

    def to_float32(self) -> np.ndarray:
        """Return float32 samples (channels, frames); int16 samples are divided by 32768."""
        if self.samples.dtype == np.int16:
            return self.samples.astype(np.float32) / np.float32(32768)
        return self.samples

    def save(self, path: str | os.PathLike[str], subtype: str | None = None) -> Path:
        """Write a .wav, .flac or .ogg file and return its absolute path.

        The file appears whole or not at all. NaN is written as silence; prompt and seed go into the file's comment.
        The same audio gives the same bytes, except in .ogg, whose stream number is random.

        Args:
            path: File to write; its suffix chooses the format.
            subtype: "pcm16" (the default of .wav and .flac; float32 samples are dithered, int16 samples are written
                unchanged), "pcm24", or "float32" (.wav only). An .ogg file is Vorbis and takes no subtype.

        Raises:
            OutputError: The file cannot be written, or cannot hold the subtype.
        """
        target, subtype = files.resolve_target(path, subtype)
        samples = self.samples if subtype == "pcm16" else self.to_float32()
        if np.isnan(samples).any():
            log.warning("samples hold NaN, written as silence to %s", target)
        files.write(target, samples, self.sample_rate, subtype, seed=self.seed or 0, comment=self._comment())
        return target

    def _comment(self) -> str:
        # Arguments that are not UTF-8 come as lone surrogates, which no file can hold.
        parts = [self.prompt.encode("utf-8", "replace").decode()] if self.prompt else []
        return "; ".join(parts + ([f"seed {self.seed}"] if self.seed is not None else []))

    def _repr_html_(self) -> str:
        """Return a player for notebooks."""
        comment = self._comment()
        data = files.encode_wav(self.samples, self.sample_rate, seed=self.seed or 0, comment=comment)
        source = base64.b64encode(data).decode()
        caption = html.escape(comment or f"{self.seconds:.1f} s")
        player = f'<audio controls src="data:audio/wav;base64,{source}"></audio>'
        return f"<figure>{player}<figcaption>{caption}</figcaption></figure>"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and dtype is not None and np.dtype(dtype) != self.samples.dtype:
            raise ValueError(f"samples are {self.samples.dtype}; another dtype needs a copy")
        samples = self.samples if dtype is None else self.samples.astype(dtype, copy=False)
        return samples.copy() if copy else samples

    def __repr__(self) -> str:
        channels = "mono" if self.samples.shape[0] == 1 else "stereo"
        return (
            f"Audio({self.seconds:.2f} s, {channels}, {self.sample_rate} Hz, seed={self.seed}, prompt={self.prompt!r})"
        )


def load(path: str | os.PathLike[str], sample_rate: int = DEFAULT_SAMPLE_RATE) -> Audio:
    """Read a mono or stereo audio file of any rate and resample it to `sample_rate` (Hz).

    Raises:
        InvalidInputError: The file is missing, empty, not audio, or has more than two channels.
    """
    samples, rate = files.read(path)
    return Audio(resample(torch.from_numpy(samples), rate, sample_rate).numpy(), sample_rate)
