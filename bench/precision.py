"""Measure the error of bf16, fp16 and fp8: `python -m bench.precision [--model nano] [--seconds 6] [--clips 3]`.

The graph backend is compared with itself in fp32, with the same seeds: relative error of the latents, and distance
between the log-spectra of the sounds. Without a GPU, fp8 is emulated exactly: every number is rounded as a GPU rounds
it, and sums are in fp32 on both. A clip of another seed gives the scale of two different clips.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bench.results import ROOT, replace_section, save, table
from presto_rt.checkpoints.house import load_model
from presto_rt.conditioning.ports import ClipControls
from presto_rt.loading import find_device
from presto_rt.models.codec import Codec
from presto_rt.pipeline import Pipeline
from presto_rt.runtime.backend import Result
from presto_rt.runtime.cuda.backend import GraphBackend
from presto_rt.runtime.cuda.fp8 import Fp8
from presto_rt.runtime.cuda.ops import CudaOps

PROMPTS = ["calm piano, 84 bpm", "techno with synth bass, 128 bpm", "string quartet in D minor"]
WAYS: list[tuple[str, torch.dtype, Fp8 | None]] = [
    ("bf16", torch.bfloat16, None),
    ("fp16", torch.float16, None),
    ("fp8, every product", torch.bfloat16, Fp8(threshold=1.0)),
    ("fp8, chosen products", torch.bfloat16, Fp8()),
]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the root-mean-square error over the root mean square."""
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def decibels(codec: Codec, a: Result, b: Result) -> float:
    """Return the mean absolute difference of log-magnitudes (mid and side, the codec's bands) above -80 dB, in dB."""
    with torch.inference_mode():
        whole, device = a.samples.shape[2] // 2048 * 2048, codec.latent_mean.device
        clips = (torch.from_numpy(r.samples[..., :whole].copy()).to(device) for r in (a, b))
        first, second = (codec.frames.features(clip) for clip in clips)
    audible = torch.maximum(first, second) > -9.2  # nats: 80 dB below full scale
    return float(8.686 * (first - second).abs()[audible].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    a = parser.parse_args()
    device = find_device("auto")
    model = load_model(a.model, device)
    codec = model.autoencoder
    assert model.transformer is not None
    assert isinstance(codec, Codec)
    weights = model.transformer(device)
    codec.to(device)

    def results(dtype: torch.dtype, fp8: Fp8 | None, seed: int = 1) -> tuple[list[Result], GraphBackend]:
        ops = CudaOps(dtype, device, backend="auto" if device.type == "cuda" else "torch")
        backend = GraphBackend(weights, model.spec, codec, model.conditioner, ops, fp8=fp8)
        pipeline = Pipeline(model, backend)
        plan = pipeline.plan(a.seconds, a.steps)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(a.clips)]
        jobs = [pipeline.job(plan, [ClipControls(prompt)], [seed + i]) for i, prompt in enumerate(prompts)]
        return [backend.run(job) for job in jobs], backend

    exact, _ = results(torch.float32, None)
    rows: list[dict[str, Any]] = []

    def compare(name: str, got: list[Result], chosen: str = "") -> None:
        errors = [relative(g.latents, e.latents) for g, e in zip(got, exact, strict=True)]
        distances = [decibels(codec, g, e) for g, e in zip(got, exact, strict=True)]
        rows.append(
            {"way": name, "latents": sum(errors) / a.clips, "decibels": sum(distances) / a.clips, "fp8": chosen}
        )
        print(rows[-1], flush=True)

    for name, dtype, fp8 in WAYS:
        got, backend = results(dtype, fp8)
        choices = backend.graphs()[0].fp8_products
        compare(name, got, f"{sum(c.fp8 for c in choices)} of {len(choices)} products" if choices else "")
    compare("another seed", results(torch.float32, None, seed=1001)[0])
    save("precision", {"model": a.model, "seconds": a.seconds, "clips": a.clips, "steps": a.steps, "rows": rows})
    replace_section(ROOT / "docs" / "gpu.md", "precision", render(rows))


def render(rows: list[dict[str, Any]]) -> str:
    """Return the table of docs/gpu.md."""
    cells = [[r["way"], r["fp8"] or "-", f"{r['latents']:.4f}", f"{r['decibels']:.2f} dB"] for r in rows]
    return table(["", "in fp8", "error of the latents", "log-spectral distance"], cells)


if __name__ == "__main__":
    main()
