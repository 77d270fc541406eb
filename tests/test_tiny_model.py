"""A third party's model through the protocols: examples/tiny_model.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from presto_rt import InvalidInputError
from presto_rt.errors import BackendUnavailableError
from presto_rt.loading import create_backend
from presto_rt.runtime.precision import Precision

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny_model.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_2s", "few_step"])
def test_tiny_model_reaches_its_closed_form_with_every_sampler(example: ModuleType, sampler: str) -> None:
    audio = example.tiny_pipeline().generate("a tone", seconds=1, seed=3, sampler=sampler, steps=6, guidance=2.0)
    frames = audio.latents.shape[0]
    target = torch.stack([torch.full((frames,), 1.5), torch.linspace(0.5, 0, frames)], -1)
    assert (audio.latents - target).abs().max() < 1e-3
    spectrum = np.abs(np.fft.rfft(audio.samples[0]))
    assert abs(int(spectrum.argmax()) - 660) <= 1  # 1.5 x 440 Hz, in a clip of one second


def test_tiny_model_depends_on_prompt_and_seed(example: ModuleType) -> None:
    pipeline = example.tiny_pipeline()
    one, other = pipeline.generate(["a tone", "a much higher tone"], seconds=0.5, seed=1)
    assert other.latents[:, 0].mean() > one.latents[:, 0].mean() + 0.5
    assert not torch.equal(one.latents, pipeline.generate("a tone", seconds=0.5, seed=2).latents)
    assert torch.equal(one.latents, pipeline.generate("a tone", seconds=0.5, seed=1).latents)


def test_tiny_model_is_limited_by_its_own_spec(example: ModuleType) -> None:
    with pytest.raises(InvalidInputError, match=r"from 0\.05 to 10"):
        example.tiny_pipeline().generate("a tone", seconds=11)


def test_tiny_model_encodes_what_it_decodes(example: ModuleType) -> None:
    pipeline = example.tiny_pipeline()
    audio = pipeline.generate("a tone", seconds=1, seed=1)
    assert (pipeline.encode(audio)[:, 1] - audio.latents[:, 1]).abs().max() < 0.05
    assert np.allclose(pipeline.decode(audio.latents, 44_100).samples, audio.samples, atol=1e-6)


def test_tiny_model_has_no_fused_program(example: ModuleType) -> None:
    model = example.tiny_pipeline().model
    with pytest.raises(BackendUnavailableError, match="choose backend='eager'"):
        create_backend(model, "cpu", torch.device("cpu"), Precision.of(torch.float32))


def test_tiny_model_runs_as_a_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLE, tmp_path / "tiny.wav"], check=True, timeout=120)
    assert (tmp_path / "tiny.wav").stat().st_size > 44 + 2 * 2 * 88_000
