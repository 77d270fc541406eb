"""How close is the codec to the original, and beside Opus? `python bench/codec.py [--model nano] [--clips 20]`

Held-out rendered clips and recordings of a data set that `presto-rt lab data build` made. Writes
bench/results/codec.json and a spectrogram picture of the first clip of each group into docs/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from results import RESULTS, machine

from presto_rt.errors import InvalidInputError
from presto_rt.lab.evaluation.codec import evaluate_codec, held_out, markdown, picture, time_codec
from presto_rt.models.codec import load_codec
from presto_rt.pipeline import load

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano", help="a shipped model, or a folder of one")
    parser.add_argument("--codec", help="a codec trainer's final folder, instead of a model's codec")
    parser.add_argument("--data", default="data")
    parser.add_argument("--clips", type=int, default=20, help="clips in each group")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each clip")
    parser.add_argument("--name", default="codec", help="bench/results/NAME.json; docs/NAME-GROUP.png")
    a = parser.parse_args()
    codec = load_codec(a.codec) if a.codec else load(a.model, device="cpu").codec
    groups = {group: held_out(a.data, group, a.clips, a.seconds) for group in ("rendered", "recorded")}
    groups = {group: clips for group, clips in groups.items() if clips}
    if not groups:
        raise InvalidInputError(f"{a.data} has no test clips of {a.seconds} s: build the data set first")
    report = evaluate_codec(codec, groups)
    report |= {"clips": {group: len(clips) for group, clips in groups.items()}, "seconds_per_clip": a.seconds,
               "timings_32_s_stereo": time_codec(codec), "machine": machine()}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{a.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    for group, clips in groups.items():
        copy = codec.decode(codec.encode(torch.from_numpy(clips[0])[None]), clips[0].shape[1])[0].numpy()
        picture(DOCS / f"{a.name}-{group}.png", {"original": clips[0], "reconstruction": copy})
    print(markdown(report), json.dumps(report["timings_32_s_stereo"], indent=1), sep="\n")


if __name__ == "__main__":
    main()
