"""Command `presto-rt codec`: the audio codec alone."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from .options import add_model_option

if TYPE_CHECKING:
    from .options import Commands


def add_parser(commands: Commands) -> None:
    """Add `codec roundtrip`."""
    codec = commands.add_parser("codec", help="use the audio codec alone")
    jobs = codec.add_subparsers(dest="job", required=True, metavar="JOB")
    parser = jobs.add_parser("roundtrip", help="encode a file to latents and decode it again")
    parser.add_argument("input", help="audio file, mono or stereo, of any rate")
    parser.add_argument("output", help=".wav, .flac or .ogg file to write")
    add_model_option(parser)
    parser.set_defaults(run=_roundtrip)


def _roundtrip(options: argparse.Namespace) -> None:
    from .. import audio, load

    audio.check_writable(options.output)
    source = audio.load(options.input)
    model = load(options.model)
    started = time.perf_counter()
    latents = model.encode(source)
    encoded = time.perf_counter()
    samples = model.decode(latents, source.samples.shape[-1]).samples.clip(-1.0, 1.0)
    decoded = time.perf_counter()
    if source.samples.shape[0] == 1:
        samples = samples.mean(0, keepdims=True)
    audio.Audio(samples, source.sample_rate).save(options.output)
    print(
        f"{options.output}: {source.seconds:.1f} s through {latents.shape[0]} x {latents.shape[1]} latents; "
        f"encode {encoded - started:.2f} s, decode {decoded - encoded:.2f} s"
    )
