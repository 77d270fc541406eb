"""Repairs of two faults of Triton's interpreter, so that its numbers equal the hardware's.

1. Conversions to bf16 truncate, and conversions to fp8 lose a carry of the mantissa. Here they go through torch: round
   to nearest, ties to even, as `cvt.rn` does.
2. Triton 3.6 calls int() on one-element arrays, which numpy >= 2.4 refuses: `for k in range(0, K, BLOCK)` would raise.

A third fault stays: matrix products of bf16 and fp8 multiply raw bits. `runtime.dot` converts its operands to fp32
first, and the kernel tests fail for any kernel that does not use it. Nothing is patched unless kernels are interpreted.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Patch the loaded Triton's interpreter; a second call does nothing."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if getattr(interpreter, "_presto_rt_repaired", False):
        return
    _round_to_nearest(interpreter)
    _index_one_element(interpreter)
    interpreter._presto_rt_repaired = True


def _round_to_nearest(interpreter: Any) -> None:
    tl = interpreter.tl
    torch_dtypes = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    builder = interpreter.InterpreterBuilder
    unrepaired = {name: getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp")}

    def convert(self: Any, handle: Any, dst_type: Any, fallback: str, *rest: Any) -> Any:
        source, target = torch_dtypes.get(handle.dtype.scalar), torch_dtypes.get(dst_type.scalar)
        small = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
        if source is None or target is None or not (source in small or target in small):
            return unrepaired[fallback](self, handle, dst_type, *rest)
        bits = torch.from_numpy(np.ascontiguousarray(handle.data))
        out = bits.view(source).to(torch.float32).to(target)
        held = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}.get(
            target
        )
        data = (out.view(held) if held is not None else out).numpy().reshape(handle.data.shape)
        return interpreter.TensorHandle(data, dst_type.scalar)

    builder.cast_impl = lambda self, src, dst_type: convert(self, src, dst_type, "cast_impl")
    builder.create_fp_to_fp = lambda self, src, dst_type, mode: convert(self, src, dst_type, "create_fp_to_fp", mode)


def _index_one_element(interpreter: Any) -> None:
    unrepaired = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        unrepaired(tensor, *scope)
        index = lambda self: int(self.handle.data.reshape(-1)[0])  # noqa: E731
        if scope:  # 3.6 and later: the scope puts the class back after the launch
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch
