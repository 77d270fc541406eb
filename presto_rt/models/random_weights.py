"""Models without training, for timing: every weight random, so that no part of the work is left out.

They are loaded by a preset's name and "-random", so that nobody takes their noise for music. Nothing is read from
files: neither weights nor the text encoder's package need to be there.
"""

from __future__ import annotations

import zlib

import torch

from ..conditioning.minilm import TextEncoder
from .codec import Codec
from .config import ModelConfig
from .dit import DiT

SUFFIX = "-random"


def random_dit(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> DiT:
    """A transformer of that shape in fp32, matrices of spread 1 / sqrt(inputs), made on the device. The same seed
    gives the same weights on the same kind of device."""
    with torch.device("meta"):
        model = DiT(config)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02
            parameter.normal_(0.0, spread, generator=generator)
    return model


def random_codec() -> Codec:
    """A codec of the shipped one's shape, on the CPU, that makes noise of moderate level."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = Codec().eval().requires_grad_(False)
    codec.feature_mean.fill_(-5.0)
    return codec


class RandomTextEncoder(TextEncoder):
    """The text encoder's shape with random weights; a word's number is made of its letters."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(None)
        self.eval().requires_grad_(False)

    def tokens(self, prompts: list[str], max_tokens: int = 96) -> list[list[int]]:
        words = ([zlib.crc32(word.encode()) % 30_000 for word in prompt.split()] for prompt in prompts)
        return [[101, *numbers[: max_tokens - 2], 102] for numbers in words]
