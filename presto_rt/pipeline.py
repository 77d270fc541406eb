"""Pipeline: a request becomes a plan, a plan becomes latents, latents become sound."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Unpack, overload

import torch
from torch import Tensor

from .audio import Audio
from .checkpoints.model import Model
from .conditioning.ports import ClipControls
from .deadline import LatencyTable, Probe, measure, plan_within
from .diffusion.schedule import Layers
from .latency_store import LatencyStore
from .request import (
    GenerationOptions,
    GenerationRequest,
    SamplingPlan,
    SamplingSettings,
    number,
    sampling_plan,
)
from .runtime.backend import Backend, Job

MAX_DEADLINE_MS = 1e9
TUNE_PROMPT = "calm piano with warm strings, 84 bpm"


class Pipeline:
    """A loaded model on a backend; see `presto_rt.load`. Any number of threads may call it.

    Args:
        model: networks, sampling defaults and conditioner.
        backend: runs the model's jobs.
        auto_tune: measure this machine when a deadline is asked for and no table of timings covers the clip.
    """

    def __init__(self, model: Model, backend: Backend, *, auto_tune: bool = False) -> None:
        self.model, self.backend, self.auto_tune = model, backend, auto_tune

    @overload  # a str is a Sequence[str]; the first overload wins
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str, **options: Unpack[GenerationOptions]
    ) -> Audio: ...

    @overload
    def generate(self, prompt: Sequence[str], **options: Unpack[GenerationOptions]) -> list[Audio]: ...

    def generate(self, prompt: str | Sequence[str], **options: Unpack[GenerationOptions]) -> Audio | list[Audio]:
        """Generate music for one prompt (an Audio) or for several (a list of them).

        The options, with their defaults and ranges, are the fields of `request.GenerationRequest`: negative_prompt,
        seconds, bpm, key, steps, sampler, guidance, guidance_interval, cfg_pp, layers, deadline_ms, seed,
        sample_format, callback.

        Raises:
            InvalidInputError: for arguments out of range.
            GenerationError: if the sampler diverged.
            OutOfMemoryError: if the device has no memory for the request.
        """
        # 1. Read the request.
        request = GenerationRequest(prompt, **options)
        clips = request.clips()
        seeds = request.seeds(len(clips))
        # 2. Plan: everything that is known before the first step.
        if request.deadline_ms is not None and self.auto_tune:
            number("deadline_ms", request.deadline_ms, 0, MAX_DEADLINE_MS)
            self.plan(request.seconds)  # rejects a bad length before anything is measured
            if not self.timings.load().covers(request.seconds):
                self.tune([request.seconds], repeats=1)
        plan = self.plan_request(request.settings, request.deadline_ms, len(clips))
        # 3. Latents and samples, batch by batch.
        size = self.backend.max_batch(plan.frames)
        made: list[Audio] = []
        for first in range(0, len(clips), size):
            batch = slice(first, first + size)
            made += self.run(plan, clips[batch], seeds[batch], request.sample_format, request.callback)
        return made[0] if isinstance(prompt, str) else made

    def run(
        self,
        plan: SamplingPlan,
        clips: Sequence[ClipControls],
        seeds: Sequence[int],
        sample_format: str = "float32",
        callback: Callable[[int, int], None] | None = None,
    ) -> list[Audio]:
        """Run one batch of clips that share a plan.

        Args:
            plan: of every clip.
            clips: controls.
            seeds: one for each clip.
            sample_format: "float32" or "int16".
            callback: called with (step, steps) after each step.
        """
        start = time.perf_counter()
        result = self.backend.run(self.job(plan, clips, seeds, sample_format), callback)
        timings = result.stage_seconds | {"total": time.perf_counter() - start - result.captured}
        samples = result.samples.swapaxes(1, 2) if sample_format == "int16" else result.samples
        rate = self.model.spec.sample_rate
        return [
            Audio(clip_samples, rate, seed=seed, prompt=clip.prompt, timings=dict(timings), latents=latents)
            for clip_samples, latents, seed, clip in zip(samples, result.latents, seeds, clips, strict=True)
        ]

    def job(
        self, plan: SamplingPlan, clips: Sequence[ClipControls], seeds: Sequence[int], sample_format: str = "float32"
    ) -> Job:
        """Return the backend's job of a batch of clips that share a plan."""
        inputs = self.model.conditioner.prepare(clips, plan.frames)
        calls = plan.calls(self.model.spec)
        return Job(calls, inputs, seeds, plan.samples, plan.frames, sample_format=sample_format)

    def plan(
        self,
        seconds: float,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        cfg_pp: bool = False,
        layers: Layers = None,
        deadline_ms: float | None = None,
        clips: int = 1,
    ) -> SamplingPlan:
        """Return the plan of a request; generates nothing and writes nothing. Raises InvalidInputError.

        Args: as in `request.GenerationRequest`; clips: number of clips that share the deadline.
        """
        settings = SamplingSettings(seconds, steps, sampler, guidance, guidance_interval, cfg_pp, layers)
        return self.plan_request(settings, deadline_ms, clips)

    def plan_request(self, settings: SamplingSettings, deadline_ms: float | None, clips: int) -> SamplingPlan:
        """Return the plan of settings, or the best one that ends in time. Raises InvalidInputError."""
        model = self.model

        def plan(settings: SamplingSettings) -> SamplingPlan:
            return sampling_plan(settings, model.spec, model.defaults, model.schedules)

        if deadline_ms is None:
            return plan(settings)
        return plan_within(
            number("deadline_ms", deadline_ms, 0, MAX_DEADLINE_MS) / 1000,
            settings,
            clips,
            plan=plan,
            table=self.timings.load(),
            max_batch=self.backend.max_batch,
            quality=model.quality,
            schedules=model.schedules,
            defaults=model.defaults,
        )

    @cached_property
    def timings(self) -> LatencyStore:
        """Measured costs of this model on this machine, for deadlines."""
        weights = self.model.digest or hashlib.sha256(json.dumps(asdict(self.model.spec)).encode()).hexdigest()
        return LatencyStore({"weights": weights, "torch": torch.__version__} | self.backend.fingerprint())

    def tune(self, lengths: Sequence[float], repeats: int = 3) -> LatencyTable:
        """Measure clips of these lengths in seconds and keep the costs. Returns the whole table."""
        table = self.timings.load()
        for seconds in lengths:
            largest = self.backend.max_batch(self.plan(seconds).frames)
            for clips in sorted({1, min(4, largest), largest}):
                row = measure(self._probe, seconds, self.model.spec.blocks, clips=clips, repeats=repeats)
                table = table.merged([row])
        self.timings.save(table)
        return table

    def _probe(self, probe: Probe) -> dict[str, float]:
        """Run one probe of `tune` and return its stages' seconds."""
        settings = SamplingSettings(
            probe.seconds, probe.steps, "euler", probe.guidance, (0.0, float("inf")), layers=probe.blocks
        )
        clips = GenerationRequest([TUNE_PROMPT] * probe.clips).clips()
        job = self.job(self.plan_request(settings, None, probe.clips), clips, range(probe.clips))
        return self.backend.run(job).stage_seconds

    def encode(self, audio: Audio) -> Tensor:
        """Return latents (T, C) fp32 of audio at the model's sample rate. Raises InvalidInputError."""
        return self.model.autoencoder.encode(torch.from_numpy(audio.to_float32())[None])[0]

    def decode(self, latents: Tensor, samples: int | None = None) -> Audio:
        """Return the audio of latents (T, C). samples: its length; None for all of the latents."""
        spec = self.model.spec
        count = len(latents) * spec.hop if samples is None else samples
        return Audio(self.backend.decode(latents[None], count)[0].cpu().numpy(), spec.sample_rate)
