"""The graph engine on a CPU: its whole path but the capture itself. Buckets, inputs, cache, threads, memory that runs
out; the same tests that need a GPU are in test_graph_cuda.py.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from presto_rt.conditioning.minilm import TextEncoder
from presto_rt.diffusion.guidance import Guidance
from presto_rt.diffusion.schedule import karras_sigmas, parse_layers
from presto_rt.diffusion.trajectory import compile_trajectory
from presto_rt.errors import GenerationError, InvalidInputError, OutOfMemoryError
from presto_rt.models.codec import Codec
from presto_rt.models.config import HOP, preset
from presto_rt.models.dit import beat_features
from presto_rt.models.random_weights import UntrainedText
from presto_rt.runtime.cuda.buffers import Request, Result, bucket, shape_of
from presto_rt.runtime.cuda.fp8 import Fp8
from presto_rt.runtime.cuda.graph import GraphEngine, Limits, poison
from presto_rt.runtime.cuda.ops import CudaOps
from presto_rt.runtime.cuda.replay import Rerun, is_out_of_memory
from tests.support.models import CODEC
from tests.support.networks import random_dit


@cache
def text_encoder() -> TextEncoder:
    """Of the real one's shape; that package need not be there."""
    return UntrainedText()


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Codec, TextEncoder]:
    torch.manual_seed(0)
    codec = Codec(CODEC).eval().requires_grad_(False)
    codec.synthesis_gain.fill_(0.1)
    for p in codec.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return random_dit(preset("tiny")), codec, text_encoder()


def engine_of(parts: tuple[Any, Codec, TextEncoder], dtype: torch.dtype = torch.float32, **options: Any) -> GraphEngine:
    return GraphEngine(*parts, CudaOps(dtype, "cpu", backend="torch"), **options)


@pytest.fixture(scope="module")
def engine(parts: tuple[Any, Codec, TextEncoder]) -> GraphEngine:
    return engine_of(parts)


def asked(prompts: str | list[str] = "calm piano", frames: int = 21, *, seeds: list[int] | None = None, steps: int = 2,
          guidance: float = 2.0, layers: Any = None, sampler: str = "few_step", negative: str | None = None,
          levels: list[float] | None = None, cut: int = 300, bpm: float | None = None,
          **options: Any) -> Request:  # fmt: skip
    texts = [prompts] if isinstance(prompts, str) else prompts
    schedule = parse_layers(layers, 3, levels=levels or karras_sigmas(steps))
    runs = compile_trajectory(sampler, levels or karras_sigmas(steps), Guidance(guidance), schedule, "edm", 0.5)
    encoder = text_encoder()
    beat = beat_features(frames, HOP / 44_100, bpm).expand(len(texts), -1, -1)
    away = None if negative is None else encoder.tokens([negative] * len(texts))
    numbers = seeds or list(range(len(texts)))
    options = {"key": torch.zeros(len(texts), 24)} | options
    return Request(encoder.tokens(texts), runs, numbers, frames * HOP - cut, frames, beat, negative=away, **options)


def same(a: Result, b: Result) -> bool:
    return np.array_equal(a.samples, b.samples) and torch.equal(a.latents, b.latents)


# ---- what a result is


def test_the_bucket_holds_the_clip_and_there_are_few() -> None:
    lengths = [bucket(n) for n in range(1, 2585)]
    assert all(b >= n for n, b in enumerate(lengths, 1))
    assert all(b - n < max(32, 0.13 * n + 1) for n, b in enumerate(lengths, 1))
    assert len(set(lengths)) == 16 + 8 + 13
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("frames", [1, 19, 32, 40])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_padded_bucket_is_the_clip_alone(
    engine: GraphEngine, monkeypatch: pytest.MonkeyPatch, frames: int, guidance: float
) -> None:
    request = asked(["piano", "drums and a very long bass line"], frames, guidance=guidance, bpm=90.0)
    padded = engine.run(request)
    monkeypatch.setattr("presto_rt.runtime.cuda.buffers.bucket", lambda n: n)
    alone = engine.run(request)
    assert padded.samples.shape == (2, 2, frames * HOP - 300)
    assert padded.latents.shape == (2, frames, 64)
    torch.testing.assert_close(padded.latents, alone.latents, rtol=1e-5, atol=2e-5)
    assert np.abs(padded.samples - alone.samples).max() < 2e-4
    assert np.abs(alone.samples).max() > 0.005


