"""Validation of operator arguments. Every check raises a one-line InvalidInputError with the value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from presto_rt.errors import BackendUnavailableError, InvalidInputError

from .runtime import capability, fp8_limit

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn,)


def check(condition: bool, message: str) -> None:
    """Raise InvalidInputError(message) unless `condition`."""
    if not condition:
        raise InvalidInputError(message)


def check_tensor(
    name: str, tensor: Tensor, dims: int, dtypes: tuple[torch.dtype, ...] = FLOATS, last_contiguous: bool = True
) -> None:
    """Raise InvalidInputError unless `tensor` has `dims` dimensions, is not empty and has one of `dtypes`.

    Args:
        name: of the argument, for the error.
        tensor: the argument.
        dims: number of dimensions.
        dtypes: dtypes that are accepted.
        last_contiguous: the last dimension must have stride 1, too.
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
    """Raise BackendUnavailableError if one of `dtypes` is fp8 and the GPU of `tensor` has no fp8 (below 8.9)."""
    if any(fp8_limit(dtype) for dtype in dtypes) and capability(tensor) < 89:
        raise BackendUnavailableError(
            f"fp8 kernels need compute capability 8.9, this GPU has {capability(tensor) / 10}"
        )


def check_out(name: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise InvalidInputError unless `out` is None or has the shape and dtype of the result."""
    if out is not None:
        check_tensor(name, out, len(shape), (dtype,))
        check_shape(name, out, shape)


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise InvalidInputError unless all tensors that are not None are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    check(
        len(set(devices.values())) <= 1,
        "tensors are on several devices: " + ", ".join(f"{n} on {d}" for n, d in devices.items()),
    )


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raise InvalidInputError unless all tensors that are not None are contiguous."""
    for name, tensor in tensors.items():
        check(tensor is None or tensor.is_contiguous(), f"{name} is not contiguous; call .contiguous()")


def check_vector(name: str, tensor: Tensor | None, length: int, *dtypes: torch.dtype) -> None:
    """Raise InvalidInputError unless `tensor` is None or a vector of `length` numbers; dtypes: default FLOATS."""
    if tensor is not None:
        check_tensor(name, tensor, 1, dtypes or FLOATS)
        check_shape(name, tensor, (length,))
