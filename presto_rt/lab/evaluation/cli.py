"""Command `presto-rt lab eval`: evaluate models on held-out captions."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

from ...errors import InvalidInputError


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `eval` to the main parser's sub-commands; its `run(args)` returns the exit status."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "eval",
        help="evaluate a model on held-out captions",
        description="Generate clips for held-out captions and evaluate them beside real clips, "
        "codec reconstructions, shuffled captions and noise.",
    )
    parser.add_argument("--model", help="weights folder (default: the shipped model); 'none' evaluates the data alone")
    parser.add_argument("--data", default="data", help="folder of the data set (default: data)")
    parser.add_argument("--split", default="test", choices=("test", "val"), help="held-out split (default: test)")
    parser.add_argument("--count", type=int, default=200, help="number of captions (default: 200)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each clip (default: 10)")
    parser.add_argument(
        "--reference", type=int, default=400, help="real clips that form the reference of the distances (default: 400)"
    )
    parser.add_argument("--steps", type=int, help="sampler steps (default: the model's)")
    parser.add_argument("--sampler", help="sampler (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--layers", help="layer schedule or percentage of blocks that run (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions, crops and noise (default: 0)")
    parser.add_argument("--batch", type=int, default=8, help="clips generated at once (default: 8)")
    parser.add_argument("--workers", type=int, help="threads that extract features (default: all cores)")
    parser.add_argument(
        "--out", default="runs/evaluation", help="folder for clips, JSON and markdown (default: runs/evaluation)"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="further weights folders, evaluated on the same captions",
    )
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="NAME=MODEL[,steps=4,layers=70%]",
        help="instead of --model: evaluate a model with these settings and its latency, and add it to a table; "
        "repeatable; the model 'real' is the held-out clips",
    )
    parser.add_argument("--results", metavar="FILE", help="the table's JSON file (default: OUT/comparison.json)")
    parser.add_argument(
        "--latency-seconds", type=float, default=32.0, help="length of the clips that --row times (default: 32)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed clips for each --row (default: 5)")
    parser.add_argument(
        "--denoising",
        action="store_true",
        help="instead, measure the denoising error by noise level beside that of the best linear denoiser",
    )
    parser.add_argument(
        "--codec",
        metavar="FOLDER",
        help="instead, compare the reconstructions of a codec (a run, a weights folder or a shipped model) with Opus",
    )
    parser.add_argument(
        "--variance",
        nargs="+",
        default=[],
        metavar="RUN",
        help="instead, print the variance of hidden states after each block of these runs at --layers",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the tables."""
    _check(args)
    from .report import markdown
    from .run import evaluate_model

    logging.getLogger("presto_rt").setLevel(logging.INFO)
    if args.row:
        return _compare(args)
    if args.codec:
        return _codec(args)
    if args.variance:
        return _variance(args)
    settings = {"steps": args.steps, "sampler": args.sampler, "guidance": args.guidance, "layers": args.layers}
    options = {name: value for name, value in settings.items() if value is not None}
    model, baselines = None, {}
    if args.model != "none":
        import presto_rt

        model = presto_rt.load(args.model) if args.model else presto_rt.load()
        baselines = {Path(folder).name: presto_rt.load(folder) for folder in args.compare}
    if args.denoising:
        return _denoising(model, args)
    result = evaluate_model(
        model,
        args.data,
        args.count,
        args.seconds,
        args.out,
        baselines=baselines,
        reference_count=args.reference,
        seed=args.seed,
        batch=args.batch,
        workers=args.workers,
        split=args.split,
        **options,
    )
    print(markdown(result))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise InvalidInputError for invalid numbers and ambiguous names before any work."""
    minimum = {"count": 4, "reference": 4, "batch": 1, "workers": 1, "repeats": 1, "seed": 0}
    for name, low in minimum.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise InvalidInputError(f"--{name} must be at least {low}, got {value}")
    if not 0.5 <= args.seconds < math.inf:
        raise InvalidInputError(f"--seconds must be at least 0.5, got {args.seconds:g}")
    names = ["generated", *(Path(folder).name for folder in args.compare)]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInputError(f"--compare: two models are named {duplicates[0]!r} in the tables; rename a folder")


def _compare(args: argparse.Namespace) -> int:
    """Evaluate each --row, print the table of all rows, and draw both plots into --out."""
    from .compare import compare, markdown, parse_row, plot

    rows = [parse_row(text) for text in args.row]
    table = compare(
        rows,
        args.data,
        args.out,
        results=args.results,
        count=args.count,
        seconds=args.seconds,
        reference_count=args.reference,
        seed=args.seed,
        split=args.split,
        batch=args.batch,
        workers=args.workers,
        latency_seconds=args.latency_seconds,
        repeats=args.repeats,
    )
    for by in ("nfe", "latency"):
        plot(table, {name: [name] for name in table["rows"]}, by, Path(args.out) / f"quality-{by}.png")
    print(markdown(table))
    return 0


def _denoising(model: Any, args: argparse.Namespace) -> int:
    """Write denoising.json and denoising.md into --out and print the table."""
    import json
    from dataclasses import asdict

    from .denoising import model_errors, table
    from .report import environment

    if model is None:
        raise InvalidInputError("--denoising needs a model; omit --model none")
    from ...checkpoints.house import load_model

    rows = model_errors(load_model(args.model or "nano"), args.data, split=args.split, seed=args.seed + 1)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(), "split": args.split, "rows": [asdict(r) for r in rows]}
    (folder / "denoising.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "denoising.md").write_text(table(rows) + "\n")
    print(table(rows))
    return 0


def _codec(args: argparse.Namespace) -> int:
    """Print the distances of reconstructions by a codec and by Opus on held-out clips, with the codec's speed."""
    from ...checkpoints.house import load_codec
    from .codec import evaluate_codec, held_out, markdown, time_codec

    codec = load_codec(args.codec)
    groups = {group: held_out(args.data, group, args.count, args.seconds) for group in ("rendered", "recorded")}
    groups = {group: clips for group, clips in groups.items() if clips}
    if not groups:
        raise InvalidInputError(f"{args.data} has no test clips of {args.seconds:g} s; run `presto-rt lab data build`")
    print(markdown(evaluate_codec(codec, {group: list(clips) for group, clips in groups.items()})))
    for stage, seconds in time_codec(codec).items():
        print(f"{stage}, 32 s of stereo: {seconds:.2f} s")
    return 0


def _variance(args: argparse.Namespace) -> int:
    """Print the variance of hidden states of each run, by noise level and block."""
    from ...diffusion.schedule import parse_layers
    from ..distill.run import saved_schedules
    from ..training.conditions import LatentSet
    from ..training.networks import load_network
    from .variance import SIGMAS, curves

    models = {}
    for run in args.variance:
        network = load_network(run)
        models[run] = (network, parse_layers(args.layers, network.config.blocks, saved=saved_schedules(run)))
    for record in curves(models, LatentSet(args.data, args.split), SIGMAS):
        values = ", ".join(f"{b}: {v:.3g}" for b, v in zip(record["blocks"], record["variance"], strict=True))
        print(f"{record['model']}, sigma {record['sigma']:g}: {values}")
    return 0
