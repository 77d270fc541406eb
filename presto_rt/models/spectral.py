"""Features of the codec's network, and synthesis from them: log-spectra of mid and side on a warped frequency axis.

A frame is one Hann-windowed FFT of 2048 samples, every 512 samples; four frames belong to one latent frame. Frame j
of a clip is centred on sample 512 j + 256, so that N = 2048 T samples give exactly 4 T frames.

The frequency axis keeps every FFT bin up to `break_hz` and then widens in proportion to frequency: 371 bands instead
of 1025 bins. With true magnitudes this costs 0.2 to 0.3 dB of log-mel distance, and it is a third of the work and of
the numbers to learn.

Phase comes from single-pass spectrogram inversion (Beauregard, Harish, Wyse, DSP 2015) of the two channels' summed
energy, and the angle between the channels from the predicted cosine; inverting the channels one by one loses the
stereo image (side/mid error 12 dB against 1.3 dB). Optional fast Griffin-Lim iterations (Perraudin, Balazs,
Søndergaard, WASPAA 2013) then make the frames agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import native

SAMPLE_RATE = 44100
N_FFT = 2048
FRAME_HOP = 512
FRAMES_PER_LATENT = 4
LATENT_HOP = FRAME_HOP * FRAMES_PER_LATENT
BINS = N_FFT // 2 + 1
PADDED_BINS = N_FFT // 2 + 64  # of the tables that csrc/simd/spectral.cpp reads
PAD = N_FFT // 2 - FRAME_HOP // 2
MOMENTUM = 0.99  # of fast Griffin-Lim
POWER_FLOOR = 1e-9  # -90 dB against a full-scale sine


def band_centres(break_hz: float) -> np.ndarray:
    """Centres of the bands in units of FFT bins: 0, 1, 2 ... up to `break_hz`, then steps in proportion to frequency,
    up to 1024."""
    knee = break_hz / (SAMPLE_RATE / N_FFT)
    centres, centre = [], 0.0
    while centre < BINS - 1:
        centres.append(centre)
        centre += max(1.0, centre / knee)
    return np.array([*centres, BINS - 1.0])


def hat_filters(centres: np.ndarray) -> np.ndarray:
    """Triangles that peak at each centre and reach zero at its neighbours, (bands, bins); every column sums to 1."""
    bins = np.arange(BINS)
    return np.stack([np.interp(bins, centres, row) for row in np.eye(len(centres))])


def mel_filters(count: int, low_hz: float = 20.0, high_hz: float = 20000.0) -> np.ndarray:
    """`count` overlapping triangles, evenly spaced on the mel scale 2595 log10(1 + f/700), peak 1, over FFT bins:
    (count, bins)."""
    edges_mel = np.linspace(_mel(low_hz), _mel(high_hz), count + 2)
    edges = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    hz = np.arange(BINS) * SAMPLE_RATE / N_FFT
    up = (hz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - hz) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0.0, np.minimum(up, down))
    for row, centre in zip(filters, edges[1:-1], strict=True):
        if row.sum() < 1e-3:  # narrower than a bin: take the nearest one
            row[round(centre * N_FFT / SAMPLE_RATE)] = 1.0
    return filters


def _mel(hz: float | np.ndarray) -> float | np.ndarray:
    return 2595.0 * np.log10(1.0 + hz / 700.0)


def mel_density(centres: np.ndarray) -> np.ndarray:
    """Width of each band on the mel scale, scaled to a mean of 1, (bands,): how much of hearing's axis a band stands
    for."""
    hz = centres * SAMPLE_RATE / N_FFT
    edges = np.concatenate([[hz[0]], 0.5 * (hz[1:] + hz[:-1]), [hz[-1]]])
    width = np.diff(_mel(edges))
    result: np.ndarray = width / width.mean()
    return result


class SpectralFrames(nn.Module):
    """Fixed maps between samples and frames. Has buffers only, none of them saved: they follow from `break_hz`."""

    def __init__(self, break_hz: float) -> None:
        super().__init__()
        centres = band_centres(break_hz)
        hats = hat_filters(centres)
        self.bands = len(centres)
        self.exact = int(np.sum(np.diff(centres) == 1.0))  # bands 0 .. exact-1 are FFT bins, unmixed
        position = np.interp(np.arange(BINS), centres, np.arange(self.bands))
        below = np.minimum(position.astype(np.int64), self.bands - 2)
        averages = hats / hats.sum(1, keepdims=True)
        buffers = {
            "window": torch.hann_window(N_FFT),
            "averages": torch.from_numpy(averages[self.exact :, self.exact :].T.copy()).float(),
            "below": torch.from_numpy(below),
            "fraction": torch.from_numpy(position - below).float(),
            "spread": torch.from_numpy(hats).float(),
            "signs": 1.0 - 2.0 * (torch.arange(BINS) % 2),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    window: Tensor
    averages: Tensor
    below: Tensor
    fraction: Tensor
    spread: Tensor
    signs: Tensor

    # ---- analysis

    def stft(self, samples: Tensor) -> Tensor:
        """(..., 2048 T) float32 samples -> complex spectra (..., 4 T, 1025); a full-scale sine has magnitude 1."""
        padded = F.pad(samples, (PAD, PAD))
        frames = padded.unfold(-1, N_FFT, FRAME_HOP) * (self.window * (4.0 / N_FFT))
        result: Tensor = torch.fft.rfft(frames)
        return result

    def _to_bands(self, power: Tensor) -> Tensor:
        return torch.cat([power[..., : self.exact], power[..., self.exact :] @ self.averages], -1)

    def features(self, samples: Tensor, with_cosine: bool = False) -> Tensor:
        """Stereo samples (B, 2, 2048 T) -> (B, 4 T, 2 or 3, bands): log-magnitude (nats) of mid and side, cosine
        between them.

        Mid is (left + right) / 2, side (left - right) / 2; a band's magnitude is the root of its mean power plus
        1e-9. The cosine is the real part of the bands' cross-spectrum over the root of the product of their powers,
        in [-1, 1].
        """
        mid = self.stft((samples[:, 0] + samples[:, 1]) * 0.5)
        side = self.stft((samples[:, 0] - samples[:, 1]) * 0.5)
        power = [self._to_bands(x.real.square() + x.imag.square()) for x in (mid, side)]
        out = [0.5 * torch.log(p + POWER_FLOOR) for p in power]
        if with_cosine:
            cross = self._to_bands(mid.real * side.real + mid.imag * side.imag)
            out.append((cross / (power[0] * power[1] + POWER_FLOOR**2).sqrt()).clamp(-1.0, 1.0))
        return torch.stack(out, 2)

    # ---- synthesis

    def to_bins(self, bands: Tensor) -> Tensor:
        """Linear interpolation from bands to FFT bins: (..., bands) -> (..., 1025)."""
        low, high = bands[..., : self.exact], bands[..., self.exact :]
        index, fraction = self.below[self.exact :] - self.exact, self.fraction[self.exact :]
        start = high.index_select(-1, index)
        return torch.cat([low, start + fraction * (high.index_select(-1, index + 1) - start)], -1)

    def istft(self, spectra: Tensor) -> Tensor:
        """Complex spectra (..., 4 T, 1025) -> samples (..., 2048 T): least-squares overlap-add, the inverse of
        `stft`."""
        frames = torch.fft.irfft(spectra, n=N_FFT)
        frames *= self.window * (N_FFT / 4.0)
        *lead, count, _ = frames.shape
        parts = N_FFT // FRAME_HOP
        pieces = frames.view(*lead, count, parts, FRAME_HOP)
        squares = self.window.square().view(parts, FRAME_HOP)
        total = frames.new_zeros(*lead, count + parts - 1, FRAME_HOP)
        weight = frames.new_zeros(count + parts - 1, FRAME_HOP)
        for part in range(parts):
            total[..., part : part + count, :] += pieces[..., part, :]
            weight[part : part + count] += squares[part]
        samples = (total / weight.clamp_min(1e-3)).flatten(-2)
        result: Tensor = samples[..., PAD : PAD + count * FRAME_HOP]
        return result

    def spectra(
        self, features: Tensor, gain: Tensor | None = None, phases: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features with cosine (B, 4 T, 3, bands) -> (magnitudes, unit phasors) of left and right, (B, 2, 4 T, 1025)
        each.

        One SPSI pass on the root of the two channels' mean power gives the phase of the louder of mid and side in
        each bin; the other is turned from it by the predicted angle. So both channels move together and the stereo
        image holds. phases: what makes unit phasors of magnitudes, `spsi` by default.
        """
        bins = self.to_bins(features)
        mid, side = self._magnitude(bins[:, :, 0]), self._magnitude(bins[:, :, 1])
        if gain is not None:  # after the floor is taken off: before, it would lift silence above it
            factor = self.to_bins(gain).exp()
            mid, side = mid * factor, side * factor
        cosine = bins[:, :, 2].clamp(-1.0, 1.0)
        sine = (1.0 - cosine.square()).sqrt()
        # Mid lies on the real axis, or side does where it is louder; the other is at the angle between them.
        louder = mid >= side
        mid_re, mid_im = torch.where(louder, mid, mid * cosine), torch.where(louder, 0.0, -mid * sine)
        side_re, side_im = torch.where(louder, side * cosine, side), torch.where(louder, side * sine, 0.0)
        pair = torch.complex(
            torch.stack([mid_re + side_re, mid_re - side_re], 1), torch.stack([mid_im + side_im, mid_im - side_im], 1)
        )
        magnitude = pair.abs()
        phase = (phases or spsi)((mid.square() + side.square()).sqrt())
        return magnitude, pair / magnitude.clamp_min(1e-9) * phase[:, None]

    @staticmethod
    def _magnitude(logs: Tensor) -> Tensor:
        # The floor that analysis added is taken off again: left in, silent bins would hum at -90 dB each, and the
        # 60 bins of a mel band near 16 kHz together at -72 dB. What is left near the floor is mostly the network's
        # error, and shrinks as in a Wiener filter.
        power = ((2.0 * logs).exp() - POWER_FLOOR).clamp_min(0.0)
        return (power.square() / (power + 0.3 * POWER_FLOOR)).clamp_min(1e-16).sqrt()

    def synthesize(
        self, features: Tensor, griffin_lim: int = 0, gain: Tensor | None = None, momentum: float = MOMENTUM
    ) -> Tensor:
        """Features with cosine (B, 4 T, 3, bands) -> stereo samples (B, 2, 2048 T), after `griffin_lim` fast
        iterations."""
        features = features.float()
        needs_graph = torch.is_grad_enabled() and features.requires_grad
        if native.lib is not None and features.device.type == "cpu" and not needs_graph:
            return self._synthesize_native(features, griffin_lim, gain, momentum)
        return self.synthesize_torch(features, griffin_lim, gain, momentum)

    def synthesize_torch(
        self, features: Tensor, griffin_lim: int = 0, gain: Tensor | None = None, momentum: float = MOMENTUM
    ) -> Tensor:
        """The twin of csrc/simd/spectral.cpp: `synthesize` step by step in torch."""
        magnitude, phasor = self.spectra(features, gain)
        previous: Tensor | None = None
        for _ in range(griffin_lim):
            current = self.stft(self.istft(phasor.mul_(magnitude)))
            phasor = current if previous is None else torch.lerp(previous, current, 1.0 + momentum)
            previous = current
            phasor = phasor / phasor.abs().clamp_min(1e-9)
        return self.istft(phasor.mul_(magnitude))

    def _synthesize_native(self, features: Tensor, griffin_lim: int, gain: Tensor | None, momentum: float) -> Tensor:
        """All of `synthesize` in one pass over time in C++, on at most two threads for each clip."""

        def padded(bins: Tensor) -> Tensor:  # whole vectors are read at the end
            return torch.cat([bins, bins[-1:].expand(PADDED_BINS - BINS)])

        factor = torch.ones(BINS) if gain is None else self.to_bins(gain.detach()).exp()
        batch, count = features.shape[:2]
        out = torch.empty(batch, 2, count * FRAME_HOP)
        assert native.lib is not None
        native.lib.spectral(
            features.detach().contiguous(), padded(factor), padded(self.below.int()), padded(self.fraction),
            out, griffin_lim, momentum, POWER_FLOOR, torch.get_num_threads(),
        )  # fmt: skip
        return out


