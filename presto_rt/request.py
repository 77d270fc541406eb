"""What callers write, checked: numbers, tempos, keys and seeds, one for each prompt."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from numbers import Real
from typing import Any

from .conditioning.keys import Key, check_key, parse_key
from .conditioning.prompts import MAX_BPM, MIN_BPM, parse_bpm
from .diffusion import noise
from .errors import InvalidInputError

MAX_COUNT = 10_000  # clips in one call


def number(name: str, value: object, low: float, high: float) -> float:
    """`value`, Python's or NumPy's, as a float in [low, high]; InvalidInputError for all else, NaN and bool included."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise InvalidInputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
    return float(value)


def tempos(prompts: list[str], bpm: float | Sequence[float | None] | None) -> list[float | None]:
    """The tempo of each clip: as given, or its prompt's own, or None."""
    given = one_each("bpm", bpm, len(prompts))
    return [
        parse_bpm(p) if b is None else number("bpm", b, MIN_BPM, MAX_BPM) for p, b in zip(prompts, given, strict=True)
    ]


def keys(prompts: list[str], key: str | Sequence[str | None] | None) -> list[Key | None]:
    """The key of each clip: as given, or its prompt's own, or None."""
    given = one_each("key", key, len(prompts))
    return [parse_key(p) if k is None else check_key(k) for p, k in zip(prompts, given, strict=True)]


def seeds(count: int, seed: int | Sequence[int] | None) -> list[int]:
    """The seed of each of `count` clips: those of a list, or counted up from one, which is drawn where it is None."""
    if count > MAX_COUNT:
        raise InvalidInputError(f"at most {MAX_COUNT} clips in one call, not {count}")
    if isinstance(seed, list | tuple):
        return [noise.check_seed(s) for s in one_each("seed", seed, count)]
    first = secrets.randbits(63) if seed is None else noise.check_seed(seed)
    return [(first + i) % 2**64 for i in range(count)]


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """A value for each of `count` prompts: a list as it is, anything else repeated."""
    given = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(given) != count:
        raise InvalidInputError(f"{count} prompts but {len(given)} values of {name}")
    return given
