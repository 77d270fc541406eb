"""generate(): exact lengths, seeds, batches, bad input; with a tiny random model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from presto_rt import native
from presto_rt.errors import BackendUnavailableError, InvalidInputError, WeightsError
from presto_rt.pipeline import Pipeline, load
from tests.support.models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    return load(write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny"), dtype="float32")


def test_same_seed_same_bits(model: Pipeline) -> None:
    a = model.generate("piano", seconds=1.0, seed=7)
    b = model.generate("piano", seconds=1.0, seed=7)
    assert np.array_equal(a.samples, b.samples)
    assert a.seed == 7
    assert a.prompt == "piano"
    assert set(a.timings) == {"text", "denoise", "decode", "total"}


def test_every_choice_changes_the_result(model: Pipeline) -> None:
    def latents(prompt: str = "piano", **options: Any) -> np.ndarray:
        return model.generate(prompt, **{"seconds": 1.0, "seed": 7, "return_latents": True, **options})[1].numpy()

    base = latents()
    for other in (
        latents(seed=8), latents("drums"), latents(bpm=90), latents(key="D minor"),
        latents("piano", steps=5), latents(sampler="dpmpp_2m"),
        latents(guidance=3.0), latents(negative_prompt="noise"), latents(layers="50%"), latents(sampler="few_step"),
        latents(guidance_interval=(0.1, 1.0)),
    ):  # fmt: skip
        assert np.abs(base - other).max() > 1e-6
    assert np.array_equal(latents("techno, 90 bpm"), latents("techno, 90 bpm", bpm=90))
    assert np.array_equal(latents("piano in D minor"), latents("piano in D minor", key="d minor"))
    assert np.array_equal(latents("techno, 90 bpm"), latents("techno, 90 bpm", bpm=np.arange(90, 91)[0]))


@pytest.mark.parametrize("seconds", [0.05, 0.5, 1, 3.3333, 8.0, 95.1])
def test_exact_length(model: Pipeline, seconds: float) -> None:
    audio = model.generate("x", seconds=seconds, seed=1, steps=1, guidance=1)
    assert audio.samples.shape == (2, round(seconds * 44_100))
    assert audio.samples.dtype == np.float32
    assert np.isfinite(audio.samples).all()


def test_batch_item_is_the_single_call(model: Pipeline) -> None:
    prompts = ["piano", "a much longer prompt about drums and bass, 90 bpm", "flute"]
    clips = model.generate(prompts, seconds=1.5, seed=40)
    for i, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
        alone = model.generate(prompt, seconds=1.5, seed=40 + i)
        assert clip.seed == 40 + i
        assert np.abs(clip.samples - alone.samples).max() <= 1e-4
    listed = model.generate(prompts, seconds=1.5, seed=[5, 6, 40])
    assert np.abs(listed[2].samples - model.generate("flute", seconds=1.5, seed=40).samples).max() <= 1e-4


def test_drawn_seed_is_told(model: Pipeline) -> None:
    a, b = (model.generate("piano", seconds=0.3, steps=1) for _ in range(2))
    assert a.seed != b.seed
    again = model.generate("piano", seconds=0.3, steps=1, seed=a.seed)
    assert np.array_equal(a.samples, again.samples)


def test_callback_and_its_interruption(model: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    model.generate("piano", seconds=0.3, steps=3, callback=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate("piano", seconds=0.3, callback=stop)
    assert model.generate("piano", seconds=0.3, seed=1).samples.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seconds": 0}, "seconds"), ({"seconds": -1}, "seconds"), ({"seconds": math.nan}, "seconds"),
        ({"seconds": math.inf}, "120"), ({"seconds": 121}, "120"), ({"seconds": "8"}, "seconds"),
        ({"seconds": True}, "seconds"), ({"seconds": None}, "seconds"), ({"steps": 0}, "steps"),
        ({"steps": 2.0}, "steps"), ({"steps": 10**6}, "steps"), ({"sampler": "magic"}, "heun"),
        ({"guidance": -1}, "guidance"), ({"guidance": math.nan}, "guidance"), ({"guidance": "2"}, "guidance"),
        ({"layers": 0}, "layers|blocks"), ({"layers": "fast"}, "layers"), ({"layers": 99}, "blocks"),
        ({"bpm": 0}, "bpm"), ({"bpm": math.nan}, "bpm"), ({"bpm": [90, 90]}, "bpm"), ({"key": "H"}, "key"),
        ({"key": 3}, "key"), ({"key": ["C major"] * 2}, "key"), ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"), ({"seed": [1, 2]}, "seed"), ({"negative_prompt": 3}, "negative"),
        ({"cfg_pp": True, "guidance": 0.5}, "CFG"), ({"guidance_interval": (2, 1)}, "interval"),
        ({"guidance_interval": 3}, "interval"), ({"guidance_interval": (1,)}, "interval"),
        ({"guidance_interval": ("a", "b")}, "interval"),
    ],
)  # fmt: skip
def test_bad_input(model: Pipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        model.generate("piano", **{"seconds": 0.3, **options})


@pytest.mark.parametrize("prompt", ["", "\U0001f3b9\U0001f3b8", "word " * 10_000])
def test_odd_prompts(model: Pipeline, prompt: str) -> None:
    assert np.isfinite(model.generate(prompt, seconds=0.3, seed=1).samples).all()


def test_bad_choices_of_model_and_backend(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    with pytest.raises(WeightsError, match="shipped models are"):
        load("piano-9000")
    with pytest.raises(BackendUnavailableError, match="torch"):
        load(folder, backend="abacus")
    with pytest.raises(InvalidInputError, match="cpu"):
        load(folder, device="tpu")
    with pytest.raises(InvalidInputError, match="bfloat16"):
        load(folder, dtype="int3")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    import json

    folder = write_tiny_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["width"] = 96
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="fit"):
        load(folder)


def test_backends_agree_and_the_engine_is_the_default(tmp_path: Path) -> None:
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")
    folder = write_tiny_model(tmp_path / "tiny")
    request = {"prompt": "piano, 90 bpm", "seconds": 1.0, "seed": 7, "return_latents": True, "layers": 2}
    chosen, plain = load(folder, dtype="float32"), load(folder, dtype="float32", backend="torch")
    assert (chosen.backend, plain.backend) == ("cpu", "torch")
    (_, a), (_, b) = chosen.generate(**request), plain.generate(**request)
    assert np.abs(a.numpy() - b.numpy()).max() <= 1e-4 * np.abs(b.numpy()).max()
    again = load(folder, dtype="float32", backend="cpu", threads=1).generate(**request)[1]
    assert torch.equal(again, a)
    listed = chosen.generate(**{**request, "prompt": ["drums", "piano, 90 bpm"], "seed": [1, 7]})[1]
    assert torch.equal(listed[1], a)


def test_the_engine_is_refused_in_words_where_it_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    with pytest.raises(BackendUnavailableError, match="float16"):
        load(folder, backend="cpu", dtype="float16")
    with pytest.raises(InvalidInputError, match="threads"):
        load(folder, threads=0)
    monkeypatch.setattr(native, "lib", None)
    monkeypatch.setattr(native, "why", "it was not built")
    with pytest.raises(BackendUnavailableError, match="not built"):
        load(folder, backend="cpu")
    with caplog.at_level("INFO", logger="presto_rt"):
        assert load(folder).backend == "torch"
    assert [r.message for r in caplog.records] == [
        "the transformer runs in plain torch: no C++ operators: it was not built"
    ]
