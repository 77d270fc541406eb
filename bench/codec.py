"""Compare the codec's reconstructions with Opus: `python -m bench.codec [--model nano] [--clips 20]`.

Needs a data set of `presto-rt lab data build`, for its held-out rendered clips and recordings. Writes
bench/results/codec.json and, for the first clip of each group, spectrograms into docs/.
"""

from __future__ import annotations

import argparse
import json

import torch

from bench.results import ROOT, machine, write
from presto_rt.checkpoints.house import load_codec
from presto_rt.errors import InvalidInputError
from presto_rt.lab.evaluation.codec import evaluate_codec, held_out, markdown, picture, time_codec

DOCS = ROOT / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano", help="name of a shipped model, or a weights folder")
    parser.add_argument("--codec", help="final/ folder of a codec training run, used in place of a model's codec")
    parser.add_argument("--data", default="data")
    parser.add_argument("--clips", type=int, default=20, help="clips in each group")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each clip")
    parser.add_argument("--name", default="codec", help="bench/results/NAME.json; docs/NAME-GROUP.png")
    a = parser.parse_args()
    codec = load_codec(a.codec or a.model)
    groups = {group: held_out(a.data, group, a.clips, a.seconds) for group in ("rendered", "recorded")}
    groups = {group: clips for group, clips in groups.items() if clips}
    if not groups:
        raise InvalidInputError(
            f"{a.data} has no test clips of {a.seconds:g} s; build the data set with `presto-rt lab data build`"
        )
    report = evaluate_codec(codec, groups)
    report |= {
        "clips": {group: len(clips) for group, clips in groups.items()},
        "seconds_per_clip": a.seconds,
        "timings_32_s_stereo": time_codec(codec),
        "machine": machine(),
    }
    write(a.name, report)
    for group, clips in groups.items():
        copy = codec.decode(codec.encode(torch.from_numpy(clips[0])[None]), clips[0].shape[1])[0].numpy()
        picture(DOCS / f"{a.name}-{group}.png", {"original": clips[0], "reconstruction": copy})
    print(markdown(report), json.dumps(report["timings_32_s_stereo"], indent=1), sep="\n")


if __name__ == "__main__":
    main()