def test_levels_hold_and_integers_are_those_of_the_samples(engine: GraphEngine) -> None:
    from presto_rt.audio.pcm import to_pcm

    request = asked(["piano", "drums"], seeds=[7, 2**64 - 1])
    floats = engine.run(request)
    integers = engine.run(dataclasses.replace(request, output="pcm16"))
    assert np.abs(floats.samples).max() <= 0.98 + 1e-6
    assert integers.samples.dtype == np.int16
    for clip, seed, got in zip(floats.samples, request.seeds, integers.samples, strict=True):
        assert np.array_equal(got, to_pcm(torch.from_numpy(clip), seed=seed).numpy())


def test_three_clips_run_as_four_and_each_is_its_own(engine: GraphEngine) -> None:
    prompts, seeds = ["piano", "drums", "flute"], [5, 6, 7]
    together = engine.run(asked(prompts, seeds=seeds))
    assert together.latents.shape[0] == 3
    for i in range(3):
        alone = engine.run(asked(prompts[i], seeds=[seeds[i]]))
        torch.testing.assert_close(together.latents[i], alone.latents[0], rtol=1e-5, atol=2e-5)


# ---- what it depends on


CHANGES: dict[str, Callable[[], Request]] = {
    "seed": lambda: asked(seeds=[1]),
    "prompt": lambda: asked("wild drums"),
    "length": lambda: asked(frames=22),
    "guidance": lambda: asked(guidance=3.0),
    "no guidance": lambda: asked(guidance=1.0),
    "tempo": lambda: asked(bpm=100.0),
    "key": lambda: asked(key=torch.eye(24)[:1]),
    "negative prompt": lambda: asked(negative="noise"),
    "layers": lambda: asked(layers=2),
    "steps": lambda: asked(steps=3),
    "levels": lambda: asked(levels=[50.0, 1.0, 0.0]),
    "sampler": lambda: asked(sampler="euler"),
    "init": lambda: asked(init=torch.ones(1, 21, 64)),
    "keep": lambda: asked(init=torch.ones(1, 21, 64), keep=torch.ones(1, 21)),
}


def test_a_replay_depends_on_each_input_and_on_nothing_else(engine: GraphEngine) -> None:
    """Every buffer is poisoned before every replay: what is not written anew would be NaN."""
    first = engine.run(asked())
    others = {}
    for name, request in CHANGES.items():
        for entry in engine.entries():
            poison(entry)
        others[name] = engine.run(request())
        for entry in engine.entries():
            poison(entry)
        assert same(engine.run(asked()), first), name  # byte for byte, whatever ran in between
    for name, result in others.items():
        n = min(result.latents.shape[1], first.latents.shape[1])
        assert np.isfinite(result.samples).all()
        assert float((result.latents[:, :n] - first.latents[:, :n]).abs().max()) > 1e-6, name
        m = min(result.samples.shape[2], first.samples.shape[2])
        assert not np.array_equal(result.samples[..., :m], first.samples[..., :m]), name
    assert not same(others["init"], others["keep"])


def test_numbers_are_inputs_and_shapes_pick_the_graph(parts: Any) -> None:
    engine = engine_of(parts)
    first = engine.run(asked())
    assert first.captured > 0
    for name in ("seed", "prompt", "length", "guidance", "tempo", "key", "levels"):
        assert engine.run(CHANGES[name]()).captured == 0, name
    for name in ("no guidance", "negative prompt", "layers", "steps", "init"):
        assert engine.run(CHANGES[name]()).captured > 0, name
    assert len(engine.entries()) == 6


