"""`Pipeline`: exact lengths, seeds, batches, sample formats, latents and bad input, with a tiny random model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from presto_rt import native
from presto_rt.audio import Audio
from presto_rt.errors import InvalidInputError
from presto_rt.loading import load
from presto_rt.pipeline import Pipeline
from presto_rt.request import GenerationOptions, GenerationRequest
from presto_rt.runtime.backend import Job, Result
from presto_rt.runtime.codec import limit_peak
from tests.support.codecs import relative_rms
from tests.support.models import count_runs, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Pipeline:
    return load(folder, dtype="float32")


@pytest.fixture
def eager(folder: Path) -> Pipeline:
    return load(folder, dtype="float32", backend="eager", device="cpu")


def latents_of(audio: Audio) -> np.ndarray:
    assert audio.latents is not None
    return audio.latents.numpy()


def test_generate_gives_the_same_bits_for_a_seed(model: Pipeline) -> None:
    a = model.generate("piano", seconds=1.0, seed=7)
    b = model.generate("piano", seconds=1.0, seed=7)
    assert np.array_equal(a.samples, b.samples)
    assert np.array_equal(latents_of(a), latents_of(b))
    assert a.seed == 7
    assert a.prompt == "piano"
    assert a.sample_rate == model.model.spec.sample_rate == 44_100
    assert set(a.timings) == {"text", "denoise", "decode", "total"}
    assert a.timings["total"] >= a.timings["denoise"] > 0


def test_generate_depends_on_every_option(model: Pipeline) -> None:
    def latents(prompt: str = "piano", **options: Any) -> np.ndarray:
        return latents_of(model.generate(prompt, **{"seconds": 1.0, "seed": 7, **options}))

    base = latents()
    others = [
        latents(seed=8),
        latents("drums"),
        latents(bpm=90),
        latents(key="D minor"),
        latents("piano", steps=5),
        latents(sampler="dpmpp_2m"),
        latents(guidance=3.0),
        latents(negative_prompt="noise"),
        latents(layers="50%"),
        latents(sampler="few_step"),
        latents(guidance_interval=(0.1, 1.0)),
        latents(sampler="euler", guidance=0.5, cfg_pp=True),
    ]
    for other in others:
        assert np.abs(base - other).max() > 1e-6
    assert np.abs(latents(sampler="euler", guidance=0.5) - others[-1]).max() > 1e-6
    assert np.array_equal(latents("techno, 90 bpm"), latents("techno, 90 bpm", bpm=90))
    assert np.array_equal(latents("piano in D minor"), latents("piano in D minor", key="d minor"))
    assert np.array_equal(latents("techno, 90 bpm"), latents("techno, 90 bpm", bpm=np.arange(90, 91)[0]))


@pytest.mark.parametrize("seconds", [0.05, 0.5, 1, 3.3333, 8.0, 95.1])
def test_generate_has_the_exact_length(model: Pipeline, seconds: float) -> None:
    audio = model.generate("x", seconds=seconds, seed=1, steps=1, guidance=1)
    assert audio.samples.shape == (2, round(seconds * 44_100))
    assert audio.samples.dtype == np.float32
    assert np.isfinite(audio.samples).all()
    assert latents_of(audio).shape == (-(-audio.samples.shape[1] // 2048), 64)


def test_generate_keeps_the_latents_that_its_samples_were_decoded_from(model: Pipeline) -> None:
    audio = model.generate("piano", seconds=0.7, seed=3)
    assert audio.latents is not None
    assert (audio.latents.device.type, audio.latents.dtype) == ("cpu", torch.float32)
    decoded = model.decode(audio.latents, audio.samples.shape[1]).samples
    scale = max(np.abs(decoded).max() / 0.98, 1.0)  # a clip that would clip is scaled to a peak of 0.98
    assert np.abs(audio.samples - decoded / scale).max() <= 1e-5
    assert np.abs(audio.samples).max() <= 0.98 + 1e-6


def test_generate_in_a_list_equals_the_single_call(model: Pipeline) -> None:
    prompts = ["piano", "a much longer prompt about drums and bass, 90 bpm", "flute"]
    clips = model.generate(prompts, seconds=1.5, seed=40)
    for i, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
        alone = model.generate(prompt, seconds=1.5, seed=40 + i)
        assert (clip.seed, clip.prompt) == (40 + i, prompt)
        assert np.abs(clip.samples - alone.samples).max() <= 1e-4
        assert np.abs(latents_of(clip) - latents_of(alone)).max() <= 1e-4
    listed = model.generate(prompts, seconds=1.5, seed=[5, 6, 40])
    assert [clip.seed for clip in listed] == [5, 6, 40]
    assert np.abs(listed[2].samples - model.generate("flute", seconds=1.5, seed=40).samples).max() <= 1e-4


def test_generate_draws_a_seed_and_returns_it(model: Pipeline) -> None:
    a, b = (model.generate("piano", seconds=0.3, steps=1) for _ in range(2))
    assert a.seed != b.seed
    again = model.generate("piano", seconds=0.3, steps=1, seed=a.seed)
    assert np.array_equal(a.samples, again.samples)


def test_generate_calls_back_after_each_step_and_can_be_interrupted(model: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    model.generate("piano", seconds=0.3, steps=3, callback=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate("piano", seconds=0.3, callback=stop)
    assert model.generate("piano", seconds=0.3, seed=1).samples.any()


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"seconds": 0}, "seconds"),
    ({"seconds": -1}, "seconds"),
    ({"seconds": math.nan}, "seconds"),
    ({"seconds": math.inf}, "120"),
    ({"seconds": 121}, "120"),
    ({"seconds": "8"}, "seconds"),
    ({"seconds": True}, "seconds"),
    ({"seconds": None}, "seconds"),
    ({"steps": 0}, "steps"),
    ({"steps": 2.0}, "steps"),
    ({"steps": 10**6}, "steps"),
    ({"sampler": "magic"}, "heun"),
    ({"guidance": -1}, "guidance"),
    ({"guidance": math.nan}, "guidance"),
    ({"guidance": "2"}, "guidance"),
    ({"layers": 0}, "layers|blocks"),
    ({"layers": "fast"}, "layers"),
    ({"layers": 99}, "blocks"),
    ({"bpm": 0}, "bpm"),
    ({"bpm": math.nan}, "bpm"),
    ({"bpm": [90, 90]}, "bpm"),
    ({"key": "H"}, "key"),
    ({"key": 3}, "key"),
    ({"key": ["C major"] * 2}, "key"),
    ({"seed": -1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": [1, 2]}, "seed"),
    ({"negative_prompt": 3}, "negative"),
    ({"cfg_pp": True, "guidance": 0.5}, "CFG"),
    ({"guidance_interval": (2, 1)}, "interval"),
    ({"guidance_interval": 3}, "interval"),
    ({"guidance_interval": 0}, "interval"),
    ({"guidance_interval": ()}, "interval"),
    ({"guidance_interval": (1,)}, "interval"),
    ({"guidance_interval": ("a", "b")}, "interval"),
    ({"sample_format": "int24"}, "float32, int16"),
    ({"sample_format": None}, "float32, int16"),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS)
def test_generate_rejects_bad_input(model: Pipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        model.generate("piano", **{"seconds": 0.3, **options})


@pytest.mark.parametrize("option", ["return_latents", "output", "duration", "clips"])
def test_generate_rejects_unknown_options(model: Pipeline, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        model.generate("piano", **{"seconds": 0.3, option: True})


def test_generation_options_are_the_fields_of_a_request() -> None:
    names = {field.name for field in fields(GenerationRequest)}
    assert names == {"prompt", *GenerationOptions.__annotations__}


@pytest.mark.parametrize("prompt", ["", "\U0001f3b9\U0001f3b8", "word " * 10_000])
def test_generate_accepts_odd_prompts(model: Pipeline, prompt: str) -> None:
    assert np.isfinite(model.generate(prompt, seconds=0.3, seed=1).samples).all()


@pytest.mark.parametrize("backend", ["eager", "cpu", "graph"])
def test_generate_in_int16_is_the_dithered_clip(folder: Path, backend: str) -> None:
    if backend == "cpu" and native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")
    model = load(folder, dtype="float32", backend=backend, device="cpu")
    options: dict[str, Any] = {"seconds": 0.4, "seed": 11, "steps": 2}
    clips = model.generate(["piano", "drums"], **options)
    integers = model.generate(["piano", "drums"], sample_format="int16", **options)
    for clip, integer in zip(clips, integers, strict=True):
        assert integer.samples.dtype == np.int16
        assert integer.samples.shape == clip.samples.shape == (2, 17_640)
        assert np.array_equal(integer.to_int16(), clip.to_int16())
        assert np.array_equal(latents_of(integer), latents_of(clip))
        assert (integer.seed, integer.prompt) == (clip.seed, clip.prompt)
    assert not np.array_equal(integers[0].samples, integers[1].samples)


def test_generate_runs_several_clips_in_batches_of_the_backend(
    eager: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"{name}, {90 + i} bpm" for i, name in enumerate(["piano", "a long drum solo", "flute", "harp", "bass"])]
    options: dict[str, Any] = {"seconds": 0.6, "steps": 2, "seed": [9, 8, 7, 6, 5]}
    alone = eager.generate(prompts, **options)
    asked: list[int] = []

    def max_batch(frames: int) -> int:
        asked.append(frames)
        return 2

    monkeypatch.setattr(eager.backend, "max_batch", max_batch)
    jobs = count_runs(eager, monkeypatch)
    together = eager.generate(prompts, **options)
    assert set(asked) == {eager.plan(0.6).frames}
    assert [list(job.seeds) for job in jobs] == [[9, 8], [7, 6], [5]]
    for a, b in zip(alone, together, strict=True):
        assert (a.seed, a.prompt) == (b.seed, b.prompt)
        assert np.abs(latents_of(a) - latents_of(b)).max() <= 1e-4
        # Not a.samples: a rounding error of the latents may turn the phase of a quiet bin by any angle.
        own = torch.from_numpy(latents_of(b))[None]
        decoded = limit_peak(eager.backend.decode(own, b.samples.shape[1]))[0]
        assert relative_rms(torch.from_numpy(b.samples), decoded) < 1e-4


def test_run_equals_generate(model: Pipeline) -> None:
    """The stages that `generate` is made of: request, plan, clips."""
    request = GenerationRequest(["piano", "drums, 120 bpm"], seconds=0.5, steps=2, seed=[3, 4])
    plan = model.plan(0.5, steps=2)
    made = model.run(plan, request.clips()[:1], [3])
    want = model.generate("piano", seconds=0.5, steps=2, seed=3)
    assert np.array_equal(made[0].samples, want.samples)
    assert plan.steps == 2
    assert plan.samples == 22_050
    assert plan.frames == 11


def test_plan_takes_the_defaults_of_the_weights(model: Pipeline) -> None:
    plan = model.plan(1.0)
    assert (plan.sampler, plan.steps, plan.guidance.scale) == ("heun", 4, 2.0)
    assert plan.sigmas[0] == pytest.approx(80.0)
    assert plan.sigmas[-1] == 0.0
    assert plan.blocks_run == 4 * model.model.spec.blocks


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_encode_and_decode_keep_the_length(folder: Path, backend: str) -> None:
    """Also where the backend has packed the decoder: the codec's encoder stays."""
    model = load(folder, dtype="float32", backend=backend, device="cpu")
    samples = np.random.default_rng(0).normal(0, 0.1, (2, 30_000)).astype(np.float32)
    latents = model.encode(Audio(samples))
    assert (tuple(latents.shape), latents.dtype) == ((15, 64), torch.float32)
    assert model.decode(latents, 30_000).samples.shape == (2, 30_000)
    assert model.decode(latents).samples.shape == (2, 15 * 2048)
    integers = Audio(np.round(samples * 32768).astype(np.int16))
    assert torch.equal(model.encode(integers), model.encode(Audio(integers.to_float32())))
    assert (model.encode(integers) - latents).abs().max() < 0.1 * latents.abs().max()


