"""From prompt to sound in one graph launch: the graph engine.

`GraphEngine.run` finds the request's graph, or records it, writes the request into the graph's input block, replays,
and copies the result out of the output block. Recorded is everything between the two blocks: text encoder, plan,
every evaluation and sampler step with its noise, decoding, levelling, 16-bit conversion, and both copies.

A lane is a stream with its own graphs, of which one runs at a time, so they share one pool for intermediate tensors.
Several lanes work side by side. Any number of threads may call `run`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...conditioning.minilm import TextEncoder
from ...errors import GenerationError, OutOfMemoryError
from ...kernels.pcm import pcm
from ...models.codec import Codec
from ...models.dit import Condition, DiT
from .. import masked_decode as sound
from ..dit import Memory, Weights, run_plan
from ..memory import Arena
from ..plan import Edit, Plan, Planner
from . import fp8 as precision
from .buffers import Inputs, Outputs, Request, Result, Shape, shape_of
from .ops import CudaOps
from .replay import CudaGraph, Recording, Rerun, counted, is_out_of_memory

log = logging.getLogger("presto_rt")


@dataclass(frozen=True)
class Limits:
    """lanes: streams that work side by side. graphs: kept in all, the least recently used go first. gibibytes: of
    memory that they may hold together, None for no limit but the device's."""

    lanes: int = 1
    graphs: int = 32
    gibibytes: float | None = None


@dataclass
class Lane:
    """A stream's graphs. Whoever has set `busy` may use them. recorder makes the recordings."""

    recorder: Callable[[], Recording]
    graphs: dict[Shape, Entry] = field(default_factory=dict)
    busy: bool = False


