"""What does rounding cost? `python bench/fidelity.py [--model nano] [--dtypes bfloat16 int8]`

The same prompts and seeds by the CPU engine in fp32, bf16 and with int8 products. For each against fp32: the latents'
relative error, the distance between the sounds, and the distance of the decoder alone on equal latents. Two controls
tell what the figures mean: eager torch in bf16, and another seed. Phases are made from levels and part for a rounding
error, so a log-mel distance of 0.1 dB and the STFT's are reached by changing every level by 0.01 dB.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np
from results import save, table
from torch import Tensor

from presto_rt.lab.evaluation.codec import measure
from presto_rt.pipeline import Pipeline, load

PROMPTS = (
    "calm piano with warm strings, 84 bpm",
    "fast drum and bass with a heavy bass line, 174 bpm",
    "solo acoustic guitar, gentle fingerpicking",
    "orchestral fanfare with brass and timpani, D major",
    "slow ambient pads with bells",
    "funky electric bass and drums, 110 bpm",
)
MEASURES = ("mel_db", "stft", "high_db", "side_db")


def clip(model: Pipeline, prompt: str, seed: int, a: argparse.Namespace) -> tuple[np.ndarray, Tensor]:
    """Sound (2, n) and latents (T, C)."""
    request = {"seconds": a.seconds, "steps": a.steps, "sampler": a.sampler, "guidance": a.guidance}
    audio, latents = model.generate(prompt, seed=seed, return_latents=True, **request)
    return np.ascontiguousarray(audio.samples), latents.float()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano", help="a shipped model, or a folder of one")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--clips", type=int, default=len(PROMPTS), help=f"prompts, at most {len(PROMPTS)}")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--name", default="fidelity", help="bench/results/NAME.json; '-' writes none")
    a = parser.parse_args()
    plain = load(a.model, device="cpu", dtype="float32", backend="cpu", threads=a.threads)
    ways: dict[str, tuple[Pipeline, int]] = {
        dtype: (load(a.model, device="cpu", dtype=dtype, backend="cpu", threads=a.threads), 0) for dtype in a.dtypes
    }
    ways["eager torch, bfloat16"] = (load(a.model, device="cpu", dtype="bfloat16", backend="torch"), 0)
    ways["float32, another seed"] = (plain, 1000)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for i, prompt in enumerate(PROMPTS[: a.clips]):
        sound, latents = clip(plain, prompt, i, a)
        for name, (model, shift) in ways.items():
            got, x = clip(model, prompt, i + shift, a)
            alone = model.decode(latents[None], sound.shape[1])[0].numpy()
            same = plain.decode(latents[None], sound.shape[1])[0].numpy()
            row = {"prompt": prompt, "latents": relative(x, latents), **measure(sound, got)}
            found[name].append(row | {"decoder": measure(same, alone)})
    rows = {
        name: {key: float(np.mean([r[key] for r in listed])) for key in ("latents", *MEASURES)}
        | {"decoder": {key: float(np.mean([r["decoder"][key] for r in listed])) for key in MEASURES}}
        for name, listed in found.items()
    }
    plan = plain.plan(a.seconds, steps=a.steps, sampler=a.sampler, guidance=a.guidance)
    settings = {"model": plain.name, "seconds": a.seconds, "steps": len(plan.levels) - 1, "sampler": plan.sampler,
                "guidance": plan.guidance.scale, "clips": len(PROMPTS[: a.clips])}  # fmt: skip
    result = {"settings": settings, "means": rows, "clips": found}
    print(render(result))
    if a.name != "-":
        print(save(a.name, result))


def render(result: dict[str, Any]) -> str:
    """The table that docs/cpu.md shows."""
    s = result["settings"]
    note = (f"Against the engine in fp32: means over {s['clips']} prompts, {s['seconds']:g} s, {s['model']}, "
            f"{s['steps']} steps of {s['sampler']}, guidance {s['guidance']:g}.")  # fmt: skip
    header = ["", "latents, relative", "log-mel, dB", "multi-res STFT", "side/mid, dB", "decoder alone, log-mel, dB"]
    cells = [
        [name, f"{r['latents']:.3f}", f"{r['mel_db']:.2f}", f"{r['stft']:.2f}", f"{r['side_db']:.2f}",
         f"{r['decoder']['mel_db']:.2f}"]
        for name, r in result["means"].items()
    ]  # fmt: skip
    return f"{note}\n\n{table(header, cells)}"


if __name__ == "__main__":
    main()
