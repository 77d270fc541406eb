"""Read a data set: items of the manifest by split and kind, and crops of their audio."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ...errors import InvalidInputError
from .manifest import KINDS, SPLITS, Item, Manifest
from .manifest import SAMPLE_RATE as SAMPLE_RATE
from .manifest import load_manifest as load_manifest


def items(
    manifest: Manifest, split: str | Iterable[str] | None = None, kinds: str | Iterable[str] | None = None
) -> list[Item]:
    """Return the items of one or more splits and kinds; None selects all.

    Raises InvalidInputError for an unknown split or kind.
    """
    splits = _names(split, SPLITS, "split")
    selected = _names(kinds, KINDS, "kind")
    return [i for i in manifest.items if i.split in splits and i.kind in selected]


def read_audio(
    item: Item,
    start_frame: int = 0,
    frames: int | None = None,
    *,
    root: str | os.PathLike[str],
) -> np.ndarray:
    """Read samples of an item.

    Args:
        item: record of the audio file.
        start_frame: first sample frame, at 44.1 kHz.
        frames: number of sample frames; None reads to the end of the file.
        root: folder of the data set, to which `item.path` is relative.

    Returns:
        (2, frames) float32 in [-1, 1].

    Raises:
        InvalidInputError: the range is not inside the file, or the file is missing or not 44.1 kHz stereo.
    """
    import soundfile

    path = Path(root) / item.path
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate != SAMPLE_RATE or file.channels != 2:
                raise InvalidInputError(f"{path} is not {SAMPLE_RATE} Hz stereo; rebuild the data set")
            count = file.frames - start_frame if frames is None else frames
            if start_frame < 0 or count < 0 or start_frame + count > file.frames:
                raise InvalidInputError(
                    f"{path} has {file.frames} frames; {count} from frame {start_frame} are outside it"
                )
            file.seek(start_frame)
            return np.ascontiguousarray(file.read(count, dtype="float32", always_2d=True).T)
    except soundfile.LibsndfileError as error:
        raise InvalidInputError(f"cannot read {path} ({error}); rebuild the data set") from error


def frames_of(item: Item) -> int:
    """Return the number of sample frames of an item from its record, without opening the file."""
    return round(item.seconds * SAMPLE_RATE)


def _names(selection: str | Iterable[str] | None, known: tuple[str, ...], field: str) -> tuple[str, ...]:
    if selection is None:
        return known
    names = (selection,) if isinstance(selection, str) else tuple(selection)
    for name in names:
        if name not in known:
            raise InvalidInputError(f"unknown {field} {name!r}; choose from: {', '.join(known)}")
    return names
