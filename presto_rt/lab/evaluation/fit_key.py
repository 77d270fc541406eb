"""Fit the key weights of `tonality` on rendered training clips: `python -m presto_rt.lab.evaluation.fit_key`.

Prints the fraction of keys found in five-fold cross-validation beside that of the published profiles on the same notes,
and the weights.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...conditioning.keys import pitch_class
from ..data.dataset import items, load_manifest
from .clip_sets import RENDERED, choose_records, real_clips
from .notes import NoteTracker
from .tonality import PROFILES, best_key, fit, key_scores, profile_scores

FOLDS = 5
Key = tuple[int, str]  # (tonic, mode)


def accuracy(scores: Callable[[np.ndarray], np.ndarray], chromas: Sequence[np.ndarray], keys: Sequence[Key]) -> float:
    """Fraction of keys found by `scores`, which maps chroma and bass chroma (2, 12) to scores (2, 12)."""
    return float(np.mean([best_key(scores(chroma)) == key for chroma, key in zip(chromas, keys, strict=True)]))


def cross_validate(chromas: list[np.ndarray], keys: list[Key], groups: list[str], ridge: float) -> float:
    """Fraction of keys found in five-fold cross-validation; all clips of a group (a composition) share a fold."""
    folds = np.array([zlib.crc32(group.encode()) % FOLDS for group in groups])
    correct = 0
    for fold in range(FOLDS):
        train = np.flatnonzero(folds != fold)
        weights = fit([chromas[i] for i in train], [keys[i] for i in train], ridge)
        correct += sum(best_key(key_scores(chromas[i], weights)) == keys[i] for i in np.flatnonzero(folds == fold))
    return correct / len(keys)


def main(arguments: list[str] | None = None) -> None:
    """Print the accuracies and the weights; `arguments` are those of the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data", help="folder of the data set (default: data)")
    parser.add_argument("--count", type=int, default=500, help="number of clips (default: 500)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each clip (default: 10)")
    parser.add_argument("--ridge", type=float, default=1e-3, help="weight of the penalty (default: 0.001)")
    args = parser.parse_args(arguments)
    keyed = [item for item in items(load_manifest(args.data), "train", RENDERED) if item.key]
    records = choose_records(keyed, args.count, args.seconds, seed=2)
    clips, tracker = real_clips(records, Path(args.data), args.seconds), NoteTracker()
    chromas = [tracker.track(clip).key_chroma() for clip in clips]
    keys = [(pitch_class(record["key"]), str(record["mode"])) for record in records]
    fraction = cross_validate(chromas, keys, [record["composition"] for record in records], args.ridge)
    print(f"{len(keys)} clips; five-fold cross-validation finds {fraction:.1%} of the keys")
    for name in PROFILES:
        fraction = accuracy(lambda chroma, name=name: profile_scores(chroma[0], name), chromas, keys)  # type: ignore[misc]
        print(f"profile {name}: {fraction:.1%}")
    for row in fit(chromas, keys, args.ridge):
        print(", ".join(f"{weight:.2f}" for weight in row))


if __name__ == "__main__":
    main()
