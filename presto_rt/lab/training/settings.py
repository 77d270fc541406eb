"""`--set OPTION=VALUE`: any setting of a trainer from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidInputError


def add(parser: argparse.ArgumentParser) -> None:
    """Add the option to a command."""
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="any other setting, as JSON")


def read(settings: list[str], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """{"p_gen": "train"} from ["p_gen=train"]; values are JSON, or else text.

    known: the settings that there are, with their defaults. Raises InvalidInputError for another name, or a value of another
    type than its default's.
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
        raise InvalidInputError(f"--set: there is no {name!r}; there are {', '.join(known)}")
    kind = type(known[name])
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise InvalidInputError(f"--set: {name} must be like {known[name]!r}, not {value!r}")
