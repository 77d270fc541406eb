"""Training examples of the base model: crops of latents with their captions, tempo and length."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...conditioning.keys import Key, key_features, pitch_class
from ...conditioning.minilm import load_text_encoder
from ...errors import InvalidInputError
from ...models.config import HOP, SAMPLE_RATE
from ...models.dit import Condition, beat_features
from ..data.dataset import load_manifest

FRAME_SECONDS = HOP / SAMPLE_RATE


@dataclass
class Piece:
    """One piece of a split: rows [start, start + frames) of the latents, and what is known of it."""

    id: str
    start: int
    frames: int
    captions: list[str]
    bpm: float | None
    beats_per_bar: int
    beat_offset: float
    key: Key | None


class LatentSet:
    """Latents of one split in memory, (frames, C) float16, with the token states of every caption.

    Pieces are drawn in proportion to their length. Raises InvalidInputError when the folder lacks encoded latents, when they
    are of another data set, and when no piece of the split has a caption.
    """

    def __init__(self, data_root: str | Path, split: str, device: torch.device | str = "cpu") -> None:
        root = Path(data_root)
        rows, index = root / "latents" / f"{split}.npy", root / "latents" / f"{split}.json"
        if not rows.is_file() or not index.is_file():
            raise InvalidInputError(
                f"no encoded latents at {rows}: run `presto-rt lab train encode` after training the codec"
            )
        self.device = torch.device(device)
        self.latents = torch.from_numpy(np.load(rows)).to(self.device)
        known = {item.id: item for item in load_manifest(root).items}
        entries = json.loads(index.read_text())["items"]
        ends = [entry["start"] + entry["frames"] for entry in entries]
        if any(entry["id"] not in known for entry in entries) or max(ends, default=0) > len(self.latents):
            raise InvalidInputError(f"{rows} is of another data set than {root}: run `presto-rt lab train encode` again")
        self.pieces = [self._piece(entry, known[entry["id"]]) for entry in entries]
        self.pieces = [p for p in self.pieces if p.captions]
        if not self.pieces:
            raise InvalidInputError(f"no piece of the split {split!r} in {root} has a caption: build a larger data set")
        self.frames = np.array([p.frames for p in self.pieces])
        self.probability = self.frames / self.frames.sum()
        self._encode_captions(root / "latents" / f"{split}.captions.safetensors")

    @staticmethod
    def _piece(entry: dict[str, Any], item: Any) -> Piece:
        key = (pitch_class(item.key), item.mode) if item.key else None
        return Piece(item.id, entry["start"], entry["frames"], list(item.captions), item.bpm, item.beats_per_bar or 4,
                     item.beat_offset_seconds or 0.0, key)  # fmt: skip

    def _encode_captions(self, cache: Path) -> None:
        """Token states of all captions, (tokens, 384) float16, with their offsets; kept beside the latents."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        captions = [c for p in self.pieces for c in p.captions]
        self.first_caption = np.cumsum([0] + [len(p.captions) for p in self.pieces])
        key = torch.tensor(list(("\n".join(captions)).encode()), dtype=torch.uint8)
        try:
            saved = load_file(cache)
        except (OSError, SafetensorError):  # not made yet, or not whole
            saved = {}
        if "key" in saved and torch.equal(saved["key"], key):
            self.tokens, self.offsets = saved["tokens"].to(self.device), saved["offsets"].numpy()
            return
        encoder, states, lengths = load_text_encoder(), [], [0]
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        encoded: dict[int, Tensor] = {}
        for i in range(0, len(order), 64):
            batch = order[i : i + 64]
            out = encoder.encode([captions[j] for j in batch])
            encoded |= {j: s[m].half() for j, s, m in zip(batch, out.states, out.mask, strict=True)}
        for i in range(len(captions)):
            states.append(encoded[i])
            lengths.append(lengths[-1] + len(encoded[i]))
        part = cache.with_name(f"{cache.name}.{os.getpid()}")  # whole or not at all, also beside another trainer
        save_file({"key": key, "tokens": torch.cat(states), "offsets": torch.tensor(lengths)}, part)
        part.replace(cache)
        self.tokens, self.offsets = torch.cat(states).to(self.device), np.array(lengths)

    def batch(
        self, rng: np.random.Generator, size: int, frames: int, control_dropout: float = 0.3
    ) -> tuple[Tensor, Condition]:
        """Random crops: latents (size, frames, C) fp32 and their conditions; shorter pieces are left out.

        Tempo and key are left out, each by itself, with probability control_dropout.
        """
        fits = self.frames >= frames
        if not fits.any():
            raise InvalidInputError(f"no piece has {frames} latent frames ({frames * FRAME_SECONDS:.0f} s)")
        probability = self.probability * fits
        chosen = rng.choice(len(self.pieces), size, p=probability / probability.sum())
        starts = rng.integers(0, self.frames[chosen] - frames + 1)
        captions = self.first_caption[chosen] + rng.integers(0, np.diff(self.first_caption)[chosen])
        told = rng.random((size, 2)) >= control_dropout
        pieces = [self.pieces[i] for i in chosen]
        rows = torch.from_numpy(np.array([p.start for p in pieces]) + starts).to(self.device)
        crops = self.latents[rows[:, None] + torch.arange(frames, device=self.device)].float()
        tempo = torch.tensor([[p.bpm or 0.0, p.beats_per_bar, p.beat_offset] for p in pieces], dtype=torch.float64)
        bpm, bar, offset = tempo[:, :, None].unbind(1)
        begin = torch.from_numpy(starts * FRAME_SECONDS)[:, None]
        beats = beat_features(frames, FRAME_SECONDS, bpm, bar, offset, begin)
        beats = beats * torch.from_numpy(told[:, 0, None, None]) * (bpm > 0)[:, :, None]
        keys = torch.tensor([key_features(p.key if t else None) for p, t in zip(pieces, told[:, 1], strict=True)])
        text, mask, pooled = self.texts(captions)
        seconds = torch.full((size,), frames * FRAME_SECONDS)
        return crops, Condition(text, mask, pooled, seconds, beats, keys).to(self.device)

    def texts(self, captions: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Token states (B, L, 384) fp32, mask (B, L) and mean (B, 384) of captions by number.

        L is the longest caption's length: of these, or on a GPU of the whole split, so that shapes stay the same.
        """
        begins, lengths = self.offsets[captions], np.diff(self.offsets)[captions]
        longest = int((lengths if self.device.type == "cpu" else np.diff(self.offsets)).max())
        places = begins[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
        mask = torch.from_numpy(np.arange(longest) < lengths[:, None]).to(self.device)
        text = self.tokens[torch.from_numpy(places).to(self.device)].float() * mask[..., None]
        return text, mask, text.sum(1) / mask.sum(1, keepdim=True)
