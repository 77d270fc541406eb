"""The graph backend on a CPU: its whole path but the capture itself. Buckets, inputs, cache, threads, out-of-memory
errors; the tests that need a GPU are in test_graph_cuda.py.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from presto_rt.audio.pcm import to_pcm
from presto_rt.diffusion import noise
from presto_rt.errors import GenerationError, InvalidInputError, OutOfMemoryError
from presto_rt.models.config import preset
from presto_rt.models.spectral import LATENT_HOP
from presto_rt.runtime.backend import Result
from presto_rt.runtime.cuda.backend import GraphBackend, Limits
from presto_rt.runtime.cuda.buffers import bucket, graph_key
from presto_rt.runtime.cuda.fp8 import Fp8
from presto_rt.runtime.cuda.replay import EagerReplay, is_out_of_memory
from presto_rt.runtime.plan import LatentEdit
from tests.support.jobs import CHANGES, graph_backend, make_job, poison, same, tiny_model, variation
from tests.support.networks import random_dit


def new_backend(dtype: torch.dtype = torch.float32, **options: Any) -> GraphBackend:
    return graph_backend(tiny_model(), dtype, **options)


@pytest.fixture(scope="module")
def backend() -> GraphBackend:
    return new_backend()


# ---- results


def test_bucket_holds_the_clip_and_has_few_values() -> None:
    lengths = [bucket(n) for n in range(1, 2585)]
    assert all(b >= n for n, b in enumerate(lengths, 1))
    assert all(b - n < max(32, 0.13 * n + 1) for n, b in enumerate(lengths, 1))
    assert len(set(lengths)) == 16 + 8 + 13
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("frames", [1, 19, 32, 40])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_graph_of_a_longer_bucket_gives_the_clip_alone(
    backend: GraphBackend, monkeypatch: pytest.MonkeyPatch, frames: int, guidance: float
) -> None:
    job = make_job(["piano", "drums and a very long bass line"], frames, guidance=guidance, bpm=90.0)
    padded = backend.run(job)
    monkeypatch.setattr("presto_rt.runtime.cuda.buffers.bucket", lambda n: n)
    alone = backend.run(job)
    assert padded.samples.shape == (2, 2, frames * LATENT_HOP - 300)
    assert padded.latents.shape == (2, frames, 64)
    torch.testing.assert_close(padded.latents, alone.latents, rtol=1e-5, atol=2e-5)
    assert np.abs(padded.samples - alone.samples).max() < 2e-4
    assert np.abs(alone.samples).max() > 0.005


def test_graph_limits_peaks_and_rounds_to_the_integers_of_to_pcm(backend: GraphBackend) -> None:
    job = make_job(["piano", "drums"], seeds=[7, 2**64 - 1])
    floats = backend.run(job)
    integers = backend.run(replace(job, sample_format="int16"))
    assert np.abs(floats.samples).max() <= 0.98 + 1e-6
    assert integers.samples.dtype == np.int16
    for clip, seed, got in zip(floats.samples, job.seeds, integers.samples, strict=True):
        assert np.array_equal(got, to_pcm(torch.from_numpy(clip), seed=seed).numpy())


def test_graph_runs_three_clips_as_four_and_each_as_it_is_alone(backend: GraphBackend) -> None:
    prompts, seeds = ["piano", "drums", "flute"], [5, 6, 7]
    together = backend.run(make_job(prompts, seeds=seeds))
    assert together.latents.shape[0] == 3
    for i in range(3):
        alone = backend.run(make_job(prompts[i], seeds=[seeds[i]]))
        torch.testing.assert_close(together.latents[i], alone.latents[0], rtol=1e-5, atol=2e-5)


# ---- dependence on inputs


def test_replay_depends_on_each_input_and_on_nothing_else(backend: GraphBackend) -> None:
    """Every buffer is poisoned before every replay: what is not written anew would be NaN."""
    first = backend.run(make_job())
    others = {}
    for name, changed in CHANGES.items():
        for graph in backend.graphs():
            poison(graph)
        others[name] = backend.run(changed())
        for graph in backend.graphs():
            poison(graph)
        assert same(backend.run(make_job()), first), name  # byte for byte, whatever ran in between
    for name, result in others.items():
        n = min(result.latents.shape[1], first.latents.shape[1])
        assert np.isfinite(result.samples).all()
        assert float((result.latents[:, :n] - first.latents[:, :n]).abs().max()) > 1e-6, name
        m = min(result.samples.shape[2], first.samples.shape[2])
        assert not np.array_equal(result.samples[..., :m], first.samples[..., :m]), name
    assert not same(others["init"], others["keep"])


def test_graph_key_depends_on_shapes_and_not_on_numbers() -> None:
    backend = new_backend()
    first = backend.run(make_job())
    assert first.captured > 0
    for name in ("seed", "prompt", "length", "guidance", "tempo", "key", "sigmas"):
        assert backend.run(CHANGES[name]()).captured == 0, name
    for name in ("no guidance", "negative prompt", "layers", "steps", "init"):
        assert backend.run(CHANGES[name]()).captured > 0, name
    assert len(backend.graphs()) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [1, 2]}, "seeds"),
        ({"seeds": []}, "at least one clip"),
        ({"samples": 0}, "one sample"),
        ({"samples": 10**9}, "hold at most"),
        ({"calls": ()}, "one network call"),
        ({"sample_format": "mp3"}, "mp3"),
        ({"inputs": {"beat": torch.ones(1, 20, 5)}}, "beat must have"),
        ({"inputs": {"beat": torch.ones(1, 21, 6)}}, "beat must have"),
        ({"inputs": {"key": torch.ones(1, 25)}}, "key must have"),
        ({"inputs": {"ids": torch.ones(1, 97, dtype=torch.int64)}}, "ids must have"),
        ({"inputs": {"seconds": torch.ones(2)}}, "1 seeds need inputs"),
        ({"edit": LatentEdit(torch.ones(1, 20, 64), torch.ones(1, 21))}, "init must have"),
        ({"edit": LatentEdit(torch.ones(1, 21, 63), torch.ones(1, 21))}, "init must have"),
        ({"edit": LatentEdit(torch.ones(1, 21, 64), torch.ones(1, 20))}, "keep must have"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_run_refuses_jobs_whose_parts_do_not_fit(backend: GraphBackend, change: dict[str, Any], words: str) -> None:
    job = make_job()
    if "inputs" in change:
        change = {"inputs": {**job.inputs, **change["inputs"]}}
    with pytest.raises(InvalidInputError, match=words):
        backend.run(replace(job, **change))


def test_run_refuses_jobs_that_lack_an_input(backend: GraphBackend) -> None:
    job = make_job()
    with pytest.raises(InvalidInputError, match="no input 'key'"):
        backend.run(replace(job, inputs={name: value for name, value in job.inputs.items() if name != "key"}))


def test_run_raises_where_the_sampler_diverged_and_goes_on() -> None:
    broken = random_dit(preset("tiny"))
    broken.output.bias.fill_(torch.inf)
    with pytest.raises(GenerationError, match="diverged"):
        graph_backend(tiny_model(broken)).run(make_job())
    backend = new_backend()
    want = backend.run(make_job(edit=variation()))
    with pytest.raises(GenerationError, match="diverged"):
        backend.run(make_job(edit=variation(float("nan"))))
    assert same(backend.run(make_job(edit=variation())), want)


# ---- threads, cache, memory


def test_backend_gives_eight_threads_the_clips_that_each_gets_alone() -> None:
    words = ["piano", "drums", "flute", "slow jazz", "techno, 130 bpm", "choir", "guitar in D minor", "strings"]
    jobs = [make_job(w, 9 + 7 * i, seeds=[i], guidance=1.0 + i % 3) for i, w in enumerate(words)]
    alone = [new_backend().run(job) for job in jobs]
    backend = new_backend(limits=Limits(streams=3, graphs=4))  # fewer than there are keys: some are dropped
    together: dict[tuple[int, int], Result] = {}

    def work(i: int) -> None:
        for turn in range(2):
            together[i, turn] = backend.run(jobs[(i + turn) % 8])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(together) == 16
    for (i, turn), result in together.items():
        assert same(result, alone[(i + turn) % 8])
    assert len(backend.graphs()) <= 4 + 2  # those of streams that were busy when the limit was applied


def test_least_recently_used_graphs_are_dropped_first() -> None:
    backend = new_backend(limits=Limits(graphs=2))
    first, second, third = make_job(steps=1), make_job(steps=2), make_job(steps=3)
    results = [backend.run(job) for job in (first, second, first, third)]
    assert [graph.key for graph in backend.graphs()] == [graph_key(first), graph_key(third)]
    assert backend.run(first).captured == 0
    again = backend.run(second)
    assert again.captured > 0
    assert same(again, results[1])
    bytes_of_one = max(graph.bytes for graph in backend.graphs())
    small = new_backend(limits=Limits(gibibytes=1.5 * bytes_of_one / 2**30))
    for job in (first, second, third):
        small.run(job)
        assert len(small.graphs()) == 1


def test_dropped_graph_frees_its_memory_at_once() -> None:
    """Without a collection of cycles, which might come in the middle of another graph's capture."""
    backend = new_backend()
    backend.run(make_job(steps=1))
    held = [weakref.ref(graph) for graph in backend.graphs()]
    gc.disable()
    try:
        backend.drop_idle_graphs()
        assert [graph() for graph in held] == [None]
    finally:
        gc.enable()


