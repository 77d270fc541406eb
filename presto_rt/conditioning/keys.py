"""Musical keys: parsing of names and prompts, and the network's input features.

A key is (tonic, mode): a pitch class 0 (C) to 11 (B), and "major" or "minor".
"""

from __future__ import annotations

import re

from ..errors import InvalidInputError

Key = tuple[int, str]

MODES = ("major", "minor")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
KEY_CHANNELS = 24  # one-hot tonic (12), then pitch classes of the scale (7 of 12)
LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_SIGNS = {"#": 1, "♯": 1, "sharp": 1, "b": -1, "♭": -1, "flat": -1}

# "a minor setback" names no key: a lower-case a counts only after "in" or "key of", and not in "in a minor key".
_KEY = re.compile(
    r"(?<![\w#])(?P<letter>[B-Gb-g]|A|(?:(?<=in )|(?<=of ))a(?! (?:major|minor)[ -](?:key|mode|scale)\b))"
    r"(?P<sign>#|♯|♭|b|[ -]?(?i:sharp|flat))?"
    r"[ -]?(?i:natural |harmonic |melodic )?(?P<mode>(?i:major|minor|maj|min))\b",
)


def pitch_class(name: str) -> int:
    """Return the pitch class, 0 (C) to 11 (B), of a note name: a letter A-G with any number of # or b.

    Raises:
        InvalidInputError: The name is not of that form.
    """
    letter, signs = name[:1].upper(), name[1:]
    if letter not in LETTERS or signs.strip("#b"):
        raise InvalidInputError(f"not a note's name: {name!r}; write a letter A-G with # or b, as in F# or Bb")
    return (LETTERS[letter] + signs.count("#") - signs.count("b")) % 12


def parse_key(prompt: str) -> Key | None:
    """Return the first key that a prompt names ("D minor", "F# major", "E-flat major"), or None."""
    found = _KEY.search(prompt)
    return _key_of(found) if found else None


def _key_of(found: re.Match[str]) -> Key:
    sign = _SIGNS.get((found["sign"] or "").strip(" -").lower(), 0)
    return (LETTERS[found["letter"].upper()] + sign) % 12, found["mode"][:3].lower() + "or"


def check_key(key: object) -> Key:
    """Return the key of a name such as "D minor". Raises InvalidInputError for anything else."""
    found = _KEY.fullmatch(key.strip().capitalize()) if isinstance(key, str) else None
    if not found:
        raise InvalidInputError(f'key must be like "D minor" or "F# major", not {key!r}')
    return _key_of(found)


def key_features(key: Key | None) -> list[float]:
    """Return KEY_CHANNELS numbers, 0 or 1: the one-hot tonic and the pitch classes of its scale; 0 without a key."""
    features = [0.0] * KEY_CHANNELS
    if key is not None:
        tonic, mode = key
        features[tonic] = 1.0
        for step in SCALES[mode]:
            features[12 + (tonic + step) % 12] = 1.0
    return features
