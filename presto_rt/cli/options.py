"""Options that several commands share. Imports neither torch nor any module that does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]

SAMPLERS = "SAMPLERS"  # stands for the names of the table of samplers in a help text; see `Parser`


class Parser(argparse.ArgumentParser):
    """Parser whose help names the samplers. The table is imported, and torch with it, when help is printed."""

    def format_help(self) -> str:
        """Return the help text with the names of the table in place of SAMPLERS."""
        text = super().format_help()
        if SAMPLERS not in text:
            return text
        from ..diffusion import trajectory

        return text.replace(SAMPLERS, ", ".join(trajectory.SAMPLERS))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, --device, --dtype and --backend, the arguments of `presto_rt.load`."""
    add_model_option(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16, int8 or fp8 (default: auto)")
    parser.add_argument("--backend", default="auto", help="auto, eager, cpu or graph (default: auto)")


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add --model."""
    parser.add_argument("--model", default="nano", help="a shipped model's name, or a weights folder (default: nano)")
