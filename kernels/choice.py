"""Choosing a backend by measuring: once per device and shape, outside of graph captures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from ..errors import BackendUnavailableError, MissingDependencyError
from .runtime import log


class Choice:
    """Remembers which of several ways to compute one operator was the fastest for a key (dtype, shapes, ...)."""

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.known: dict[Hashable, str] = {}
        self._warned = False

    def fastest(
        self,
        device: torch.device,
        key: Hashable,
        ways: Callable[[], Mapping[str, Callable[[], Any]]],
        unmeasured: str,
    ) -> str:
        """Name of the fastest of `ways()` on a CUDA device; those that raise are left out.

        During a graph capture nothing can be measured: then `unmeasured` is the answer for a key not seen before.
        """
        key = (device, key)
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
                with torch.cuda.device(device):
                    times[name] = milliseconds(call)
            except torch.OutOfMemoryError:  # says nothing of the way; the caller may make room and ask again
                raise
            except (
                BackendUnavailableError,
                MissingDependencyError,
            ) as error:  # by design: a peer that cannot take the input
                log.debug("%s: %s left out: %s", self.operator, name, error)
            except Exception as error:  # peers and compilers raise what they like; one that works is all that is needed
                first = (str(error).splitlines() or [type(error).__name__])[0]
                log.warning("%s: %s left out, it failed: %s", self.operator, name, first)
        best = min(times, key=times.__getitem__) if times else unmeasured
        listed = ", ".join(f"{name} {time:.4f} ms" for name, time in sorted(times.items(), key=lambda pair: pair[1]))
        log.info("%s: %s is fastest for %s (%s)", self.operator, best, key, listed)
        self.known[key] = best
        return best


def milliseconds(call: Callable[[], Any], repeats: int = 7, calls: int = 10) -> float:
    """Median time of `call` on the GPU, by CUDA events, after three runs to warm up.

    Calls queue up behind a sleeping kernel, so that what they cost the host, nothing inside a captured graph, is not
    compared.
    """
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(6_000_000)  # about 3 ms: ten calls of many small launches each are queued by then
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times)