def spsi(magnitude: Tensor) -> Tensor:
    """Return unit phasors, complex64, of magnitudes (channels, frames, 1025), on the magnitudes' device.

    Triton on a CUDA device, C++ on the CPU, or NumPy where neither is available.
    """
    if magnitude.is_cuda:
        from ..kernels import runtime
        from ..kernels import spsi as kernel

        if runtime.use_triton(magnitude, "auto"):
            result: Tensor = kernel.spsi(magnitude, hop=FRAME_HOP, size=N_FFT)
            return result
    on_cpu = magnitude.detach().to("cpu", torch.float32).contiguous()
    if native.lib is None:
        return torch.from_numpy(spsi_numpy(on_cpu.numpy(), FRAME_HOP, N_FFT)).to(magnitude.device)
    phasors = torch.empty(on_cpu.shape, dtype=torch.complex64)
    native.lib.spsi(on_cpu, phasors, FRAME_HOP, N_FFT)
    return phasors.to(magnitude.device)


def spsi_numpy(magnitude: np.ndarray, hop: int = FRAME_HOP, n_fft: int = N_FFT) -> np.ndarray:
    """Single-pass spectrogram inversion: magnitudes (channels, frames, bins) -> unit phasors (same shape), complex64.

    Each local maximum is a sinusoid: a parabola through it and its neighbours gives its frequency, its phase advances
    by frequency times hop from the same bin's phase one frame earlier, and the bins between the valleys on its sides
    share it. The twin of csrc/spsi.cpp, which says more.
    """
    channels, frames, bins = magnitude.shape
    if bins != n_fft // 2 + 1:
        raise ValueError(f"spsi needs n_fft / 2 + 1 = {n_fft // 2 + 1} bins, got {bins}")
    out = np.empty(magnitude.shape, np.complex64)
    phase = np.zeros(channels * bins)
    signs = np.where(np.arange(bins) % 2, -1.0, 1.0)
    edge = np.full((channels, 1), -np.inf)
    for t in range(frames):
        m = magnitude[:, t].astype(np.float64)
        left = np.concatenate([edge, m[:, :-1]], 1)
        right = np.concatenate([m[:, 1:], edge], 1)
        peaks = np.flatnonzero((m > left) & (m >= right))
        starts = (m > left) & (np.roll(left, 1, 1) >= left)  # the bin before is a valley
        starts[:, 0], starts[:, 1] = True, False
        region = np.cumsum(starts.reshape(-1)) - 1
        a, b, c = left.reshape(-1)[peaks], m.reshape(-1)[peaks], right.reshape(-1)[peaks]
        inside = np.isfinite(a) & np.isfinite(c)
        with np.errstate(invalid="ignore"):
            bend = a - 2.0 * b + c
        bent = inside & (bend < 0.0)
        offset = np.zeros(len(peaks))
        offset[bent] = 0.5 * (a[bent] - c[bent]) / bend[bent]
        angle = phase[peaks] + 2.0 * math.pi * hop / n_fft * (peaks % bins + offset)
        angle = np.remainder(angle + math.pi, 2.0 * math.pi) - math.pi
        phase = angle[region]
        out[:, t] = (np.exp(1j * phase).reshape(channels, bins) * signs).astype(np.complex64)
    return out
