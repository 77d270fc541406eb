"""Training examples of the base model: crops of latents with captions, tempo, key and length."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...conditioning.keys import Key, key_features, pitch_class
from ...conditioning.minilm import load_text_encoder
from ...conditioning.tempo import beat_features
from ...errors import InvalidInputError
from ...models.config import HOP, SAMPLE_RATE
from ...models.dit import Condition
from ..data.manifest import Item, load_manifest

FRAME_SECONDS = HOP / SAMPLE_RATE
ENCODER_BATCH = 64  # captions encoded at once


@dataclass
class Piece:
    """One piece of a split: frames [start, start + frames) of the latents, and its annotations.

    Attributes:
        id: the item's id in the manifest.
        start: first latent frame.
        frames: number of latent frames.
        captions: texts that describe the piece.
        bpm: tempo in beats per minute, None if unknown.
        beats_per_bar: beats in a bar.
        beat_offset: time of the first downbeat, in seconds.
        key: (pitch class, mode), None if unknown.
    """

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

    Pieces are drawn with probability proportional to their length. Token states are cached beside the latents.

    Args:
        data_root: data set folder with encoded latents.
        split: "train", "val" or "test".
        device: device of the latents, token states and batches.

    Raises:
        InvalidInputError: no encoded latents, latents of another data set, or no piece with a caption.
    """

    def __init__(self, data_root: str | Path, split: str, device: torch.device | str = "cpu") -> None:
        root = Path(data_root)
        array, index = root / "latents" / f"{split}.npy", root / "latents" / f"{split}.json"
        if not array.is_file() or not index.is_file():
            raise InvalidInputError(
                f"no encoded latents at {array}; run `presto-rt lab train encode` after training the codec"
            )
        self.device = torch.device(device)
        self.latents = torch.from_numpy(np.load(array)).to(self.device)
        items = {item.id: item for item in load_manifest(root).items}
        entries = json.loads(index.read_text())["items"]
        ends = [entry["start"] + entry["frames"] for entry in entries]
        if any(entry["id"] not in items for entry in entries) or max(ends, default=0) > len(self.latents):
            raise InvalidInputError(f"{array} is of another data set than {root}; repeat `presto-rt lab train encode`")
        self.pieces = [self._piece(entry, items[entry["id"]]) for entry in entries]
        self.pieces = [p for p in self.pieces if p.captions]
        if not self.pieces:
            raise InvalidInputError(f"no piece of the split {split!r} in {root} has a caption; build a larger data set")
        self.frames = np.array([p.frames for p in self.pieces])
        self.probability = self.frames / self.frames.sum()
        self.first_caption: npt.NDArray[np.int64] = np.cumsum([0] + [len(p.captions) for p in self.pieces])
        self.tokens: Tensor  # token states of all captions, (tokens, 384) float16
        self.offsets: npt.NDArray[np.int64]  # first token of each caption, and the number of tokens at the end
        self._load_captions(root / "latents" / f"{split}.captions.safetensors")

    @staticmethod
    def _piece(entry: dict[str, Any], item: Item) -> Piece:
        key = (pitch_class(item.key), item.mode) if item.key and item.mode else None
        return Piece(
            item.id,
            entry["start"],
            entry["frames"],
            list(item.captions),
            item.bpm,
            item.beats_per_bar or 4,
            item.beat_offset_seconds or 0.0,
            key,
        )

    def _load_captions(self, cache: Path) -> None:
        """Fill `tokens` and `offsets` from the cache, or encode the captions and write the cache."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        captions = [c for p in self.pieces for c in p.captions]
        key = torch.tensor(list(("\n".join(captions)).encode()), dtype=torch.uint8)
        try:
            saved = load_file(cache)
        except (OSError, SafetensorError):  # missing or truncated
            saved = {}
        if "key" in saved and torch.equal(saved["key"], key):
            self.tokens, self.offsets = saved["tokens"].to(self.device), saved["offsets"].numpy()
            return
        encoder = load_text_encoder()
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        encoded: dict[int, Tensor] = {}
        for i in range(0, len(order), ENCODER_BATCH):
            batch = order[i : i + ENCODER_BATCH]
            output = encoder.encode([captions[j] for j in batch])
            encoded |= {j: s[m].half() for j, s, m in zip(batch, output.states, output.mask, strict=True)}
        states = [encoded[i] for i in range(len(captions))]
        tokens, offsets = torch.cat(states), np.cumsum([0] + [len(s) for s in states])
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}")  # atomic, also if two trainers write it
        save_file({"key": key, "tokens": tokens, "offsets": torch.tensor(offsets)}, temporary)
        temporary.replace(cache)
        self.tokens, self.offsets = tokens.to(self.device), offsets

    def batch(
        self, rng: np.random.Generator, size: int, frames: int, control_dropout: float = 0.3
    ) -> tuple[Tensor, Condition]:
        """Draw random crops of pieces with at least `frames` latent frames.

        Args:
            rng: source of the random choices.
            size: number of crops, B.
            frames: latent frames of each crop, T.
            control_dropout: probability with which tempo and key, independently, are omitted from a crop's condition.

        Returns:
            Latents (B, T, C) float32 and their conditions, on the set's device.

        Raises:
            InvalidInputError: every piece is shorter than `frames`.
        """
        long_enough = self.frames >= frames
        if not long_enough.any():
            raise InvalidInputError(
                f"no piece has {frames} latent frames ({frames * FRAME_SECONDS:.0f} s); use shorter crops"
            )
        probability = self.probability * long_enough
        chosen = rng.choice(len(self.pieces), size, p=probability / probability.sum())
        starts = rng.integers(0, self.frames[chosen] - frames + 1)
        captions = self.first_caption[chosen] + rng.integers(0, np.diff(self.first_caption)[chosen])
        keep_tempo, keep_key = (rng.random((size, 2)) >= control_dropout).T
        pieces = [self.pieces[i] for i in chosen]
        first = torch.from_numpy(np.array([p.start for p in pieces]) + starts).to(self.device)
        crops = self.latents[first[:, None] + torch.arange(frames, device=self.device)].float()
        tempo = torch.tensor([[p.bpm or 0.0, p.beats_per_bar, p.beat_offset] for p in pieces], dtype=torch.float64)
        bpm, beats_per_bar, offset = tempo[:, :, None].unbind(1)
        crop_start = torch.from_numpy(starts * FRAME_SECONDS)[:, None]
        beats = beat_features(frames, FRAME_SECONDS, bpm, beats_per_bar, offset, crop_start)
        beats = beats * torch.from_numpy(keep_tempo)[:, None, None] * (bpm > 0)[:, :, None]
        keys = torch.tensor([key_features(p.key if keep else None) for p, keep in zip(pieces, keep_key, strict=True)])
        text, mask, pooled = self.texts(captions)
        seconds = torch.full((size,), frames * FRAME_SECONDS)
        return crops, Condition(text, mask, pooled, seconds, beats, keys).to(self.device)

    def texts(self, captions: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Return token states (B, L, 384) float32, their mask (B, L) and their mean (B, 384) for caption indices (B,).

        L is the length of the longest caption of the batch; on a GPU it is that of the whole split, so that shapes do
        not change between steps.
        """
        first, lengths = self.offsets[captions], np.diff(self.offsets)[captions]
        longest = int((lengths if self.device.type == "cpu" else np.diff(self.offsets)).max())
        positions = first[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
        mask = torch.from_numpy(np.arange(longest) < lengths[:, None]).to(self.device)
        text = self.tokens[torch.from_numpy(positions).to(self.device)].float() * mask[..., None]
        return text, mask, text.sum(1) / mask.sum(1, keepdim=True)
