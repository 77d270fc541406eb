"""Pipeline: a request becomes a plan, a plan becomes latents, latents become sound."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import request as arguments
from .audio.clip import Audio
from .checkpoints import Checkpoint, load_folder
from .conditioning.keys import Key, key_features
from .conditioning.minilm import TextEncoder, TextStates, load_text_encoder
from .conditioning.prompts import check_prompts
from .diffusion import noise
from .diffusion.guidance import Guidance, guided
from .diffusion.precond import precondition
from .diffusion.samplers import SAMPLERS, sample
from .diffusion.schedule import Layers, LayerSchedule, parse_layers, sampling_sigmas
from .diffusion.trajectory import compile_trajectory
from .errors import BackendUnavailableError, InvalidInputError, WeightsError
from .models.codec import Codec, CodecConfig
from .models.config import HOP, MAX_SECONDS, SAMPLE_RATE, ModelConfig, preset
from .models.dit import Condition, DiT, beat_features
from .models.random_weights import SUFFIX, UntrainedText, untrained, untrained_codec
from .request import number
from .runtime.codec import DecoderEngine
from .runtime.cpu import autodtype as rates
from .runtime.cpu.ops import CpuOps, unavailable
from .runtime.cpu.threads import thread_limit
from .runtime.cuda.buffers import Request
from .runtime.engine import Engine
from .runtime.text_encoder import TextEngine

if TYPE_CHECKING:  # Triton is loaded where it is used
    from .runtime.cuda.fp8 import Fp8
    from .runtime.cuda.graph import GraphEngine, Limits

log = logging.getLogger("presto_rt")

BACKENDS = ("auto", "torch", "cpu", "graph")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": None,
          "fp8": torch.bfloat16}  # fmt: skip
MAX_STEPS = 1_000
PEAK = 0.98
Callback = Callable[[int, int], None]


@dataclass(frozen=True)
class Defaults:
    """Sampling settings that come with a model's weights."""

    steps: int = 32
    sampler: str = "dpmpp_2m"
    guidance: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    layers: Layers = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Defaults:
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if "guidance_interval" in known:
            low, high = known["guidance_interval"]
            known["guidance_interval"] = (low, math.inf if high is None else high)
        return cls(**known)


@dataclass(frozen=True)
class Plan:
    """Everything about a trajectory that is known before its first step."""

    sampler: str
    levels: tuple[float, ...]
    guidance: Guidance
    layers: LayerSchedule
    samples: int
    frames: int


