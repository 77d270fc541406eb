"""Encoding a data set once, into files that a trainer can map into memory.

For each split: `<split>.npy`, float16, (total frames, 64), all items one after the other, and `<split>.json`, which
says where each item lies: {"items": [{"id", "start", "frames"}, ...], "total_frames", "channels", "codec", "done",
"complete"}. The order is the order of ids, and encoding is deterministic, so a run that was killed goes on after the
last item recorded and ends at the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...errors import InvalidInputError
from ...models.codec import Codec, load_codec
from ...models.spectral import LATENT_HOP
from ..data.dataset import Item, frames_of, items, load_manifest, read_audio

RENDERED = ("solo", "duo", "band")
SAVE_EVERY = 200  # items that are encoded between two records of how far it is


def encode_dataset(
    data_root: str | os.PathLike[str],
    codec: Codec,
    out_dir: str | os.PathLike[str],
    *,
    splits: Iterable[str] = ("train", "val", "test"),
    kinds: Iterable[str] = RENDERED,
    progress: bool = True,
) -> dict[str, int]:
    """Encode all items of `kinds` and return the number of latent frames for each split.

    Items that an earlier call encoded with the same codec are taken over: a killed run goes on, and a grown data set
    costs only its new items. Files of another codec are replaced. Raises InvalidInputError where there are no such items.
    """
    manifest = load_manifest(data_root)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    stamp = codec_stamp(codec)
    kinds = tuple(kinds)
    totals = {}
    for split in splits:
        chosen = sorted(items(manifest, split, kinds), key=lambda item: item.id)
        totals[split] = _encode_split(data_root, codec, out, split, chosen, stamp, progress)
    if not any(totals.values()):
        raise InvalidInputError(f"{data_root} has no items of kinds {', '.join(kinds)}: build the data set first")
    return totals


def codec_stamp(codec: Codec) -> str:
    """SHA-256 over the weights that latents depend on."""
    digest = hashlib.sha256()
    for name, value in sorted(codec.state_dict().items()):
        if name.startswith("encoder.") or name in ("feature_mean", "latent_mean", "latent_scale"):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_latents(folder: str | os.PathLike[str], split: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The memory-mapped latents (total frames, 64) float16 of a split, and its index. Raises InvalidInputError where they
    are missing."""
    array, index = Path(folder) / f"{split}.npy", Path(folder) / f"{split}.json"
    if not array.is_file() or not index.is_file():
        raise InvalidInputError(f"no latents of split {split!r} in {folder}: encode the data set first")
    return np.load(array, mmap_mode="r"), json.loads(index.read_text(encoding="utf-8"))


def _encode_split(
    root: str | os.PathLike[str], codec: Codec, out: Path, split: str, chosen: list[Item], stamp: str, progress: bool
) -> int:
    lengths = [-(-frames_of(item) // LATENT_HOP) for item in chosen]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    total = int(starts[-1])
    index_path, array_path = out / f"{split}.json", out / f"{split}.npy"
    index: dict[str, Any] = {
        "codec": stamp,
        "channels": codec.config.latent_channels,
        "total_frames": total,
        "items": [
            {"id": item.id, "start": int(start), "frames": length}
            for item, start, length in zip(chosen, starts[:-1], lengths, strict=True)
        ],
    }
    known = _known(out, split, stamp)
    part_index, part_array = out / f"{split}.part.json", out / f"{split}.part.npy"
    part_index.unlink(missing_ok=True)  # the array that it tells of is emptied
    latents = np.lib.format.open_memmap(
        part_array, mode="w+", dtype=np.float16, shape=(total, codec.config.latent_channels)
    )
    bar = tqdm(total=round(sum(i.seconds for i in chosen)), desc=f"latents, {split}", unit="s", disable=not progress)
    fresh = 0
    for number, item in enumerate(chosen):
        encoded = known.get(item.id)
        if encoded is None or len(encoded) != lengths[number]:
            if fresh % SAVE_EVERY == 0:
                latents.flush()
                _write_json(part_index, {**index, "done": number, "complete": False})
            samples = torch.from_numpy(read_audio(item, root=root))
            encoded = codec.encode(samples)[0].cpu().numpy()
            fresh += 1
        if len(encoded) != lengths[number]:
            raise InvalidInputError(
                f"{item.id} is not {item.seconds} s long as the manifest says: rebuild the data set"
            )
        latents[starts[number] : starts[number + 1]] = encoded
        bar.update(round(item.seconds))
    bar.close()
    latents.flush()
    index_path.unlink(missing_ok=True)  # never the index of other latents beside these
    os.replace(part_array, array_path)
    _write_json(index_path, {**index, "done": len(chosen), "complete": True})
    part_index.unlink(missing_ok=True)
    return total


def _known(out: Path, split: str, stamp: str) -> dict[str, np.ndarray]:
    """Latents by item that earlier runs with the same codec left, whole or in part."""
    known: dict[str, np.ndarray] = {}
    for stem in (split, f"{split}.part"):
        try:
            index = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
            array = np.load(out / f"{stem}.npy", mmap_mode="r")
        except (OSError, ValueError):
            continue
        if index.get("codec") != stamp or len(array) != index["total_frames"]:
            continue
        for item in index["items"][: index["done"]]:
            known[item["id"]] = np.array(array[item["start"] : item["start"] + item["frames"]])
    return known


def main() -> None:
    """Command line: encode a data set's rendered items with a trained codec."""
    parser = argparse.ArgumentParser(prog="python -m presto_rt.lab.training.latents", description="Encode a data set.")
    parser.add_argument("--data", default="data")
    parser.add_argument("--codec", default="runs/codec/final", help="folder with config.json and codec.safetensors")
    parser.add_argument("--out", default="data/latents")
    a = parser.parse_args()
    print(encode_dataset(a.data, load_codec(a.codec), a.out))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
