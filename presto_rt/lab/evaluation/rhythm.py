"""Tempo of a clip, and whether it agrees with the one that was asked for.

Onset strength is the half-wave rectified growth of a log-mel spectrogram (Bello et al. 2005, "spectral flux"). Tempo
is the pulse period whose multiples all stand out in its autocorrelation (a comb, after Scheirer 1998), with a
log-normal preference for tempi that people tap to (Ellis 2007). Octave errors are the known weakness of every such
estimator, so agreement allows for them, and a control with shuffled captions tells what that leniency is worth.
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
PRIOR_BPM, PRIOR_OCTAVES = 110.0, 1.5  # centre and width of the preference


@lru_cache(maxsize=1)
def _mel() -> Tensor:
    return torch.from_numpy(mel_matrix(RATE, N_FFT, BANDS))


def onset_strength(samples: np.ndarray) -> np.ndarray:
    """Mono samples (n,) at 22,050 Hz -> onset strength (frames,) float32 at 100.2 Hz, its slow mean removed."""
    x = torch.as_tensor(np.ascontiguousarray(samples, dtype=np.float32))
    if x.numel() <= N_FFT:
        x = torch.nn.functional.pad(x, (0, N_FFT + 1 - x.numel()))
    spectrum = torch.stft(x, N_FFT, HOP, window=torch.hann_window(N_FFT), pad_mode="reflect", return_complex=True).abs()
    mel = _mel() @ spectrum
    # relative to the clip's own level, so that a quiet clip has the same onsets as a loud one
    logmel = torch.log1p(10.0 * mel / mel.amax().clamp_min(1e-9))
    lag = 2  # 20 ms: a frame's window spreads an attack over about two hops
    flux = (logmel[:, lag:] - logmel[:, :-lag]).clamp_min(0).sum(0).numpy()
    flux = np.concatenate([np.zeros(lag, dtype=np.float32), flux])
    width = int(FPS)
    slow = np.convolve(np.pad(flux, width // 2, mode="edge"), np.ones(width) / width, mode="same")[width // 2 :][
        : len(flux)
    ]
    return np.maximum(flux - slow, 0).astype(np.float32)


def pulse(onsets: np.ndarray, bpm: np.ndarray, beats: int = 6) -> np.ndarray:
    """How strongly onsets repeat at each tempo, (len(bpm),): mean autocorrelation at 1..`beats` beats, 1 =
    perfectly.
    """
    x = onsets.astype(np.float64)
    x = x - x.mean()
    n = len(x)
    spectrum = np.abs(np.fft.rfft(x, 2 * n)) ** 2
    acf = np.fft.irfft(spectrum)[:n] / np.arange(n, 0, -1)  # unbiased: few pairs at long lags
    if acf[0] <= 0:
        return np.zeros(len(bpm))
    acf = acf / acf[0]
    period = 60.0 * FPS / bpm
    multiples = np.arange(1, beats + 1)[:, None] * period[None]
    usable = multiples < 0.75 * n  # beyond that the unbiased estimate is noise
    values = np.where(usable, np.interp(multiples, np.arange(n), acf), 0.0)
    return values.sum(0) / np.maximum(usable.sum(0), 1)


def tempo(clip: np.ndarray, rate: int = 44100) -> float:
    """Tempo of a clip (channels, n) in beats per minute, 40 to 240; NaN if nothing repeats (silence, steady tones)."""
    onsets = onset_strength(mono(clip, rate, RATE))
    grid = 40.0 * 2.0 ** np.arange(0, np.log2(6.0), 1 / 240)  # steps of 0.3 %
    strength = pulse(onsets, grid)
    score = strength * np.exp(-0.5 * (np.log2(grid / PRIOR_BPM) / PRIOR_OCTAVES) ** 2)
    best = int(np.argmax(score))
    return float(grid[best]) if score[best] > 0 else float("nan")


def tempo_agrees(
    estimate: float, asked: float, tolerance: float = TOLERANCE, octaves: tuple[float, ...] = OCTAVES
) -> bool:
    """Whether the estimate is within `tolerance` of the asked tempo times one of `octaves`. NaN never agrees."""
    return any(abs(estimate - asked * octave) <= tolerance * asked * octave for octave in octaves)
