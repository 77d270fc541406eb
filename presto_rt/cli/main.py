"""Parser and exit status of the command `presto-rt`. Errors are one line on stderr and a non-zero exit status.

Other packages add commands through the entry point group "presto_rt.commands": each entry is a command's name and a
function that adds its parser to the sub-commands and sets `run(arguments) -> int | None`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import InvalidInputError, PrestoError
from . import codec, describe, generate, info, tune
from .options import Parser

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

COMMANDS = {
    "generate": generate.add_parser,
    "tune": tune.add_parser,
    "codec": codec.add_parser,
    "info": info.add_parser,
    "describe": describe.add_parser,
}
EXTENSIONS_GROUP = "presto_rt.commands"
INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 after an error, 130 after Ctrl-C.

    argparse itself exits with status 2 on options that it cannot parse.
    """
    logging.basicConfig(format="presto-rt: %(message)s", level=logging.WARNING)
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed = _parse(argv)
        return int(parsed.run(parsed) or 0)
    except PrestoError as error:
        print(f"presto-rt: error: {error}", file=sys.stderr)
        return 1
    except (OSError, ModuleNotFoundError) as error:  # a disk, a permission, a package that only some commands need
        hint = "; pip install 'presto-rt[data,train,eval]'" if isinstance(error, ImportError) else ""
        print(f"presto-rt: error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("presto-rt: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments; extensions are looked up only if the first one is not a built-in command."""
    from .. import __version__

    command = argv[0] if argv else "--help"
    extensions = {} if command in COMMANDS else _extensions()
    if not command.startswith("-") and command not in COMMANDS and command not in extensions:
        raise InvalidInputError(
            f"unknown command {command!r}; choose from: {', '.join([*COMMANDS, *extensions])} "
            "(in a source tree, pip install -e . registers all commands)"
        )
    parser = Parser(prog="presto-rt", description="Text to 44.1 kHz stereo music, in moments.")
    parser.add_argument("--version", action="version", version=f"presto-rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_parser in COMMANDS.values():
        add_parser(commands)
    for extension in extensions.values():
        extension.load()(commands)
    return parser.parse_args(argv)


def _extensions() -> dict[str, EntryPoint]:
    """Return the installed entry points of the group by name."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=EXTENSIONS_GROUP)}
