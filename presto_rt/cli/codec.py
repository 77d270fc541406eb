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
    import torch

    from .. import audio, load

    audio.check_writable(options.output)
    source = audio.load(options.input)
    codec = load(options.model).codec
    device = next(codec.parameters()).device
    with torch.inference_mode():
        samples = torch.from_numpy(source.samples).to(device)
        started = time.perf_counter()
        latents = codec.encode(samples[None])
        encoded = time.perf_counter()
        out = codec.decode(latents, frames=samples.shape[-1])[0].cpu()
        decoded = time.perf_counter()
    if source.samples.shape[0] == 1:
        out = out.mean(0, keepdim=True)
    audio.Audio(out.numpy(), source.sample_rate).save(options.output)
    print(
        f"{options.output}: {source.seconds:.1f} s through {latents.shape[1]} x {latents.shape[2]} latents; "
        f"encode {encoded - started:.2f} s, decode {decoded - encoded:.2f} s"
    )