class Flaky(EagerReplay):
    """A replayable that raises `error` in the calls whose numbers are in `failing`."""

    def __init__(self, calls: list[str], failing: set[int], error: Exception) -> None:
        super().__init__()
        self.calls, self.failing, self.error = calls, failing, error

    def turn(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 in self.failing:
            raise self.error

    def capture(self, work: Callable[[], None]) -> None:
        self.turn("capture")
        super().capture(work)

    def replay(self) -> None:
        self.turn("replay")
        super().replay()


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["capture", "replay"])
def test_out_of_memory_is_tried_again_without_the_other_graphs(where: str, error: Exception) -> None:
    calls: list[str] = []
    failing: set[int] = set()
    backend = new_backend(recorder=lambda: lambda: Flaky(calls, failing, error))
    kept = backend.run(make_job(steps=1))
    want = backend.run(make_job(steps=3))
    backend.drop_idle_graphs()
    backend.run(make_job(steps=1))
    calls.clear()
    failing.add(0 if where == "capture" else 1)
    assert same(backend.run(make_job(steps=3)), want)
    assert calls == (["capture"] if where == "capture" else ["capture", "replay"]) + ["capture", "replay"]
    assert [graph.key for graph in backend.graphs()] == [graph_key(make_job(steps=3))]  # the other one was dropped
    assert same(backend.run(make_job(steps=1)), kept)


