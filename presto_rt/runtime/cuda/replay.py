"""Replayable work: a CUDA graph, or on a CPU the same work run again.

The work reads from buffers that keep their addresses and writes to such buffers, so both kinds do the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

Work = Callable[[], None]
WARM_UP = 2  # runs before a capture: kernels compile, cuBLAS and cuFFT allocate workspaces, kernels are selected


class Replayable(Protocol):
    """`capture` once, then `replay` any number of times; after a replay the results are on the host."""

    def capture(self, work: Work) -> None:
        """Record the work. Raises what the work raises, out-of-memory errors included; then nothing is recorded."""

    def replay(self) -> None:
        """Run the recorded work and wait for its end."""

    def stage(self, name: str) -> None:
        """Begin a stage; called by the work."""

    def stage_seconds(self) -> dict[str, float]:
        """Return the seconds of each stage in the last replay."""


class EagerReplay:
    """The work itself, run again."""

    def __init__(self) -> None:
        self._work: Work | None = None
        self._stages: list[tuple[str, float]] = []

    def capture(self, work: Work) -> None:
        """See `Replayable.capture`."""
        work()
        self._work = work

    def replay(self) -> None:
        """See `Replayable.replay`."""
        if self._work is None:
            raise RuntimeError("nothing was captured: call capture(work) first")
        self._stages = []
        self._work()

    def stage(self, name: str) -> None:
        """See `Replayable.stage`."""
        self._stages.append((name, time.perf_counter()))

    def stage_seconds(self) -> dict[str, float]:
        """See `Replayable.stage_seconds`."""
        pairs = zip(self._stages, self._stages[1:], strict=False)
        return {name: end - start for (name, start), (_, end) in pairs}


class CudaGraphReplay:
    """One CUDA graph on a stream.

    Args:
        stream: the graph is captured and replayed on it.
        pool: memory pool of intermediate tensors, shared by graphs that never run at the same time.
        graphed: False launches every kernel anew on the same stream, which shows what the graph saves.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: Any = None, graphed: bool = True) -> None:
        self.stream, self.pool, self.graphed = stream, pool, graphed
        self.graph: torch.cuda.CUDAGraph | None = None
        self._work: Work | None = None
        self._events: dict[str, torch.cuda.Event] = {}
        self._done = torch.cuda.Event()

    def capture(self, work: Work) -> None:
        """See `Replayable.capture`."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                work()
        self.stream.synchronize()
        self._work = work
        if not self.graphed:
            return
        graph = torch.cuda.CUDAGraph()
        # Other threads go on launching and allocating meanwhile. The stream is entered once more around the capture: a
        # capture that fails leaves torch's own stream context open.
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            work()
        self.graph = graph

    def replay(self) -> None:
        """See `Replayable.replay`."""
        if self._work is None:
            raise RuntimeError("nothing was captured: call capture(work) first")
        with torch.cuda.stream(self.stream):
            if self.graph is not None:
                self.graph.replay()
            else:
                self._work()
            self._done.record(self.stream)
        self._done.synchronize()  # releases the interpreter lock

    def stage(self, name: str) -> None:
        """See `Replayable.stage`."""
        if name not in self._events:
            # An external event becomes a node of the graph, which is timed in every replay.
            self._events[name] = torch.cuda.Event(enable_timing=True, external=self.graphed)
        self._events[name].record(self.stream)

    def stage_seconds(self) -> dict[str, float]:
        """See `Replayable.stage_seconds`."""
        pairs = zip(self._events.items(), list(self._events.values())[1:], strict=False)
        return {name: start.elapsed_time(end) / 1e3 for (name, start), end in pairs}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if the exception or any of its causes is an out-of-memory error.

    It may be one of torch, Python, the driver, torch's CPU allocator or a CUDA library (CUBLAS_STATUS_ALLOC_FAILED).
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        message = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in message:
            return True
        if isinstance(error, RuntimeError) and ("allocate memory" in message or "alloc_failed" in message):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def reserved_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the bytes of GPU memory that torch has reserved since; 0 on a CPU."""
    if device.type != "cuda":
        yield lambda: 0
        return
    before = torch.cuda.memory_reserved(device)
    yield lambda: max(0, torch.cuda.memory_reserved(device) - before)
