"""Commands `presto-rt lab data build` and `presto-rt lab data info`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add `data` to the main parser's sub-commands; its `run(args)` returns the exit status."""
    data = subparsers.add_parser("data", help="build or describe the training data set")
    commands = data.add_subparsers(dest="data_command", required=True)
    build = commands.add_parser("build", help="compose and render captioned music, fetch free recordings")
    build.add_argument("--root", default="data", help="folder of the data set (default: data)")
    build.add_argument("--hours", type=float, default=25.0, help="hours of rendered music (default: 25)")
    build.add_argument("--seed", type=int, default=0, help="the same seed gives the same pieces (default: 0)")
    build.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    build.add_argument("--no-recordings", action="store_true", help="omit the Debian recordings")
    build.set_defaults(run=_build)
    info = commands.add_parser("info", help="print hours by kind and split")
    info.add_argument("--root", default="data", help="folder of the data set (default: data)")
    info.set_defaults(run=_info)


def _build(args: argparse.Namespace) -> int:
    from .build import build

    manifest = build(args.root, args.hours, args.seed, args.workers, recordings=not args.no_recordings)
    return 0 if manifest.complete else 1


def _info(args: argparse.Namespace) -> int:
    from .build import summary
    from .manifest import load_manifest

    print(summary(load_manifest(args.root)))
    return 0
