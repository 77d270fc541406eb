"""Choose the fastest matmul dtype for this CPU: measured once a process, in about 0.1 s, on one thread.

Instruction sets do not decide it: AVX512-BF16 doubles the rate of fp32 on one processor and halves it on another
(docs/cpu.md). The ratios measured so far are far from the limits below, so one processor decides alike every time.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import cache

import torch

from ... import native
from .products import int8_is_exact, onednn_supports, pack_int8, pack_linear
from .threads import thread_limit

ROWS, INPUTS, OUTPUTS = 345, 384, 1536  # a typical MLP product of 16 s of audio
FEW_ROWS = 16  # enough to tell a reference loop, a thousand times slower, from a fast product
INT8_SPEEDUP = 1.7  # int8 products must be this much faster to pay for the tokens' scales


@cache
def matmul_rates() -> dict[str, float]:
    """Return the rate of one thread's products in GFLOP/s by dtype; 0.0 for a dtype without fast products here."""
    rates = {"float32": 0.0, "bfloat16": 0.0, "int8": 0.0}
    with thread_limit(1), torch.inference_mode():
        weight = torch.randn(OUTPUTS, INPUTS)
        for dtype in (torch.float32, torch.bfloat16) if has_bf16() else (torch.float32,):
            product, x = pack_linear(weight, None, dtype, ROWS), torch.randn(ROWS, INPUTS).to(dtype)
            rates[str(dtype).removeprefix("torch.")] = _rate(lambda p=product, x=x: p(x), ROWS)  # type: ignore[misc]
        if native.lib is not None and int8_is_exact():
            packed, x = pack_int8(weight, None), torch.randint(1, 256, (ROWS, INPUTS)).to(torch.uint8)
            if _rate(lambda: packed(x[:FEW_ROWS], torch.float32), FEW_ROWS, 1) > 1.0:
                rates["int8"] = _rate(lambda: packed(x, torch.float32), ROWS)
    return rates


def preferred_float() -> torch.dtype:
    """Return bfloat16 where its products are at least as fast as those of fp32, float32 elsewhere."""
    if not has_bf16():
        return torch.float32
    rates = matmul_rates()
    return torch.bfloat16 if rates["bfloat16"] >= rates["float32"] else torch.float32


def int8_is_faster() -> bool:
    """Return True if the transformer runs faster with its products in int8."""
    rates = matmul_rates()
    return rates["int8"] >= INT8_SPEEDUP * max(rates["float32"], rates["bfloat16"])


def preferred_dtype() -> str:
    """Return the name that `dtype="auto"` stands for with the CPU backend."""
    return "int8" if int8_is_faster() else str(preferred_float()).removeprefix("torch.")


def has_bf16() -> bool:
    """Return True if the processor has bf16 instructions (AVX512-BF16, AMX) and oneDNN uses them."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return platform.machine() in ("x86_64", "AMD64") and bool(supported()) and onednn_supports(torch.bfloat16)


def _rate(product: Callable[[], object], rows: int, repeats: int = 5) -> float:
    """Return the best rate of several runs in GFLOP/s, after one warm-up."""
    product()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2e-9 * rows * INPUTS * OUTPUTS / best
