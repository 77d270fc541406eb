"""Shared runtime of the operators: the optional Triton import, kernel launches and their recording.

An operator calls `launch(kernel, grid, *tensors_and_numbers, **constants)`, which runs the kernel. Inside
`recording(arch)` the same call appends a `Launch` to a list and runs nothing. `presto_rt.kernels.report` uses this to
compile exactly what the operators launch, from meta tensors and without a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from presto_rt.errors import BackendUnavailableError, InvalidInputError

log = logging.getLogger("presto_rt.kernels")

triton: ModuleType | None
try:
    triton = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:
    triton = None
    tl = None

#: True if Triton's interpreter runs the kernels on CPU tensors: TRITON_INTERPRET=1, set before Triton's first import.
interpreting: bool = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "on",
    "yes",
)
# The same flag for use inside kernels, which may only read constexpr globals.
INTERPRET: Any = tl.constexpr(interpreting) if tl is not None else interpreting


def jit(function: Callable[..., Any], varying: Sequence[str] = ()) -> Any:
    """Apply `triton.jit` if Triton is installed; otherwise return the function, which is then never called.

    Args:
        function: kernel or device function.
        varying: names of integer arguments that differ between calls (table rows, noise streams). Triton does not
            specialize them, so one binary serves all values; by default it compiles separately for 1 and for multiples
            of 16.
    """
    return triton.jit(function, do_not_specialize=list(varying)) if triton is not None else function


if interpreting:
    from .interpreter import repair

    repair()


@jit
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """Return acc + a @ b, accumulated in fp32.

    Triton's interpreter multiplies the raw bits of bf16 and fp8 operands, so both are converted to fp32 there.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if a.dtype == tl.float8e4nv:
        # Hopper accumulates fp8 products with 14 bits: promote the partial sum to fp32 every 128 products.
        return tl.dot(a, b, acc, max_num_imprecise_acc=128)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def saturate(x, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clamp x to +-LIMIT, the largest finite number of an fp8 format; LIMIT = 0 returns x unchanged."""
    if LIMIT > 0:
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    return x


def fp8_limit(dtype: torch.dtype) -> float:
    """Return the largest finite number of an fp8 dtype (448 for e4m3) and 0 for any other dtype: `saturate`'s LIMIT."""
    return float(torch.finfo(dtype).max) if dtype.is_floating_point and dtype.itemsize == 1 else 0.0


def saturating_cast(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert y to `dtype`, clamped to the finite range if `dtype` is fp8; the reference of the kernels' epilogue."""
    limit = fp8_limit(dtype)
    return (y.clamp(-limit, limit) if limit else y).to(dtype)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Arguments of one call of `launch`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    options: dict[str, Any]


@dataclasses.dataclass
class _Recorder:
    arch: int
    launches: list[Launch]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Record launches instead of running them: operators called on meta tensors append to the yielded list.

    arch: compute capability that the launches are configured for, 80 or 90.
    """
    global _recorder
    outer, _recorder = _recorder, _Recorder(arch, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = outer


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 1,
    options: dict[str, Any] | None = None,
    **constants: Any,
) -> None:
    """Run `kernel` on `grid`.

    Args:
        kernel: result of `jit`.
        grid: number of programs along each axis.
        arguments: tensors, numbers and None, by position; the first is a tensor and decides the device.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        options: further options of Triton's compiler.
        constants: constexpr arguments, by name.
    """
    # Explicit, since Triton 3.10 changes the default.
    options = {"enable_fp_fusion": True, **(options or {})}
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages, options))
        return
    with _on_device_of(arguments[0]):
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, **options)


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(tensor: Tensor) -> int:
    """Return the compute capability that a launch on `tensor` targets: 80, 90, ...; 90 under the interpreter."""
    if _recorder is not None:
        return _recorder.arch
    return _capability(tensor.device.index) if tensor.is_cuda else 90


@functools.cache
def _log_fallback(reason: str, level: int) -> None:
    """Log the use of the reference path, once per reason."""
    log.log(level, "fused kernels run as plain torch, slower: %s", reason)


def use_triton(tensor: Tensor, backend: str = "auto") -> bool:
    """Return True if an operator runs its Triton kernel on `tensor`, False if it runs its torch reference.

    Args:
        tensor: any input of the operator.
        backend: "auto" (Triton for CUDA tensors, under the interpreter and while recording), "triton" or "torch". A
            fallback of "auto" is logged, once per reason.

    Raises:
        InvalidInputError: `backend` is another name.
        BackendUnavailableError: `backend` is "triton" and Triton cannot run on this tensor.
    """
    if backend not in ("auto", "triton", "torch"):
        raise InvalidInputError(f"backend={backend!r} is unknown; use 'auto', 'triton' or 'torch'")
    if backend == "torch":
        return False
    if triton is not None and (tensor.is_cuda or interpreting or _recorder is not None):
        return True
    if triton is None:
        reason, remedy = "Triton is not installed", "pip install triton"
    else:
        reason, remedy = f"Triton needs a GPU, not a {tensor.device.type} tensor", "move it to a GPU"
    if backend == "triton":
        raise BackendUnavailableError(f"backend='triton' cannot run: {reason}; {remedy} or use backend='torch'")
    _log_fallback(f"{reason} ({remedy})", logging.WARNING if tensor.is_cuda else logging.INFO)
    return False


def copy_into(out: Tensor | None, result: Tensor) -> Tensor:
    """Return `result`, copied into `out` if `out` is given; the last line of every reference path."""
    return result if out is None else out.copy_(result)


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Return all strides but the last, which kernels take to be 1; (0, 0) for an absent (B, T, C) tensor."""
    return tuple(tensor.stride()[:-1]) if tensor is not None else (0, 0)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two >= `number`."""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """Return number / divisor rounded up."""
    return -(-number // divisor)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a meta tensor, as `shipped` configurations take them: shape and dtype without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")
