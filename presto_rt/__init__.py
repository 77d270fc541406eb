"""Presto-RT: text to 44.1 kHz stereo music by few-step latent diffusion.

    import presto_rt
    audio = presto_rt.generate("slow sad piano in D minor, 70 bpm", seconds=32, seed=7)
    audio.save("out.wav")

Importing this costs nothing: torch is loaded when the first name is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audio.clip import Audio as Audio
    from .pipeline import Pipeline as Pipeline
    from .pipeline import load as load

__version__ = "0.1.0"
__all__ = ["Audio", "Pipeline", "generate", "load"]

# In a clone that was not installed, presto_rt.kernels lies beside this folder and not in it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

_loaded: dict[str, Pipeline] = {}


def generate(prompt: Any, *, model: str = "nano", **options: Any) -> Any:
    """Music for a prompt (an Audio) or a list of prompts (a list). The model is loaded once and kept.

    Options are those of `Pipeline.generate`: seconds, bpm, key, steps, sampler, guidance, layers, seed, ...
    """
    if model not in _loaded:
        from .pipeline import load

        _loaded[model] = load(model)
    return _loaded[model].generate(prompt, **options)


def __getattr__(name: str) -> Any:
    if name == "Audio":
        from .audio.clip import Audio

        return Audio
    if name in ("Pipeline", "load"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'presto_rt' has no attribute {name!r}")
