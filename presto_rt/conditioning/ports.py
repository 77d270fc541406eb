"""Inputs of a conditioned network: four ports that every diffusion transformer of the family has.

A model's own fields (a pooled caption, a tempo, a length) are packed into these ports by its conditioner. Plans,
buffers and backends know the ports alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .keys import Key

#: Inputs on the host, by name: CPU tensors whose first axis counts clips.
HostInputs = Mapping[str, Tensor]
#: Prefix of the host inputs that only requests with negative prompts have.
NEGATIVE = "negative_"
#: Shape and dtype of each host input of a batch.
InputLayout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
#: Token numbers (B, L) int64 and their mask (B, L) bool -> token states (B, L, C) fp32.
TokenEncoder = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of N network inputs.

    cross: (N, S, C) token states for cross-attention. cross_lengths: (N,) int32, number of valid tokens, which come
    first. vector: (N, V) fp32, global inputs of the modulation. local: (N, T, L) fp32, a vector for each latent frame.
    """

    cross: Tensor
    cross_lengths: Tensor
    vector: Tensor
    local: Tensor

    @property
    def cross_mask(self) -> Tensor:
        """(N, S) bool: True for valid tokens."""
        return torch.arange(self.cross.shape[1], device=self.cross.device) < self.cross_lengths[:, None]

    def cat(self, other: Conditioning) -> Conditioning:
        """Stack two batches of equal T; shorter token sequences are padded with zeros."""
        length = max(self.cross.shape[1], other.cross.shape[1])
        first, second = self._padded(length), other._padded(length)
        return Conditioning(*(torch.cat([getattr(first, f.name), getattr(second, f.name)]) for f in fields(self)))

    def _padded(self, length: int) -> Conditioning:
        missing = length - self.cross.shape[1]
        if not missing:
            return self
        return Conditioning(F.pad(self.cross, (0, 0, 0, missing)), self.cross_lengths, self.vector, self.local)

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning on another device."""
        return Conditioning(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class ClipControls:
    """Validated controls of one clip: prompt, negative prompt or None, tempo in beats a minute or None, key or None."""

    prompt: str
    negative_prompt: str | None = None
    bpm: float | None = None
    key: Key | None = None


class Conditioner(Protocol):
    """Controls -> host inputs -> `Conditioning`.

    `prepare` runs on the host and looks at strings. `embed` runs on the device, reads only the tensors of `layout` and
    never looks at a value, so that a CUDA graph can capture it.
    """

    def prepare(self, clips: Sequence[ClipControls], frames: int) -> HostInputs:
        """Return the host inputs of clips of `frames` latent frames."""

    def layout(self, clips: int, frames: int, negative: bool) -> InputLayout:
        """Return shapes and dtypes of static host inputs that hold any request of this size."""

    def embed(self, inputs: HostInputs, encode: TokenEncoder | None = None) -> tuple[Conditioning, Conditioning]:
        """Return the conditional and the unconditional conditioning. encode: replaces the model's own text encoder."""
