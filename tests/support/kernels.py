"""Helpers of the kernel tests: the error rule, poisoned outputs, and a count of the writes to each element."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative root-mean-square error of rounding the result once, for results that eager torch happens to get exactly.
ROUNDING = {torch.float32: 2e-7, torch.float16: 3e-4, torch.bfloat16: 2.5e-3, torch.float8_e4m3fn: 3e-2}


def rotary_table(
    tokens: int, dims: int, device: torch.device | str = "cpu", theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each (tokens, dims / 2) fp32, computed in fp64."""
    frequencies = theta ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def error(result: Tensor, truth: Tensor) -> float:
    """Return the root-mean-square error of `result` relative to `truth` (fp64)."""
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    assert result.shape == truth.shape, f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(result).all(), (
        f"{int((~torch.isfinite(result)).sum())} elements are not finite (or were never written)"
    )
    return float((result - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-30))


def assert_no_worse(result: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Require an error of at most twice eager torch's in the same dtype, or of half a rounding step."""
    ours, theirs = error(result, truth), error(eager, truth)
    assert ours <= max(2 * theirs, ROUNDING[result.dtype]), f"error {ours:.3g}, eager torch has {theirs:.3g}"


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return an output full of NaN, so that elements that are not written fail the comparison."""
    return torch.full(shape, float("nan"), dtype=torch.float32, device=device).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """Return the same values with gaps of NaN between the rows of the last dimension."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"), device=tensor.device).to(tensor.dtype)
    wide[..., 3 : 3 + tensor.shape[-1]] = tensor
    return wide[..., 3 : 3 + tensor.shape[-1]]


@contextlib.contextmanager
def counted_writes() -> Iterator[Counter[int]]:
    """Count stores per address in the interpreter, which runs programs sequentially and so hides races."""
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
    """Require that `call` writes every element of `outputs` (default: of its result) exactly once, and nothing else."""
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


interpreted_only = pytest.mark.skipif(
    "not __import__('presto_rt.kernels.runtime', fromlist=['x']).interpreting",
    reason="counts stores inside the interpreter",
)
