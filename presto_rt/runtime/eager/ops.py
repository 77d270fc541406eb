"""Table of operators in plain torch: the reference of the other tables, on any device and in any dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...diffusion import noise
from ...errors import BackendUnavailableError
from ...models import spectral
from ...models.rotary import rotate
from ...models.spectral import FRAME_HOP, N_FFT, PAD, SpectralFrames
from ..codec import valid_mask
from ..ops import Capabilities, Modulation, PackedLinear, SamplerBuffers, Seeds
from ..plan import LatentEdit, PlannedCall

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}
WINDOWS = N_FFT // FRAME_HOP  # analysis windows that overlap at a sample


@dataclass(frozen=True)
class DenseWeights:
    """Weights (N, K) and bias (N,) or None, as they are."""

    weight: Tensor
    bias: Tensor | None
    input_scale: float | None = None


class ComposedSamplerStep(ABC):
    """`Ops.sampler_step` for tables in which noise, update and kept latents are operators of their own."""

    @abstractmethod
    def normal(self, seeds: Seeds, stream: int, out: Tensor) -> Tensor:
        """See `Ops.normal`."""

    @abstractmethod
    def update_state(
        self,
        buffers: SamplerBuffers,
        conditional: Tensor,
        unconditional: Tensor | None,
        fresh: Tensor | None,
        call: PlannedCall,
    ) -> None:
        """Apply the nine coefficients of `trajectory` to the state.

        Args:
            buffers: x, history and network_input are written.
            conditional: raw output F_c.
            unconditional: raw output F_u, or None.
            fresh: noise (B, T, C) fp32, or None.
            call: coefficients and number of copies of the next input.
        """

    def sampler_step(
        self,
        buffers: SamplerBuffers,
        conditional: Tensor,
        unconditional: Tensor | None,
        seeds: Seeds,
        call: PlannedCall,
        edit: LatentEdit | None,
    ) -> None:
        """See `Ops.sampler_step`."""
        fresh = None if call.noise_stream is None else self.normal(seeds, call.noise_stream, buffers.noise)
        self.update_state(buffers, conditional, unconditional, fresh, call)
        if edit is not None and call.step:
            self.normal(seeds, 0, buffers.noise)
            keep_latents(buffers, call, edit)


class ReferenceOps(ComposedSamplerStep):
    """Plain torch, one formula after another. See `runtime.ops.Ops`."""

    capabilities = Capabilities()

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.dtype, self.device = dtype, torch.device(device)

    @property
    def wide(self) -> torch.dtype:
        """fp32, or fp64 where the activations are."""
        return torch.promote_types(self.dtype, torch.float32)

    def pack(self, weight: Tensor, bias: Tensor | None) -> DenseWeights:
        """See `Ops.pack`."""
        moved = weight.detach().to(self.device, self.dtype).contiguous()
        return DenseWeights(moved, None if bias is None else bias.detach().to(self.device, self.dtype))

    def linear(
        self,
        x: Tensor,
        weights: PackedLinear,
        out: Tensor | None,
        activation: str = "none",
        out_scale: float | None = None,
    ) -> Tensor:
        """See `Ops.linear`."""
        assert isinstance(weights, DenseWeights)
        if out_scale is not None or weights.input_scale is not None:
            raise BackendUnavailableError("fp8 products need the CUDA table; choose another precision")
        y = ACTIVATIONS[activation](F.linear(x, weights.weight, weights.bias))
        return y if out is None else out.copy_(y)

    def adaln(
        self,
        source: Tensor,
        branch: Tensor,
        modulation: Modulation,
        residual: Tensor,
        out: Tensor,
        eps: float,
        out_scale: float | None = None,
    ) -> None:
        """See `Ops.adaln`."""
        if out_scale is not None:
            raise BackendUnavailableError("fp8 outputs need the CUDA table; choose another precision")
        table, gate, shift, scale = modulation.table, modulation.gate, modulation.shift, modulation.scale
        gated = branch.float() if gate is None else table[:, gate, None] * branch.float()
        residual.copy_(source + gated)
        y = F.layer_norm(residual, residual.shape[-1:], eps=eps)
        if shift is not None and scale is not None:
            y = y * (1 + table[:, scale, None]) + table[:, shift, None]
        out.copy_(y)

    def qk_norm_rope(
        self,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        q: Tensor,
        k: Tensor,
        eps: float,
    ) -> Tensor:
        """See `Ops.qk_norm_rope`."""
        parts = qkv.unflatten(-1, (3, q.shape[1], q.shape[3])).permute(2, 0, 3, 1, 4)
        for part, weight, out in zip(parts, weights, (q, k), strict=False):
            out.copy_(rotate(F.rms_norm(part.float(), weight.shape, weight, eps), *angles))
        result: Tensor = parts[2]
        return result

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None, out: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """See `Ops.attention`."""
        mask = None
        if lengths is not None:
            mask = (torch.arange(k.shape[2], device=k.device) < lengths[:, None])[:, None, None]
        return out.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def cross_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None,
        lengths: Tensor,
        scratch: Tensor | None,
        out: Tensor,
        eps: float = 1e-6,
    ) -> Tensor:
        """See `Ops.cross_attention`."""
        heads = q.unflatten(-1, (k.shape[1], k.shape[3])).transpose(1, 2)
        if q_weight is not None:
            heads = F.rms_norm(heads.float(), q_weight.shape, q_weight, eps).to(q.dtype)
        mask = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        y = F.scaled_dot_product_attention(heads, k, v, attn_mask=mask[:, None, None])
        return out.copy_(y.transpose(1, 2).flatten(2))

    def scratch_bytes(self, batch: int, heads: int, keys: int, dim: int) -> int:
        """See `Ops.scratch_bytes`."""
        return 0

    def normal(self, seeds: Seeds, stream: int, out: Tensor) -> Tensor:
        """See `Ops.normal`."""
        for clip, seed in zip(out, seeds, strict=True):
            if isinstance(seed, Tensor) and seed.is_cuda:  # not read on the host: a graph may be recording
                drawn = noise.normal_torch(seed, clip.numel(), stream=stream, device=out.device)
                clip.copy_(drawn.view(clip.shape))
            else:
                clip.copy_(noise.normal(int(seed) % 2**64, clip.shape, stream=stream, device=out.device))
        return out

    def update_state(
        self,
        buffers: SamplerBuffers,
        conditional: Tensor,
        unconditional: Tensor | None,
        fresh: Tensor | None,
        call: PlannedCall,
    ) -> None:
        """See `ComposedSamplerStep.update_state`."""
        a, b, c, h, s, p, q, r, c_in = call.coefficients
        x = buffers.x
        following, kept = a * x + b * conditional.float(), p * x + q * conditional.float()
        if unconditional is not None:
            following, kept = following + c * unconditional.float(), kept + r * unconditional.float()
        following = following + h * buffers.history
        x.copy_(following if fresh is None else following + s * fresh)
        buffers.history.copy_(kept)
        for copy in range(call.next_copies):
            buffers.network_input[copy * len(x) : (copy + 1) * len(x)].copy_(c_in * x)

    def mix_norm(
        self,
        source: Tensor | None,
        branch: Tensor | None,
        mix: Tensor | None,
        norm: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        out: Tensor,
        eps: float = 1e-5,
        after: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.mix_norm`."""
        terms = [x.to(self.wide) for x in (source, branch) if x is not None]
        y = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        if lengths is not None:
            y = y * valid_mask(y.shape[1], lengths)[..., None]
        if residual is not None and not after:
            residual.copy_(y)
        if mix is not None:
            count, half = y.shape[1], len(mix) // 2
            padded = F.pad(y, (0, 0, half, half))
            y = padded[:, :count] * mix[0]
            for k in range(1, len(mix)):
                y = y + padded[:, k : k + count] * mix[k]
        if norm is not None:
            weight, bias = (w.to(self.wide) for w in norm)
            y = F.layer_norm(y, y.shape[-1:], weight, bias, eps)
        if residual is not None and after:
            residual.copy_(y)
        return out.copy_(y)

    def features(
        self, head: Tensor, linear: Tensor, mean: Tensor, maximum: Tensor, scale: float, out: Tensor
    ) -> Tensor:
        """See `Ops.features`."""
        bands = out.shape[3]
        y = (head.to(self.wide) + linear.to(self.wide))[..., : 3 * bands].unflatten(-1, (3, bands))
        out[:, :, :2] = torch.minimum(y[:, :, :2] * scale + mean, maximum)
        out[:, :, 2] = torch.tanh(y[:, :, 2])
        return out

    def synthesize(
        self,
        frames: SpectralFrames,
        features: Tensor,
        gain: Tensor,
        iterations: int,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.synthesize`."""
        batch, count = features.shape[:2]
        if lengths is None:
            lengths = torch.full((batch,), count, dtype=torch.int32, device=features.device)
        valid = valid_mask(count, lengths)
        magnitude, phasor = frames.spectra(features, gain, self.phases)
        magnitude = magnitude * valid[:, None, :, None]
        inside = valid_mask(count * FRAME_HOP, lengths * FRAME_HOP)[:, None]
        envelope = window_energy(frames, valid)[:, None]
        previous: Tensor | None = None
        for _ in range(iterations):
            current = frames.stft(overlap_add(frames, phasor.mul_(magnitude), envelope) * inside)
            phasor = current if previous is None else torch.lerp(previous, current, 1.0 + spectral.MOMENTUM)
            previous = current
            phasor = phasor / phasor.abs().clamp_min(1e-9)
        return overlap_add(frames, phasor.mul_(magnitude), envelope) * inside

    def phases(self, magnitude: Tensor) -> Tensor:
        """Return unit phasors of magnitudes (channels, frames, bins) by single-pass spectrogram inversion."""
        return spectral.spsi(magnitude)


def keep_latents(buffers: SamplerBuffers, call: PlannedCall, edit: LatentEdit) -> None:
    """Replace the state by the kept latents at the state's noise level, where the edit keeps them.

    buffers.noise holds the noise of stream 0; the next network input follows the state.
    """
    x = buffers.x
    known = edit.init + call.next_sigma * buffers.noise
    x.copy_(edit.keep[..., None] * known + (1.0 - edit.keep[..., None]) * x)
    for copy in range(call.next_copies):
        buffers.network_input[copy * len(x) : (copy + 1) * len(x)].copy_(call.coefficients[-1] * x)


def window_energy(frames: SpectralFrames, valid: Tensor) -> Tensor:
    """Return (B, samples): the energy of the windows of valid frames (B, F) at each sample."""
    squares = frames.window.square().view(WINDOWS, FRAME_HOP)
    parts = (F.pad(valid[..., None] * squares[part], (0, 0, part, WINDOWS - 1 - part)) for part in range(WINDOWS))
    total = torch.stack(tuple(parts)).sum(0).flatten(1)
    return total[:, PAD : PAD + valid.shape[1] * FRAME_HOP].clamp_min(1e-3)


def overlap_add(frames: SpectralFrames, spectra: Tensor, envelope: Tensor) -> Tensor:
    """Return samples (B, 2, 512 F) of spectra (B, 2, F, 1025), which are changed, over the windows' energy."""
    for end in (0, -1):  # real in a real signal's spectrum; not every FFT library ignores the imaginary part
        torch.view_as_real(spectra)[..., end, 1].zero_()
    pieces = torch.fft.irfft(spectra, n=N_FFT) * (frames.window * (N_FFT / 4.0))
    pieces = pieces.unflatten(-1, (WINDOWS, FRAME_HOP))
    count = pieces.shape[-3]
    total = pieces.new_zeros(*pieces.shape[:-3], count + WINDOWS - 1, FRAME_HOP)
    for part in range(WINDOWS):
        total[..., part : part + count, :] += pieces[..., part, :]
    result: Tensor = total.flatten(-2)[..., PAD : PAD + count * FRAME_HOP] / envelope
    return result
