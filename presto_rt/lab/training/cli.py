"""Command `presto-rt lab train`: train the codec and the base model, encode the data set, pack weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InvalidInputError
from . import settings

if TYPE_CHECKING:
    from ...cli.options import Commands

CODEC_HELP = "the codec's run folder, or a model whose codec is used"


def add_parser(commands: Commands) -> None:
    """Add `train` with its jobs `codec`, `base`, `encode` and `pack`."""
    train = commands.add_parser("train", help="train the codec or the base model, or pack weights")
    jobs = train.add_subparsers(dest="job", required=True, metavar="JOB")
    _add_codec(jobs)
    _add_base(jobs)
    _add_encode(jobs)
    _add_pack(jobs)


def _add_codec(jobs: Commands) -> None:
    parser = jobs.add_parser("codec", help="train the audio codec")
    _add_run_options(parser, "runs/codec")
    parser.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone: latents stay valid")
    parser.add_argument("--start-from", metavar="FOLDER", help="start from a trained codec (a run's final/)")
    settings.add(parser)
    parser.set_defaults(run=_train_codec)


def _add_base(jobs: Commands) -> None:
    parser = jobs.add_parser("base", help="train the diffusion model on the codec's latents")
    _add_run_options(parser, "runs/base")
    parser.add_argument("--model", default="nano", help="a preset: nano, small or medium (default: nano)")
    parser.add_argument("--start-from", metavar="MODEL", help="start from the weights of a run or a shipped model")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, help="latent frames in a batch")
    settings.add(parser)
    parser.set_defaults(run=_train_base)


def _add_encode(jobs: Commands) -> None:
    parser = jobs.add_parser("encode", help="encode the data set to latents with a trained codec")
    parser.add_argument("--data", default="data", help="data set folder (default: data)")
    parser.add_argument("--codec", default="runs/codec", help=f"{CODEC_HELP} (default: runs/codec)")
    parser.set_defaults(run=_encode)


def _add_pack(jobs: Commands) -> None:
    parser = jobs.add_parser("pack", help="pack a trained codec and base model into one weights folder")
    parser.add_argument("output", help="the weights folder to write")
    parser.add_argument("--codec", default="runs/codec", help=f"{CODEC_HELP} (default: runs/codec)")
    parser.add_argument(
        "--share-codec", action="store_true", help="leave the codec's files in --codec's weights folder"
    )
    parser.add_argument("--base", default="runs/base", help="the run folder of the base or a distilled model")
    parser.add_argument("--quality", metavar="FILE", help="JSON list of measured plans: steps, layers, kid")
    parser.add_argument("--defaults", default="{}", help="sampling defaults as JSON: steps, sampler, guidance, ...")
    parser.set_defaults(run=_pack)


def _add_run_options(parser: argparse.ArgumentParser, run_dir: str) -> None:
    """Add the options that every training run has."""
    parser.add_argument(
        "--minutes", type=float, required=True, help="time budget; a resumed run counts the minutes it has used"
    )
    parser.add_argument("--data", default="data", help="the folder of `presto-rt lab data build` (default: data)")
    parser.add_argument(
        "--run", dest="run_dir", default=run_dir, help=f"folder of checkpoints and logs (default: {run_dir})"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    parser.add_argument("--seed", type=int, default=0)


def _train_codec(options: argparse.Namespace) -> None:
    from .codec import CodecTraining, train_codec

    changes = {"seed": options.seed} | settings.read(options.set, vars(CodecTraining()))
    train_codec(
        options.data,
        options.run_dir,
        options.minutes,
        device=options.device,
        resume=options.resume,
        settings=CodecTraining(**changes),
        freeze_encoder=options.freeze_encoder,
        start_from=options.start_from,
    )


def _train_base(options: argparse.Namespace) -> None:
    from .base import BaseTraining, train_base

    known = {name: default for name, default in vars(BaseTraining(options.minutes)).items() if name != "minutes"}
    changes = {"seed": options.seed, "learning_rate": options.learning_rate} | settings.read(options.set, known)
    if options.tokens is not None:
        changes["tokens"] = options.tokens
    errors = train_base(
        options.data,
        options.run_dir,
        options.minutes,
        device=options.device,
        resume=options.resume,
        model=options.model,
        start_from=options.start_from,
        **changes,
    )
    print("held-out error / sigma_data^2: " + ", ".join(f"{name[4:]}: {error:.4f}" for name, error in errors.items()))


def _encode(options: argparse.Namespace) -> None:
    from ...checkpoints.house import load_codec
    from .latents import encode_dataset

    encode_dataset(options.data, load_codec(options.codec), Path(options.data) / "latents")


def _pack(options: argparse.Namespace) -> None:
    from .pack import pack

    try:
        defaults = json.loads(options.defaults)
        quality = json.loads(Path(options.quality).read_text()) if options.quality else []
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"--defaults or --quality cannot be read as JSON: {error}") from error
    pack(
        options.output,
        codec_run=options.codec,
        base_run=options.base,
        defaults=defaults,
        quality=quality,
        share_codec=options.share_codec,
    )
    print(f"wrote {options.output}")
