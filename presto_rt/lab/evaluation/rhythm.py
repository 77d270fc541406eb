"""Tempo estimation, and agreement of an estimate with the requested tempo.

Onset strength is the half-wave rectified difference of a log-mel spectrogram ("spectral flux", Bello et al. 2005). The
tempo is the period whose multiples have the highest mean autocorrelation (a comb, after Scheirer 1998), weighted by a
log-normal prior (Ellis 2007). Such estimators often err by an octave, so the agreement accepts octaves; the control
with shuffled captions measures the effect of that tolerance.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .musicnn import mel_matrix, mono

RATE, N_FFT, HOP, BANDS = 22050, 1024, 220, 64
FPS = RATE / HOP  # 100.2 frames per second
OCTAVES = (1.0, 2.0, 0.5, 3.0, 1.0 / 3.0)
TOLERANCE = 0.04
PRIOR_BPM, PRIOR_OCTAVES = 110.0, 1.5  # center and width of the prior


@lru_cache(maxsize=1)
def _mel() -> Tensor:
    return torch.from_numpy(mel_matrix(RATE, N_FFT, BANDS))


def onset_strength(samples: np.ndarray) -> np.ndarray:
    """Onset strength of mono samples (n,) at 22,050 Hz: (frames,) float32 at 100.2 Hz, without its moving average."""
    x = torch.as_tensor(np.ascontiguousarray(samples, dtype=np.float32))
    if x.numel() <= N_FFT:
        x = torch.nn.functional.pad(x, (0, N_FFT + 1 - x.numel()))
    spectrum = torch.stft(x, N_FFT, HOP, window=torch.hann_window(N_FFT), pad_mode="reflect", return_complex=True).abs()
    mel = _mel() @ spectrum
    # relative to the clip's peak, so that the onsets do not depend on its level
    logmel = torch.log1p(10.0 * mel / mel.amax().clamp_min(1e-9))
    lag = 2  # 20 ms: a frame's window spreads an attack over about two hops
    flux = (logmel[:, lag:] - logmel[:, :-lag]).clamp_min(0).sum(0).numpy()
    flux = np.concatenate([np.zeros(lag, dtype=np.float32), flux])
    width = int(FPS)
    average = np.convolve(np.pad(flux, width // 2, mode="edge"), np.ones(width) / width, mode="same")[width // 2 :][
        : len(flux)
    ]
    strength: np.ndarray = np.maximum(flux - average, 0).astype(np.float32)
    return strength


def pulse(onsets: np.ndarray, bpm: np.ndarray, beats: int = 6) -> np.ndarray:
    """Periodicity of onsets at each tempo: the mean autocorrelation at lags of 1..`beats` beats, at most 1.

    `onsets` is (frames,) at 100.2 Hz, `bpm` (tempi,) in beats a minute; the result is (tempi,) float64.
    """
    x = onsets.astype(np.float64)
    x = x - x.mean()
    n = len(x)
    spectrum = np.abs(np.fft.rfft(x, 2 * n)) ** 2
    acf: np.ndarray = np.fft.irfft(spectrum)[:n] / np.arange(n, 0, -1)  # unbiased: longer lags have fewer pairs
    if acf[0] <= 0:
        return np.zeros(len(bpm))
    acf = acf / acf[0]
    period = 60.0 * FPS / bpm
    multiples = np.arange(1, beats + 1)[:, None] * period[None]
    usable = multiples < 0.75 * n  # beyond that the unbiased estimate is noise
    values = np.where(usable, np.interp(multiples, np.arange(n), acf), 0.0)
    mean: np.ndarray = values.sum(0) / np.maximum(usable.sum(0), 1)
    return mean


def tempo(clip: np.ndarray, rate: int = 44100) -> float:
    """Estimate the tempo of a clip, (channels, n) or (n,), in beats a minute, 40 to 240; NaN without a pulse."""
    onsets = onset_strength(mono(clip, rate, RATE))
    grid = 40.0 * 2.0 ** np.arange(0, np.log2(6.0), 1 / 240)  # steps of 0.3 %
    strength = pulse(onsets, grid)
    score = strength * np.exp(-0.5 * (np.log2(grid / PRIOR_BPM) / PRIOR_OCTAVES) ** 2)
    best = int(np.argmax(score))
    return float(grid[best]) if score[best] > 0 else float("nan")


def tempo_agrees(estimate: float, target: float, octaves: tuple[float, ...] = OCTAVES) -> bool:
    """Return True if the estimate is within 4 % of the target tempo times one of `octaves`; False for NaN."""
    return any(abs(estimate - target * octave) <= TOLERANCE * target * octave for octave in octaves)