class Entry:
    """One shape's graph with the buffers that it reads and writes."""

    def __init__(self, engine: GraphEngine, shape: Shape, recording: Recording) -> None:
        self.engine, self.shape, self.recording = engine, shape, recording
        self.inputs = Inputs(shape, engine.config, engine.device)
        self.outputs = Outputs(shape, engine.config, engine.device)
        self.memory: Memory | None = None
        self.weights: Weights | tuple[Weights, ...] = engine.weights
        self.precision: tuple[precision.Choice, ...] = ()
        self.bytes, self.used = 0, 0

    def capture(self, request: Request) -> None:
        """Records the work. The request is run once or more on the way."""
        engine = self.engine
        with counted(engine.device) as taken:
            if engine.fp8 is not None:
                plans = (self._calibration(r) for r in precision.requests(request, engine.encoder, engine.config))
                self.weights, self.precision = precision.calibrate(
                    engine.ops, engine.weights, plans, self._memory, engine.fp8
                )
            self.inputs.write(request)
            self.form = engine.planner.form(request.evaluations, self.shape.frames)
            self.recording.capture(self._weakly())
            held = [self.inputs.device, self.inputs.host, self.outputs.device, self.outputs.host]
            fixed = sum(arena.size for arena in [*held, *([self.memory.arena] if self.memory else [])])
            self.bytes = max(taken(), fixed)

    def _calibration(self, request: Request) -> tuple[Plan, Tensor]:
        self.inputs.write(request)
        self.inputs.send()
        if self.engine.device.type == "cuda":  # the host's block is written anew for the next
            torch.cuda.current_stream(self.engine.device).synchronize()
        self.form = self.engine.planner.form(request.evaluations, self.shape.frames)
        plan = self.plan()
        # Apart from the input block, into which the next one is written.
        return replace(plan, lengths=plan.lengths.clone()), self.inputs.seeds.clone()

    def _weakly(self) -> Callable[[], None]:
        """`work` for a recording, which keeps it: were the entry held too, a dropped graph's memory would stay until
        Python looks for cycles, and that may be in the middle of another capture."""
        weak = weakref.ref(self)

        def work() -> None:
            entry = weak()
            assert entry is not None  # only the entry itself runs its recording
            entry.work()

        return work

    def _memory(self, plan: Plan) -> Memory:
        if self.memory is None:
            self.memory = Memory(plan, self.engine.ops, self.engine.device)
        return self.memory

    def plan(self) -> Plan:
        """The plan of what lies in the input block, made without looking at it."""
        engine, i, b = self.engine, self.inputs, self.shape.clips
        mask = torch.arange(i.ids.shape[1], device=engine.device) < i.words[:, None]
        states = engine.encoder(i.ids, mask)
        pooled = (states * mask[..., None]).sum(1) / i.words[:, None]
        condition = Condition(states[:b], mask[:b], pooled[:b], i.seconds, i.beat, i.key)
        words, both = i.words, condition
        if self.form.guided:
            other = engine.null.null(condition)
            if self.shape.texts == 2:
                other.text, other.text_mask, other.pooled = states[b:], mask[b:], pooled[b:]
            else:
                words = torch.cat([words, torch.ones_like(words)])
            both = condition.cat(other)
        frames = i.frames.repeat(1 + self.form.guided)
        edit = Edit(i.init, i.keep) if self.shape.edited else None
        return engine.planner.build(self.form, i.numbers, i.start, both, words, engine.ops.dtype, frames, edit)

    @torch.inference_mode()
    def work(self) -> None:
        """What is recorded."""
        engine, i, out, mark = self.engine, self.inputs, self.outputs.device, self.recording.mark
        mark("text")
        i.send()
        plan = self.plan()
        mark("denoise")
        latents = run_plan(engine.ops, self.weights, plan, self._memory(plan), i.seeds)
        mark("decode")
        valid = latents * sound.inside(latents.shape[1], i.frames)[..., None]
        out.tensor("latents").copy_(valid)
        out.tensor("finite").copy_(torch.isfinite(valid).all(2).all(1))
        samples = sound.decode(engine.codec, valid.nan_to_num(), i.frames, engine.ops.backend)
        levelled = sound.level(samples, i.samples, engine.peak)
        if self.shape.output == "pcm16":
            pcm(levelled, i.seeds, out=out.tensor("samples"), backend=engine.ops.backend)
        else:
            out.tensor("samples").copy_(levelled)
        self.outputs.fetch()
        mark("end")

    def run(self, request: Request, captured: float) -> Result:
        """Replays for a request; raises GenerationError if the sampler diverged."""
        self.inputs.write(request)
        self.recording.replay()
        host, clips, n = self.outputs.host, len(request.prompts), request.samples
        if not host.tensor("finite")[:clips].all():
            raise GenerationError("the sampler diverged: latents hold NaN or infinity; try another sampler or seed")
        samples = host.tensor("samples")[:clips]
        samples = samples[:, :n] if self.shape.output == "pcm16" else samples[..., :n]
        latents = host.tensor("latents")[:clips, : request.frames]
        return Result(samples.clone().numpy(), latents.clone(), self.recording.stages(), captured)