def test_editing(engine: GraphEngine) -> None:
    """A start from a clip at a level is near it when the level is low; what is kept is there to the bit."""
    init = torch.randn(1, 21, 64) * 0.5

    def distance(level: float) -> float:
        result = engine.run(asked(levels=[level, level / 4, 0.0], init=init, guidance=1.0))
        return float((result.latents - init).square().mean().sqrt())

    near, middle, far = distance(0.01), distance(0.5), distance(40.0)
    assert near < 0.1 * middle < middle < far
    keep = torch.zeros(1, 21)
    keep[:, :9] = 1
    for sampler in ("few_step", "dpmpp_2m"):
        result = engine.run(asked(init=init, keep=keep, sampler=sampler))
        assert torch.equal(result.latents[:, :9], init[:, :9])
        assert float((result.latents[:, 9:] - init[:, 9:]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [1, 2]}, "seeds"), ({"samples": 0}, "samples"), ({"samples": 10**9}, "samples"),
        ({"output": "mp3"}, "mp3"), ({"keep": torch.ones(1, 21)}, "give init"),
        ({"init": torch.ones(1, 20, 64)}, "init"), ({"beat": torch.ones(1, 20, 5)}, "beat"), ({"prompts": []}, "beat"),
    ],
)  # fmt: skip
def test_bad_requests(engine: GraphEngine, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        engine.run(dataclasses.replace(asked(), **change))


def test_what_diverges_is_said(parts: Any) -> None:
    broken = copy.deepcopy(parts[0])
    broken.output.bias.fill_(torch.inf)
    with pytest.raises(GenerationError, match="diverged"):
        engine_of((broken, *parts[1:])).run(asked())


# ---- threads, cache, memory


def test_eight_threads_get_what_they_would_get_alone(parts: Any) -> None:
    words = ["piano", "drums", "flute", "slow jazz", "techno, 130 bpm", "choir", "guitar in D minor", "strings"]
    requests = [asked(w, 9 + 7 * i, seeds=[i], guidance=1.0 + i % 3) for i, w in enumerate(words)]
    alone = [engine_of(parts).run(r) for r in requests]
    engine = engine_of(parts, limits=Limits(lanes=3, graphs=4))  # fewer than there are shapes: some are dropped
    together: dict[tuple[int, int], Result] = {}

    def work(i: int) -> None:
        for turn in range(2):
            together[i, turn] = engine.run(requests[(i + turn) % 8])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(together) == 16
    for (i, turn), result in together.items():
        assert same(result, alone[(i + turn) % 8])
    assert len(engine.entries()) <= 4 + 2  # those of lanes that were busy when the limit was looked at


def test_the_least_recently_used_graphs_go_first(parts: Any) -> None:
    engine = engine_of(parts, limits=Limits(graphs=2))
    first, second, third = asked(steps=1), asked(steps=2), asked(steps=3)
    results = [engine.run(r) for r in (first, second, first, third)]
    assert [e.shape for e in engine.entries()] == [shape_of(first), shape_of(third)]
    assert engine.run(first).captured == 0
    again = engine.run(second)
    assert again.captured > 0
    assert same(again, results[1])
    bytes_of_one = max(e.bytes for e in engine.entries())
    small = engine_of(parts, limits=Limits(gibibytes=1.5 * bytes_of_one / 2**30))
    for request in (first, second, third):
        small.run(request)
        assert len(small.entries()) == 1


def test_a_dropped_graph_gives_its_memory_back_at_once(parts: Any) -> None:
    """Not when Python next looks for cycles: the memory is wanted now, and a graph must not go in another's capture."""
    engine = engine_of(parts)
    engine.run(asked(steps=1))
    held = [weakref.ref(e) for e in engine.entries()]
    gc.disable()
    try:
        engine.forget()
        assert [e() for e in held] == [None]
    finally:
        gc.enable()


class Flaky(Rerun):
    """A recording in which memory runs out, in the calls whose turn is in `failing`."""

    def __init__(self, calls: list[str], failing: set[int], error: Exception) -> None:
        super().__init__()
        self.calls, self.failing, self.error = calls, failing, error

    def _turn(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 in self.failing:
            raise self.error

    def capture(self, work: Callable[[], None]) -> None:
        self._turn("capture")
        super().capture(work)

    def replay(self) -> None:
        self._turn("replay")
        super().replay()


OUT = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
       RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
       RuntimeError("CUDA error: out of memory")]  # fmt: skip


@pytest.mark.parametrize("error", OUT, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["capture", "replay"])
def test_out_of_memory_is_tried_again_without_the_other_graphs(parts: Any, where: str, error: Exception) -> None:
    calls: list[str] = []
    failing: set[int] = set()
    engine = engine_of(parts, recorder=lambda: lambda: Flaky(calls, failing, error))
    kept = engine.run(asked(steps=1))
    want = engine.run(asked(steps=3))
    engine.forget()
    engine.run(asked(steps=1))
    calls.clear()
    failing.add(0 if where == "capture" else 1)
    assert same(engine.run(asked(steps=3)), want)
    assert calls == (["capture"] if where == "capture" else ["capture", "replay"]) + ["capture", "replay"]
    assert [e.shape for e in engine.entries()] == [shape_of(asked(steps=3))]  # the other one was dropped
    assert same(engine.run(asked(steps=1)), kept)


def test_out_of_memory_twice_is_a_clear_error_and_the_engine_goes_on(parts: Any) -> None:
    calls: list[str] = []
    failing: set[int] = set()
    engine = engine_of(parts, recorder=lambda: lambda: Flaky(calls, failing, OUT[0]))
    want = engine.run(asked())
    calls.clear()
    failing |= {0, 1}
    with pytest.raises(OutOfMemoryError, match=r"shorter clip.*2 GiB"):
        engine.run(asked())
    assert engine.entries() == []
    assert same(engine.run(asked()), want)
    silent = engine_of(parts, recorder=lambda: lambda: Flaky([], {0}, MemoryError()))
    with pytest.raises(OutOfMemoryError, match="MemoryError"):
        silent.run(asked())
    assert not is_out_of_memory(ValueError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    calls.clear()
    failing.clear()
    failing.add(0)
    broken = engine_of(parts, recorder=lambda: lambda: Flaky(calls, failing, ValueError("other")))
    with pytest.raises(ValueError, match="other"):  # not taken for a lack of memory
        broken.run(asked())
    assert not broken.lanes[0].busy


def test_a_capture_is_told_of_in_the_log(parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="presto_rt"):
        engine_of(parts).run(asked())
    assert any("captured 1 x 32 frames, 2 evaluations (2 guided, 6 blocks), float32 in " in m for m in caplog.messages)


# ---- fp8


def test_fp8_is_close_and_thresholds_choose(parts: Any) -> None:
    def error(result: Result) -> float:
        return float((result.latents - exact.latents).square().mean().sqrt() / exact.latents.square().mean().sqrt())

    request = asked(sampler="euler")
    exact = engine_of(parts).run(request)
    half = engine_of(parts, torch.bfloat16).run(request)
    engine = engine_of(parts, torch.bfloat16, fp8=Fp8(threshold=1.0))
    narrow = engine.run(request)
    choices = engine.entries()[0].precision
    assert len(choices) == 2 * 3 * 4
    assert all(c.fp8 and 0.02 < c.error < 0.06 and c.scale > 0 for c in choices)
    assert error(half) < error(narrow) < 0.1
    none = engine_of(parts, torch.bfloat16, fp8=Fp8(threshold=0.0))
    assert torch.equal(none.run(request).latents, half.latents)
    assert not any(c.fp8 for c in none.entries()[0].precision)
    middle = sorted(c.error for c in choices)[12]
    some = engine_of(parts, torch.bfloat16, fp8=Fp8(threshold=middle))
    some.run(request)
    assert sum(c.fp8 for c in some.entries()[0].precision) == 13
    # the calibration does not depend on who comes first
    other = engine_of(parts, torch.bfloat16, fp8=Fp8(threshold=1.0))
    other.run(asked("wild drums", seeds=[9], sampler="euler"))
    assert same(other.run(request), narrow)


def test_a_tensor_as_a_seed_makes_the_same_noise() -> None:
    from presto_rt.diffusion import noise

    for seed in (0, 7, 2**63 + 5, 2**64 - 1):
        bits = torch.from_numpy(np.array([seed], dtype=np.uint64).view(np.int64))[0]
        got: Tensor = noise.normal_torch(bits, 1001, stream=3)
        assert torch.equal(got, noise.normal(seed, (1001,), stream=3))
