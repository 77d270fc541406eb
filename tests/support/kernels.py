"""Shared by the kernel tests: the error rule, poisoned outputs, and a count of how often each element is written."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# relative root-mean-square error that is rounding of the result alone, for results that torch happens to get exactly
ROUNDING = {torch.float32: 2e-7, torch.float16: 3e-4, torch.bfloat16: 2.5e-3, torch.float8_e4m3fn: 3e-2}


def error(result: Tensor, truth: Tensor) -> float:
    """Root-mean-square error of `result` relative to `truth` (fp64)."""
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    assert result.shape == truth.shape, f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(result).all(), (
        f"{int((~torch.isfinite(result)).sum())} elements are not finite (or were never written)"
    )
    return float((result - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-30))


def assert_no_worse(result: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The rule of all kernel tests: error at most twice that of plain torch in the same dtype, or half a rounding
    step.
    """
    ours, theirs = error(result, truth), error(plain, truth)
    assert ours <= max(2 * theirs, ROUNDING[result.dtype]), f"error {ours:.3g}, plain torch has {theirs:.3g}"


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """An output full of NaN: what is not written shows."""
    return torch.full(shape, float("nan"), dtype=torch.float32, device=device).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between the rows of the last dimension."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"), device=tensor.device).to(tensor.dtype)
    wide[..., 3 : 3 + tensor.shape[-1]] = tensor
    return wide[..., 3 : 3 + tensor.shape[-1]]


@contextlib.contextmanager
def counted_writes() -> Iterator[Counter[int]]:
    """Counts stores per address in the interpreter (which runs programs one after another and so hides races)."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.create_masked_store
    counts: Counter[int] = Counter()

    def counting(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        import numpy as np

        addresses, chosen = np.broadcast_arrays(pointers.data, mask.data)
        counts.update(addresses[chosen].tolist())
        return original(self, pointers, value, mask, *rest)

    builder.create_masked_store = counting
    try:
        yield counts
    finally:
        builder.create_masked_store = original


def assert_written_once(call: Callable[[], Any], *outputs: Tensor) -> None:
    """`call` writes every element of `outputs` (of its result where none are given) exactly once, and nothing else."""
    with counted_writes() as counts:
        result = call()
    outputs = outputs or (result,)
    expected: set[int] = set()
    for out in outputs:
        offsets = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(out.shape, out.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(size) * stride
        expected |= set((out.data_ptr() + offsets * out.element_size()).reshape(-1).tolist())
    assert set(counts) == expected, (
        f"{len(expected - set(counts))} elements never written, {len(set(counts) - expected)} outside"
    )
    assert max(counts.values()) == 1, f"{sum(n > 1 for n in counts.values())} elements written more than once"


interpreted_only = pytest.mark.skipif("not __import__('presto_rt.kernels.runtime', fromlist=['x']).interpreting",
                                      reason="counts stores inside the interpreter")  # fmt: skip
