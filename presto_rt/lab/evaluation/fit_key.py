"""Fits the key weights of `tonality` on rendered training clips and prints them: python -m
presto_rt.lab.evaluation.fit_key.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ...conditioning.keys import pitch_class
from ..data.dataset import items, load_manifest
from .notes import NoteTracker
from .run import RENDERED, choose, real_clips
from .tonality import best_key, fit, key_scores


def cross_validate(chromas: list[np.ndarray], keys: list[tuple[int, str]], groups: list[str], ridge: float) -> float:
    """Share of keys found by weights fitted on the other four fifths; a composition lies in one fifth."""
    fold = np.array([zlib.crc32(g.encode()) % 5 for g in groups])
    right = 0
    for k in range(5):
        seen = np.flatnonzero(fold != k)
        weights = fit([chromas[i] for i in seen], [keys[i] for i in seen], ridge)
        right += sum(best_key(key_scores(chromas[i], weights)) == keys[i] for i in np.flatnonzero(fold == k))
    return right / len(keys)


def main() -> None:
    """Print the weights, the number of clips and the cross-validated share of keys found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data", help="data set folder (default: data)")
    parser.add_argument("--count", type=int, default=500, help="clips (default: 500)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each (default: 10)")
    parser.add_argument("--ridge", type=float, default=1e-3, help="penalty (default: 0.001)")
    args = parser.parse_args()
    keyed = [i for i in items(load_manifest(args.data), "train", RENDERED) if i.key]
    records: list[dict[str, Any]] = choose(keyed, args.count, args.seconds, seed=2)
    clips, tracker = real_clips(records, Path(args.data), args.seconds), NoteTracker()
    chromas = [tracker.track(clip).chromas() for clip in clips]
    keys = [(pitch_class(r["key"]), str(r["mode"])) for r in records]
    share = cross_validate(chromas, keys, [r["composition"] for r in records], args.ridge)
    print(f"{len(keys)} clips; five-fold cross-validation finds {share:.1%} of the keys")
    for row in fit(chromas, keys, args.ridge):
        print(", ".join(f"{w:.2f}" for w in row))


if __name__ == "__main__":
    main()
