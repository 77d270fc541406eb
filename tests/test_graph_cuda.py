"""What only a GPU can show of the graph engine: captured graphs give what the CPU gives, replays read their inputs,
several streams and a lack of memory do no harm.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch

from presto_rt.errors import OutOfMemoryError
from presto_rt.kernels import runtime
from presto_rt.models.config import preset
from presto_rt.models.random_weights import UntrainedText, untrained_codec
from presto_rt.runtime.cuda.buffers import Result
from presto_rt.runtime.cuda.fp8 import Fp8
from presto_rt.runtime.cuda.graph import GraphEngine, Limits, poison
from presto_rt.runtime.cuda.ops import CudaOps
from tests.support.networks import random_dit
from tests.test_graph import CHANGES, asked, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(runtime.interpreting, reason="TRITON_INTERPRET is set; unset it to run on the GPU"),
]


def engine_on(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> GraphEngine:
    encoder = UntrainedText().to(device)
    codec, backend = untrained_codec().to(device), "torch" if device == "cpu" else "auto"
    return GraphEngine(random_dit(preset("tiny")), codec, encoder, CudaOps(dtype, device, backend=backend), **options)


@pytest.fixture(scope="module")
def engine() -> GraphEngine:
    return engine_on("cuda")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["few_step", "dpmpp_2m"])
def test_the_graph_gives_what_the_cpu_gives(engine: GraphEngine, guidance: float, sampler: str) -> None:
    request = asked(["piano", "drums"], guidance=guidance, sampler=sampler, bpm=90.0)
    got, want = engine.run(request), engine_on("cpu").run(request)
    torch.testing.assert_close(got.latents, want.latents, rtol=1e-3, atol=1e-3)
    assert float(np.square(got.samples).mean()) == pytest.approx(float(np.square(want.samples).mean()), rel=0.05)
    assert set(got.stages) == {"text", "denoise", "decode"}
    assert all(seconds > 0 for seconds in got.stages.values())


def test_a_replay_depends_on_each_input_and_on_nothing_else(engine: GraphEngine) -> None:
    first = engine.run(asked())
    for name, request in CHANGES.items():
        for entry in engine.entries():
            poison(entry)
        other = engine.run(request())
        n, m = min(other.latents.shape[1], 21), min(other.samples.shape[2], first.samples.shape[2])
        assert float((other.latents[:, :n] - first.latents[:, :n]).abs().max()) > 1e-6, name
        assert not np.array_equal(other.samples[..., :m], first.samples[..., :m]), name
        for entry in engine.entries():
            poison(entry)
        assert same(engine.run(asked()), first), name


def test_a_padded_bucket_is_the_clip_alone(engine: GraphEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = engine.run(asked(frames=40))
    monkeypatch.setattr("presto_rt.runtime.cuda.buffers.bucket", lambda n: n)
    alone = engine.run(asked(frames=40))
    torch.testing.assert_close(padded.latents, alone.latents, rtol=1e-3, atol=1e-3)


def test_launching_every_kernel_gives_the_same(engine: GraphEngine) -> None:
    eager = engine_on("cuda", graphed=False).run(asked())
    torch.testing.assert_close(eager.latents, engine.run(asked()).latents, rtol=1e-3, atol=1e-3)


def test_eight_threads_on_two_streams(engine: GraphEngine) -> None:
    requests = [asked("piano", 9 + 7 * i, seeds=[i], guidance=1.0 + i % 3) for i in range(8)]
    shared = engine_on("cuda", limits=Limits(lanes=2, graphs=6))
    alone = [engine.run(r) for r in requests]
    together: dict[tuple[int, int], Result] = {}

    def work(i: int) -> None:
        for turn in range(3):
            together[i, turn] = shared.run(requests[(i + turn) % 8])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(together) == 24
    for (i, turn), result in together.items():
        torch.testing.assert_close(result.latents, alone[(i + turn) % 8].latents, rtol=1e-3, atol=1e-3)


def test_out_of_memory_is_said_and_survived() -> None:
    engine = engine_on("cuda")
    want = engine.run(asked())
    total = torch.cuda.get_device_properties(0).total_memory
    # Of what this process's allocator holds: what other processes have does not count here.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(OutOfMemoryError, match="shorter"):
            engine.run(asked(["piano"] * 64, frames=2500))
        again = engine.run(asked())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(again.latents, want.latents, rtol=1e-3, atol=1e-3)


def test_half_precision_and_fp8(engine: GraphEngine) -> None:
    exact = engine.run(asked(sampler="euler")).latents
    errors = []
    ways: list[dict[str, Any]] = [{}]
    if torch.cuda.get_device_capability() >= (8, 9):
        ways.append({"fp8": Fp8(threshold=1.0)})
    for options in ways:
        got = engine_on("cuda", torch.bfloat16, **options).run(asked(sampler="euler")).latents
        errors.append(float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
    assert errors == sorted(errors)
    assert errors[-1] < 0.1


def test_integers_are_those_of_the_samples(engine: GraphEngine) -> None:
    from presto_rt.audio.pcm import to_pcm

    floats = engine.run(asked(seeds=[7]))
    integers = engine.run(dataclasses.replace(asked(seeds=[7]), output="pcm16"))
    want = to_pcm(torch.from_numpy(floats.samples[0]), seed=7).numpy()
    assert np.abs(integers.samples[0].astype(int) - want).max() <= 1
