"""Small random models and jobs for them, shared by the tests of backends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from presto_rt.checkpoints.house import build_model
from presto_rt.checkpoints.model import Model
from presto_rt.conditioning.keys import check_key
from presto_rt.conditioning.ports import ClipControls
from presto_rt.diffusion.guidance import Guidance
from presto_rt.diffusion.schedule import Layers, karras_sigmas, parse_layers
from presto_rt.diffusion.trajectory import compile_trajectory
from presto_rt.models.codec import Codec
from presto_rt.models.config import preset
from presto_rt.models.dit import DiT
from presto_rt.models.random_weights import RandomTextEncoder
from presto_rt.runtime.backend import Job, Result
from presto_rt.runtime.cuda.backend import GraphBackend
from presto_rt.runtime.cuda.graph import CapturedGraph
from presto_rt.runtime.cuda.ops import CudaOps
from presto_rt.runtime.plan import LatentEdit

from .models import CODEC
from .networks import random_dit


@cache
def text_encoder() -> RandomTextEncoder:
    """Return a text encoder of the real one's shape; that package need not be there."""
    return RandomTextEncoder()


def quiet_codec() -> Codec:
    """Return a small codec with random weights whose samples are seldom limited."""
    torch.manual_seed(0)
    codec = Codec(CODEC).eval().requires_grad_(False)
    codec.synthesis_gain.fill_(0.1)
    for p in codec.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return codec


def tiny_model(dit: DiT | None = None, codec: Codec | None = None, device: str = "cpu") -> Model:
    """Return a model of small random networks.

    Args:
        dit: transformer; None for a random "tiny" one.
        codec: None for `quiet_codec`.
        device: of the conditioner and its text encoder.
    """
    encoder = text_encoder() if device == "cpu" else copy.deepcopy(text_encoder()).to(device)
    dit = random_dit(preset("tiny")) if dit is None else dit
    return build_model("tiny", dit, quiet_codec() if codec is None else codec, device=device, encoder=encoder)


def graph_backend(
    model: Model, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> GraphBackend:
    """Return a graph backend of a model, on a CPU with torch's form of every kernel. options: of `GraphBackend`."""
    ops = CudaOps(dtype, device, backend="torch" if device == "cpu" else "auto")
    assert model.transformer is not None
    assert isinstance(model.autoencoder, Codec)
    weights = model.transformer(torch.device(device))
    return GraphBackend(weights, model.spec, model.autoencoder, model.conditioner, ops, **options)


def make_job(
    prompts: str | Sequence[str] = "calm piano",
    frames: int = 21,
    *,
    seeds: Sequence[int] | None = None,
    steps: int = 2,
    guidance: float = 2.0,
    layers: Layers = None,
    sampler: str = "few_step",
    negative: str | None = None,
    sigmas: Sequence[float] | None = None,
    cut: int = 300,
    bpm: float | None = None,
    key: str | None = None,
    edit: LatentEdit | None = None,
    sample_format: str = "float32",
    model: Model | None = None,
) -> Job:
    """Return a job for `tiny_model` or another model of its depth.

    Args:
        prompts: one, or one for each clip.
        frames: latent frames.
        seeds: None for 0, 1, ...
        steps: of the sampler.
        guidance: scale.
        layers: layer budget.
        sampler: name of the sampler.
        negative: negative prompt of every clip, or None.
        sigmas: noise levels; None for those of `steps`.
        cut: samples that the last latent frame lacks.
        bpm: tempo of every clip.
        key: of every clip.
        edit: latents that are kept.
        sample_format: "float32" or "int16".
        model: gives the conditioner; None for `tiny_model`'s.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    model = shared_model() if model is None else model
    levels = karras_sigmas(steps) if sigmas is None else list(sigmas)
    schedule = parse_layers(layers, model.spec.blocks, sigmas=levels)
    calls = compile_trajectory(sampler, levels, Guidance(guidance), schedule, "edm", model.spec.sigma_data)
    tonality = None if key is None else check_key(key)
    inputs = model.conditioner.prepare([ClipControls(text, negative, bpm, tonality) for text in texts], frames)
    seeds = list(range(len(texts))) if seeds is None else seeds
    return Job(calls, inputs, seeds, frames * model.spec.hop - cut, frames, edit, sample_format)


@cache
def shared_model() -> Model:
    """Return one `tiny_model` for jobs; nothing packs or frees its networks."""
    return tiny_model()


def variation(value: float = 1.0, keep: float = 0.0) -> LatentEdit:
    """Return an edit of one clip of 21 frames."""
    return LatentEdit(torch.full((1, 21, 64), value), torch.full((1, 21), keep))


#: Jobs that differ from `make_job()` in one input each.
CHANGES: dict[str, Callable[[], Job]] = {
    "seed": lambda: make_job(seeds=[1]),
    "prompt": lambda: make_job("wild drums"),
    "length": lambda: make_job(frames=22),
    "guidance": lambda: make_job(guidance=3.0),
    "no guidance": lambda: make_job(guidance=1.0),
    "tempo": lambda: make_job(bpm=100.0),
    "key": lambda: make_job(key="D minor"),
    "negative prompt": lambda: make_job(negative="noise"),
    "layers": lambda: make_job(layers=2),
    "steps": lambda: make_job(steps=3),
    "sigmas": lambda: make_job(sigmas=[50.0, 1.0, 0.0]),
    "sampler": lambda: make_job(sampler="euler"),
    "init": lambda: make_job(edit=variation()),
    "keep": lambda: make_job(edit=variation(keep=1.0)),
}


def same(a: Result, b: Result) -> bool:
    """Return True if samples and latents are equal to the bit."""
    return np.array_equal(a.samples, b.samples) and torch.equal(a.latents, b.latents)


@torch.inference_mode()
def poison(graph: CapturedGraph) -> None:
    """Fill every block that a replay reads or writes with NaN, except the host's inputs, which `run` writes."""
    for arena in graph.arenas():
        if arena is not graph.inputs.host:
            arena.block.fill_(0xFF)
    if graph.device.type == "cuda":
        torch.cuda.synchronize(graph.device)  # filled on this stream, read on the graph's