def test_backends_agree_on_latents_and_clips(folder: Path) -> None:
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")
    request: dict[str, Any] = {"prompt": "piano, 90 bpm", "seconds": 1.0, "seed": 7, "layers": 2}
    chosen = load(folder, dtype="float32", device="cpu")
    plain = load(folder, dtype="float32", backend="eager", device="cpu")
    assert (chosen.backend.name, plain.backend.name) == ("cpu", "eager")
    a, b = latents_of(chosen.generate(**request)), latents_of(plain.generate(**request))
    assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()
    again = load(folder, dtype="float32", backend="cpu", device="cpu", threads=1).generate(**request)
    assert np.array_equal(latents_of(again), a)
    listed = chosen.generate(**{**request, "prompt": ["drums", "piano, 90 bpm"], "seed": [1, 7]})
    assert np.array_equal(latents_of(listed[1]), a)


def test_run_excludes_the_time_of_capture_from_the_total(eager: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Result] = eager.backend.run

    def run(job: Job, on_step: Any = None) -> Result:
        result = original(job, on_step)
        return Result(result.samples, result.latents, result.stage_seconds, captured=1000.0)

    monkeypatch.setattr(eager.backend, "run", run)
    assert eager.generate("piano", seconds=0.3, steps=1, seed=1).timings["total"] < -900.0
