"""The package's public names: exports, and `generate` with a model that is loaded once."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import presto_rt
from presto_rt import errors
from presto_rt.pipeline import Pipeline
from tests.support.models import write_tiny_model


def test_exports_exist_and_include_every_error() -> None:
    assert all(getattr(presto_rt, name) is not None for name in presto_rt.__all__)
    assert set(presto_rt.__all__) <= set(dir(presto_rt))
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert raised <= set(presto_rt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        presto_rt.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.InvalidInputError, ValueError),
        (errors.BackendUnavailableError, RuntimeError),
        (errors.OutputError, OSError),
        (errors.MissingDependencyError, ImportError),
        (errors.OutOfMemoryError, MemoryError),
        (errors.GenerationError, ArithmeticError),
    ],
)
def test_errors_derive_from_the_builtin_of_their_kind(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, errors.PrestoError)
    assert issubclass(error, builtin)
    assert not issubclass(errors.GenerationError, errors.InvalidInputError)


def test_generate_has_the_options_and_defaults_of_the_pipeline() -> None:
    ours = {name: value.default for name, value in inspect.signature(presto_rt.generate).parameters.items()}
    theirs = {name: value.default for name, value in inspect.signature(Pipeline.generate).parameters.items()}
    assert ours.pop("model") == "nano"
    assert ours.items() <= theirs.items()


def test_generate_equals_the_pipeline(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    options = {"seconds": 0.3, "steps": 2, "seed": 5}
    pipeline = presto_rt.load(folder)
    audio = presto_rt.generate("piano", model=folder, **options)
    assert np.array_equal(audio.samples, pipeline.generate("piano", **options).samples)
    clips = presto_rt.generate(["piano", "drums"], model=folder, **options)
    assert [clip.prompt for clip in clips] == ["piano", "drums"]
    assert np.array_equal(clips[0].samples, audio.samples)


def test_generate_from_several_threads_loads_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Echo:
        def generate(self, prompt: str, **_: object) -> str:
            return prompt

    def load(name: str) -> Echo:
        loaded.append(name)
        time.sleep(0.1)  # long enough that all threads ask meanwhile
        return Echo()

    monkeypatch.setattr(sys.modules[presto_rt.load.__module__], "load", load)
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(presto_rt.generate(f"{i}", model="echo"))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["echo"]
    assert sorted(results) == [f"{i}" for i in range(8)]
