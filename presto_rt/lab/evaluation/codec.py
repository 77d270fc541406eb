"""How close a codec's reconstruction is to the original, beside Opus at several bit rates.

Clips are held-out pieces: rendered ones and recordings, (2, n) float32 at 44.1 kHz. `measure` compares two clips;
`evaluate_codec` runs the codec and Opus over a data set's test split; bench/codec.py writes its JSON and pictures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...errors import InvalidInputError, MissingDependencyError
from ...models.codec import Codec
from ...models.spectral import N_FFT, SAMPLE_RATE, mel_filters
from ..data.dataset import frames_of, items, load_manifest, read_audio
from . import statistics

MEASURES = {
    "mel_db": "log-mel L1, dB",
    "stft": "multi-res STFT",
    "si_sdr_db": "SI-SDR, dB",
    "high_db": "8-16 kHz error, dB",
    "side_db": "side/mid error, dB",
}
OPUS_RATES = (12, 16, 24, 32, 48)
POWER_FLOOR = 1e-9  # -90 dB against a full-scale sine
BANDS = 80


def spectrum(clip: Tensor, n_fft: int = N_FFT) -> Tensor:
    """Magnitudes (channels, bins, frames) of (channels, n) samples; Hann, hop n_fft / 4; a full-scale sine has
    magnitude 1."""
    window = torch.hann_window(n_fft)
    return torch.stft(clip, n_fft, n_fft // 4, window=window, return_complex=True, pad_mode="constant").abs() * (
        4.0 / n_fft
    )


@cache
def _mels(count: int) -> Tensor:
    return torch.from_numpy(mel_filters(count)).float()


def _decibels(power: Tensor) -> Tensor:
    return 10.0 * torch.log10(power + POWER_FLOOR)


def measure(original: np.ndarray, copy: np.ndarray) -> dict[str, float]:
    """Distances between two stereo clips (2, n) of the same length, float32 at 44.1 kHz.

    - mel_db: mean absolute difference of log-power in 80 mel bands (20 Hz to 20 kHz, FFT 2048, hop 512) of left and
      right, floor -90 dB;
    - stft: mean over FFT 512, 1024, 2048, 4096 of spectral convergence, |S - S'| / |S| (Frobenius), left and right;
    - si_sdr_db: scale-invariant signal-to-distortion ratio. A codec that does not code phase has about -30 dB or less
      by design;
    - high_db: absolute difference of the level in 8-16 kHz, over frames of 46 ms, mean;
    - side_db: absolute difference of the side-to-mid level in 40 mel bands, averaged over 0.37 s, mean.
    """
    if original.shape != copy.shape or original.ndim != 2 or original.shape[0] != 2 or original.shape[1] < 4096:
        raise InvalidInputError(
            f"clips must be two (2, n) arrays of one length of at least 4096, got {original.shape} and {copy.shape}"
        )
    x, y = (
        torch.from_numpy(np.ascontiguousarray(original)).float(),
        torch.from_numpy(np.ascontiguousarray(copy)).float(),
    )
    sx, sy = spectrum(x), spectrum(y)
    px, py = sx.square(), sy.square()
    mels = _mels(BANDS)
    out = {"mel_db": (_decibels(mels @ px) - _decibels(mels @ py)).abs().mean().item()}
    ratios = []
    for n_fft in (512, 1024, 2048, 4096):
        a, b = (sx, sy) if n_fft == N_FFT else (spectrum(x, n_fft), spectrum(y, n_fft))
        ratios.append((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a).clamp_min(1e-9)).item())
    out["stft"] = float(np.mean(ratios))
    scale = (x * y).sum() / y.square().sum().clamp_min(1e-12)
    error = (x - scale * y).square().sum()
    out["si_sdr_db"] = (10.0 * torch.log10(((scale * y).square().sum() + 1e-12) / (error + 1e-12))).item()
    low, high = round(8000 * N_FFT / SAMPLE_RATE), round(16000 * N_FFT / SAMPLE_RATE)
    out["high_db"] = (_decibels(px[:, low:high].sum(1)) - _decibels(py[:, low:high].sum(1))).abs().mean().item()
    out["side_db"] = (_side_to_mid(x) - _side_to_mid(y)).abs().mean().item()
    return out


def _side_to_mid(clip: Tensor) -> Tensor:
    mid, side = spectrum((clip[0] + clip[1])[None] * 0.5), spectrum((clip[0] - clip[1])[None] * 0.5)
    power = [_mels(40) @ s[0].square() for s in (mid, side)]
    blocks = [torch.nn.functional.avg_pool1d(p[None], 32, ceil_mode=True)[0] for p in power]
    return _decibels(blocks[1]) - _decibels(blocks[0])


def opus(clip: np.ndarray, kilobits: int) -> np.ndarray:
    """The clip (2, n) after Opus at `kilobits` kb/s, aligned, same length. Raises MissingDependencyError where opus-tools
    is absent."""
    if not (shutil.which("opusenc") and shutil.which("opusdec")):
        raise MissingDependencyError("opusenc and opusdec are not found: install opus-tools to compare with Opus")
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        source, coded, decoded = (os.path.join(folder, name) for name in ("in.wav", "coded.opus", "out.wav"))
        soundfile.write(source, clip.T, SAMPLE_RATE, subtype="PCM_16")
        subprocess.run(["opusenc", "--quiet", "--bitrate", str(kilobits), source, coded], check=True)
        subprocess.run(["opusdec", "--quiet", "--rate", str(SAMPLE_RATE), coded, decoded], check=True)
        back = soundfile.read(decoded, dtype="float32", always_2d=True)[0].T[:, : clip.shape[1]]
    return np.pad(back, ((0, 0), (0, clip.shape[1] - back.shape[1])))


def held_out(root: str | os.PathLike[str], group: str, count: int, seconds: float, seed: int = 0) -> list[np.ndarray]:
    """`count` clips (2, n) of the test split, one for each item while they last: group "rendered" or "recorded"."""
    kinds = ("recording",) if group == "recorded" else ("solo", "duo", "band")
    frames = int(seconds * SAMPLE_RATE)
    long = [i for i in items(load_manifest(root), "test", kinds) if frames_of(i) >= frames]
    rng = np.random.default_rng(seed)
    clips = []
    for index in rng.permutation(len(long)):
        start = int(rng.integers(0, frames_of(long[index]) - frames + 1))
        clip = read_audio(long[index], start, frames, root=root)
        if np.square(clip).mean() > 1e-6:  # not silence
            clips.append(clip)
        if len(clips) == count:
            break
    return clips


def evaluate_codec(
    codec: Codec,
    groups: dict[str, Sequence[np.ndarray]],
    *,
    griffin_lim: Sequence[int] = (0, 2, 4),
    opus_rates: Sequence[int] = OPUS_RATES,
    noise: Sequence[float] = (0.1,),
    progress: bool = True,
) -> dict[str, Any]:
    """Mean measures of the codec and of Opus for each group of clips: {"systems": {name: {group: measures}}, "notes":
    [...]}, with the 95 % bootstrap interval of mel_db over clips.

    The codec appears once for each number of Griffin-Lim iterations, and with Gaussian noise of the given shares of
    the latents' standard deviation added. Opus is left out, with a note, where its tools are absent.
    """
    systems: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    notes: list[str] = []
    if opus_rates and not (shutil.which("opusenc") and shutil.which("opusdec")):
        notes.append("Opus is left out: opusenc and opusdec are not installed")
        opus_rates = ()
    for rate in opus_rates:
        systems[f"Opus {rate} kb/s"] = lambda clip, rate=rate: opus(clip, rate)
    for iterations in griffin_lim:
        systems[f"codec, {iterations} Griffin-Lim"] = lambda clip, n=iterations: _round_trip(codec, clip, n)
    best = codec.config.griffin_lim
    for level in noise:
        systems[f"codec, {best} Griffin-Lim, noise {level} sigma"] = lambda clip, s=level: _round_trip(
            codec, clip, best, s
        )
    results: dict[str, Any] = {}
    bar = tqdm(total=len(systems) * sum(map(len, groups.values())), desc="codec", unit="clip", disable=not progress)
    for name, system in systems.items():
        results[name] = {}
        for group, clips in groups.items():
            rows = []
            for clip in clips:
                rows.append(measure(clip, system(clip)))
                bar.update()
            values = {key: np.array([row[key] for row in rows]) for key in MEASURES}
            interval = statistics.mean(values["mel_db"])
            results[name][group] = {key: float(value.mean()) for key, value in values.items()}
            results[name][group]["mel_db_interval"] = [interval.low, interval.high]
    bar.close()
    return {"systems": results, "notes": notes}


def _round_trip(codec: Codec, clip: np.ndarray, griffin_lim: int, noise: float = 0.0) -> np.ndarray:
    latents = codec.encode(torch.from_numpy(clip)[None])
    if noise:
        draw = torch.Generator().manual_seed(0)
        latents = latents + noise * 0.5 * torch.randn(latents.shape, generator=draw).to(latents)
    return codec.decode(latents, clip.shape[1], griffin_lim)[0].cpu().numpy()


def time_codec(codec: Codec, seconds: float = 32.0, repeats: int = 5) -> dict[str, float]:
    """Median wall seconds for `seconds` of stereo: encode, decode network alone, and decode with 0, 2 and 4
    Griffin-Lim iterations."""
    samples = 0.1 * torch.randn(1, 2, int(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    latents = codec.encode(samples)

    def network() -> None:
        with torch.inference_mode():
            codec.decode_features(latents)

    tasks: dict[str, Callable[[], object]] = {"encode": lambda: codec.encode(samples), "decode network": network}
    for n in (0, 2, 4):
        tasks[f"decode, {n} Griffin-Lim"] = lambda n=n: codec.decode(latents, griffin_lim=n)
    out = {}
    for name, task in tasks.items():
        task()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            task()
            times.append(time.perf_counter() - start)
        out[name] = float(np.median(times))
    return out


def markdown(report: dict[str, Any]) -> str:
    """The report's table: one row for each system, every cell group by group."""
    groups = list(next(iter(report["systems"].values())))
    lines = [f"| {' / '.join(groups)} | " + " | ".join(MEASURES.values()) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, by_group in report["systems"].items():
        cells = [" / ".join(_cell(by_group[group], key) for group in groups) for key in MEASURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *report["notes"]]) + "\n"


def _cell(measures: dict[str, Any], key: str) -> str:
    text = f"{measures[key]:.2f}"
    if (interval := measures.get(f"{key}_interval")) is not None:
        text += f" ({interval[0]:.2f}-{interval[1]:.2f})"
    return text


def picture(path: str | os.PathLike[str], clips: dict[str, np.ndarray]) -> None:
    """Spectrograms of stereo clips (2, n) by title, one above the other, as PNG. Raises MissingDependencyError without
    matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("spectrogram pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7, 2.5 * len(clips)), dpi=64, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(clips), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, clip) in zip(axes, clips.items(), strict=True):
        level = 20.0 * np.log10(spectrum(torch.from_numpy(clip).mean(0, keepdim=True))[0].numpy() + 1e-5)
        duration = clip.shape[1] / SAMPLE_RATE
        axis.imshow(
            level,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=-90,
            vmax=-20,
            extent=(0, duration, 0, SAMPLE_RATE / 2000),
        )
        axis.set(title=name, ylabel="kHz", ylim=(0.05, 20))
        axis.set_yscale("symlog", linthresh=2)
        axis.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes[-1].set_xlabel("seconds")
    figure.savefig(path)