def test_out_of_memory_twice_raises_and_the_backend_goes_on() -> None:
    calls: list[str] = []
    failing: set[int] = set()
    backend = new_backend(recorder=lambda: lambda: Flaky(calls, failing, OUT_OF_MEMORY[0]))
    want = backend.run(make_job())
    calls.clear()
    failing |= {0, 1}
    with pytest.raises(OutOfMemoryError, match=r"shorter clip.*2 GiB"):
        backend.run(make_job())
    assert backend.graphs() == []
    assert same(backend.run(make_job()), want)
    silent = new_backend(recorder=lambda: lambda: Flaky([], {0}, MemoryError()))
    with pytest.raises(OutOfMemoryError, match="MemoryError"):
        silent.run(make_job())
    assert not is_out_of_memory(ValueError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    calls.clear()
    failing.clear()
    failing.add(0)
    broken = new_backend(recorder=lambda: lambda: Flaky(calls, failing, ValueError("other")))
    with pytest.raises(ValueError, match="other"):  # not taken for a lack of memory
        broken.run(make_job())
    assert not broken.streams[0].busy


def test_capture_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="presto_rt"):
        new_backend().run(make_job())
    assert any(
        "captured 1 x 32 frames, 2 network calls (2 guided, 6 blocks), float32 in " in m for m in caplog.messages
    )


# ---- fp8


def test_fp8_is_close_and_its_threshold_chooses_products() -> None:
    def error(result: Result) -> float:
        return float((result.latents - exact.latents).square().mean().sqrt() / exact.latents.square().mean().sqrt())

    job = make_job(sampler="euler")
    exact = new_backend().run(job)
    half = new_backend(torch.bfloat16).run(job)
    backend = new_backend(torch.bfloat16, fp8=Fp8(threshold=1.0))
    in_fp8 = backend.run(job)
    choices = backend.graphs()[0].fp8_products
    assert len(choices) == 2 * 3 * 4
    assert all(c.fp8 and 0.02 < c.error < 0.06 and c.input_scale > 0 for c in choices)
    assert error(half) < error(in_fp8) < 0.1
    none = new_backend(torch.bfloat16, fp8=Fp8(threshold=0.0))
    assert torch.equal(none.run(job).latents, half.latents)
    assert not any(c.fp8 for c in none.graphs()[0].fp8_products)
    middle = sorted(c.error for c in choices)[12]
    some = new_backend(torch.bfloat16, fp8=Fp8(threshold=middle))
    some.run(job)
    assert sum(c.fp8 for c in some.graphs()[0].fp8_products) == 13
    # The calibration does not depend on which job comes first.
    other = new_backend(torch.bfloat16, fp8=Fp8(threshold=1.0))
    other.run(make_job("wild drums", seeds=[9], sampler="euler"))
    assert same(other.run(job), in_fp8)


def test_normal_torch_takes_a_seed_as_a_tensor() -> None:
    for seed in (0, 7, 2**63 + 5, 2**64 - 1):
        bits = torch.from_numpy(np.array([seed], dtype=np.uint64).view(np.int64))[0]
        got: Tensor = noise.normal_torch(bits, 1001, stream=3)
        assert torch.equal(got, noise.normal(seed, (1001,), stream=3))
