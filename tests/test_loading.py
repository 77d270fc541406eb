"""`load`: names, devices, backends and precisions; what a backend packs and what a model keeps."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import presto_rt
from presto_rt import loading, native
from presto_rt.checkpoints.house import load_model
from presto_rt.diffusion.schedule import LayerSchedule
from presto_rt.errors import BackendUnavailableError, InvalidInputError, WeightsError
from presto_rt.loading import create_backend, load
from presto_rt.models.codec import Codec
from presto_rt.runtime.cpu.products import int8_is_exact
from presto_rt.runtime.precision import Precision
from tests.support.models import change_config, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny")


def needs_native() -> None:
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")


def test_load_explains_bad_choices(folder: Path) -> None:
    with pytest.raises(WeightsError, match="shipped models are"):
        load("piano-9000")
    for name in ("abacus", "torch"):
        with pytest.raises(BackendUnavailableError, match="auto, eager, cpu, graph"):
            load(folder, backend=name)
    with pytest.raises(InvalidInputError, match="cpu"):
        load(folder, device="tpu")
    with pytest.raises(InvalidInputError, match="bfloat16"):
        load(folder, dtype="int3")
    for threads in (0, -1, 1025, 2.0, True, "2"):
        with pytest.raises(InvalidInputError, match="threads"):
            load(folder, threads=threads)  # type: ignore[arg-type]


def test_load_explains_a_missing_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="no CUDA GPU"):
        load(folder, device="cuda")
    assert load(folder, dtype="float32", backend="eager").backend.device.type == "cpu"


def test_load_explains_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    change_config(folder, model={"width": 96})
    with pytest.raises(WeightsError, match="fit"):
        load(folder)


def test_load_takes_the_cpu_backend_by_default(folder: Path) -> None:
    needs_native()
    model = load(folder, device="cpu", dtype="float32")
    assert model.backend.name == "cpu"
    assert model.backend.device == torch.device("cpu")
    assert model.backend.precision == Precision.of(torch.float32)
    assert load(folder, device="cpu", backend="eager", dtype="float32").backend.name == "eager"
    assert load(folder, device="cpu", backend="graph", dtype="float32").backend.name == "graph"


def test_load_explains_a_cpu_backend_that_is_not_available(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.lib is not None:
        with pytest.raises(BackendUnavailableError, match="float16"):
            load(folder, backend="cpu", device="cpu", dtype="float16")
    monkeypatch.setattr(native, "lib", None)
    monkeypatch.setattr(native, "why", "it was not built")
    with pytest.raises(BackendUnavailableError, match="not built"):
        load(folder, backend="cpu", device="cpu")
    with caplog.at_level("INFO", logger="presto_rt"):
        assert load(folder, device="cpu").backend.name == "eager"
    assert [r.message for r in caplog.records] == ["the model runs in plain torch: no C++ operators: it was not built"]


def test_load_in_bfloat16_runs_on_every_processor(folder: Path) -> None:
    """Through oneDNN's bf16 products where the processor has them, through torch's elsewhere."""
    options: dict[str, Any] = {"seconds": 0.5, "seed": 3, "steps": 2}
    exact = load(folder, device="cpu", dtype="float32").generate("piano", **options).latents
    model = load(folder, device="cpu", dtype="bfloat16")
    assert model.backend.precision == Precision.of(torch.bfloat16)
    rounded = model.generate("piano", **options).latents
    assert rounded is not None
    assert exact is not None
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_load_in_int8_needs_the_cpu_backend_and_exact_products(folder: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="CPU backend"):
        load(folder, device="cpu", dtype="int8", backend="eager")
    with pytest.raises(BackendUnavailableError, match="graph"):
        load(folder, device="cpu", dtype="fp8", backend="eager")
    needs_native()
    if not int8_is_exact():
        with pytest.raises(BackendUnavailableError, match="VNNI"):
            load(folder, device="cpu", dtype="int8")
        return
    model = load(folder, device="cpu", dtype="int8")
    assert model.backend.precision.name == "int8"
    assert np.isfinite(model.generate("piano", seconds=0.3, seed=1, steps=1).samples).all()


@pytest.mark.parametrize("backend", ["cpu", "graph"])
def test_load_keeps_no_weights_that_a_backend_has_packed(folder: Path, backend: str) -> None:
    if backend == "cpu":
        needs_native()
    model = load(folder, device="cpu", backend=backend, dtype="float32")
    assert model.model.network is None
    assert model.model.transformer is None
    codec = model.model.autoencoder
    assert isinstance(codec, Codec)
    assert not list(codec.decoder.parameters())
    assert not any(name.startswith("decoder.") for name in codec.state_dict())
    latents = model.encode(model.generate("piano", seconds=0.3, seed=1, steps=1))
    with pytest.raises(RuntimeError):
        codec.decode(latents)  # the backend has the decoder
    assert np.isfinite(model.decode(latents).samples).all()


def test_load_keeps_the_networks_of_the_eager_backend(folder: Path) -> None:
    model = load(folder, device="cpu", backend="eager", dtype="float32")
    assert isinstance(model.model.network, torch.nn.Module)
    codec = model.model.autoencoder
    latents = model.encode(model.generate("piano", seconds=0.3, seed=1, steps=1))
    assert codec.decode(latents[None], 5000).shape == (1, 2, 5000)


def test_create_backend_needs_neutral_weights_for_a_fused_backend(folder: Path) -> None:
    model = load_model(folder)
    model.transformer = None
    for name in ("cpu", "graph"):
        with pytest.raises(BackendUnavailableError, match="backend='eager'"):
            create_backend(model, name, torch.device("cpu"), Precision.of(torch.float32))
    assert create_backend(model, "eager", torch.device("cpu"), Precision.of(torch.float32)).name == "eager"


def test_load_makes_presets_with_random_weights() -> None:
    model = load("tiny-random", device="cpu", dtype="float32")
    assert model.model.name == "tiny-random"
    assert model.plan(1.0).sampler == "few_step"
    samples = model.generate("piano", seconds=0.3, seed=1).samples
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() > 0.01


def test_load_reads_the_layer_schedules_of_the_weights(tmp_path: Path) -> None:
    """Saved schedules are checked when loaded, used by name, and a default budget is taken."""
    folder = write_tiny_model(tmp_path / "tiny")
    saved = LayerSchedule(3, ((1.0, (0, 1, 2)), (math.inf, (0, 2))))

    def save(schedule: LayerSchedule) -> None:
        change_config(folder, layers={"70%": schedule.to_json()}, defaults={"layers": "70%"})

    save(saved)
    loaded = load(folder)
    assert loaded.model.schedules == {"70%": saved}
    assert loaded.plan(1.0).layers == loaded.plan(1.0, layers="70%").layers == saved
    assert loaded.plan(1.0, layers="100%").layers.blocks(80.0) == (0, 1, 2)
    assert [len(loaded.plan(1.0, 3, layers="1,2,3").layers.blocks(s)) for s in (80.0, 2.5, 0.002)] == [1, 2, 3]
    save(replace(saved, depth=4))
    with pytest.raises(WeightsError, match="4 blocks"):
        load(folder)


def test_load_reads_an_unbounded_guidance_interval(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    change_config(folder, defaults={"guidance_interval": [0.5, None], "unknown": 3})
    assert "null" in (folder / "config.json").read_text()
    assert load(folder).plan(1.0).guidance.interval == (0.5, math.inf)
    assert json.loads((folder / "config.json").read_text())["defaults"]["steps"] == 4


def test_generate_from_eight_threads_loads_and_runs_a_folder_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first use of a model by many threads at a time, with the real loader."""
    loaded: list[object] = []

    def counted(name: str) -> object:
        loaded.append(name)
        return load(name, dtype="float32", device="cpu")

    monkeypatch.setattr(loading, "load", counted)
    results: dict[int, np.ndarray] = {}
    start = threading.Barrier(8)

    def clip(number: int) -> None:
        start.wait()
        audio = presto_rt.generate("piano", model=folder, seconds=0.3, steps=1, seed=number % 2)
        results[number] = audio.samples

    threads = [threading.Thread(target=clip, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1
    assert len(results) == 8
    assert all(np.array_equal(results[number], results[number % 2]) for number in range(8))
    assert not np.array_equal(results[0], results[1])
