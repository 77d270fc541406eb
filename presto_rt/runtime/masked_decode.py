"""From latents to samples without looking at a tensor on the way: the codec's decoding as a captured graph runs it.

`Codec.decode` for clips that are shorter than the buffer they lie in: what is beyond a clip's end is made zero wherever
a frame sees its neighbours, so the samples are those of the clip alone. Phases come from `presto_rt.kernels.spsi`.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import runtime, spsi
from ..models import spectral as codec_features
from ..models.codec import Codec
from ..models.spectral import FRAME_HOP, FRAMES_PER_LATENT, N_FFT, PAD, SpectralFrames

PARTS = N_FFT // FRAME_HOP


def inside(count: int, lengths: Tensor) -> Tensor:
    """(B, count) fp32: 1 before each clip's length, 0 from there on."""
    return (torch.arange(count, device=lengths.device) < lengths[:, None]).float()


def decode(codec: Codec, latents: Tensor, frames: Tensor, backend: str = "auto") -> Tensor:
    """Latents (B, T, C) fp32 of which frames (B,) int32 count -> samples (B, 2, 2048 T) fp32, not clamped, zero beyond
    the clip. backend: of the phases' kernel."""
    coarse, fine = inside(latents.shape[1], frames), inside(4 * latents.shape[1], 4 * frames)
    fused = runtime.use_triton(latents, backend)
    phases = partial(spsi.spsi, hop=FRAME_HOP, size=N_FFT, backend=backend) if fused else codec_features.spsi
    magnitude, phasor = codec.frames.spectra(features(codec, latents, coarse, fine), codec.synthesis_gain, phases)
    magnitude = magnitude * fine[:, None, :, None]
    whole = inside(latents.shape[1] * FRAMES_PER_LATENT * FRAME_HOP, frames * (FRAMES_PER_LATENT * FRAME_HOP))[:, None]
    envelope = energy(codec.frames, fine)[:, None]
    previous: Tensor | None = None
    for _ in range(codec.config.griffin_lim):
        current = codec.frames.stft(istft(codec.frames, phasor.mul_(magnitude), envelope) * whole)
        phasor = current if previous is None else torch.lerp(previous, current, 1.99)
        previous = current
        phasor = phasor / phasor.abs().clamp_min(1e-9)
    return istft(codec.frames, phasor.mul_(magnitude), envelope) * whole


def features(codec: Codec, latents: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """`Codec.decode_features` with a mask before every block that mixes frames: (B, 4 T, 3, bands)."""
    net, z = codec.decoder, latents / codec.latent_scale + codec.latent_mean
    x = net.stem(z)
    for block in net.blocks:
        x = block(x * coarse[..., None])
    x = net.split(x).view(len(z), -1, net.frame_width)
    for block in net.frame_blocks:
        x = block(x * fine[..., None])
    y = net.linear(z).view(*x.shape[:2], -1).float() + net.head(net.norm(x)).float()
    y = codec.denormalize(y.unflatten(-1, (3, net.bands)))
    return torch.cat([torch.minimum(y[:, :, :2], codec.ceiling), y[:, :, 2:]], 2)


def energy(frames: SpectralFrames, fine: Tensor) -> Tensor:
    """(B, samples): how much of the windows' energy reaches each sample, from the frames that count."""
    squares = frames.window.square().view(PARTS, FRAME_HOP)
    parts = (F.pad(fine[..., None] * squares[part], (0, 0, part, PARTS - 1 - part)) for part in range(PARTS))
    total = torch.stack(tuple(parts)).sum(0).flatten(1)
    return total[:, PAD : PAD + fine.shape[1] * FRAME_HOP].clamp_min(1e-3)


def istft(frames: SpectralFrames, spectra: Tensor, envelope: Tensor) -> Tensor:
    """`SpectralFrames.istft` with the windows' energy given: (B, 2, F, 1025) complex, changed -> (B, 2, 512 F)."""
    for end in (0, -1):  # real in a real signal's spectrum; not every FFT library ignores what else is there
        torch.view_as_real(spectra)[..., end, 1].zero_()
    pieces = torch.fft.irfft(spectra, n=N_FFT) * (frames.window * (N_FFT / 4.0))
    pieces = pieces.unflatten(-1, (PARTS, FRAME_HOP))
    count = pieces.shape[-3]
    total = pieces.new_zeros(*pieces.shape[:-3], count + PARTS - 1, FRAME_HOP)
    for part in range(PARTS):
        total[..., part : part + count, :] += pieces[..., part, :]
    return total.flatten(-2)[..., PAD : PAD + count * FRAME_HOP] / envelope


def level(samples: Tensor, lengths: Tensor, peak: float) -> Tensor:
    """Clips (B, 2, N) that go over `peak` within their lengths (B,) samples, turned down as a whole."""
    loudest = (samples.abs() * inside(samples.shape[2], lengths)[:, None]).amax((1, 2), keepdim=True)
    return samples / (loudest / peak).clamp_min(1.0)
