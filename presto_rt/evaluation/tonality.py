"""Key of a clip from how long each pitch class sounds, and how far it is from the key that was asked for."""

from __future__ import annotations

import numpy as np

from presto_rt.errors import InvalidInput

NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
MODES = ("major", "minor")
_LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}

# How well each pitch class fits a key, from its tonic up.
# Krumhansl and Kessler 1982 (listeners' ratings); Temperley 2007, "Kostka-Payne" corpus (frequencies in textbook
# examples).
PROFILES = {
    "krumhansl": (
        (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
        (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
    ),
    "temperley": (
        (0.748, 0.060, 0.488, 0.082, 0.670, 0.460, 0.096, 0.715, 0.104, 0.366, 0.057, 0.400),
        (0.712, 0.084, 0.474, 0.618, 0.049, 0.460, 0.105, 0.747, 0.404, 0.067, 0.133, 0.330),
    ),
}


def pitch_class(name: str) -> int:
    """0 (C) to 11 (B) of a note's name: a letter A-G with any number of # or b. Raises InvalidInput otherwise."""
    letter, signs = name[:1].upper(), name[1:]
    if letter not in _LETTERS or signs.strip("#b"):
        raise InvalidInput(f"not a note's name: {name!r}; write a letter A-G with # or b, as in F# or Bb")
    return (_LETTERS[letter] + signs.count("#") - signs.count("b")) % 12


def key_scores(chroma: np.ndarray, profile: str = "temperley") -> np.ndarray:
    """Pearson correlation of a chroma vector (12,) with each key's profile: (2, 12), mode then tonic. Zeros for
    silence.
    """
    chroma = np.asarray(chroma, dtype=np.float64)
    scores = np.zeros((2, 12))
    if chroma.std() < 1e-9:
        return scores
    for mode, weights in enumerate(PROFILES[profile]):
        for tonic in range(12):
            scores[mode, tonic] = np.corrcoef(chroma, np.roll(weights, tonic))[0, 1]
    return scores


def mirex_score(estimate: tuple[int, str], asked: tuple[int, str]) -> float:
    """MIREX's graded key score: 1 the same; .5 a fifth above, same mode; .3 relative; .2 parallel; else 0."""
    (tonic, mode), (want, want_mode) = estimate, asked
    if mode == want_mode:
        return 1.0 if tonic == want else 0.5 if (tonic - want) % 12 == 7 else 0.0
    if tonic == want:
        return 0.2
    relative = (want + 9) % 12 if want_mode == "major" else (want + 3) % 12
    return 0.3 if tonic == relative else 0.0
