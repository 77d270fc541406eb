"""What the graph engine is asked for, what of it fixes the shape of a graph, and the buffers that hold the rest.

Any length runs in a bucket: a graph for somewhat more latent frames, in which everything beyond the clip's end is
masked. Numbers of clips go up to powers of two. So a few graphs serve all requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...conditioning.keys import KEY_CHANNELS
from ...diffusion.trajectory import Evaluation
from ...errors import InvalidInputError
from ...models.config import HOP, SAMPLE_RATE, ModelConfig
from ...models.dit import BEAT_CHANNELS
from ..memory import Arena, Buffer
from ..plan import NUMBERS, numbers, start

OUTPUTS = {"pcm16": torch.int16, "float32": torch.float32}


def bucket(frames: int) -> int:
    """The latent frames of the graph that clips of `frames` latent frames run in: a multiple of 32 up to 512, of 64 up
    to 1024 (48 s), of 128 beyond. At most 32 frames are wasted up to 12 s, and 13 % beyond."""
    step = 32 if frames <= 512 else 64 if frames <= 1024 else 128
    return -(-frames // step) * step


@dataclass(frozen=True)
class Request:
    """B clips of one length.

    prompts: token numbers of each clip's text; negative: of what guidance leads away from, None for the model's own
    "no text"; seeds; samples: of each clip; frames: latent ones; beat (B, frames, 5), key (B, 24) fp32, on the CPU.
    Editing: init (B, frames, C) and keep (B, frames) as in `plan.Edit`. output: "pcm16", dithered by the seeds, or
    "float32".
    """

    prompts: Sequence[Sequence[int]]
    evaluations: tuple[Evaluation, ...]
    seeds: Sequence[int]
    samples: int
    frames: int
    beat: Tensor
    key: Tensor
    negative: Sequence[Sequence[int]] | None = None
    init: Tensor | None = None
    keep: Tensor | None = None
    output: str = "float32"

    def check(self, config: ModelConfig) -> None:
        """Raises InvalidInputError for parts that do not fit each other or the model."""
        clips = len(self.prompts)
        shapes = {"beat": (clips, self.frames, BEAT_CHANNELS), "key": (clips, KEY_CHANNELS),
                  "init": (clips, self.frames, config.latent_channels), "keep": (clips, self.frames)}  # fmt: skip
        for name, shape in shapes.items():
            given = getattr(self, name)
            if given is not None and tuple(given.shape) != shape:
                raise InvalidInputError(f"{name} must have the shape {shape}, not {tuple(given.shape)}")
        if not clips or len(self.seeds) != clips or len(self.negative or self.prompts) != clips:
            raise InvalidInputError(f"{clips} prompts need as many seeds and negative prompts")
        if not 0 < self.samples <= self.frames * HOP:
            raise InvalidInputError(
                f"{self.frames} latent frames hold 1 to {self.frames * HOP} samples, not {self.samples}"
            )
        if self.keep is not None and self.init is None:
            raise InvalidInputError("keep says what of init stays: give init too")
        if self.output not in OUTPUTS:
            raise InvalidInputError(f"unknown output {self.output!r}; there are {', '.join(OUTPUTS)}")


@dataclass(frozen=True)
class Shape:
    """What fixes a captured graph. moves: of each evaluation its blocks, whether it is guided, its noise stream and the
    sampler step that it ends. levels: noise levels, where scales were calibrated for them (fp8); else empty."""

    clips: int
    frames: int
    texts: int
    moves: tuple[tuple[tuple[int, ...], bool, int | None, int], ...]
    edited: bool
    output: str
    levels: tuple[float, ...] = ()

    def __str__(self) -> str:
        guided, blocks = sum(m[1] for m in self.moves), sum(len(m[0]) for m in self.moves)
        return (f"{self.clips} x {self.frames} frames, {len(self.moves)} evaluations ({guided} guided, {blocks} blocks)"
                f"{', edited' if self.edited else ''}, {self.output}")  # fmt: skip


def shape_of(request: Request, calibrated: bool = False) -> Shape:
    """The shape of the graph that a request runs in. calibrated: the graph is for these noise levels alone."""
    clips = 1 << (len(request.prompts) - 1).bit_length()
    moves = tuple((e.blocks, e.guided, e.stream, e.step) for e in request.evaluations)
    guided = any(e.guided for e in request.evaluations)
    texts = 2 if guided and request.negative is not None else 1
    levels = tuple(e.sigma for e in request.evaluations) if calibrated else ()
    return Shape(clips, bucket(request.frames), texts, moves, request.init is not None, request.output, levels)


class Inputs:
    """All that a replay reads of a request, in one block on the host and one on the device: a single copy inside the
    graph moves it."""

    def __init__(self, shape: Shape, config: ModelConfig, device: torch.device) -> None:
        f32, b, t, length = torch.float32, shape.clips, shape.frames, config.text_tokens
        sizes: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("ids", (shape.texts * b, length), torch.int64), ("words", (shape.texts * b,), torch.int32),
            ("numbers", (len(shape.moves), NUMBERS), f32), ("start", (2,), f32), ("seeds", (b,), torch.int64),
            ("seconds", (b,), f32), ("frames", (b,), torch.int32), ("samples", (b,), torch.int32),
            ("beat", (b, t, BEAT_CHANNELS), f32), ("key", (b, KEY_CHANNELS), f32),
        ]  # fmt: skip
        if shape.edited:
            sizes += [("init", (b, t, config.latent_channels), f32), ("keep", (b, t), f32)]
        buffers = [Buffer(name, size, dtype, ((0, 0),)) for name, size, dtype in sizes]
        self.shape = shape
        self.device = Arena(buffers, device)
        self.host = Arena(buffers, pinned=device.type == "cuda")

    def write(self, request: Request) -> None:
        """A request into the host's block. Clips beyond the request's repeat its last."""
        b = self.shape.clips
        clips = [min(i, len(request.prompts) - 1) for i in range(b)]
        texts = [request.prompts[i] for i in clips]
        if self.shape.texts == 2 and request.negative is not None:
            texts += [request.negative[i] for i in clips]
        ids, words = self.host.tensor("ids").zero_(), self.host.tensor("words")
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.tensor(text)
            words[i] = len(text)
        self.host.tensor("numbers").copy_(numbers(request.evaluations))
        self.host.tensor("start").copy_(start(request.evaluations))
        seeds = np.array([request.seeds[i] for i in clips], dtype=np.uint64).view(np.int64)
        self.host.tensor("seeds").copy_(torch.from_numpy(seeds))
        self.host.tensor("seconds").fill_(request.frames * HOP / SAMPLE_RATE)
        self.host.tensor("frames").fill_(request.frames)
        self.host.tensor("samples").fill_(request.samples)
        self.host.tensor("key").copy_(request.key[clips])
        padded = [("beat", request.beat)]
        if request.init is not None:
            keep = torch.zeros(request.init.shape[:2]) if request.keep is None else request.keep
            padded += [("init", request.init), ("keep", keep)]
        for name, value in padded:
            self.host.tensor(name).zero_()[:, : request.frames].copy_(value[clips])

    def send(self) -> None:
        """Host to device, on the current stream: the first thing that a graph does."""
        self.device.block.copy_(self.host.block, non_blocking=True)

    def __getattr__(self, name: str) -> Tensor:
        device = self.__dict__.get("device")
        if device is None or name not in device.buffers:
            raise AttributeError(name)
        return device.tensor(name)


class Outputs:
    """What a replay leaves, on the device and on the host: samples, latents, and whether all of them are numbers."""

    def __init__(self, shape: Shape, config: ModelConfig, device: torch.device) -> None:
        b, count = shape.clips, shape.frames * HOP
        samples = (b, count, 2) if shape.output == "pcm16" else (b, 2, count)
        buffers = [
            Buffer("samples", samples, OUTPUTS[shape.output], ((0, 0),)),
            Buffer("latents", (b, shape.frames, config.latent_channels), torch.float32, ((0, 0),)),
            Buffer("finite", (b,), torch.uint8, ((0, 0),)),
        ]
        self.device = Arena(buffers, device)
        self.host = Arena(buffers, pinned=device.type == "cuda")

    def fetch(self) -> None:
        """Device to host, on the current stream: the last thing that a graph does."""
        self.host.block.copy_(self.device.block, non_blocking=True)


@dataclass(frozen=True)
class Result:
    """samples: (B, 2, N) float32 or (B, N, 2) int16; latents (B, T, C) fp32; stages: seconds of each; captured: seconds
    that recording the graph took, 0 where it was there."""

    samples: np.ndarray
    latents: Tensor
    stages: dict[str, float]
    captured: float
