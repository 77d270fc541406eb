"""The graph backend on a GPU: captured graphs give what the CPU gives, replays read their inputs, and several streams
and out-of-memory errors do no harm.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from presto_rt.audio.pcm import to_pcm
from presto_rt.errors import OutOfMemoryError
from presto_rt.kernels import runtime
from presto_rt.models.random_weights import random_codec
from presto_rt.runtime.backend import Result
from presto_rt.runtime.cuda.backend import GraphBackend, Limits
from presto_rt.runtime.cuda.fp8 import Fp8
from presto_rt.runtime.plan import LatentEdit
from tests.support.jobs import CHANGES, graph_backend, make_job, poison, same, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(runtime.interpreting, reason="TRITON_INTERPRET is set; unset it to run on the GPU"),
]


def backend_on(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> GraphBackend:
    return graph_backend(tiny_model(codec=random_codec(), device=device), dtype, device, **options)


@pytest.fixture(scope="module")
def backend() -> GraphBackend:
    return backend_on("cuda")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["few_step", "dpmpp_2m"])
def test_graph_gives_what_the_cpu_gives(backend: GraphBackend, guidance: float, sampler: str) -> None:
    job = make_job(["piano", "drums"], guidance=guidance, sampler=sampler, bpm=90.0)
    got, want = backend.run(job), backend_on("cpu").run(job)
    torch.testing.assert_close(got.latents, want.latents, rtol=1e-3, atol=1e-3)
    assert float(np.square(got.samples).mean()) == pytest.approx(float(np.square(want.samples).mean()), rel=0.05)
    assert set(got.stage_seconds) == {"text", "denoise", "decode"}
    assert all(seconds > 0 for seconds in got.stage_seconds.values())


def test_replay_depends_on_each_input_and_on_nothing_else(backend: GraphBackend) -> None:
    first = backend.run(make_job())
    for name, changed in CHANGES.items():
        for graph in backend.graphs():
            poison(graph)
        other = backend.run(changed())
        n, m = min(other.latents.shape[1], 21), min(other.samples.shape[2], first.samples.shape[2])
        assert float((other.latents[:, :n] - first.latents[:, :n]).abs().max()) > 1e-6, name
        assert not np.array_equal(other.samples[..., :m], first.samples[..., :m]), name
        for graph in backend.graphs():
            poison(graph)
        assert same(backend.run(make_job()), first), name


def test_graph_of_a_longer_bucket_gives_the_clip_alone(backend: GraphBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = backend.run(make_job(frames=40))
    monkeypatch.setattr("presto_rt.runtime.cuda.buffers.bucket", lambda n: n)
    alone = backend.run(make_job(frames=40))
    torch.testing.assert_close(padded.latents, alone.latents, rtol=1e-3, atol=1e-3)


def test_backend_without_graphs_gives_the_same(backend: GraphBackend) -> None:
    eager = backend_on("cuda", graphed=False).run(make_job())
    torch.testing.assert_close(eager.latents, backend.run(make_job()).latents, rtol=1e-3, atol=1e-3)


def test_backend_gives_eight_threads_on_two_streams_their_clips(backend: GraphBackend) -> None:
    jobs = [make_job("piano", 9 + 7 * i, seeds=[i], guidance=1.0 + i % 3) for i in range(8)]
    shared = backend_on("cuda", limits=Limits(streams=2, graphs=6))
    alone = [backend.run(job) for job in jobs]
    together: dict[tuple[int, int], Result] = {}

    def work(i: int) -> None:
        for turn in range(3):
            together[i, turn] = shared.run(jobs[(i + turn) % 8])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(together) == 24
    for (i, turn), result in together.items():
        torch.testing.assert_close(result.latents, alone[(i + turn) % 8].latents, rtol=1e-3, atol=1e-3)


def test_out_of_memory_raises_and_the_backend_goes_on() -> None:
    backend = backend_on("cuda")
    want = backend.run(make_job())
    total = torch.cuda.get_device_properties(0).total_memory
    # Of what this process's allocator holds: what other processes have does not count here.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(OutOfMemoryError, match="shorter"):
            backend.run(make_job(["piano"] * 64, frames=2500))
        again = backend.run(make_job())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(again.latents, want.latents, rtol=1e-3, atol=1e-3)


def test_bf16_and_fp8_are_close(backend: GraphBackend) -> None:
    exact = backend.run(make_job(sampler="euler")).latents
    errors = []
    ways: list[dict[str, Any]] = [{}]
    if torch.cuda.get_device_capability() >= (8, 9):
        ways.append({"fp8": Fp8(threshold=1.0)})
    for options in ways:
        got = backend_on("cuda", torch.bfloat16, **options).run(make_job(sampler="euler")).latents
        errors.append(float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
    assert errors == sorted(errors)
    assert errors[-1] < 0.1


def test_graph_rounds_to_the_integers_of_to_pcm(backend: GraphBackend) -> None:
    floats = backend.run(make_job(seeds=[7]))
    integers = backend.run(replace(make_job(seeds=[7]), sample_format="int16"))
    want = to_pcm(torch.from_numpy(floats.samples[0]), seed=7).numpy()
    assert np.abs(integers.samples[0].astype(int) - want).max() <= 1


@pytest.mark.parametrize("sampler", ["few_step", "dpmpp_2m"])
def test_edit_keeps_latents_to_the_bit(backend: GraphBackend, sampler: str) -> None:
    generator = torch.Generator().manual_seed(0)
    edit = LatentEdit(torch.randn(1, 21, 64, generator=generator) * 0.5, torch.zeros(1, 21))
    edit.keep[:, :9] = 1
    job = make_job(edit=edit, sampler=sampler)
    got, want = backend.run(job).latents, backend_on("cpu").run(job).latents
    assert torch.equal(got[:, :9], edit.init[:, :9])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_backend_leaves_the_codec_where_it_is() -> None:
    """The encoder stays in use: its parts must lie on one device."""
    model = tiny_model(device="cuda")
    graph_backend(model, device="cuda")
    assert model.autoencoder.encode(torch.zeros(1, 2, 5000)).shape == (1, 3, 64)
