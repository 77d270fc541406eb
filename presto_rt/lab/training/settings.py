"""The `--set OPTION=VALUE` argument: override any option of a trainer on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidInputError


def add(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, which may be repeated, to a command's parser."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="set any other option; VALUE is JSON or text"
    )


def read(settings: list[str], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parse the values of `--set`: ["p_gen=train", "tokens=512"] gives {"p_gen": "train", "tokens": 512}.

    Values are parsed as JSON, and taken as text if that fails. Lists become tuples.

    Args:
        settings: strings of the form OPTION=VALUE.
        known: allowed options with their default values; None allows every name and type.

    Raises:
        InvalidInputError: malformed string, unknown option, or a value whose type differs from the default's.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidInputError(f"--set takes OPTION=VALUE, not {setting!r}")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        changes[name] = tuple(parsed) if isinstance(parsed, list) else parsed
        if known is not None:
            _check(name, changes[name], known)
    return changes


def _check(name: str, value: Any, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise InvalidInputError(f"--set: unknown option {name!r}; choose from: {', '.join(known)}")
    kind = type(known[name])
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise InvalidInputError(f"--set: {name} must have the type of its default {known[name]!r}, not {value!r}")
