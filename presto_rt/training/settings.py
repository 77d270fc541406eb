"""`--set OPTION=VALUE`: any setting of a trainer from the command line."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import InvalidInput


def add(parser: argparse.ArgumentParser) -> None:
    """Add the option to a command."""
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="any other setting, as JSON")


def read(settings: list[str]) -> dict[str, Any]:
    """{"p_gen": "train"} from ["p_gen=train"]; values are JSON, or else text."""
    changes = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidInput(f"--set takes OPTION=VALUE, not {setting!r}")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        changes[name] = tuple(parsed) if isinstance(parsed, list) else parsed
    return changes
