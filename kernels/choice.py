"""Choosing a backend by measuring: once per device and shape, outside of graph captures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from .runtime import log


class Choice:
    """Remembers which of several ways to compute one operator was the fastest for a key (device, dtype, shapes,
    ...).
    """

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.known: dict[Hashable, str] = {}
        self._warned = False

    def fastest(self, key: Hashable, ways: Callable[[], Mapping[str, Callable[[], Any]]], unmeasured: str) -> str:
        """Name of the fastest of `ways()` on the current CUDA device; those that raise are left out.

        During a graph capture nothing can be measured: then `unmeasured` is the answer for a key not seen before.
        """
        if key in self.known:
            return self.known[key]
        if torch.cuda.is_current_stream_capturing():
            if not self._warned:
                log.warning("%s was not measured before a graph capture; taking %s", self.operator, unmeasured)
                self._warned = True
            return unmeasured
        times: dict[str, float] = {}
        for name, call in ways().items():
            try:
                times[name] = milliseconds(call)
            except (RuntimeError, ImportError, ValueError, TypeError) as error:  # a peer that cannot take the input
                log.debug("%s: %s left out: %s", self.operator, name, error)
        best = min(times, key=times.__getitem__) if times else unmeasured
        listed = ", ".join(f"{name} {time:.4f} ms" for name, time in sorted(times.items(), key=lambda pair: pair[1]))
        log.info("%s: %s is fastest for %s (%s)", self.operator, best, key, listed)
        self.known[key] = best
        return best


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of `call` on the GPU, by CUDA events, after three runs to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)
