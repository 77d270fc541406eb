"""Encoding of a data set into latents that trainers map into memory.

Each split has two files. `<split>.npy` holds float16 latents (total frames, 64), all items concatenated in the order of
their ids. `<split>.json` is its index: {"items": [{"id", "start", "frames"}, ...], "total_frames", "channels", "codec",
"done", "complete"}. Encoding is deterministic, so that a killed run continues after its last recorded item and ends
with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ...errors import InvalidInputError
from ...models.codec import Codec
from ...models.spectral import LATENT_HOP
from ..data.dataset import frames_of, items, read_audio
from ..data.manifest import Item, load_manifest

RENDERED = ("solo", "duo", "band")
SAVE_EVERY = 200  # items encoded between two records of the progress


def encode_dataset(
    data_root: str | os.PathLike[str],
    codec: Codec,
    out_dir: str | os.PathLike[str],
    *,
    splits: Iterable[str] = ("train", "val", "test"),
    kinds: Iterable[str] = RENDERED,
    progress: bool = True,
) -> dict[str, int]:
    """Encode all items of the given splits and kinds.

    Items that an earlier call encoded with the same codec are reused, so that a killed run continues and a grown data
    set costs only its new items. Latents of another codec are replaced.

    Args:
        data_root: data set folder.
        codec: encoder of the latents.
        out_dir: folder of the latents.
        splits: splits to encode.
        kinds: kinds of items to encode.
        progress: show a progress bar.

    Returns:
        Number of latent frames of each split.

    Raises:
        InvalidInputError: the data set has no such items, or an item's audio is not as long as its manifest entry.
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
        raise InvalidInputError(f"{data_root} has no items of kinds {', '.join(kinds)}; run `presto-rt lab data build`")
    return totals


def codec_stamp(codec: Codec) -> str:
    """SHA-256 (hex) of the weights that the latents depend on: encoder, feature mean, latent mean and scale."""
    digest = hashlib.sha256()
    for name, value in sorted(codec.state_dict().items()):
        if name.startswith("encoder.") or name in ("feature_mean", "latent_mean", "latent_scale"):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_latents(folder: str | os.PathLike[str], split: str) -> tuple[npt.NDArray[np.float16], dict[str, Any]]:
    """Return a split's memory-mapped latents (total frames, 64) float16 and its index.

    Raises:
        InvalidInputError: the files are missing.
    """
    array, index = Path(folder) / f"{split}.npy", Path(folder) / f"{split}.json"
    if not array.is_file() or not index.is_file():
        raise InvalidInputError(f"no latents of split {split!r} in {folder}; run `presto-rt lab train encode`")
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
    reusable = _encoded_items(out, split, stamp)
    part_index, part_array = out / f"{split}.part.json", out / f"{split}.part.npy"
    part_index.unlink(missing_ok=True)  # it describes the array that the next line empties
    latents = np.lib.format.open_memmap(
        part_array, mode="w+", dtype=np.float16, shape=(total, codec.config.latent_channels)
    )
    bar = tqdm(total=round(sum(i.seconds for i in chosen)), desc=f"latents, {split}", unit="s", disable=not progress)
    newly_encoded = 0
    for number, item in enumerate(chosen):
        encoded = reusable.get(item.id)
        if encoded is None or len(encoded) != lengths[number]:
            if newly_encoded % SAVE_EVERY == 0:
                latents.flush()
                _write_json(part_index, {**index, "done": number, "complete": False})
            samples = torch.from_numpy(read_audio(item, root=root))
            encoded = codec.encode(samples)[0].cpu().numpy()
            newly_encoded += 1
        if len(encoded) != lengths[number]:
            raise InvalidInputError(
                f"{item.id} has {len(encoded)} latent frames, but its manifest entry of {item.seconds} s has "
                f"{lengths[number]}; rebuild the data set"
            )
        latents[starts[number] : starts[number + 1]] = encoded
        bar.update(round(item.seconds))
    bar.close()
    latents.flush()
    index_path.unlink(missing_ok=True)  # a kill between the replacements must not pair an index with another array
    os.replace(part_array, array_path)
    _write_json(index_path, {**index, "done": len(chosen), "complete": True})
    part_index.unlink(missing_ok=True)
    return total


def _encoded_items(out: Path, split: str, stamp: str) -> dict[str, npt.NDArray[np.float16]]:
    """Latents by item id of earlier runs with the same codec, complete or interrupted."""
    encoded: dict[str, npt.NDArray[np.float16]] = {}
    for stem in (split, f"{split}.part"):
        try:
            index = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
            array = np.load(out / f"{stem}.npy", mmap_mode="r")
        except (OSError, ValueError):
            continue
        if index.get("codec") != stamp or len(array) != index["total_frames"]:
            continue
        for item in index["items"][: index["done"]]:
            encoded[item["id"]] = np.array(array[item["start"] : item["start"] + item["frames"]])
    return encoded


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
