"""Requests: every check of a caller's arguments, and the sampling plan that follows from them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypedDict

from .conditioning.keys import Key, check_key, parse_key
from .conditioning.ports import ClipControls
from .conditioning.prompts import MAX_BPM, MIN_BPM, check_prompts, parse_bpm
from .diffusion.guidance import Guidance
from .diffusion.noise import check_seed
from .diffusion.schedule import Layers, LayerSchedule, parse_layers
from .diffusion.trajectory import NetworkCall, check_guidance, compile_trajectory, find_sampler, sampling_sigmas
from .errors import InvalidInputError
from .runtime.spec import NetworkSpec

MAX_CLIPS = 10_000  # in one call
MAX_STEPS = 1_000
MIN_SECONDS = 0.05


@dataclass(frozen=True)
class Defaults:
    """Sampling settings that come with a model's weights."""

    steps: int = 32
    sampler: str = "dpmpp_2m"
    guidance: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    layers: Layers = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Defaults:
        """Return the defaults of a config.json; unknown names are ignored, an upper limit of null is infinity."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if "guidance_interval" in known:
            low, high = known["guidance_interval"]
            known["guidance_interval"] = (low, math.inf if high is None else high)
        return cls(**known)


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling arguments of a call; None takes the model's default.

    Args:
        seconds: length of the clip.
        steps: sampler steps.
        sampler: name of the sampler.
        guidance: scale of classifier-free guidance.
        guidance_interval: (low, high) sigma between which guidance is active.
        cfg_pp: CFG++.
        layers: layer budget, see `diffusion.schedule.parse_layers`.
    """

    seconds: float
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    cfg_pp: bool = False
    layers: Layers = None


@dataclass(frozen=True)
class SamplingPlan:
    """Trajectory of a request, known before its first step.

    sigmas: falling noise levels, the last one 0. samples: audio samples of the clip. frames: latent frames that hold
    them.
    """

    sampler: str
    sigmas: tuple[float, ...]
    guidance: Guidance
    layers: LayerSchedule
    samples: int
    frames: int

    @property
    def steps(self) -> int:
        """Number of sampler steps."""
        return len(self.sigmas) - 1

    @property
    def blocks_run(self) -> int:
        """Number of blocks that run at the plan's noise levels, together."""
        return sum(len(self.layers.blocks(sigma)) for sigma in self.sigmas[:-1])

    def calls(self, spec: NetworkSpec) -> tuple[NetworkCall, ...]:
        """Return the plan's network calls for a network."""
        return compile_trajectory(
            self.sampler, self.sigmas, self.guidance, self.layers, spec.prediction_type, spec.sigma_data
        )


