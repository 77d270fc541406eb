"""CPU backend: the fused operators of C++ and oneDNN, one clip after another."""

from __future__ import annotations

import os
import platform
import threading
import time

import torch
from torch import Tensor

from ...conditioning.text_conditioner import TextConditioner
from ...errors import GenerationError
from ...models.codec import Codec
from ..backend import Job, OnStep, Result, to_sample_format
from ..codec import CodecProgram, limit_peak
from ..dit import Memory, denoise, memory_key, pack_transformer
from ..memory import Pool
from ..plan import LatentEdit, Planner
from ..precision import Precision
from ..spec import NetworkSpec
from ..text_encoder import TextProgram
from ..weights import TransformerWeights
from .ops import CpuOps
from .threads import thread_limit


class CpuBackend:
    """A model packed for the CPU. See `runtime.backend.Backend`.

    Args:
        weights: of the transformer, fp32; packed here and not kept.
        spec: shape of the transformer.
        codec: in fp32; its decoder is packed here and not kept.
        conditioner: its text encoder runs over the fused operators.
        precision: "float32", "bfloat16" or "int8".
        threads: of all operators; None for torch's number.
        exact_int8: int8 products that are exact and slow, on any processor; see `CpuOps`.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(
        self,
        weights: TransformerWeights,
        spec: NetworkSpec,
        codec: Codec,
        conditioner: TextConditioner,
        *,
        precision: Precision,
        threads: int | None = None,
        exact_int8: bool = False,
    ) -> None:
        self.spec, self.conditioner, self.precision = spec, conditioner, precision
        self.threads = torch.get_num_threads() if threads is None else threads
        self.ops = CpuOps(precision.dtype, self.threads, precision.name == "int8", exact_int8)
        self.planner = Planner(weights, spec)
        self.transformer = pack_transformer(weights, self.ops)
        self.codec = CodecProgram(codec, self.ops)
        self._memories: Pool[Memory] = Pool()
        self._text: TextProgram | None = None
        self._text_lock = threading.Lock()

    def run(self, job: Job, on_step: OnStep | None = None) -> Result:
        """See `Backend.run`. Clips of a job run as one batch; the pipeline gives one clip at a time."""
        with torch.inference_mode(), thread_limit(self.threads):
            started = time.perf_counter()
            conditional, unconditional = self.conditioner.embed(job.inputs, self._encode)
            encoded = time.perf_counter()
            dtype, edit = self.ops.dtype, job.edit
            if edit is not None:
                edit = LatentEdit(edit.init.float().contiguous(), edit.keep.float().contiguous())
            plan = self.planner.plan(job.calls, conditional, unconditional, job.frames, dtype, edit)
            with self._memories.take(memory_key(plan), lambda: Memory(plan, self.ops)) as memory:
                latents = denoise(self.ops, self.transformer, plan, memory, job.seeds, on_step).clone()
            denoised = time.perf_counter()
            samples = limit_peak(self.decode(latents, job.samples))
            ended = time.perf_counter()
        seconds = {"text": encoded - started, "denoise": denoised - encoded, "decode": ended - denoised}
        return Result(to_sample_format(samples, job.seeds, job.sample_format), latents, seconds)

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        with self._text_lock:  # packed with the first prompt, once
            if self._text is None:
                ops = CpuOps(self.ops.dtype, self.threads)
                self._text = TextProgram(self.conditioner.encoder, ops)
        return self._text(ids, mask)

    def decode(self, latents: Tensor, samples: int) -> Tensor:
        """See `Backend.decode`."""
        if not torch.isfinite(latents).all():
            raise GenerationError("latents hold NaN or infinity: the sampler diverged; try more steps or less guidance")
        with thread_limit(self.threads):
            return self.codec.decode(latents.float())[..., :samples]

    def max_batch(self, frames: int) -> int:
        """See `Backend.max_batch`: batches gain nothing here, and a clip alone has the same bits as one of many."""
        return 1

    def fingerprint(self) -> dict[str, str | int]:
        """See `Backend.fingerprint`."""
        return {
            "backend": self.name,
            "device": f"{platform.machine()}, {os.cpu_count()} cores",
            "precision": self.precision.name,
            "threads": self.threads,
        }
