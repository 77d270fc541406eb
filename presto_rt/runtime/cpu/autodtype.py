"""In which numbers does this processor multiply matrices fastest? Measured once in a process, in about 0.1 s, on one
thread; it is what `dtype="auto"` goes by on a CPU.

Its features do not tell: AVX512-BF16 doubles the rate of fp32 on one processor, and halves it on another (docs/cpu.md).
The ratios found so far are far from the limits below, so that a processor decides alike every time.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import cache

import torch

from ... import native
from .ops import int8_is_exact, pack, pack_int8
from .threads import thread_limit

ROWS, INPUTS, OUTPUTS = 345, 384, 1536  # the largest product of a nano block, for 16 s
FEW = 16  # rows that tell a reference loop, a thousand times slower, from a product
#: so much faster than the others must int8 products be to pay for finding and applying the tokens' scales
INT8_PAYS = 1.7


@cache
def product_rates() -> dict[str, float]:
    """Products of one thread in G operations a second, by dtype ("float32", "bfloat16", "int8"); 0.0 for what this
    processor does not compute in."""
    rates = {"float32": 0.0, "bfloat16": 0.0, "int8": 0.0}
    with thread_limit(1), torch.inference_mode():
        weight = torch.randn(OUTPUTS, INPUTS)
        for dtype in (torch.float32, torch.bfloat16) if has_bf16() else (torch.float32,):
            product, x = pack(weight, None, dtype, ROWS), torch.randn(ROWS, INPUTS).to(dtype)
            rates[str(dtype).removeprefix("torch.")] = _rate(lambda p=product, x=x: p(x), ROWS)
        if native.lib is not None and int8_is_exact():
            narrow, numbers = pack_int8(weight, None), torch.randint(1, 256, (ROWS, INPUTS)).to(torch.uint8)
            if _rate(lambda: narrow(numbers[:FEW], torch.float32), FEW, 1) > 1.0:
                rates["int8"] = _rate(lambda: narrow(numbers, torch.float32), ROWS)
    return rates


def fastest_float() -> torch.dtype:
    """bfloat16 where its products are as fast as fp32's at least, float32 elsewhere."""
    if not has_bf16():
        return torch.float32
    rates = product_rates()
    return torch.bfloat16 if rates["bfloat16"] >= rates["float32"] else torch.float32


def int8_is_faster() -> bool:
    """Whether the engine is faster with the transformer's products in int8."""
    rates = product_rates()
    return rates["int8"] >= INT8_PAYS * max(rates["float32"], rates["bfloat16"])


def chosen() -> str:
    """What `dtype="auto"` is for the CPU engine."""
    return "int8" if int8_is_faster() else str(fastest_float()).removeprefix("torch.")


def has_bf16() -> bool:
    """Whether the processor has instructions for bf16 (AVX512-BF16, AMX)."""
    return platform.machine() in ("x86_64", "AMD64") and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def _rate(product: Callable[[], object], rows: int, times: int = 5) -> float:
    """The best of several, after one that is not counted."""
    product()
    best = float("inf")
    for _ in range(times):
        begin = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - begin)
    return 2e-9 * rows * INPUTS * OUTPUTS / best
