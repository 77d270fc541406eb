"""Selection of the fastest implementation by measurement, once per device and shape, outside graph captures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from presto_rt.errors import BackendUnavailableError, MissingDependencyError

from .runtime import log


class KernelSelector:
    """Cache of the fastest of several implementations of one operator, keyed by device, dtype, shapes and options."""

    def __init__(self, operator: str) -> None:
        """operator: name for log messages."""
        self.operator = operator
        self.selected: dict[Hashable, str] = {}
        self._warned = False

    def fastest(
        self,
        device: torch.device,
        key: Hashable,
        candidates: Callable[[], Mapping[str, Callable[[], Any]]],
        default: str,
    ) -> str:
        """Return the name of the fastest candidate on a CUDA device, measured at the first call for each key.

        Args:
            device: CUDA device to measure on.
            key: identifies the measurement: dtype, shapes, strides, options.
            candidates: makes the implementations by name, as calls without arguments. Candidates that raise are left
                out.
            default: name to return for an unmeasured key during a graph capture, where nothing can be measured.

        Raises:
            torch.OutOfMemoryError: a candidate ran out of memory; nothing is cached, so the call can be repeated.
        """
        key = (device, key)
        if key in self.selected:
            return self.selected[key]
        if torch.cuda.is_current_stream_capturing():
            if not self._warned:
                log.warning("%s was not measured before a graph capture; taking %s", self.operator, default)
                self._warned = True
            return default
        times: dict[str, float] = {}
        for name, call in candidates().items():
            try:
                with torch.cuda.device(device):
                    times[name] = milliseconds(call)
            except torch.OutOfMemoryError:  # no verdict on the candidate: the caller may free memory and try again
                raise
            except (BackendUnavailableError, MissingDependencyError) as error:  # expected: it does not take this input
                log.debug("%s: %s left out: %s", self.operator, name, error)
            except Exception as error:  # third-party kernels and compilers raise anything; one working one is enough
                first_line = (str(error).splitlines() or [type(error).__name__])[0]
                log.warning("%s: %s left out, it failed: %s", self.operator, name, first_line)
        best = min(times, key=times.__getitem__) if times else default
        ranking = ", ".join(f"{name} {time:.4f} ms" for name, time in sorted(times.items(), key=lambda pair: pair[1]))
        log.info("%s: %s is fastest for %s (%s)", self.operator, best, key, ranking)
        self.selected[key] = best
        return best


def milliseconds(call: Callable[[], Any], repeats: int = 7, calls: int = 10) -> float:
    """Return the median GPU time of `call` in ms, by CUDA events, after three warm-up calls.

    The calls are queued behind a sleeping kernel, so host time, which a captured graph does not pay, is not measured.
    """
    for _ in range(3):
        call()
    times: list[float] = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(6_000_000)  # about 3 ms, in which ten calls of many small launches are queued
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times)
