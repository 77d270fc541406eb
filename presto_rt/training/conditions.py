"""Training examples of the base model: crops of latents with their captions, tempo and length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import HOP, SAMPLE_RATE
from ..data.dataset import load_manifest
from ..errors import InvalidInput
from ..keys import Key, key_features, pitch_class
from ..models.dit import Condition, beat_features
from ..text import load_text_encoder

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

    Pieces are drawn in proportion to their length. Raises InvalidInput when the folder lacks encoded latents.
    """

    def __init__(self, data_root: str | Path, split: str, device: torch.device | str = "cpu") -> None:
        root = Path(data_root)
        rows, index = root / "latents" / f"{split}.npy", root / "latents" / f"{split}.json"
        if not rows.is_file() or not index.is_file():
            raise InvalidInput(f"no encoded latents at {rows}: run `presto-rt train encode` after training the codec")
        self.device = torch.device(device)
        self.latents = torch.from_numpy(np.load(rows)).to(self.device)
        known = {item.id: item for item in load_manifest(root).items}
        self.pieces = [self._piece(entry, known[entry["id"]]) for entry in json.loads(index.read_text())["items"]]
        self.pieces = [p for p in self.pieces if p.captions]
        weights = np.array([p.frames for p in self.pieces], dtype=np.float64)
        self.probability = weights / weights.sum()
        self._encode_captions(root / "latents" / f"{split}.captions.safetensors")

    @staticmethod
    def _piece(entry: dict[str, Any], item: Any) -> Piece:
        key = (pitch_class(item.key), item.mode) if item.key else None
        return Piece(item.id, entry["start"], entry["frames"], list(item.captions), item.bpm, item.beats_per_bar or 4,
                     item.beat_offset_seconds or 0.0, key)  # fmt: skip

    def _encode_captions(self, cache: Path) -> None:
        """Token states of all captions, (tokens, 384) float16, with their offsets; kept beside the latents."""
        from safetensors.torch import load_file, save_file

        captions = [c for p in self.pieces for c in p.captions]
        self.first_caption = np.cumsum([0] + [len(p.captions) for p in self.pieces])
        key = torch.tensor(list(("\n".join(captions)).encode()), dtype=torch.uint8)
        if cache.is_file():
            saved = load_file(cache)
            if torch.equal(saved["key"], key):
                self.tokens, self.offsets = saved["tokens"].to(self.device), saved["offsets"]
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
        self.tokens, self.offsets = torch.cat(states), torch.tensor(lengths)
        save_file({"key": key, "tokens": self.tokens, "offsets": self.offsets}, cache)
        self.tokens = self.tokens.to(self.device)

    def batch(
        self, rng: np.random.Generator, size: int, frames: int, control_dropout: float = 0.3
    ) -> tuple[Tensor, Condition]:
        """Random crops: latents (size, frames, C) fp32 and their conditions; shorter pieces are left out.

        Tempo and key are left out, each by itself, with probability control_dropout.
        """
        fits = np.array([p.frames >= frames for p in self.pieces])
        if not fits.any():
            raise InvalidInput(f"no piece has {frames} latent frames ({frames * FRAME_SECONDS:.0f} s)")
        probability = self.probability * fits
        chosen = rng.choice(len(self.pieces), size, p=probability / probability.sum())
        crops, texts, beats, keys = [], [], [], []
        for i in chosen:
            piece = self.pieces[i]
            start = int(rng.integers(0, piece.frames - frames + 1))
            crops.append(self.latents[piece.start + start : piece.start + start + frames])
            caption = self.first_caption[i] + rng.integers(len(piece.captions))
            texts.append(self.tokens[self.offsets[caption] : self.offsets[caption + 1]])
            bpm = None if rng.random() < control_dropout else piece.bpm
            beats.append(beat_features(frames, FRAME_SECONDS, bpm, piece.beats_per_bar, piece.beat_offset,
                                       start * FRAME_SECONDS))  # fmt: skip
            keys.append(key_features(None if rng.random() < control_dropout else piece.key))
        text = torch.nn.utils.rnn.pad_sequence([t.float() for t in texts], batch_first=True)
        lengths = torch.tensor([len(t) for t in texts], device=self.device)
        mask = torch.arange(text.shape[1], device=self.device) < lengths[:, None]
        pooled = text.sum(1) / lengths[:, None]
        seconds = torch.full((size,), frames * FRAME_SECONDS, device=self.device)
        condition = Condition(text, mask, pooled, seconds, torch.stack(beats), torch.tensor(keys))
        return torch.stack(crops).float(), condition.to(self.device)
