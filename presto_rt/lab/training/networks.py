"""Transformers that are there already: to go on from, to learn from."""

from __future__ import annotations

import os
from pathlib import Path

from ...checkpoints import load_folder
from ...errors import WeightsError
from ...models.config import ModelConfig
from ...models.dit import DiT
from .common import load_checkpoint
from .loop import part


def load_network(where: str | os.PathLike[str]) -> DiT:
    """The transformer of a checkpoint file, a run folder (their averaged weights), a weights folder or a shipped model.

    Float32 on the CPU, of any network kind: `diffusion.precond` makes the same denoiser of all. Raises WeightsError.
    """
    path = Path(where)
    checkpoint = path / "checkpoint.safetensors" if path.is_dir() else path
    if checkpoint.is_file():
        tensors, meta = load_checkpoint(checkpoint)
        state, config = part(tensors, "ema"), meta["config"]
    else:
        loaded = load_folder(where)
        state, config = loaded.parts["dit"], loaded.config["model"]
    network = DiT(ModelConfig.from_dict(config))
    try:
        network.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as error:
        raise WeightsError(f"the weights of {where} do not fit this version: {str(error).splitlines()[0]}") from error
    return network
