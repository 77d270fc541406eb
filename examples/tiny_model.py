"""A model of your own through `Pipeline`: a toy network, a toy autoencoder and a toy conditioner, in plain torch.

The toy's data is one tone for each prompt, so its denoiser has a closed form, and every sampler arrives at the tone.
Run it: python examples/tiny_model.py tiny.wav
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from presto_rt import Pipeline
from presto_rt.checkpoints.model import Model
from presto_rt.conditioning.ports import ClipControls, Conditioning, HostInputs, InputLayout, TokenEncoder
from presto_rt.request import Defaults
from presto_rt.runtime.eager.backend import EagerBackend
from presto_rt.runtime.spec import NetworkSpec

HOP, RATE, CHANNELS, SIGMA_DATA = 441, 44_100, 2, 0.5
SPEC = NetworkSpec(
    width=8, blocks=1, heads=1, head_dim=8, hidden=8, channels=CHANNELS, max_cross_tokens=1, prediction_type="edm",
    sigma_data=SIGMA_DATA, sigma_min=0.002, sigma_max=80.0, rho=7.0, hop=HOP, sample_rate=RATE, max_seconds=10.0,
)  # fmt: skip


class ToyNetwork:
    """Raw network F of a denoiser that always answers with the conditioning's local port."""

    def raw(self, x: Tensor, time: Tensor, conditioning: Conditioning, blocks: Sequence[int], budget: float) -> Tensor:
        """Return F = (D - c_skip z) / c_out for D = local (Karras et al. 2022, table 1)."""
        sigma = (4 * time).exp()[:, None, None]
        total = (sigma**2 + SIGMA_DATA**2).sqrt()
        return (conditioning.local - SIGMA_DATA**2 / total * x) * total / (sigma * SIGMA_DATA)


class ToyAutoencoder:
    """Latents are the pitch in units of 440 Hz and the loudness of each frame."""

    def encode(self, samples: Tensor) -> Tensor:
        """Return the loudness of each frame at a pitch of 1."""
        loudness = samples.mean(1).unfold(-1, HOP, HOP).abs().amax(-1)
        return torch.stack([torch.ones_like(loudness), loudness], -1)

    def decode(self, latents: Tensor, frames: int, *, clamp: bool = True) -> Tensor:
        """Return a sine of the latents' pitch and loudness, (B, 2, frames)."""
        pitch, loudness = latents.repeat_interleave(HOP, 1)[:, :frames].unbind(-1)
        sine = loudness * (2 * torch.pi * 440 / RATE * pitch.double().cumsum(1)).sin().float()
        return (sine.clamp(-1, 1) if clamp else sine)[:, None].repeat(1, 2, 1)


class ToyConditioner:
    """A longer prompt is a higher tone."""

    def prepare(self, clips: Sequence[ClipControls], frames: int) -> HostInputs:
        """Return pitch and a fading loudness of each frame."""
        pitch = torch.tensor([[1 + len(clip.prompt) / 12] for clip in clips]).expand(-1, frames)
        return {"local": torch.stack([pitch, torch.linspace(0.5, 0, frames).expand(len(clips), -1)], -1)}

    def layout(self, clips: int, frames: int, negative: bool) -> InputLayout:
        """Return the shape of `prepare`'s result."""
        return {"local": ((clips, frames, CHANNELS), torch.float32)}

    def embed(self, inputs: HostInputs, encode: TokenEncoder | None = None) -> tuple[Conditioning, Conditioning]:
        """Return the local port; the other ports are empty."""
        clips, local = len(inputs["local"]), inputs["local"]
        empty, lengths = torch.zeros(clips, 1, 1), torch.ones(clips, dtype=torch.int32)
        conditioning = Conditioning(empty, lengths, torch.zeros(clips, 1), local)
        return conditioning, conditioning


def tiny_pipeline() -> Pipeline:
    """Return a pipeline over the toy model."""
    network, autoencoder, conditioner = ToyNetwork(), ToyAutoencoder(), ToyConditioner()
    model = Model("tiny", SPEC, conditioner, autoencoder, network, defaults=Defaults(8, "heun", 1.0))
    return Pipeline(model, EagerBackend(network, autoencoder, conditioner, channels=CHANNELS))


if __name__ == "__main__":
    print(tiny_pipeline().generate("a tone", seconds=2, seed=1).save(sys.argv[1] if len(sys.argv) > 1 else "tiny.wav"))
