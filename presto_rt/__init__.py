"""Presto-RT: text to 44.1 kHz stereo music by few-step latent diffusion.

    import presto_rt
    audio = presto_rt.generate("slow sad piano in D minor, 70 bpm", seconds=32, seed=7)
    audio.save("out.wav")

The import does not load torch; the first use of `load`, `generate`, `Pipeline` or `Audio` does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Unpack, overload

from .errors import (
    BackendUnavailableError,
    GenerationError,
    InvalidInputError,
    MissingDependencyError,
    OutOfMemoryError,
    OutputError,
    PrestoError,
    WeightsError,
)

if TYPE_CHECKING:
    from .audio import Audio
    from .loading import load
    from .pipeline import Pipeline
    from .request import GenerationOptions

__version__ = "0.2.0"
__all__ = [
    "Audio",
    "BackendUnavailableError",
    "GenerationError",
    "InvalidInputError",
    "MissingDependencyError",
    "OutOfMemoryError",
    "OutputError",
    "Pipeline",
    "PrestoError",
    "WeightsError",
    "generate",
    "load",
]

# In a source tree that is not installed, the package presto_rt.kernels is a sibling of this folder, not inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

# Names that are imported when they are first used, and the modules that define them.
_LAZY = {"Audio": ".audio", "Pipeline": ".pipeline", "load": ".loading"}
Name: TypeAlias = "str | os.PathLike[str]"
_pipelines: dict[str, Pipeline] = {}
_loading = threading.Lock()


@overload  # a str is a Sequence[str]; the first overload wins
def generate(  # type: ignore[overload-overlap]
    prompt: str, *, model: Name = "nano", **options: Unpack[GenerationOptions]
) -> Audio: ...


@overload
def generate(prompt: Sequence[str], *, model: Name = "nano", **options: Unpack[GenerationOptions]) -> list[Audio]: ...


def generate(
    prompt: str | Sequence[str], *, model: Name = "nano", **options: Unpack[GenerationOptions]
) -> Audio | list[Audio]:
    """Generate music for a prompt or a sequence of prompts with a model that is loaded once and kept.

    Args:
        prompt: Text of a clip, or a sequence of texts.
        model: Name of a shipped model, or a weights folder. It is loaded with the defaults of `load`.
        options: Fields of `presto_rt.request.GenerationRequest`: negative_prompt, seconds, bpm, key, steps, sampler,
            guidance, guidance_interval, cfg_pp, layers, deadline_ms, seed, sample_format, callback.

    Returns:
        An Audio for a string, a list of Audio for a sequence.

    Raises:
        WeightsError: The model does not exist or is damaged.
        InvalidInputError: An option has the wrong type, is out of range, or names something unknown.
        GenerationError: The sampler diverged.
        OutOfMemoryError: The memory for the request is not available.
    """
    return _pipeline(os.fspath(model)).generate(prompt, **options)


def _pipeline(model: str) -> Pipeline:
    """Return the pipeline of a model. Threads that need the same one at the same time load it once."""
    if model not in _pipelines:
        with _loading:
            if model not in _pipelines:  # no other thread loaded it meanwhile
                from .loading import load

                _pipelines[model] = load(model)
    return _pipelines[model]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
