"""One captured graph: its buffers, and the work from the input block to the output block."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...conditioning.ports import Conditioner
from ...errors import GenerationError
from ...kernels.pcm import pcm
from ..backend import Job, Result
from ..codec import CodecProgram, limit_peak, valid_mask
from ..dit import Memory, PackedTransformer, denoise
from ..memory import Arena
from ..plan import CompiledPlan, LatentEdit, Planner
from ..spec import NetworkSpec
from . import fp8
from .buffers import GraphKey, InputBuffers, OutputBuffers
from .ops import CudaOps
from .replay import Replayable, reserved_memory


@dataclass(frozen=True)
class GraphModel:
    """The parts of a model that all of its graphs share.

    ops: table of operators of the transformer. packed: weights for it. codec: its decoder, in fp32. fp8: where products
    run in fp8, or None.
    """

    spec: NetworkSpec
    conditioner: Conditioner
    ops: CudaOps
    planner: Planner
    packed: PackedTransformer
    codec: CodecProgram
    fp8: fp8.Fp8 | None


class CapturedGraph:
    """One key's graph with the buffers that it reads and writes.

    Args:
        model: shared parts.
        key: of the graph.
        replayable: records the work.
    """

    def __init__(self, model: GraphModel, key: GraphKey, replayable: Replayable) -> None:
        self.model, self.key, self.replayable = model, key, replayable
        self.device = model.ops.device
        self.inputs = InputBuffers(key, model.spec, model.conditioner, self.device)
        self.outputs = OutputBuffers(key, model.spec, self.device)
        self.codec_arena = model.codec.arena(key.clips, key.frames)
        self.memory: Memory | None = None
        self.packed: PackedTransformer | tuple[PackedTransformer, ...] = model.packed
        self.fp8_products: tuple[fp8.ProductChoice, ...] = ()
        self.bytes, self.last_used = 0, 0

    def arenas(self) -> list[Arena]:
        """Return every static block that a replay reads or writes."""
        held = [self.inputs.device, self.inputs.host, self.outputs.device, self.outputs.host, self.codec_arena]
        return [*held, *([self.memory.arena] if self.memory else [])]

    def capture(self, job: Job) -> None:
        """Record the work; the job runs once or more on the way."""
        with reserved_memory(self.device) as reserved:
            if self.model.fp8 is not None:
                plans = (self._calibration_plan(j) for j in fp8.calibration_jobs(job, self.model.conditioner))
                self.packed, self.fp8_products = fp8.calibrate(
                    self.model.ops, self.model.packed, plans, self._plan_memory, self.model.fp8
                )
            self.inputs.write(job)
            self.layout = self.model.planner.layout(job.calls, self.key.frames)
            self.replayable.capture(self._weak_work())
            self.bytes = max(reserved(), sum(arena.size for arena in self.arenas()))

    def _calibration_plan(self, job: Job) -> tuple[CompiledPlan, Tensor]:
        self.inputs.write(job)
        self.inputs.send()
        if self.device.type == "cuda":  # the host's block is written again for the next plan
            torch.cuda.current_stream(self.device).synchronize()
        self.layout = self.model.planner.layout(job.calls, self.key.frames)
        plan = self.plan()
        # Copies of the tensors that lie in the input block, into which the next job is written.
        lengths, valid = plan.cross_lengths.clone(), plan.valid_frames
        plan = replace(plan, cross_lengths=lengths, valid_frames=None if valid is None else valid.clone())
        return plan, self.inputs.tensor("seeds").clone()

    def _weak_work(self) -> Callable[[], None]:
        """Return `work` without a reference to this graph: a recording keeps its work, and the memory of a dropped
        graph would otherwise stay until Python collects cycles, possibly in the middle of another capture."""
        weak = weakref.ref(self)

        def work() -> None:
            graph = weak()
            assert graph is not None  # only the graph itself runs its recording
            graph.work()

        return work

    def _plan_memory(self, plan: CompiledPlan) -> Memory:
        if self.memory is None:
            self.memory = Memory(plan, self.model.ops)
        return self.memory

    def plan(self) -> CompiledPlan:
        """Build the plan from the staged inputs without host synchronization."""
        model, inputs = self.model, self.inputs
        conditional, unconditional = model.conditioner.embed(inputs.conditioner_inputs())
        conditioning = conditional.cat(unconditional) if self.layout.guided else conditional
        valid_frames = inputs.tensor("frames").repeat(1 + self.layout.guided)
        edit = LatentEdit(inputs.tensor("init"), inputs.tensor("keep")) if self.key.edited else None
        table, scale = inputs.tensor("call_table"), inputs.tensor("initial_scale")
        return model.planner.build(self.layout, table, scale, conditioning, model.ops.dtype, valid_frames, edit)

    @torch.inference_mode()
    def work(self) -> None:
        """Run everything that is recorded, from the input block to the output block."""
        model, inputs, outputs = self.model, self.inputs, self.outputs.device
        self.replayable.stage("text")
        inputs.send()
        plan = self.plan()
        self.replayable.stage("denoise")
        latents = denoise(model.ops, self.packed, plan, self._plan_memory(plan), inputs.tensor("seeds"))
        self.replayable.stage("decode")
        frames = inputs.tensor("frames")
        valid = latents * valid_mask(latents.shape[1], frames)[..., None]
        outputs.tensor("latents").copy_(valid)
        outputs.tensor("finite").copy_(torch.isfinite(valid).all(2).all(1))
        samples = model.codec.masked_decode(self.codec_arena, valid.nan_to_num(), frames)
        limited = limit_peak(samples, inputs.tensor("samples"))
        if self.key.sample_format == "int16":
            pcm(limited, inputs.tensor("seeds"), out=outputs.tensor("samples"), backend=model.ops.backend)
        else:
            outputs.tensor("samples").copy_(limited)
        self.outputs.fetch()
        self.replayable.stage("end")

    def run(self, job: Job, captured: float) -> Result:
        """Replay for a job. Raises GenerationError where the sampler diverged. captured: seconds of the recording."""
        self.inputs.write(job)
        self.replayable.replay()
        host, clips, n = self.outputs.host, len(job.seeds), job.samples
        if not host.tensor("finite")[:clips].all():
            raise GenerationError("latents hold NaN or infinity: the sampler diverged; try more steps or less guidance")
        samples = host.tensor("samples")[:clips]
        samples = samples[:, :n] if self.key.sample_format == "int16" else samples[..., :n]
        latents = host.tensor("latents")[:clips, : job.frames].clone()
        return Result(samples.clone().numpy(), latents, self.replayable.stage_seconds(), captured)