class GraphEngine:
    """A model as captured graphs. dit: in fp32, or any dtype; codec and encoder: as they shall run, on ops.device.

    peak: clips that go over it are turned down to it. fp8: where matrix products run in fp8, see `precision.Fp8`.
    recorder: makes the recordings of one lane; by default CUDA graphs on a stream of their own, or on a CPU the work
    run again.
    """

    def __init__(
        self,
        dit: DiT,
        codec: Codec,
        encoder: TextEncoder,
        ops: CudaOps,
        *,
        peak: float = 0.98,
        limits: Limits | None = None,
        fp8: precision.Fp8 | None = None,
        graphed: bool = True,
        recorder: Callable[[], Callable[[], Recording]] | None = None,
    ) -> None:
        from ..engine import pack_weights

        self.config, self.ops, self.device, self.peak = dit.config, ops, ops.device, peak
        self.codec, self.encoder, self.fp8, self.graphed = codec, encoder, fp8, graphed
        self.limits = limits or Limits()
        self.planner = Planner(dit, ops.device)
        self.null = self.planner.head
        self.weights = pack_weights(dit, ops)
        self.lanes = [Lane((recorder or self._recorder)()) for _ in range(self.limits.lanes)]
        self._free = threading.Condition()
        self._capturing = threading.Lock()
        self._clock = itertools.count(1)

    def _recorder(self) -> Callable[[], Recording]:
        if self.device.type != "cuda":
            return Rerun
        stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        return lambda: CudaGraph(stream, pool, self.graphed)

    def run(self, request: Request) -> Result:
        """Sound and latents of a request. Raises InvalidInputError, OutOfMemoryError or GenerationError."""
        request.check(self.config)
        shape = shape_of(request, calibrated=self.fp8 is not None)
        with self._lane(shape) as lane, torch.inference_mode():
            for last in (False, True):
                try:
                    return self._run(lane, shape, request)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    # The words alone: the frames of the error and of its causes hold what must be given back.
                    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
                self.forget(lane)
                if last:
                    raise OutOfMemoryError(
                        f"no memory for {shape}, with nothing else kept: ask for fewer clips at once or a shorter "
                        f"clip, or make room on the device ({said})"
                    )
                log.warning("out of memory for %s: all idle graphs are dropped, and it is tried once more", shape)
        raise AssertionError("not reached")

    def _run(self, lane: Lane, shape: Shape, request: Request) -> Result:
        captured = 0.0
        entry = lane.graphs.get(shape)
        if entry is None:
            begin = time.perf_counter()
            with self._capturing:
                entry = Entry(self, shape, lane.recorder())
                entry.capture(request)
            captured = time.perf_counter() - begin
            log.info("captured %s in %.2f s, %.0f MiB", shape, captured, entry.bytes / 2**20)
            with self._free:
                lane.graphs[shape] = entry
                self._make_room(lane, entry)
        entry.used = next(self._clock)
        return entry.run(request, captured)

    def _make_room(self, lane: Lane, newest: Entry) -> None:
        """Drops the least recently used graphs until the limits hold. Those of busy lanes stay."""
        most = None if self.limits.gibibytes is None else self.limits.gibibytes * 2**30
        while True:
            kept = [(each, e) for each in self.lanes for e in each.graphs.values()]
            if len(kept) <= self.limits.graphs and (most is None or sum(e.bytes for _, e in kept) <= most):
                return
            idle = [(each, e) for each, e in kept if (each is lane or not each.busy) and e is not newest]
            if not idle:
                return
            where, oldest = min(idle, key=lambda pair: pair[1].used)
            del where.graphs[oldest.shape]
            log.info("dropped the graph of %s", oldest.shape)

    def forget(self, own: Lane | None = None) -> None:
        """Drops every graph that is not in use, and gives its memory back. own: a lane that the caller holds."""
        with self._free:
            for lane in self.lanes:
                if lane is own or not lane.busy:
                    lane.graphs.clear()
        if self.device.type == "cuda":
            with self._capturing:  # a device whose stream is being captured must not be waited for
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()

    def entries(self) -> list[Entry]:
        """The graphs that are kept, the least recently used first."""
        with self._free:
            return sorted((e for lane in self.lanes for e in lane.graphs.values()), key=lambda e: e.used)

    @contextlib.contextmanager
    def _lane(self, shape: Shape) -> Iterator[Lane]:
        """A lane for the caller alone: an idle one that has the graph, else any idle one, else the first to be idle."""
        with self._free:
            self._free.wait_for(lambda: not all(lane.busy for lane in self.lanes))
            idle = [lane for lane in self.lanes if not lane.busy]
            lane = next((one for one in idle if shape in one.graphs), idle[0])
            lane.busy = True
        try:
            yield lane
        finally:
            with self._free:
                lane.busy = False
                self._free.notify()


@torch.inference_mode()
def poison(entry: Entry) -> None:
    """Fills everything that a replay is to write, and the device's copy of what it reads, with NaN: for tests."""
    arenas: list[Arena] = [entry.inputs.device, entry.outputs.device, entry.outputs.host]
    for arena in [*arenas, *([entry.memory.arena] if entry.memory else [])]:
        arena.block.fill_(0xFF)
    if entry.engine.device.type == "cuda":
        torch.cuda.synchronize(entry.engine.device)  # filled on this stream, read on the lane's
