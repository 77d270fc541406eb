"""Timing of one operator several ways on the same inputs, against the machine's measured rates.

Inputs are rotated through enough copies to overflow the last-level cache, since the network finds them cold, too. On a
GPU one CUDA graph holds a call on each copy and is replayed, so launches cost the same as inside the engine.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.results import spread

Way = Callable[..., Any]
CACHE_BYTES = 64 << 20  # of a CPU, where torch cannot tell


@dataclasses.dataclass
class Case:
    """One operator at one shape.

    make: fresh random inputs. ways: name to function of those inputs; "eager" is what the others are compared with,
    "presto" is ours. moved: bytes that must be moved at least (inputs once, outputs once); operations: floating-point
    ones; rate: of the matrix units on these operands, relative to bf16.
    """

    operator: str
    shape: str
    make: Callable[[], tuple[Tensor, ...]]
    ways: dict[str, Way]
    moved: int
    operations: int
    rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """Measured rates: bytes/s of a large copy (read plus written), operations/s of a large bf16 product."""

    bandwidth: float
    product: float

    def floor(self, case: Case) -> float:
        """Return the lower bound of the case's time in seconds."""
        return max(case.moved / self.bandwidth, case.operations / (case.rate * self.product))


def cases(operator: str, device: str, preset: str) -> list[Case]:
    """Return the cases of one operator's file."""
    return list(importlib.import_module(f"bench.kernels.{operator}").cases(device, preset))


def presets(device: str) -> tuple[str, ...]:
    """Return the presets whose shapes are timed on a device."""
    return ("small", "medium") if device == "cuda" else ("nano",)


def size(*tensors: Tensor | None) -> int:
    """Return the total bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def copies(case: Case, device: str, limit: int = 32) -> list[tuple[Tensor, ...]]:
    """Return sets of inputs that together overflow the cache twice; at least two, at most `limit`."""
    first = case.make()
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CACHE_BYTES
    count = max(2, min(limit, -(-2 * cache // max(1, size(*first)))))
    return [first, *(case.make() for _ in range(count - 1))]


def measure(way: Way, inputs: list[tuple[Tensor, ...]], device: str, seconds: float = 0.5) -> dict[str, float]:
    """Return seconds per call: median, 90th percentile, extremes and number of runs over all inputs."""
    run = _graph(way, inputs) if device == "cuda" else lambda: [way(*tensors) for tensors in inputs]
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    clock(run)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        times.append(clock(run) / len(inputs))
    return spread(times)


def _graph(way: Way, inputs: list[tuple[Tensor, ...]]) -> Callable[[], Any]:
    torch.cuda.synchronize()  # the inputs were made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            for tensors in inputs:
                way(*tensors)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [way(*tensors) for tensors in inputs]

    def replay(_outputs: object = kept) -> None:  # the graph writes into the outputs, so they must live
        graph.replay()

    return replay


def _cuda_seconds(run: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Behind a sleeping kernel (about 0.2 ms), so that the host's time to launch the graph is not in between.
    torch.cuda._sleep(400_000)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ceiling(device: str, numbers: int, side: int) -> Ceiling:
    """Measure a copy of `numbers` fp32 numbers and a bf16 product of two side x side matrices."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    copied = measure(lambda a: target.copy_(a), [(source,)], device)["median"]
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    multiplied = measure(torch.matmul, [(a, b)], device)["median"]
    return Ceiling(2 * size(source) / copied, 2 * side**3 / multiplied)


def result(case: Case, way: str, times: dict[str, float], top: Ceiling) -> dict[str, Any]:
    """Return the row of one case and way for JSON and table."""
    return {
        "operator": case.operator,
        "shape": case.shape,
        "way": way,
        "seconds": times,
        "gigabytes_per_second": case.moved / times["median"] / 1e9,
        "teraflops": case.operations / times["median"] / 1e12,
        "of_floor": top.floor(case) / times["median"],
    }
