"""Command `presto-rt tune`: measure this machine, so that --deadline-ms can choose a plan."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import InvalidInputError
from .options import add_model_options

if TYPE_CHECKING:
    from .options import Commands


def add_parser(commands: Commands) -> None:
    """Add `tune`."""
    parser = commands.add_parser("tune", help="measure this machine, so that --deadline-ms can choose")
    add_model_options(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        nargs="+",
        default=[2.0, 8.0, 32.0],
        help="clip lengths to measure; lengths between them are interpolated (default: 2 8 32)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs per measurement; the slowest counts (default: 3)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from .. import load

    if options.repeats < 1:
        raise InvalidInputError(f"--repeats must be at least 1, not {options.repeats}")
    model = load(options.model, device=options.device, dtype=options.dtype, backend=options.backend)
    for seconds in options.seconds:
        model.plan(seconds)  # reject a bad length before any work
    print("clip        clips     text     per step   per block   guided   decode   (ms)")
    for row in model.tune(options.seconds, options.repeats).rows:
        print(
            f"{row.seconds:6.1f} s {row.clips:7d} {1e3 * row.text:8.2f} {1e3 * row.evaluation:12.2f} "
            f"{1e3 * row.block:11.3f} "
            f"{row.guided:7.2f}x {1e3 * row.decode:8.2f}"
        )
    print(f"kept in {model.timings.path}")
