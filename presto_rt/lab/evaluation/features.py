"""Extract the features that the metrics need from sets of clips: in parallel, with an optional cache on disk."""

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
from .distances import level_statistics
from .musicnn import Tagger
from .notes import NoteTracker
from .rhythm import tempo

VERSION = 1  # part of the cache's file names; raise it when an extractor changes its results


@dataclass(frozen=True)
class ClipFeatures:
    """Features of a set of C clips and their N windows of 3 s.

    Args:
        clip: (N,) int64, index of the clip of each window.
        penultimate: (N, 200) float32, the tagger's penultimate layer.
        tags: (C, 50) float32, mean tag probabilities.
        embedding: (C, 200) float32, mean penultimate layer.
        tempo: (C,) float64 in beats per minute, NaN without a pulse.
        chroma: (C, 2, 12) float32, chroma and bass chroma of the notes; NaN without note tracking.
        density: (C,) float64, note onsets per second; NaN without note tracking.
        levels: (C, 4) float64, level statistics in the order of `distances.LEVELS`.
    """

    clip: np.ndarray
    penultimate: np.ndarray
    tags: np.ndarray
    embedding: np.ndarray
    tempo: np.ndarray
    chroma: np.ndarray
    density: np.ndarray
    levels: np.ndarray

    def select(self, indices: np.ndarray) -> ClipFeatures:
        """Return the features of some clips, renumbered from 0 in the order of `indices`."""
        windows = [np.flatnonzero(self.clip == i) for i in indices]
        per_clip = {
            f.name: getattr(self, f.name)[indices]
            for f in fields(ClipFeatures)
            if f.name not in ("clip", "penultimate")
        }
        return ClipFeatures(
            clip=np.repeat(np.arange(len(indices)), [len(w) for w in windows]),
            penultimate=self.penultimate[np.concatenate(windows)],
            **per_clip,
        )


def extract_features(
    clips: Sequence[np.ndarray],
    *,
    rate: int = 44100,
    workers: int | None = None,
    notes: bool = True,
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> ClipFeatures:
    """Extract the features of a set of clips.

    Args:
        clips: clips (2, n) float32. The sequence may load them lazily: each is read once, and at most `workers` are in
            memory at a time.
        rate: sample rate of the clips in Hz.
        workers: threads, each of which processes one clip at a time; None uses all cores.
        notes: also track notes; without them, chroma and density are NaN.
        cache: folder that keeps the features of each clip under the hash of its samples; None keeps nothing.
        progress: called with 1 after each clip.

    Returns:
        Features of the clips, in their order.

    Raises:
        InvalidInputError: `clips` is empty.
        MissingDependencyError: the package of a network is not installed.
    """
    if not len(clips):
        raise InvalidInputError("no clips to extract features from; pass at least one")
    tagger, thread = Tagger(), local()
    torch_threads = torch.get_num_threads()

    def extract(i: int) -> dict[str, np.ndarray]:
        clip = np.asarray(clips[i], dtype=np.float32)
        if cache is None:
            return compute(clip)
        digest = hashlib.sha256(clip.tobytes()).hexdigest()[:24]
        file = cache / f"{digest}-{rate}-{VERSION}-{int(notes)}.npz"
        if file.is_file():
            with np.load(file) as stored:
                return dict(stored)
        features = compute(clip)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}-{i}.part.npz")  # equal clips may be extracted at the same time
        np.savez(part, **features)  # type: ignore[arg-type]  # the stub takes a name for the flag allow_pickle
        os.replace(part, file)
        return features

    def compute(clip: np.ndarray) -> dict[str, np.ndarray]:
        windows = tagger.tag(clip, rate)
        features: dict[str, np.ndarray] = {
            "penultimate": windows.penultimate,
            "tags": windows.tags.mean(0),
            "tempo": np.array(tempo(clip, rate)),
            "chroma": np.full((2, 12), np.nan),
            "density": np.array(np.nan),
            "levels": level_statistics(clip, rate),
        }
        if notes:
            if not hasattr(thread, "tracker"):
                thread.tracker = NoteTracker(threads=1)
            tracked = thread.tracker.track(clip, rate)
            features |= {"chroma": tracked.key_chroma(), "density": np.array(tracked.density())}
        return features

    with ThreadPoolExecutor(workers or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = []
        for features in pool.map(extract, range(len(clips))):
            results.append(features)
            if progress is not None:
                progress(1)
    torch.set_num_threads(torch_threads)
    names = ("tags", "tempo", "chroma", "density", "levels")
    stacked = {name: np.stack([features[name] for features in results]) for name in names}
    penultimate = [features["penultimate"] for features in results]
    return ClipFeatures(
        clip=np.repeat(np.arange(len(clips)), [len(windows) for windows in penultimate]),
        penultimate=np.concatenate(penultimate),
        embedding=np.stack([windows.mean(0) for windows in penultimate]),
        **stacked,
    )
