"""Device, precision and compilation of a training run."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import BackendUnavailableError, InvalidInputError
from ...runtime.cpu.autodtype import preferred_float


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a CUDA GPU if one is available, else the CPU.

    Raises:
        InvalidInputError: unknown name.
        BackendUnavailableError: "cuda" without a usable GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InvalidInputError(f"unknown device {name!r}; choose from: auto, cpu, cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailableError(f"device {name!r} needs a CUDA GPU and none is available; choose auto or cpu")
    return torch.device(name)


def large_batches(device: str) -> bool:
    """Return True if runs on `device` use the batch size of a GPU by default."""
    return pick_device(device).type == "cuda"


def compile_blocks(*models: nn.Module, always: bool = False) -> None:
    """Compile each transformer block in place if the model is on a CUDA GPU, or on any device if `always`.

    All blocks share one compilation per batch and crop shape, whichever of them run; compiling whole networks would
    repeat it for each layer schedule. Names in state dicts do not change.
    """
    for model in models:
        if always or next(model.parameters()).device.type == "cuda":
            import torch._dynamo.config as dynamo

            # variants: with and without gradients, trained and frozen weights, static and dynamic sizes
            dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
            for block in model.get_submodule("blocks").children():
                block.compile()


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where it is the faster matmul dtype: on a GPU and on CPUs that prefer it."""
    use_bfloat16 = device.type == "cuda" or preferred_float() is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16)
