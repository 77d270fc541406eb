"""Work that is recorded once and then repeated: a CUDA graph, or on a CPU the same work run again.

Whatever the work reads must be in buffers that stay where they are, and whatever it leaves goes to such buffers, so
that both kinds do the same. The CPU's is no imitation: it is how the graph engine runs where there is no GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

Work = Callable[[], None]
WARM_UP = 2  # runs before a capture: kernels compile, cuBLAS and cuFFT make their workspaces, choices are measured


class Recording(Protocol):
    """`capture` once, then `replay` any number of times; after a replay the results are on the host."""

    def capture(self, work: Work) -> None:
        """Records `work`. May raise what the work raises, out of memory included; then it is not recorded."""

    def replay(self) -> None:
        """Does the work again and waits for its end."""

    def mark(self, name: str) -> None:
        """Called by the work: a stage begins here."""

    def stages(self) -> dict[str, float]:
        """Seconds from each mark to the next, in the last replay."""


class Rerun:
    """The work itself, again."""

    def __init__(self) -> None:
        self._work: Work | None = None
        self._marks: list[tuple[str, float]] = []

    def capture(self, work: Work) -> None:
        work()
        self._work = work

    def replay(self) -> None:
        if self._work is None:
            raise RuntimeError("nothing was captured")
        self._marks = []
        self._work()

    def mark(self, name: str) -> None:
        self._marks.append((name, time.perf_counter()))

    def stages(self) -> dict[str, float]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return {name: end - begin for (name, begin), (_, end) in pairs}


class CudaGraph:
    """One CUDA graph on a stream; its intermediate tensors come from `pool`, which graphs that never run at the same
    time may share.

    graphed=False launches every kernel anew instead, on the same stream: what a graph saves is the difference.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: Any = None, graphed: bool = True) -> None:
        self.stream, self.pool, self.graphed = stream, pool, graphed
        self.graph: torch.cuda.CUDAGraph | None = None
        self._work: Work | None = None
        self._events: dict[str, torch.cuda.Event] = {}
        self._done = torch.cuda.Event()

    def capture(self, work: Work) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                work()
        self.stream.synchronize()
        self._work = work
        if not self.graphed:
            return
        graph = torch.cuda.CUDAGraph()
        # Other threads go on launching and allocating meanwhile. The stream once more around it: a capture that cannot
        # be ended leaves torch's own stream context open.
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            work()
        self.graph = graph

    def replay(self) -> None:
        if self._work is None:
            raise RuntimeError("nothing was captured")
        with torch.cuda.stream(self.stream):
            if self.graph is not None:
                self.graph.replay()
            else:
                self._work()
            self._done.record(self.stream)
        self._done.synchronize()  # without the interpreter's lock

    def mark(self, name: str) -> None:
        if name not in self._events:
            # External: inside a graph it becomes a node that is timed in every replay.
            self._events[name] = torch.cuda.Event(enable_timing=True, external=self.graphed)
        self._events[name].record(self.stream)

    def stages(self) -> dict[str, float]:
        pairs = zip(self._events.items(), list(self._events.values())[1:], strict=False)
        return {name: begin.elapsed_time(end) / 1e3 for (name, begin), end in pairs}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says, or follows from one that says, that memory ran out: torch's own, Python's, the driver's,
    that of torch's CPU allocator or of a CUDA library (CUBLAS_STATUS_ALLOC_FAILED)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        said = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in said:
            return True
        if isinstance(error, RuntimeError) and ("allocate memory" in said or "alloc_failed" in said):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def counted(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that tells how many bytes of the GPU's memory torch has taken since (0 on a CPU)."""
    if device.type != "cuda":
        yield lambda: 0
        return
    before = torch.cuda.memory_reserved(device)
    yield lambda: max(0, torch.cuda.memory_reserved(device) - before)
