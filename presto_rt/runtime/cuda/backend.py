"""CUDA backend: a whole request, from token numbers to samples, in one graph launch.

`GraphBackend.run` finds the job's graph or records it, writes the job into the graph's input block, replays, and copies
the result out of the output block. Everything between the two blocks is recorded: text encoder, plan, every network
call and sampler step with its noise, decoding, peak limiting, 16-bit conversion, and both copies. On a CPU the same
work runs again in place of a graph.

An execution stream has its own graphs, of which one runs at a time, so they share one pool of intermediate tensors.
Several streams work concurrently. Any number of threads may call `run`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...conditioning.ports import Conditioner
from ...errors import OutOfMemoryError
from ...models.codec import Codec
from ..backend import Job, OnStep, Result, gpu_batch
from ..codec import CodecProgram
from ..dit import pack_transformer
from ..plan import Planner
from ..precision import Precision
from ..spec import NetworkSpec
from ..weights import TransformerWeights
from .buffers import GraphKey, check_job, graph_key
from .fp8 import Fp8
from .graph import CapturedGraph, GraphModel
from .ops import CudaOps
from .replay import CudaGraphReplay, EagerReplay, Replayable, is_out_of_memory

log = logging.getLogger("presto_rt")


@dataclass(frozen=True)
class Limits:
    """Bounds of a graph backend.

    streams: execution streams that work concurrently. graphs: kept in all; the least recently used are dropped first.
    gibibytes: memory that the graphs may hold together; None for no limit but the device's.
    """

    streams: int = 1
    graphs: int = 32
    gibibytes: float | None = None


@dataclass
class ExecutionStream:
    """Graphs of one stream. Whoever has set `busy` may use them. recorder: makes its replayable work."""

    recorder: Callable[[], Replayable]
    graphs: dict[GraphKey, CapturedGraph] = field(default_factory=dict)
    busy: bool = False


class GraphBackend:
    """A model as captured graphs. See `runtime.backend.Backend`.

    Args:
        weights: of the transformer, fp32, on the table's device.
        spec: shape of the transformer.
        codec: in fp32; its decoder is packed here and not kept.
        conditioner: computes on the table's device.
        ops: table of operators of the transformer.
        limits: bounds of streams, graphs and memory.
        fp8: where matrix products run in fp8; None for nowhere.
        graphed: False launches every kernel anew, which shows what graphs save.
        recorder: makes the recorder of each stream; None for CUDA graphs, or on a CPU the work run again.
    """

    name = "graph"

    def __init__(
        self,
        weights: TransformerWeights,
        spec: NetworkSpec,
        codec: Codec,
        conditioner: Conditioner,
        ops: CudaOps,
        *,
        limits: Limits | None = None,
        fp8: Fp8 | None = None,
        graphed: bool = True,
        recorder: Callable[[], Callable[[], Replayable]] | None = None,
    ) -> None:
        self.device, self.graphed = ops.device, graphed
        self.precision = Precision("fp8", ops.dtype) if fp8 is not None else Precision.of(ops.dtype)
        decoder_ops = CudaOps(torch.float32, ops.device, ops.unfused, ops.backend)
        planner, packed = Planner(weights, spec, ops.device), pack_transformer(weights, ops)
        self.model = GraphModel(spec, conditioner, ops, planner, packed, CodecProgram(codec, decoder_ops), fp8)
        self.limits = limits or Limits()
        self.streams = [ExecutionStream((recorder or self._recorder)()) for _ in range(self.limits.streams)]
        self._free = threading.Condition()
        self._capturing = threading.Lock()
        self._clock = itertools.count(1)

    def _recorder(self) -> Callable[[], Replayable]:
        if self.device.type != "cuda":
            return EagerReplay
        stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        return lambda: CudaGraphReplay(stream, pool, self.graphed)

    def run(self, job: Job, on_step: OnStep | None = None) -> Result:
        """See `Backend.run`. The steps are reported after the graph, one after another."""
        check_job(job, self.model.spec, self.model.conditioner)
        key = graph_key(job, calibrated=self.model.fp8 is not None)
        result = self._run_with_retry(key, job)
        for step in range(1, job.calls[-1].step + 1 if on_step else 1):
            on_step(step, job.calls[-1].step)  # type: ignore[misc]
        return result

    def _run_with_retry(self, key: GraphKey, job: Job) -> Result:
        with self._stream(key) as stream, torch.inference_mode():
            for last in (False, True):
                try:
                    return self._run(stream, key, job)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    # Only the text: the frames of the error and of its causes hold the memory that must be freed.
                    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                self.drop_idle_graphs(stream)
                if last:
                    raise OutOfMemoryError(
                        f"no memory for {key}, with no other graph kept: ask for fewer clips at once or a shorter "
                        f"clip, or free memory on the device ({reason})"
                    )
                log.warning("out of memory for %s: all idle graphs are dropped, and it is tried once more", key)
        raise AssertionError("not reached")

    def _run(self, stream: ExecutionStream, key: GraphKey, job: Job) -> Result:
        captured = 0.0
        graph = stream.graphs.get(key)
        if graph is None:
            start = time.perf_counter()
            with self._capturing:
                graph = CapturedGraph(self.model, key, stream.recorder())
                graph.capture(job)
            captured = time.perf_counter() - start
            log.info("captured %s in %.2f s, %.0f MiB", key, captured, graph.bytes / 2**20)
            with self._free:
                stream.graphs[key] = graph
                self._make_room(stream, graph)
        graph.last_used = next(self._clock)
        return graph.run(job, captured)

    def _make_room(self, own: ExecutionStream, newest: CapturedGraph) -> None:
        """Drop the least recently used graphs until the limits hold. Graphs of busy streams stay."""
        most = None if self.limits.gibibytes is None else self.limits.gibibytes * 2**30
        while True:
            kept = [(stream, graph) for stream in self.streams for graph in stream.graphs.values()]
            if len(kept) <= self.limits.graphs and (most is None or sum(graph.bytes for _, graph in kept) <= most):
                return
            idle = [(stream, g) for stream, g in kept if (stream is own or not stream.busy) and g is not newest]
            if not idle:
                return
            stream, oldest = min(idle, key=lambda pair: pair[1].last_used)
            del stream.graphs[oldest.key]
            log.info("dropped the graph of %s", oldest.key)

    def drop_idle_graphs(self, own: ExecutionStream | None = None) -> None:
        """Drop every graph that is not in use and free its memory. own: a stream that the caller holds."""
        with self._free:
            for stream in self.streams:
                if stream is own or not stream.busy:
                    stream.graphs.clear()
        if self.device.type == "cuda":
            with self._capturing:  # a device whose stream is being captured must not be synchronized
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()

    def graphs(self) -> list[CapturedGraph]:
        """Return the graphs that are kept, the least recently used first."""
        with self._free:
            kept = (graph for stream in self.streams for graph in stream.graphs.values())
            return sorted(kept, key=lambda graph: graph.last_used)

    @contextlib.contextmanager
    def _stream(self, key: GraphKey) -> Iterator[ExecutionStream]:
        """Lend a stream: an idle one that has the graph, else any idle one, else the first to become idle."""
        with self._free:
            self._free.wait_for(lambda: not all(stream.busy for stream in self.streams))
            idle = [stream for stream in self.streams if not stream.busy]
            stream = next((one for one in idle if key in one.graphs), idle[0])
            stream.busy = True
        try:
            yield stream
        finally:
            with self._free:
                stream.busy = False
                self._free.notify()

    @torch.inference_mode()
    def decode(self, latents: Tensor, samples: int) -> Tensor:
        """See `Backend.decode`."""
        return self.model.codec.decode(latents.to(self.device, torch.float32))[..., :samples]

    def max_batch(self, frames: int) -> int:
        """See `Backend.max_batch`."""
        return 1 if self.device.type == "cpu" else gpu_batch(frames)

    def fingerprint(self) -> dict[str, str | int]:
        """See `Backend.fingerprint`."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "backend": self.name,
            "device": device,
            "precision": self.precision.name,
            "threads": torch.get_num_threads(),
        }
