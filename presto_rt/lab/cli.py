"""Command `presto-rt lab`: data, training, distillation and evaluation.

`presto-rt` finds it by the entry point group "presto_rt.commands" in pyproject.toml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .data import cli as data
from .distill import cli as distill
from .evaluation import cli as evaluation
from .training import cli as training

if TYPE_CHECKING:
    from ..cli.options import Commands


def add_commands(commands: Commands) -> None:
    """Add `lab` with its sub-commands `data`, `train`, `distill` and `eval`."""
    lab = commands.add_parser("lab", help="build data, train, distill and evaluate models")
    jobs = lab.add_subparsers(dest="lab_command", required=True, metavar="COMMAND")
    for package in (data, training, distill, evaluation):
        package.add_parser(jobs)