class Pipeline:
    """A loaded model: text encoder, diffusion transformer and codec on one device. See `load`.

    schedules: the layer schedules that the weights have learned, by budget. quality: measured figures of plans, each
    {"steps", "layers", "kid"}, for `deadline_ms`. digest: names the weights. backend: "torch", or "cpu" for the engine,
    which runs on `threads` threads (None: as many as torch). int8: its products in 8-bit integers.
    "graph" is `engine.graph`, with `limits` and `fp8`. encoder: of texts, the shared one by default.
    """

    def __init__(self, dit: DiT, codec: Codec, *, device: torch.device, dtype: torch.dtype,
                 defaults: Defaults | None = None, name: str = "custom",
                 schedules: dict[str, LayerSchedule] | None = None, quality: Sequence[dict[str, Any]] = (),
                 digest: str = "", backend: str = "torch", threads: int | None = None,
                 int8: bool = False, limits: Limits | None = None, fp8: Fp8 | None = None,
                 encoder: TextEncoder | None = None) -> None:  # fmt: skip
        self.int8, self._encoder = int8, encoder
        self.name, self.device, self.dtype, self.digest, self.backend = name, device, dtype, digest, backend
        self.schedules, self.quality = schedules or {}, list(quality)
        self.config: ModelConfig = dit.config
        self.defaults = defaults or Defaults()
        # Before the weights are rounded to `dtype`: the engine keeps what is small in fp32.
        self.engine: Engine | None = None
        self.decoder: DecoderEngine | None = None
        self._text: TextEngine | None = None  # made from the shared text encoder with the first prompt
        if backend == "cpu":
            self.engine = Engine(dit, CpuOps(dtype, threads, int8), threads)
            self.decoder = DecoderEngine(codec, CpuOps(dtype, threads, int8), threads)
        self.graph: GraphEngine | None = None
        self.codec = codec.to(device).eval().requires_grad_(False)
        if backend == "graph":
            from .runtime.cuda.graph import GraphEngine
            from .runtime.cuda.ops import CudaOps

            table = CudaOps(dtype, device, backend="torch" if device.type == "cpu" else "auto")
            self.graph = GraphEngine(dit, self.codec, self.encoder, table, peak=PEAK, limits=limits, fp8=fp8)
        self.dit = dit.to(device, dtype).eval().requires_grad_(False)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        seconds: float = 32.0,
        bpm: float | Sequence[float | None] | None = None,
        key: str | Sequence[str | None] | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        cfg_pp: bool = False,
        layers: Layers = None,
        deadline_ms: float | None = None,
        seed: int | Sequence[int] | None = None,
        callback: Callback | None = None,
        return_latents: bool = False,
        output: str = "audio",
    ) -> Any:
        """Music for one prompt (an Audio) or several (a list of them), 44.1 kHz stereo.

        seconds: 0.05 to 120; the clip has exactly round(seconds * 44100) frames. bpm: tempo, 30 to 300; None takes the
        prompt's own ("90 bpm"), or leaves it free. key: like "D minor", in the same way.
        steps, sampler, guidance: None takes the model's defaults.
        guidance: classifier-free guidance scale, 1 for none; with cfg_pp (CFG++) from 0 to 1. guidance_interval:
        (low, high) sigma. layers: how many blocks run: 6 at every level, "75%" on average and fewer at high noise, or
        one entry for each step. deadline_ms: takes the best steps and layers that end in time on this machine, by the
        table of `presto-rt tune` (measured quickly where there is none); those that are given stay. seed: clip i of a
        list uses seed + i, or the i-th of a list of seeds; None draws one, which the Audio tells. callback(step,
        steps) after each step (all at once at the end, where a graph does them in one). return_latents: returns
        (audio, latents (T, C)) or (list, (B, T, C)). output: "pcm16" gives int16 arrays (frames, 2) instead of Audio,
        dithered by their seeds, for those who send them on. Raises InvalidInputError, OutOfMemoryError.
        """
        prompts = check_prompts(prompt)
        tempos, keys = arguments.tempos(prompts, bpm), arguments.keys(prompts, key)
        seeds = arguments.seeds(len(prompts), seed)
        how = (seconds, steps, sampler, guidance, guidance_interval, cfg_pp, layers)
        plan = self.plan(*how, deadline_ms=deadline_ms, clips=len(prompts))
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            raise InvalidInputError("negative_prompt must be a string")
        if output not in ("audio", "pcm16"):
            raise InvalidInputError(f'output must be "audio" or "pcm16", not {output!r}')
        clips: list[Any] = []
        latents = []
        # On a CPU clips run one after another: batching gains nothing at these sizes, and a clip is then the same
        # to the bit whether it was asked for alone or among others.
        # On a GPU a graph holds a power of two.
        size = 1 if self.device.type == "cpu" else 1 << (max(1, 32_768 // plan.frames).bit_length() - 1)
        for first in range(0, len(prompts), size):
            part = slice(first, first + size)
            given = (plan, prompts[part], tempos[part], keys[part], seeds[part], negative_prompt, callback)
            if self.graph is not None:
                made, x = self._run_graph(*given, output)
            else:
                audio, x = self._run(*given)
                made = [clip.to_int16() for clip in audio] if output == "pcm16" else audio
            clips += made
            latents.append(x)
        stacked = torch.cat(latents)
        if isinstance(prompt, str):
            return (clips[0], stacked[0]) if return_latents else clips[0]
        return (clips, stacked) if return_latents else clips

    def plan(self, seconds: float, steps: int | None = None, sampler: str | None = None,
             guidance: float | None = None, guidance_interval: tuple[float, float] | None = None,
             cfg_pp: bool = False, layers: Layers = None, deadline_ms: float | None = None,
             clips: int = 1) -> Plan:  # fmt: skip
        """The plan of a request; raises InvalidInputError for settings that cannot be run."""
        if deadline_ms is not None:
            from .deadline import plan_in_time

            request = {"sampler": sampler, "guidance": guidance, "guidance_interval": guidance_interval,
                       "cfg_pp": cfg_pp}  # fmt: skip
            limit = number("deadline_ms", deadline_ms, 0, 1e9) / 1000
            return plan_in_time(self, limit, clips, seconds, steps, layers, request)
        config, defaults = self.config, self.defaults
        steps = defaults.steps if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
            raise InvalidInputError(f"steps must be a whole number from 1 to {MAX_STEPS}, not {steps!r}")
        sampler = defaults.sampler if sampler is None else sampler
        if sampler not in SAMPLERS:
            raise InvalidInputError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
        scale = number("guidance", defaults.guidance if guidance is None else guidance, 0, 100)
        how = Guidance(scale, guidance_interval or defaults.guidance_interval, cfg_pp)
        how.check(sampler)
        samples = round(number("seconds", seconds, 0.05, MAX_SECONDS) * SAMPLE_RATE)
        levels = sampling_sigmas(sampler, steps, config.sigma_min, config.sigma_max, config.rho)
        schedule = parse_layers(
            defaults.layers if layers is None else layers, config.blocks, levels=levels, saved=self.schedules,
            ladder=(config.sigma_min, config.sigma_max, config.rho),
        )  # fmt: skip
        return Plan(sampler, tuple(levels), how, schedule, samples, -(-samples // HOP))

    @torch.inference_mode()
    def _run(self, plan: Plan, prompts: list[str], tempos: list[float | None], keys: list[Key | None],
             seeds: list[int], negative: str | None,
             callback: Callback | None) -> tuple[list[Audio], Tensor]:  # fmt: skip
        started = time.perf_counter()
        condition = self._condition(plan, prompts, tempos, keys)
        unconditional = self.dit.null(condition)
        if negative is not None:
            states = self._encode([negative] * len(prompts))
            unconditional = replace(unconditional, text=states.states, text_mask=states.mask, pooled=states.pooled)
        encoded = time.perf_counter()
        x = self.denoise(plan, condition, unconditional, seeds, callback)
        self._synchronize()
        denoised = time.perf_counter()
        samples = self.decode(x, plan.samples)
        # A clip that would go over full scale is turned down as a whole: clipping would be heard.
        levelled = (samples / (samples.abs().amax((1, 2), keepdim=True) / PEAK).clamp_min(1.0)).cpu().numpy()
        decoded = time.perf_counter()
        timings = {"text": encoded - started, "denoise": denoised - encoded, "decode": decoded - denoised,
                   "total": decoded - started}  # fmt: skip
        audio = [
            Audio(s, SAMPLE_RATE, seed=seed, prompt=p, timings=dict(timings))
            for s, seed, p in zip(levelled, seeds, prompts, strict=True)
        ]
        return audio, x.cpu()

    def request(self, plan: Plan, prompts: list[str], tempos: list[float | None], keys: list[Key | None],
                seeds: list[int], negative: str | None = None, output: str = "float32") -> Request:  # fmt: skip
        """What `engine.graph` is asked for a plan: everything of a call that its graph reads."""
        config, encoder = self.config, self.encoder
        runs = compile_trajectory(
            plan.sampler, plan.levels, plan.guidance, plan.layers, config.network, config.sigma_data
        )
        tokens = encoder.tokens(prompts, config.text_tokens)
        away = None if negative is None else encoder.tokens([negative] * len(prompts), config.text_tokens)
        beats = torch.stack([beat_features(plan.frames, HOP / SAMPLE_RATE, bpm) for bpm in tempos])
        tonality = torch.tensor([key_features(key) for key in keys])
        return Request(tokens, runs, seeds, plan.samples, plan.frames, beats, tonality, away, output=output)

    def _run_graph(self, plan: Plan, prompts: list[str], tempos: list[float | None], keys: list[Key | None],
                   seeds: list[int], negative: str | None, callback: Callback | None,
                   output: str) -> tuple[list[Any], Tensor]:  # fmt: skip
        assert self.graph is not None
        started = time.perf_counter()
        kind = "pcm16" if output == "pcm16" else "float32"
        result = self.graph.run(self.request(plan, prompts, tempos, keys, seeds, negative, kind))
        for step in range(1, len(plan.levels) if callback else 0):
            callback(step, len(plan.levels) - 1)  # type: ignore[misc]
        if output == "pcm16":
            return list(result.samples), result.latents
        timings = result.stages | {"total": time.perf_counter() - started - result.captured}
        audio = [Audio(s, SAMPLE_RATE, seed=seed, prompt=p, timings=dict(timings))
                 for s, seed, p in zip(result.samples, seeds, prompts, strict=True)]  # fmt: skip
        return audio, result.latents

    def denoise(self, plan: Plan, condition: Condition, unconditional: Condition, seeds: list[int],
                callback: Callback | None = None) -> Tensor:  # fmt: skip
        """The trajectory of a plan: latents (B, T, C) fp32 from seeds and conditions. The hot path."""
        if self.engine is not None:
            c = self.config
            runs = compile_trajectory(plan.sampler, plan.levels, plan.guidance, plan.layers, c.network, c.sigma_data)
            return self.engine.run(self.engine.plan(runs, condition, unconditional, plan.frames), seeds, callback)
        both_conditions = cache(lambda: condition.cat(unconditional))  # not made where nothing is guided
        shape = (plan.frames, self.config.latent_channels)
        drawn = None
        if self.device.type == "cuda":
            from .runtime.cuda.ops import noise_of

            drawn = noise_of(seeds, shape, self.device)

        def fresh(stream: int) -> Tensor:
            if drawn is not None:
                return drawn(stream)
            return torch.stack([noise.normal(s, shape, stream=stream, device=self.device) for s in seeds])

        def denoiser(x: Tensor, sigma: float, given: Condition) -> Tensor:
            levels = torch.full((len(x),), sigma, device=x.device)
            return precondition(self.dit, x, levels, given, plan.layers.blocks(sigma), plan.layers.budget(sigma),
                                kind=self.config.network, sigma_data=self.config.sigma_data)  # fmt: skip

        def both(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
            conditional, other = denoiser(torch.cat([x, x]), sigma, both_conditions()).chunk(2)
            return conditional, other

        denoise = guided(lambda x, sigma: denoiser(x, sigma, condition), both, plan.guidance)
        return sample(plan.sampler, denoise, plan.levels[0] * fresh(0), plan.levels, fresh, callback)

    @torch.inference_mode()
    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """Stereo samples (B, 2, frames) fp32 of latents (B, T, C), not limited to full scale. Raises InvalidInputError."""
        if self.device.type == "cuda":
            from .runtime import masked_decode as sound

            count = torch.full((len(latents),), latents.shape[1], dtype=torch.int32, device=self.device)
            return sound.decode(self.codec, latents, count)[..., :frames]
        if self.decoder is None:
            return self.codec.decode(latents, frames=frames, clamp=False).float()
        with thread_limit(self.decoder.threads):
            return self.codec.decode(latents, frames=frames, clamp=False, network=self.decoder)

    def _condition(self, plan: Plan, prompts: list[str], tempos: list[float | None],
                   keys: list[Key | None]) -> Condition:  # fmt: skip
        states = self._encode(prompts)
        beats = torch.stack([beat_features(plan.frames, HOP / SAMPLE_RATE, bpm) for bpm in tempos])
        seconds = torch.full((len(prompts),), plan.frames * HOP / SAMPLE_RATE)
        tonality = torch.tensor([key_features(key) for key in keys])
        return Condition(states.states, states.mask, states.pooled, seconds, beats, tonality).to(self.device)

    def _encode(self, prompts: list[str]) -> TextStates:
        encoder = self.encoder
        if self.decoder is not None and self._text is None:
            self._text = TextEngine(encoder, CpuOps(self.dtype, self.decoder.threads), self.decoder.threads)
        states = encoder.encode(prompts, self.config.text_tokens, self._text)
        return TextStates(*(t.to(self.device) for t in (states.states, states.mask, states.pooled)))

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder on the model's device; on a CPU all models share one. Loaded when it is first needed."""
        if self._encoder is None:
            shared = load_text_encoder()
            self._encoder = shared if self.device.type == "cpu" else copy.deepcopy(shared).to(self.device)
        return self._encoder

    @property
    def precision(self) -> str:
        """What the products are computed in: "float32", "bfloat16", "float16", "int8" or "fp8"."""
        if self.graph is not None and self.graph.fp8 is not None:
            return "fp8"
        return "int8" if self.int8 else str(self.dtype).removeprefix("torch.")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def load(name: str | os.PathLike[str] = "nano", *, device: str = "auto", dtype: str = "auto",
         backend: str = "auto", threads: int | None = None, limits: Limits | None = None) -> Pipeline:  # fmt: skip
    """Load a shipped model by name, or a folder with config.json and safetensors shards. "small-random" and the like
    are a preset without training, for timing.

    device: "auto" takes a CUDA GPU when there is one. dtype of the transformer: "auto" is bfloat16 on a GPU, and on a
    CPU what this processor is fastest in (`engine.rates` measures it once): bfloat16, float32, or "int8", which does
    the engine's products in 8-bit integers, a scale for each token and output channel, and the rest in the faster of
    the other two (docs/cpu.md has its cost). Name one where every processor shall round alike. "fp8" is
    bfloat16 with those products in fp8 that lose little by it (backend "graph", docs/engine.md). backend: "cpu" is the
    engine for CPUs, "graph" the one that runs all of a request as one CUDA graph (on a CPU: as one recorded function),
    "torch" plain torch; "auto" takes the device's engine where it can be had, else torch, and logs why. threads: of the
    CPU engine; torch's number by default. limits: how many graphs and streams the graph engine keeps.
    Raises WeightsError, BackendUnavailableError, InvalidInputError.
    """
    if backend not in BACKENDS:
        raise BackendUnavailableError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    where = _device(device)
    computed = _dtype(dtype, where)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise InvalidInputError(f"threads must be a whole number from 1 to 1024, not {threads!r}")
    random = str(name).endswith(SUFFIX)
    loaded = Checkpoint({}) if random else load_folder(name)
    try:
        if random:
            config = preset(str(name).removesuffix(SUFFIX))
            dit, codec, encoder = untrained(config, where), untrained_codec(), UntrainedText().to(where)
            loaded.digest = f"random {config.name}"
            loaded.config = {"defaults": {"steps": 4, "sampler": "few_step", "guidance": 1.0}}
        else:
            config, encoder = ModelConfig.from_dict(loaded.config["model"]), None
            dit, codec = DiT(config), Codec(CodecConfig.from_dict(loaded.config["codec"]))
            dit.load_state_dict({k: v.float() for k, v in loaded.parts["dit"].items()})
            codec.load_state_dict(
                {k: v.float() if v.is_floating_point() else v for k, v in loaded.parts["codec"].items()}
            )
        saved = {k: LayerSchedule.from_json(v) for k, v in loaded.config.get("layers", {}).items()}
        schedules = {k: parse_layers(v, config.blocks) for k, v in saved.items()}  # of this very depth
    except (InvalidInputError, KeyError, RuntimeError) as error:
        raise WeightsError(
            f"the weights of {name} do not fit their configuration: {str(error).splitlines()[0]}"
        ) from error
    ran_by = _backend(backend, where, computed, config)
    if dtype == "int8" and ran_by != "cpu":
        raise BackendUnavailableError(
            'dtype="int8" needs the CPU engine: choose device="cpu" and backend="auto" or "cpu"'
        )
    int8 = dtype == "int8" or (dtype == "auto" and ran_by == "cpu" and rates.int8_is_faster())
    fp8 = None
    if dtype == "fp8":
        if ran_by != "graph":
            raise BackendUnavailableError("fp8 needs backend='graph'; choose it, or another dtype")
        from .runtime.cuda.fp8 import Fp8

        fp8 = Fp8()
    return Pipeline(dit, codec, device=where, dtype=computed, name=Path(name).name, backend=ran_by, threads=threads,
                    defaults=Defaults.from_dict(loaded.config.get("defaults", {})), schedules=schedules,
                    quality=loaded.config.get("quality", ()), digest=loaded.digest, int8=int8, limits=limits,
                    fp8=fp8, encoder=encoder)  # fmt: skip


def _backend(name: str, device: torch.device, dtype: torch.dtype, config: ModelConfig) -> str:
    """What runs the transformer: "graph" or "cpu", the engines, or "torch". BackendUnavailableError where what was asked for
    by name cannot be had."""
    on_cpu = device.type == "cpu"
    if not on_cpu:
        from .runtime.cuda import ops as cuda
    why = {"cpu": unavailable(dtype) if on_cpu else "the device is not a CPU",
           "graph": None if on_cpu else cuda.unavailable(config, dtype, device)}  # fmt: skip
    if why.get(name) is not None:
        raise BackendUnavailableError(f"the {name} engine cannot be used: {why[name]}; choose backend='torch'")
    if name != "auto":
        return name
    engine = "cpu" if on_cpu else "graph"
    if why[engine] is not None:
        log.info("the transformer runs in plain torch: %s", why[engine])
        return "torch"
    return engine


def _device(name: str) -> torch.device:
    if name not in DEVICES:
        raise InvalidInputError(f"unknown device {name!r}; there are {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("no CUDA GPU can be used here; choose device='auto' or 'cpu'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name not in DTYPES:
        raise InvalidInputError(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
    chosen = DTYPES[name]
    if chosen is not None:
        return chosen
    return torch.bfloat16 if device.type == "cuda" else rates.fastest_float()
