"""Keys of captured graphs, and the static buffers that hold everything else of a request.

A clip of any length runs in a bucket: a graph for slightly more latent frames, in which everything beyond the clip's
end is masked. Numbers of clips go up to powers of two. So a small number of graphs serves all requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...conditioning.ports import NEGATIVE, Conditioner, HostInputs
from ...errors import InvalidInputError
from ..backend import SAMPLE_FORMATS, Job
from ..memory import Arena, Buffer
from ..plan import COLUMNS, call_table, initial_scale
from ..spec import NetworkSpec

ALWAYS = ((0, 0),)


def bucket(frames: int) -> int:
    """Return the latent frames of the graph that clips of `frames` latent frames run in.

    A multiple of 32 up to 512, of 64 up to 1024 (48 s at 21.5 Hz), of 128 beyond: at most 32 masked frames up to 512,
    and 13 % beyond.
    """
    step = 32 if frames <= 512 else 64 if frames <= 1024 else 128
    return -(-frames // step) * step


@dataclass(frozen=True)
class GraphKey:
    """Sizes and settings that fix a captured graph.

    Args:
        clips: a power of two.
        frames: latent frames of the bucket.
        negative: the job has negative prompts.
        calls: of each network call its blocks, whether it is guided, its noise stream and the step that it ends.
        edited: the job keeps latents.
        sample_format: "float32" or "int16".
        sigmas: noise levels, where fp8 scales were calibrated for them; else empty.
    """

    clips: int
    frames: int
    negative: bool
    calls: tuple[tuple[tuple[int, ...], bool, int | None, int], ...]
    edited: bool
    sample_format: str
    sigmas: tuple[float, ...] = ()

    def __str__(self) -> str:
        guided, blocks = sum(call[1] for call in self.calls), sum(len(call[0]) for call in self.calls)
        edited = ", edited" if self.edited else ""
        return (
            f"{self.clips} x {self.frames} frames, {len(self.calls)} network calls "
            f"({guided} guided, {blocks} blocks){edited}, {self.sample_format}"
        )


def graph_key(job: Job, calibrated: bool = False) -> GraphKey:
    """Return the key of the graph that a job runs in. calibrated: the graph is for these noise levels alone."""
    return GraphKey(
        clips=1 << (len(job.seeds) - 1).bit_length(),
        frames=bucket(job.frames),
        negative=any(name.startswith(NEGATIVE) for name in job.inputs) and any(call.guided for call in job.calls),
        calls=tuple((call.blocks, call.guided, call.noise_stream, call.step) for call in job.calls),
        edited=job.edit is not None,
        sample_format=job.sample_format,
        sigmas=tuple(call.sigma for call in job.calls) if calibrated else (),
    )


def check_job(job: Job, spec: NetworkSpec, conditioner: Conditioner) -> None:
    """Raise InvalidInputError for parts of a job that do not fit each other or the model.

    Shorter inputs are padded with zeros in a graph's buffers, so that a wrong shape would not be noticed there.
    """
    clips, frames = len(job.seeds), job.frames
    if job.samples > frames * spec.hop:
        raise InvalidInputError(f"{frames} latent frames hold at most {frames * spec.hop} samples, not {job.samples}")
    if job.edit is not None and tuple(job.edit.init.shape) != (clips, frames, spec.channels):
        shape = tuple(job.edit.init.shape)
        raise InvalidInputError(f"init must have the shape ({clips}, {frames}, {spec.channels}), not {shape}")
    negative = any(name.startswith(NEGATIVE) for name in job.inputs)
    layouts = [conditioner.layout(clips, length, negative) for length in (frames, frames + 1)]
    for name, (shape, _) in layouts[0].items():
        if name not in job.inputs:
            raise InvalidInputError(f"the job has no input {name!r}: prepare its inputs by the model's conditioner")
        given = tuple(job.inputs[name].shape)
        # Axes that grow with the number of frames must fit exactly, all others at most.
        exact = [a != b for a, b in zip(shape, layouts[1][name][0], strict=True)]
        if len(given) != len(shape) or any(
            size != most if same else size > most for size, most, same in zip(given, shape, exact, strict=True)
        ):
            raise InvalidInputError(f"{name} must have the shape {shape}, not {given}")


class InputBuffers:
    """Inputs of a replay, in one block on the host and one on the device; one copy moves them.

    Args:
        key: of the graph.
        spec: of the network.
        conditioner: gives the layout of its inputs.
        device: of the graph.
    """

    def __init__(self, key: GraphKey, spec: NetworkSpec, conditioner: Conditioner, device: torch.device) -> None:
        f32, b = torch.float32, key.clips
        self.layout = conditioner.layout(b, key.frames, key.negative)
        buffers = [Buffer(name, shape, dtype, ALWAYS) for name, (shape, dtype) in self.layout.items()]
        buffers += [
            Buffer("call_table", (len(key.calls), COLUMNS), f32, ALWAYS),
            Buffer("initial_scale", (2,), f32, ALWAYS),
            Buffer("seeds", (b,), torch.int64, ALWAYS),
            Buffer("frames", (b,), torch.int32, ALWAYS),
            Buffer("samples", (b,), torch.int32, ALWAYS),
        ]
        if key.edited:
            buffers.append(Buffer("init", (b, key.frames, spec.channels), f32, ALWAYS))
            buffers.append(Buffer("keep", (b, key.frames), f32, ALWAYS))
        self.key = key
        self.device = Arena(buffers, device)
        self.host = Arena(buffers, pinned=device.type == "cuda")

    def write(self, job: Job) -> None:
        """Write a job into the host's block. Clips beyond the job's repeat its last one."""
        index = [min(i, len(job.seeds) - 1) for i in range(self.key.clips)]
        seeds = np.array([job.seeds[i] for i in index], dtype=np.uint64).view(np.int64)
        host = self.host.tensor
        host("call_table").copy_(call_table(job.calls))
        host("initial_scale").copy_(initial_scale(job.calls))
        host("seeds").copy_(torch.from_numpy(seeds))
        host("frames").fill_(job.frames)
        host("samples").fill_(job.samples)
        padded = {name: job.inputs[name] for name in self.layout}
        if job.edit is not None:
            padded |= {"init": job.edit.init, "keep": job.edit.keep}
        for name, value in padded.items():
            target = host(name).zero_()
            target[tuple(slice(size) for size in (self.key.clips, *value.shape[1:]))].copy_(value[index])

    def send(self) -> None:
        """Copy host to device, on the current stream: the first operation of a graph."""
        self.device.block.copy_(self.host.block, non_blocking=True)

    def tensor(self, name: str) -> Tensor:
        """Return an input on the device."""
        return self.device.tensor(name)

    def conditioner_inputs(self) -> HostInputs:
        """Return the conditioner's inputs on the device."""
        return {name: self.device.tensor(name) for name in self.layout}


class OutputBuffers:
    """Results of a replay on the device and on the host: samples, latents, and a flag for finite latents.

    Args:
        key: of the graph.
        spec: of the network.
        device: of the graph.
    """

    def __init__(self, key: GraphKey, spec: NetworkSpec, device: torch.device) -> None:
        b, count = key.clips, key.frames * spec.hop
        samples = (b, count, 2) if key.sample_format == "int16" else (b, 2, count)
        buffers = [
            Buffer("samples", samples, SAMPLE_FORMATS[key.sample_format], ALWAYS),
            Buffer("latents", (b, key.frames, spec.channels), torch.float32, ALWAYS),
            Buffer("finite", (b,), torch.uint8, ALWAYS),
        ]
        self.device = Arena(buffers, device)
        self.host = Arena(buffers, pinned=device.type == "cuda")

    def fetch(self) -> None:
        """Copy device to host, on the current stream: the last operation of a graph."""
        self.host.block.copy_(self.device.block, non_blocking=True)
