"""Eager backend: any model that implements the protocols, in plain torch."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ...conditioning.ports import Conditioner, Conditioning
from ...diffusion import noise
from ...diffusion.trajectory import NetworkCall, sample
from ...errors import GenerationError
from ..backend import Autoencoder, Job, Network, OnStep, Result, gpu_batch, to_sample_format
from ..codec import limit_peak
from ..precision import Precision


class EagerBackend:
    """Runs the networks of a model as they are. See `runtime.backend.Backend`.

    Args:
        network: the raw network, on `device`.
        autoencoder: on `device`.
        conditioner: computes on `device`.
        channels: latent channels.
        device: where everything runs.
        dtype: of the network's activations.
    """

    name = "eager"

    def __init__(
        self,
        network: Network,
        autoencoder: Autoencoder,
        conditioner: Conditioner,
        *,
        channels: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network, self.autoencoder, self.conditioner = network, autoencoder, conditioner
        self.channels, self.device, self.precision = channels, torch.device(device), Precision.of(dtype)

    @torch.inference_mode()
    def run(self, job: Job, on_step: OnStep | None = None) -> Result:
        """See `Backend.run`."""
        started = time.perf_counter()
        inputs = {name: value.to(self.device) for name, value in job.inputs.items()}
        conditional, unconditional = self.conditioner.embed(inputs)
        encoded = self._now()
        latents = self.denoise(job, conditional, unconditional, on_step)
        if not torch.isfinite(latents).all():
            raise GenerationError("latents hold NaN or infinity: the sampler diverged; try more steps or less guidance")
        denoised = self._now()
        samples = limit_peak(self.decode(latents, job.samples)).cpu()
        ended = self._now()
        seconds = {"text": encoded - started, "denoise": denoised - encoded, "decode": ended - denoised}
        return Result(to_sample_format(samples, job.seeds, job.sample_format), latents.cpu(), seconds)

    def denoise(
        self, job: Job, conditional: Conditioning, unconditional: Conditioning, on_step: OnStep | None = None
    ) -> Tensor:
        """Return latents (B, T, C) fp32 of a job's trajectory under a conditioning."""
        guided = any(call.guided for call in job.calls)
        both = conditional.cat(unconditional) if guided else conditional
        clips = len(job.seeds)

        def evaluate(call: NetworkCall, x: Tensor) -> tuple[Tensor, Tensor | None]:
            x = torch.cat([x, x]) if call.guided else x
            time_input = torch.full((len(x),), call.time, device=x.device)
            conditioning = both if call.guided else conditional
            output = self.network.raw(x, time_input, conditioning, call.blocks, call.budget)
            return output[:clips], output[clips:] if call.guided else None

        edit = None if job.edit is None else (job.edit.init.to(self.device), job.edit.keep.to(self.device))
        return sample(job.calls, evaluate, self._noise(job), on_step, edit)

    def _noise(self, job: Job) -> Callable[[int], Tensor]:
        """Return a function from a stream to the clips' noise (B, T, C) fp32."""
        shape = (job.frames, self.channels)
        if self.device.type == "cuda":  # one kernel; torch's operators would take hundreds
            from ...kernels import sampler_step

            seeds = sampler_step.seeds_tensor(list(job.seeds), self.device)
            return lambda stream: sampler_step.normal(seeds, shape, stream=stream)
        return lambda stream: torch.stack(
            [noise.normal(seed, shape, stream=stream, device=self.device) for seed in job.seeds]
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor, samples: int) -> Tensor:
        """See `Backend.decode`."""
        return self.autoencoder.decode(latents.to(self.device), samples, clamp=False).float()

    def max_batch(self, frames: int) -> int:
        """See `Backend.max_batch`."""
        return 1 if self.device.type == "cpu" else gpu_batch(frames)

    def fingerprint(self) -> dict[str, str | int]:
        """See `Backend.fingerprint`."""
        cuda = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if cuda else platform.machine()
        return {
            "backend": self.name,
            "device": device,
            "precision": self.precision.name,
            "threads": torch.get_num_threads(),
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
