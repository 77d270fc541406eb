"""Fused operators for audio diffusion transformers, one file each: equation, Triton kernel, launcher and reference.

    from presto_rt.kernels.adaln import Modulation, adaln
    residual, y = adaln(residual, branch, Modulation(table, gate=2, shift=3, scale=4))

Every operator takes `backend="auto" | "triton" | "torch"`: "auto" runs the Triton kernel on CUDA tensors and plain
torch on all others. Modules are imported on first use. Importing an operator's module registers it as
`torch.ops.presto_rt.NAME`. `presto_rt.kernels.report` prints the resources of each compiled kernel.
"""

from __future__ import annotations

import importlib
from types import ModuleType

OPERATORS = (
    "adaln",
    "attention",
    "conv_transpose1d",
    "cross_attention",
    "gemm",
    "pcm",
    "qk_norm_rope",
    "sampler_step",
    "snake_conv1d",
    "spsi",
)
__all__ = [*OPERATORS, "report"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
