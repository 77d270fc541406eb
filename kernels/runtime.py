"""What every operator shares: Triton (or its absence), launching, recording of launches, and checks of arguments.

An operator calls `launch(kernel, grid, *tensors_and_numbers, **constants)`. Usually that runs the kernel. Inside
`recording(arch)` it only notes what would have run, so that `presto_rt.kernels.report` compiles exactly what an
operator launches, from meta tensors and without a GPU.
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

from ..errors import BackendUnavailableError, InvalidInputError

log = logging.getLogger("presto_rt.kernels")

triton: ModuleType | None
try:
    triton = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:
    triton = None
    tl = None

#: True when Triton's interpreter runs the kernels on CPU tensors (TRITON_INTERPRET=1, set before the first import of
#: Triton).
interpreting: bool = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "on",
    "yes",
)
# the same for use inside kernels, which see only constexpr globals
INTERPRET: Any = tl.constexpr(interpreting) if tl is not None else interpreting


def jit(function: Callable[..., Any], varying: Sequence[str] = ()) -> Any:
    """`triton.jit` where Triton is installed; else the function as it is, never called.

    varying: integers that differ from call to call (rows, streams). One binary takes them all; Triton would compile
    others for 1 and for multiples of 16.
    """
    return triton.jit(function, do_not_specialize=list(varying)) if triton is not None else function


if interpreting:
    from .interpreter import repair

    repair()


@jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in fp32. The interpreter multiplies the raw bits of bf16 and fp8, so there both go
    up to fp32 first.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if (
        a.dtype == tl.float8e4nv
    ):  # Hopper keeps 14 bits of an fp8 sum: every 128 products move on to an fp32 accumulator
        return tl.dot(a, b, acc, max_num_imprecise_acc=128)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def saturate(x, LIMIT: tl.constexpr):
    """x cut to +-LIMIT (the largest number of an fp8 format); LIMIT = 0 leaves x alone."""
    if LIMIT > 0:
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    return x


def fp8_limit(dtype: torch.dtype) -> float:
    """Largest finite number of an fp8 dtype, 0 for every other dtype: the LIMIT of `saturate`."""
    return float(torch.finfo(dtype).max) if dtype.is_floating_point and dtype.itemsize == 1 else 0.0


def narrow(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in `dtype`, saturated where that is fp8: what the kernels' last lines do, in plain torch."""
    limit = fp8_limit(dtype)
    return (y.clamp(-limit, limit) if limit else y).to(dtype)


