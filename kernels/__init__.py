"""Fused operators for audio diffusion transformers: one file each, with its equation, Triton kernel, launcher and
plain reference.

    from presto_rt.kernels import adaln
    y = adaln.norm_modulate(x, table, shift=0, scale=1)

Every operator takes `backend="auto" | "triton" | "torch"`: "auto" is the Triton kernel on CUDA tensors and plain
torch elsewhere. Nothing is imported before it is used. `presto_rt.kernels.ops` registers the operators with
torch.library; `presto_rt.kernels.report` prints the resources that each kernel takes.
"""

from __future__ import annotations

import importlib
from typing import Any

OPERATORS = (
    "adaln",
    "attention",
    "conv_transpose1d",
    "cross_attention",
    "edm_step",
    "gemm",
    "istft_head",
    "pcm",
    "qk_norm_rope",
    "snake_conv1d",
    "spsi",
)
__all__ = [*OPERATORS, "ops", "report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
