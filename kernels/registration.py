"""Registration of the operators as `torch.ops.presto_rt.*`.

Each operator's module ends with one call of `register_operator`, so importing the module registers the operator:

    from presto_rt.kernels import adaln
    residual, y = torch.ops.presto_rt.adaln(residual, branch, table, gate=2, shift=3, scale=4)

All registered operators are functional: they allocate their outputs, contiguous for any layout of the inputs, and alias
no input. They trace, compile and export. The functions of the operator modules take `out=` and save the dispatcher's
microseconds per call; the CUDA backend, which records all calls in one graph, uses those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("presto_rt", "DEF")
#: Names of the operators registered so far.
REGISTERED: list[str] = []


def register_operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `torch.ops.presto_rt.NAME`.

    Args:
        schema: torch.library schema without namespace, for example "pcm(Tensor samples, Tensor? seeds=None) -> Tensor".
        implementation: computes the results on CPU and CUDA tensors.
        fake: returns empty results of the same shapes, dtypes and strides; used for tracing.
    """
    name = schema.split("(")[0]
    _library.define(schema)
    for dispatch_key in ("CPU", "CUDA"):
        _library.impl(name, implementation, dispatch_key)
    torch.library.register_fake(f"presto_rt::{name}", fake, lib=_library)
    REGISTERED.append(name)
