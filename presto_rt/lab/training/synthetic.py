"""Small synthetic data sets of latents, for tests and dry runs of the trainers without audio."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..data.manifest import Item, Manifest
from .conditions import FRAME_SECONDS


def write_latents(root: str | Path, pieces: int = 8, frames: int = 200, seed: int = 0) -> Path:
    """Write a manifest and encoded latents whose sign depends on the caption.

    Args:
        root: folder to write; must not contain latents yet.
        pieces: number of training pieces; the validation split has a quarter as many, at least 2.
        frames: latent frames of each piece.
        seed: seed of the latents' noise.

    Returns:
        `root` as a path.
    """
    root = Path(root)
    (root / "latents").mkdir(parents=True)
    rng, items = np.random.default_rng(seed), []
    for split, count in (("train", pieces), ("val", max(2, pieces // 4))):
        rows, index = [], []
        for i in range(count):
            sign, word = (1, "piano") if i % 2 else (-1, "drums")
            rows.append((0.45 * sign + 0.1 * rng.standard_normal((frames, 64))).astype(np.float16))
            index.append({"id": f"{split}{i}", "start": i * frames, "frames": frames})
            items.append(
                Item(
                    id=f"{split}{i}",
                    kind="solo",
                    split=split,
                    path="x.flac",
                    seconds=frames * FRAME_SECONDS,
                    composition=f"c{split}{i}",
                    content="",
                    source="",
                    licence="",
                    captions=[f"{word} music", f"some {word}"],
                    instruments=[word],
                    bpm=120.0,
                    beats_per_bar=4,
                    beat_offset_seconds=0.0,
                )
            )
        np.save(root / "latents" / f"{split}.npy", np.concatenate(rows))
        (root / "latents" / f"{split}.json").write_text(json.dumps({"items": index}))
    Manifest(root, 0, items).save()
    return root
