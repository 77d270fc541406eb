"""Ways to make a clip on a CUDA GPU, for bench/e2e_gpu.py: the graph backend, and torch eager or compiled."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from presto_rt.checkpoints.model import Model
from presto_rt.conditioning.ports import ClipControls, Conditioning
from presto_rt.loading import float_dtype
from presto_rt.models.codec import Codec
from presto_rt.models.dit import Condition, DiT
from presto_rt.pipeline import Pipeline
from presto_rt.runtime.backend import Job, Network
from presto_rt.runtime.codec import limit_peak
from presto_rt.runtime.cost import plan_cost
from presto_rt.runtime.eager.backend import EagerBackend
from presto_rt.runtime.plan import Planner

STAGES = ("text", "denoise", "decode")
# As many words each, so that a baseline compiled for fixed shapes is compiled once.
PROMPTS = ("calm piano with warm strings, 84 bpm", "fast drum and deep bass, 174 bpm", "sad slow solo viola in D minor")


@dataclass(frozen=True)
class Case:
    """One row: a way to make a clip, a model and sampling settings.

    Attributes:
        way: "ours", "ours without X" with one optimization switched off, "eager", or a mode of torch.compile.
        layers: share of the blocks that run.
    """

    way: str
    model: str = "small-random"
    seconds: float = 32.0
    clips: int = 1
    steps: int = 4
    sampler: str = "few_step"
    guidance: float = 1.0
    layers: str = "100%"
    dtype: str = "bfloat16"

    def settings(self) -> dict[str, Any]:
        """Return the sampling settings as `Pipeline.plan` takes them."""
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "sampler": self.sampler,
            "guidance": self.guidance,
            "layers": None if self.layers == "100%" else self.layers,
        }


#: a way to make a clip: maps a seed to an int16 array and the seconds of each stage
Clip = Callable[[int], tuple[Any, dict[str, float]]]


def job_of(pipeline: Pipeline, case: Case, seed: int) -> Job:
    """Return the job of a case for the seeds that start with `seed`."""
    prompts = [PROMPTS[(seed + i) % len(PROMPTS)] for i in range(case.clips)]
    controls = [ClipControls(prompt) for prompt in prompts]
    seeds = [seed + i for i in range(case.clips)]
    return pipeline.job(pipeline.plan(**case.settings()), controls, seeds, "int16")


def ours(model: Model, case: Case, device: torch.device) -> Pipeline:
    """Return the model on the graph backend, with the optimization switched off that the way names."""
    from presto_rt.runtime.cuda.backend import GraphBackend
    from presto_rt.runtime.cuda.fp8 import Fp8
    from presto_rt.runtime.cuda.ops import CudaOps

    off = case.way.removeprefix("ours without ") if case.way.startswith("ours without ") else ""
    unfused = [off] if off not in ("", "the graph") else []
    ops = CudaOps(float_dtype(case.dtype, device), device, unfused, "torch" if device.type == "cpu" else "auto")
    assert model.transformer is not None
    assert isinstance(model.autoencoder, Codec)
    weights, fp8 = model.transformer(device), Fp8() if case.dtype == "fp8" else None
    graphed = off != "the graph"
    backend = GraphBackend(weights, model.spec, model.autoencoder, model.conditioner, ops, graphed=graphed, fp8=fp8)
    return Pipeline(model, backend)


def graph_clips(pipeline: Pipeline, case: Case) -> Clip:
    """Return clips by the graph backend."""

    def clip(seed: int) -> tuple[Any, dict[str, float]]:
        result = pipeline.backend.run(job_of(pipeline, case, seed))
        return result.samples, result.stage_seconds

    return clip


class CompiledNetwork:
    """A compiled network; its outputs are copied, because a CUDA graph overwrites them."""

    def __init__(self, network: DiT, **options: Any) -> None:
        self.compiled = torch.compile(network, dynamic=False, **options)

    def raw(self, x: Tensor, time: Tensor, conditioning: Conditioning, blocks: Sequence[int], budget: float) -> Tensor:
        """Return the raw output (N, T, C)."""
        torch.compiler.cudagraph_mark_step_begin()
        output: Tensor = self.compiled(x, time, Condition.from_ports(conditioning), blocks, budget)
        return output.clone()


def baseline(model: Model, case: Case, device: torch.device) -> Pipeline:
    """Return the model in plain torch, eager or compiled, all of it on the device."""
    network, codec = model.network, model.autoencoder
    assert isinstance(network, DiT)
    assert isinstance(codec, Codec)
    dtype = float_dtype(case.dtype, device)
    network.to(device, dtype)
    codec.to(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    way: Network = network
    if case.way != "eager":
        mode = {"compile": "default", "max-autotune": "max-autotune"}[case.way]
        options: dict[str, Any] = {"mode": mode} if device.type == "cuda" else {"backend": "aot_eager"}
        way = CompiledNetwork(network, **options)
    backend = EagerBackend(way, codec, model.conditioner, channels=model.spec.channels, device=device, dtype=dtype)
    return Pipeline(model, backend)


def eager_clips(pipeline: Pipeline, case: Case) -> Clip:
    """Return clips in plain torch, with the conversion to 16 bits on the device, as the graph backend has it."""
    from presto_rt.kernels.pcm import pcm
    from presto_rt.kernels.sampler_step import seeds_tensor

    backend, conditioner = pipeline.backend, pipeline.model.conditioner
    assert isinstance(backend, EagerBackend)
    cuda = backend.device.type == "cuda"

    @torch.inference_mode()
    def clip(seed: int) -> tuple[Any, dict[str, float]]:
        marks: list[Any] = []

        def mark() -> None:  # events on a GPU: the host waits once, for the samples, as it does for ours
            if cuda:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())

        seeds = seeds_tensor([seed], backend.device)
        mark()
        job = job_of(pipeline, case, seed)
        inputs = {name: value.to(backend.device) for name, value in job.inputs.items()}
        conditional, unconditional = conditioner.embed(inputs)
        mark()
        latents = backend.denoise(job, conditional, unconditional)
        mark()
        samples = limit_peak(backend.decode(latents, job.samples))
        integers = pcm(samples.contiguous(), seeds).cpu().numpy()
        mark()
        if cuda:
            marks[-1].synchronize()
        pairs = itertools.pairwise(marks)
        taken = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in pairs]
        return integers, dict(zip(STAGES, taken, strict=True))

    return clip


def floor(model: Model, job: Job, device: torch.device, top: Any) -> float:
    """Return the seconds that the transformer's operations and bytes take at the machine's own rates."""
    assert model.transformer is not None
    with torch.inference_mode():
        inputs = {name: value.to(device) for name, value in job.inputs.items()}
        planner = Planner(model.transformer(device), model.spec, device)
        plan = planner.plan(job.calls, *model.conditioner.embed(inputs), job.frames, torch.bfloat16)
    cost = plan_cost(plan, torch.bfloat16.itemsize)
    return float(max(cost.flops / top.product, cost.bytes / top.bandwidth))
