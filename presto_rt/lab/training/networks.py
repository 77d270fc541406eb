"""Loading of trained transformers: to continue their training, or to distill them."""

from __future__ import annotations

import os
from pathlib import Path

from ...checkpoints import load_folder
from ...errors import WeightsError
from ...models.config import ModelConfig
from ...models.dit import DiT
from .checkpoint import load_checkpoint, run_checkpoint, without_prefix


def load_network(source: str | os.PathLike[str]) -> DiT:
    """Load the transformer of a checkpoint, a run folder, a weights folder or a shipped model.

    Checkpoints and run folders give their averaged weights. The prediction type may be any that `diffusion.precond`
    knows.

    Returns:
        The network, in float32 on the CPU.

    Raises:
        WeightsError: nothing found at `source`, or its weights do not fit the current architecture.
    """
    path = Path(source)
    checkpoint = run_checkpoint(path) if path.is_dir() else path
    if checkpoint.is_file():
        tensors, meta = load_checkpoint(checkpoint)
        state, config = without_prefix("ema", tensors), meta["config"]
    else:
        loaded = load_folder(source)
        state, config = loaded.parts["dit"], loaded.config["model"]
    network = DiT(ModelConfig.from_dict(config))
    try:
        network.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"the weights of {source} do not fit this version ({reason}); train them again") from error
    return network
