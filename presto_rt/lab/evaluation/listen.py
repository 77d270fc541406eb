"""Everything the judges need to know about a clip, heard once per set, in parallel, and kept on disk when asked to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from threading import local

import numpy as np
import torch

from ...errors import InvalidInputError
from .distances import levels
from .musicnn import Tagger
from .notes import NoteTracker
from .rhythm import tempo

VERSION = 1  # raise it when any judge changes what it says: kept results of other versions are not used


@dataclass(frozen=True)
class Listening:
    """What was heard in a set of clips. Windows (N) belong to clips (C) through `clip`."""

    clip: np.ndarray  # (N,) int64
    penultimate: np.ndarray  # (N, 200) float32
    tags: np.ndarray  # (C, 50) mean tag probabilities
    embedding: np.ndarray  # (C, 200) mean penultimate layer
    tempo: np.ndarray  # (C,) bpm, NaN when there is none
    chroma: np.ndarray  # (C, 2, 12) chroma and bass chroma of its notes
    density: np.ndarray  # (C,) note onsets per second
    levels: np.ndarray  # (C, 4) in the order of distances.LEVELS


def listen(
    clips: Sequence[np.ndarray],
    *,
    rate: int = 44100,
    workers: int | None = None,
    notes: bool = True,
    keep: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Listening:
    """Hear every clip (2, n). `clips` may load them lazily: each is asked for once, and a few are held at a time.

    workers: threads, one clip each (default: the machine's cores). notes=False skips note tracking; keys and
    densities are then NaN. keep: folder where what was heard is kept per clip, by the hash of its samples.
    progress(1) is called after each clip.
    """
    if not len(clips):
        raise InvalidInputError("there are no clips to listen to")
    tagger, own = Tagger(), local()
    tracker_threads = torch.get_num_threads()

    def hear(i: int) -> dict[str, np.ndarray]:
        clip = np.asarray(clips[i], dtype=np.float32)
        file = None
        if keep is not None:
            digest = hashlib.sha256(clip.tobytes()).hexdigest()[:24]
            file = keep / f"{digest}-{rate}-{VERSION}-{int(notes)}.npz"
            if file.is_file():
                with np.load(file) as stored:
                    result = dict(stored)
                _tick(progress)
                return result
        heard = tagger.hear([clip], rate)
        result = {
            "penultimate": heard.penultimate,
            "tags": heard.tags.mean(0),
            "tempo": np.float64(tempo(clip, rate)),
            "chroma": np.full((2, 12), np.nan),
            "density": np.float64(np.nan),
            "levels": levels(clip, rate),
        }
        if notes:
            if not hasattr(own, "tracker"):
                own.tracker = NoteTracker(threads=1)
            found = own.tracker.track(clip, rate)
            result["chroma"], result["density"] = found.chromas(), np.float64(found.density())
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}-{i}.part.npz")  # equal clips are heard side by side
            np.savez(part, **result)
            os.replace(part, file)
        _tick(progress)
        return result

    with ThreadPoolExecutor(workers or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = list(pool.map(hear, range(len(clips))))
    torch.set_num_threads(tracker_threads)
    stacked = {name: np.stack([r[name] for r in results]) for name in ("tags", "tempo", "chroma", "density", "levels")}
    windows = [r["penultimate"] for r in results]
    return Listening(
        clip=np.repeat(np.arange(len(clips)), [len(w) for w in windows]),
        penultimate=np.concatenate(windows),
        embedding=np.stack([w.mean(0) for w in windows]),
        **stacked,
    )


def _tick(progress: Callable[[int], None] | None) -> None:
    if progress is not None:
        progress(1)


def take(heard: Listening, chosen: np.ndarray) -> Listening:
    """What was heard in some of the clips, renumbered 0.. in the order of `chosen`."""
    rows = [np.flatnonzero(heard.clip == c) for c in chosen]
    per_clip = {
        f.name: getattr(heard, f.name)[chosen] for f in fields(Listening) if f.name not in ("clip", "penultimate")
    }
    return Listening(
        clip=np.repeat(np.arange(len(chosen)), [len(r) for r in rows]),
        penultimate=heard.penultimate[np.concatenate(rows)],
        **per_clip,
    )