def sampling_plan(
    settings: SamplingSettings, spec: NetworkSpec, defaults: Defaults, schedules: Mapping[str, LayerSchedule]
) -> SamplingPlan:
    """Return the plan of a call's settings.

    Args:
        settings: of the call.
        spec: of the network.
        defaults: for settings that are None.
        schedules: layer schedules that the weights were trained for, by budget.

    Raises:
        InvalidInputError: for settings out of range or combinations that are not defined.
    """
    steps = defaults.steps if settings.steps is None else settings.steps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise InvalidInputError(f"steps must be a whole number from 1 to {MAX_STEPS}, not {steps!r}")
    sampler = defaults.sampler if settings.sampler is None else settings.sampler
    find_sampler(sampler)
    scale = number("guidance", defaults.guidance if settings.guidance is None else settings.guidance, 0, 100)
    interval = defaults.guidance_interval if settings.guidance_interval is None else settings.guidance_interval
    guidance = Guidance(scale, interval, settings.cfg_pp)
    check_guidance(sampler, guidance)
    samples = round(number("seconds", settings.seconds, MIN_SECONDS, spec.max_seconds) * spec.sample_rate)
    ladder = (spec.sigma_min, spec.sigma_max, spec.rho)
    sigmas = sampling_sigmas(sampler, steps, *ladder)
    layers = defaults.layers if settings.layers is None else settings.layers
    schedule = parse_layers(layers, spec.blocks, sigmas=sigmas, saved=schedules, ladder=ladder)
    return SamplingPlan(sampler, tuple(sigmas), guidance, schedule, samples, spec.frames(samples))


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `generate`; see `GenerationRequest`."""

    negative_prompt: str | None
    seconds: float
    bpm: float | Sequence[float | None] | None
    key: str | Sequence[str | None] | None
    steps: int | None
    sampler: str | None
    guidance: float | None
    guidance_interval: tuple[float, float] | None
    cfg_pp: bool
    layers: Layers
    deadline_ms: float | None
    seed: int | Sequence[int] | None
    sample_format: str
    callback: Callable[[int, int], None] | None


@dataclass(frozen=True)
class GenerationRequest:
    """Arguments of `generate`, checked when a plan and clips are made of them.

    Args:
        prompt: text, or a sequence of texts.
        negative_prompt: text that guidance leads away from; needs guidance.
        seconds: length, from 0.05 to the model's longest; the clip has exactly round(seconds * sample rate) frames.
        bpm: tempo, 30 to 300 beats a minute, or one for each prompt; None reads the prompt ("90 bpm").
        key: like "D minor", or one for each prompt; None reads the prompt.
        steps: sampler steps; None takes the model's default, as for the settings below.
        sampler: name of the sampler (`diffusion.trajectory.SAMPLERS`).
        guidance: scale of classifier-free guidance, 1 for none; with cfg_pp 0 to 1.
        guidance_interval: (low, high) sigma between which guidance is active.
        cfg_pp: CFG++.
        layers: blocks that run: 6 at every noise level, "75%" on average, or one entry for each step.
        deadline_ms: take the best steps and layers that end in time, by the table of `presto-rt tune`.
        seed: clip i of a list has seed + i, or the i-th of a list; None draws one.
        sample_format: "float32", or "int16" for dithered 16-bit samples.
        callback: called with (step, steps) after each sampler step; a graph reports them at its end.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | None = None
    seconds: float = 32.0
    bpm: float | Sequence[float | None] | None = None
    key: str | Sequence[str | None] | None = None
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    cfg_pp: bool = False
    layers: Layers = None
    deadline_ms: float | None = None
    seed: int | Sequence[int] | None = None
    sample_format: str = "float32"
    callback: Callable[[int, int], None] | None = None

    @property
    def settings(self) -> SamplingSettings:
        """The arguments that a plan is made of."""
        return SamplingSettings(**{f.name: getattr(self, f.name) for f in fields(SamplingSettings)})

    def clips(self) -> list[ClipControls]:
        """Return the controls of each clip; tempo and key that are not given are read from the prompt.

        Raises InvalidInputError for values of another type, out of range, or of another number than the prompts.
        """
        prompts, negative = check_prompts(self.prompt), self.negative_prompt
        if negative is not None and not isinstance(negative, str):
            raise InvalidInputError(f"negative_prompt must be a string or None, not {negative!r}")
        clips = zip(prompts, tempos(prompts, self.bpm), keys(prompts, self.key), strict=True)
        return [ClipControls(text, negative, tempo, tonality) for text, tempo, tonality in clips]

    def seeds(self, clips: int) -> list[int]:
        """Return the seed of each of `clips` clips. Raises InvalidInputError."""
        return seeds(clips, self.seed)


def number(name: str, value: object, low: float, high: float) -> float:
    """Return Python's or NumPy's number as a float in [low, high]. Raises InvalidInputError for all else, NaN and bool
    included. name: of the argument, for the error."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise InvalidInputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
    return float(value)


def tempos(prompts: Sequence[str], bpm: float | Sequence[float | None] | None) -> list[float | None]:
    """Return the tempo of each clip: the given one, or the prompt's own, or None."""
    given = one_each("bpm", bpm, len(prompts))
    return [
        parse_bpm(prompt) if tempo is None else number("bpm", tempo, MIN_BPM, MAX_BPM)
        for prompt, tempo in zip(prompts, given, strict=True)
    ]


def keys(prompts: Sequence[str], key: str | Sequence[str | None] | None) -> list[Key | None]:
    """Return the key of each clip: the given one, or the prompt's own, or None."""
    given = one_each("key", key, len(prompts))
    return [parse_key(p) if name is None else check_key(name) for p, name in zip(prompts, given, strict=True)]


def seeds(count: int, seed: int | Sequence[int] | None) -> list[int]:
    """Return the seed of each of `count` clips: those of a list, or counted up from one; None draws the first."""
    if count > MAX_CLIPS:
        raise InvalidInputError(f"at most {MAX_CLIPS} clips in one call, not {count}")
    if isinstance(seed, list | tuple):
        return [check_seed(value) for value in one_each("seed", seed, count)]
    first = secrets.randbits(63) if seed is None else check_seed(seed)
    return [(first + i) % 2**64 for i in range(count)]


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """Return a value for each of `count` prompts: a list as it is, anything else repeated."""
    given = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(given) != count:
        raise InvalidInputError(f"{count} prompts but {len(given)} values of {name}; give one for each prompt")
    return given
