"""A small synthetic set of latents, for tests and dry runs: what a trainer reads, without audio."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..data.manifest import Item, Manifest
from .conditions import FRAME_SECONDS


def write_latents(root: str | Path, pieces: int = 8, frames: int = 200, seed: int = 0) -> Path:
    """Write a manifest and encoded latents of `pieces` training and a quarter as many validation pieces to `root`.

    The caption decides the latents' sign, which is what a model has to learn from text. Returns `root`.
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
            items.append(Item(f"{split}{i}", "solo", split, "x.flac", frames * FRAME_SECONDS, f"c{split}{i}", "", "",
                              "", [f"{word} music", f"some {word}"], [word], None, 120.0, 4, 0.0))  # fmt: skip
        np.save(root / "latents" / f"{split}.npy", np.concatenate(rows))
        (root / "latents" / f"{split}.json").write_text(json.dumps({"items": index}))
    Manifest(root, 0, items).save()
    return root