# ---- launching -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: what `launch` was given."""

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
    """Inside, operators given meta tensors note their launches for compute capability `arch` (80, 90) in the list
    instead of running.
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
    """Run `kernel` on `grid` with positional `arguments` (tensors, numbers, None) and compile-time `constants`."""
    # said explicitly: Triton 3.10 turns the default around
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
    """Compute capability that a launch on `tensor` is for: 80, 90, ...; 90 under the interpreter."""
    if _recorder is not None:
        return _recorder.arch
    return _capability(tensor.device.index) if tensor.is_cuda else 90


@functools.cache
def _say_plain(why: str, level: int) -> None:
    """Once per reason."""
    log.log(level, "fused kernels run as plain torch, slower: %s", why)


def use_triton(tensor: Tensor, backend: str = "auto") -> bool:
    """Whether an operator runs its Triton kernel on `tensor` (True) or its plain torch reference (False).

    backend: "auto" (Triton on CUDA tensors, under the interpreter and while recording), "triton" or "torch".
    Raises InvalidInputError for another name, BackendUnavailableError when "triton" cannot run on this tensor; what "auto" gives
    up it logs, one line for each reason.
    """
    if backend not in ("auto", "triton", "torch"):
        raise InvalidInputError(f"backend={backend!r} is unknown; use 'auto', 'triton' or 'torch'")
    if backend == "torch":
        return False
    if triton is not None and (tensor.is_cuda or interpreting or _recorder is not None):
        return True
    if triton is None:
        why, remedy = "Triton is not installed", "pip install triton"
    else:
        why, remedy = f"Triton needs a GPU, not a {tensor.device.type} tensor", "move it to a GPU"
    if backend == "triton":
        raise BackendUnavailableError(f"backend='triton' cannot run: {why}; {remedy} or use backend='torch'")
    _say_plain(f"{why} ({remedy})", logging.WARNING if tensor.is_cuda else logging.INFO)
    return False


# ---- checks --------------------------------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn,)


def check(condition: bool, message: str) -> None:
    """Raise InvalidInputError(message) unless `condition`."""
    if not condition:
        raise InvalidInputError(message)


def check_tensor(
    name: str, tensor: Tensor, dims: int, dtypes: tuple[torch.dtype, ...] = FLOATS, last_contiguous: bool = True
) -> None:
    """Raise InvalidInputError unless `tensor` has `dims` dimensions, none empty, one of `dtypes`, and a last dimension
    of stride 1.
    """
    check(isinstance(tensor, Tensor), f"{name} is a {type(tensor).__name__}; pass a torch tensor")
    check(tensor.dim() == dims, f"{name} has {tensor.dim()} dimensions, expected {dims}; reshape it")
    check(tensor.numel() > 0, f"{name} is empty (shape {tuple(tensor.shape)}); every dimension needs length 1 or more")
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    check(tensor.dtype in dtypes, f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; use one of {names}")
    if last_contiguous:
        check(
            tensor.shape[-1] == 1 or tensor.stride(-1) == 1,
            f"{name} is not contiguous in its last dimension (stride {tensor.stride(-1)}); call .contiguous()",
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InvalidInputError unless `tensor` has exactly `shape`."""
    check(tuple(tensor.shape) == tuple(shape), f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_fp8(tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise BackendUnavailableError where one of `dtypes` is fp8 and the GPU of `tensor` is older than fp8."""
    if any(fp8_limit(dtype) for dtype in dtypes) and capability(tensor) < 89:
        raise BackendUnavailableError(
            f"fp8 kernels need compute capability 8.9, this GPU has {capability(tensor) / 10}"
        )


def check_rows(table: Tensor | None, base: Tensor | None, rows: list[int], batch: int, width: int) -> None:
    """Raise InvalidInputError unless `table` (rows, width) has those rows and `base` is (batch,) int32; either may be None.

    What `base` adds on the device is not known here: base + row must lie in the table.
    """
    check(table is not None or not rows, "gate, shift and scale are rows of a table; pass the table")
    if table is not None:
        check_tensor("table", table, 2)
        check(table.shape[1] == width, f"table has width {table.shape[1]}, the rows it modulates have {width}")
        check(all(0 <= row < table.shape[0] for row in rows), f"row offsets {rows} must lie in 0..{table.shape[0] - 1}")
    if base is not None:
        check_tensor("base", base, 1, (torch.int32,))
        check_shape("base", base, (batch,))


def check_out(name: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise InvalidInputError unless `out` is None or can take a result of that shape and dtype."""
    if out is not None:
        check_tensor(name, out, len(shape), (dtype,))
        check_shape(name, out, shape)


def filled(out: Tensor | None, result: Tensor) -> Tensor:
    """`result`, or `out` with the result in it: how the plain paths end."""
    return result if out is None else out.copy_(result)


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise InvalidInputError unless all given tensors (None apart) are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    check(
        len(set(devices.values())) <= 1,
        "tensors are on several devices: " + ", ".join(f"{n} on {d}" for n, d in devices.items()),
    )


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """All strides but the last, which kernels take for 1; None stands for a (batch, token, channel) tensor: zeros."""
    return tuple(tensor.stride()[:-1]) if tensor is not None else (0, 0)


def next_power_of_2(number: int) -> int:
    """Smallest power of two that is >= number."""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """Integer division, rounded up."""
    return -(-number // divisor)
