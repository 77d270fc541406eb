"""Conditioner for models with a caption, a clip length, a tempo and a key.

Vector port: pooled token states (W), clip length in seconds (1), key features (24). Cross port: token states. Local
port: beat-phase features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .keys import KEY_CHANNELS, key_features
from .minilm import TextEncoder, load_text_encoder
from .ports import NEGATIVE, ClipControls, Conditioning, HostInputs, InputLayout, TokenEncoder
from .tempo import BEAT_CHANNELS, beat_features


class VectorFields(NamedTuple):
    """Fields of the vector port: pooled (N, W), seconds (N,), key (N, 24)."""

    pooled: Tensor
    seconds: Tensor
    key: Tensor


def pack_vector(fields: VectorFields) -> Tensor:
    """Return the vector port (N, W + 25) of its fields."""
    return torch.cat([fields.pooled, fields.seconds[:, None], fields.key], 1)


def unpack_vector(vector: Tensor) -> VectorFields:
    """Return the fields of a vector port (N, W + 25)."""
    pooled, seconds, key = vector.split([vector.shape[1] - KEY_CHANNELS - 1, 1, KEY_CHANNELS], 1)
    return VectorFields(pooled.contiguous(), seconds[:, 0], key)  # a strided product may round in another order


class TextConditioner:
    """Conditioner over a text encoder. See `ports.Conditioner`.

    Args:
        null_text: (1, 1, W) learned token state of "no caption".
        null_pooled: (1, W) learned pooled state of "no caption".
        max_tokens: longer prompts are cut here, with a logged warning.
        hop: audio samples of a latent frame.
        sample_rate: of the audio, in Hz.
        encoder: text encoder; None takes the packaged one at the first prompt, shared by all models on a CPU.
        device: where `embed` computes.
    """

    def __init__(
        self,
        null_text: Tensor,
        null_pooled: Tensor,
        *,
        max_tokens: int,
        hop: int,
        sample_rate: int,
        encoder: TextEncoder | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.null_text = null_text.detach().to(self.device, torch.float32, copy=True)
        self.null_pooled = null_pooled.detach().to(self.device, torch.float32, copy=True)
        self.max_tokens, self.hop, self.sample_rate = max_tokens, hop, sample_rate
        self._encoder = encoder

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder on this conditioner's device, loaded at the first prompt."""
        if self._encoder is None:
            shared = load_text_encoder()
            self._encoder = shared if self.device.type == "cpu" else copy.deepcopy(shared).to(self.device)
        return self._encoder

    def prepare(self, clips: Sequence[ClipControls], frames: int) -> HostInputs:
        """Return token numbers, lengths, clip seconds, beat and key features of each clip, on the CPU."""
        ids, lengths = self._tokens([clip.prompt for clip in clips])
        frame_seconds = self.hop / self.sample_rate
        inputs = {
            "ids": ids,
            "lengths": lengths,
            "seconds": torch.full((len(clips),), frames * self.hop / self.sample_rate),
            "beat": torch.stack([beat_features(frames, frame_seconds, clip.bpm) for clip in clips]),
            "key": torch.tensor([key_features(clip.key) for clip in clips]),
        }
        if any(clip.negative_prompt is not None for clip in clips):
            negative = self._tokens([clip.negative_prompt or "" for clip in clips])
            inputs |= {NEGATIVE + "ids": negative[0], NEGATIVE + "lengths": negative[1]}
        return inputs

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        rows = self.encoder.tokens(prompts, self.max_tokens)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([len(row) for row in rows], dtype=torch.int32)

    def layout(self, clips: int, frames: int, negative: bool) -> InputLayout:
        """Return shapes and dtypes of static host inputs, with prompts at their longest."""
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "ids": ((clips, self.max_tokens), torch.int64),
            "lengths": ((clips,), torch.int32),
            "seconds": ((clips,), torch.float32),
            "beat": ((clips, frames, BEAT_CHANNELS), torch.float32),
            "key": ((clips, KEY_CHANNELS), torch.float32),
        }
        if negative:
            layout |= {NEGATIVE + name: layout[name] for name in ("ids", "lengths")}
        return layout

    def embed(self, inputs: HostInputs, encode: TokenEncoder | None = None) -> tuple[Conditioning, Conditioning]:
        """Return conditional and unconditional conditioning of inputs on this conditioner's device.

        Without a negative prompt the unconditional branch has the learned null caption and no key (Ho & Salimans 2022).
        """
        encode = encode or self.encoder
        cross, pooled = self._states(encode, inputs["ids"], inputs["lengths"])
        seconds, key = inputs["seconds"], inputs["key"]
        conditional = Conditioning(
            cross, inputs["lengths"], pack_vector(VectorFields(pooled, seconds, key)), inputs["beat"]
        )
        clips = len(seconds)
        if NEGATIVE + "ids" in inputs:
            lengths = inputs[NEGATIVE + "lengths"]
            cross, pooled = self._states(encode, inputs[NEGATIVE + "ids"], lengths)
        else:
            cross, pooled = self.null_text.expand(clips, -1, -1), self.null_pooled.expand(clips, -1)
            lengths = torch.ones_like(inputs["lengths"])
        vector = pack_vector(VectorFields(pooled, seconds, torch.zeros_like(key)))
        return conditional, Conditioning(cross, lengths, vector, inputs["beat"])

    @staticmethod
    def _states(encode: TokenEncoder, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return token states (B, L, W) and their mean over valid tokens (B, W)."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        states = encode(ids, mask)
        return states, (states * mask[..., None]).sum(1) / lengths[:, None]
