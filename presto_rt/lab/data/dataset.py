"""Reading a data set: the manifest, its items by split and kind, and audio crops."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ...errors import InvalidInputError
from .manifest import KINDS, SPLITS, Item, Manifest
from .manifest import load_manifest as load_manifest

SAMPLE_RATE = 44100


def items(
    manifest: Manifest, split: str | Iterable[str] | None = None, kinds: str | Iterable[str] | None = None
) -> list[Item]:
    """Items of a split (or several) and of some kinds; None means all.

    Raises InvalidInputError for an unknown split or kind.
    """
    splits = _names(split, SPLITS, "split")
    chosen = _names(kinds, KINDS, "kind")
    return [i for i in manifest.items if i.split in splits and i.kind in chosen]


def read_audio(
    item: Item,
    start_frame: int = 0,
    frames: int | None = None,
    *,
    root: str | os.PathLike[str],
    dtype: str = "float32",
) -> np.ndarray:
    """Samples of an item, shape (2, n), "float32" in [-1, 1] or "int16".

    n = `frames`, or all that is left from `start_frame`.

    Raises InvalidInputError when the asked part is not inside the file, or the file is missing or not 44.1 kHz stereo.
    """
    import soundfile

    path = Path(root) / item.path
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate != SAMPLE_RATE or file.channels != 2:
                raise InvalidInputError(f"{path} is not {SAMPLE_RATE} Hz stereo: rebuild the data set")
            wanted = file.frames - start_frame if frames is None else frames
            if start_frame < 0 or wanted < 0 or start_frame + wanted > file.frames:
                raise InvalidInputError(f"{path} has {file.frames} frames; asked for {wanted} from {start_frame}")
            file.seek(start_frame)
            return np.ascontiguousarray(file.read(wanted, dtype=dtype, always_2d=True).T)
    except soundfile.LibsndfileError as error:
        raise InvalidInputError(f"cannot read {path} ({error}): rebuild the data set") from error


def frames_of(item: Item) -> int:
    """Number of frames of an item by its record, without opening the file."""
    return round(item.seconds * SAMPLE_RATE)


def _names(given: str | Iterable[str] | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    if given is None:
        return known
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in known:
            raise InvalidInputError(f"unknown {what} {name!r}: one of {', '.join(known)}")
    return names
