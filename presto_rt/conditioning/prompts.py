"""Prompts as callers write them: validation, and the tempo that a prompt names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import InvalidInputError

MIN_BPM, MAX_BPM = 30.0, 300.0

_BPM = re.compile(r"(?<![\w.])(\d{2,3}(?:\.\d+)?)\s*-?\s*(?:bpm|beats per minute)\b", re.IGNORECASE)


def parse_bpm(prompt: str) -> float | None:
    """Return the tempo that a prompt names ("90 bpm", "120 beats per minute"); None without one in 30 to 300."""
    found = _BPM.search(prompt)
    if not found:
        return None
    bpm = float(found.group(1))
    return bpm if MIN_BPM <= bpm <= MAX_BPM else None


def check_prompts(prompts: object) -> list[str]:
    """Return the prompts of a string or a sequence of strings as a list. Raises InvalidInputError for all else."""
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(prompt, str) for prompt in listed):
        raise InvalidInputError(f"prompt must be a string or a non-empty sequence of strings, not {_shown(prompts)}")
    return list(listed)


def _shown(value: object) -> str:
    """Show a value in one short line of an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
