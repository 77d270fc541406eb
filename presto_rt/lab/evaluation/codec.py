"""Evaluate the reconstructions of a codec beside Opus at several bit rates.

Clips are (2, n) float32 at 44.1 kHz. `measure` compares two clips; `evaluate_codec` runs the codec and Opus on groups
of held-out clips; bench/codec.py writes the JSON and the figures of docs/codec.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
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
    """STFT magnitudes of samples (channels, n): (channels, bins, frames), where a full-scale sine has magnitude 1.

    The window is Hann, the hop n_fft / 4.
    """
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
      right, with a floor of -90 dB;
    - stft: spectral convergence |S - S'| / |S| (Frobenius norms) of left and right, averaged over FFT sizes 512, 1024,
      2048 and 4096;
    - si_sdr_db: scale-invariant signal-to-distortion ratio, about -30 dB or less for a codec that does not code phase;
    - high_db: mean absolute difference of the level in 8-16 kHz, over frames of 46 ms;
    - side_db: mean absolute difference of the side-to-mid ratio in 40 mel bands, over blocks of 0.37 s.

    Raises InvalidInputError for other shapes and clips of fewer than 4096 frames.
    """
    if original.shape != copy.shape or original.ndim != 2 or original.shape[0] != 2 or original.shape[1] < 4096:
        raise InvalidInputError(
            f"clips must be two (2, n) arrays of the same length n >= 4096, got {original.shape} and {copy.shape}"
        )
    x, y = (torch.from_numpy(np.ascontiguousarray(clip)).float() for clip in (original, copy))
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
    """Encode and decode a clip (2, n) with Opus at `kilobits` kb/s, aligned and of the same length.

    Raises MissingDependencyError without opus-tools.
    """
    if not (shutil.which("opusenc") and shutil.which("opusdec")):
        raise MissingDependencyError("opusenc and opusdec are not installed; run: apt-get install opus-tools")
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        source, coded, decoded = (os.path.join(folder, name) for name in ("in.wav", "coded.opus", "out.wav"))
        soundfile.write(source, clip.T, SAMPLE_RATE, subtype="PCM_16")
        subprocess.run(["opusenc", "--quiet", "--bitrate", str(kilobits), source, coded], check=True)
        subprocess.run(["opusdec", "--quiet", "--rate", str(SAMPLE_RATE), coded, decoded], check=True)
        decoded_clip = soundfile.read(decoded, dtype="float32", always_2d=True)[0].T[:, : clip.shape[1]]
    return np.pad(decoded_clip, ((0, 0), (0, clip.shape[1] - decoded_clip.shape[1])))


def held_out(root: str | os.PathLike[str], group: str, count: int, seconds: float, seed: int = 0) -> list[np.ndarray]:
    """Load clips of the test split, at most one of each item, in random order; silent crops are skipped.

    Args:
        root: folder of the data set.
        group: "rendered" or "recorded".
        count: largest number of clips.
        seconds: length of each clip.
        seed: seed of items and crops.

    Returns:
        Clips (2, n) float32.
    """
    kinds = ("recording",) if group == "recorded" else ("solo", "duo", "band")
    frames = int(seconds * SAMPLE_RATE)
    candidates = [i for i in items(load_manifest(root), "test", kinds) if frames_of(i) >= frames]
    rng = np.random.default_rng(seed)
    clips = []
    for index in rng.permutation(len(candidates)):
        start = int(rng.integers(0, frames_of(candidates[index]) - frames + 1))
        clip = read_audio(candidates[index], start, frames, root=root)
        if np.square(clip).mean() > 1e-6:  # -60 dBFS
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
    """Measure the codec and Opus on groups of clips.

    Args:
        codec: the codec.
        groups: clips (2, n) by name of the group.
        griffin_lim: numbers of Griffin-Lim iterations to decode with.
        opus_rates: bit rates of Opus in kb/s; left out, with a note, without opus-tools.
        noise: levels of Gaussian noise on the latents, as fractions of their standard deviation 0.5.
        progress: show a progress bar.

    Returns:
        {"systems": {name: {group: measures}}, "notes": [...]}, with means over clips of the measures in MEASURES, and
        the 95 % bootstrap interval of mel_db as "mel_db_interval".
    """
    systems: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    notes: list[str] = []
    if opus_rates and not (shutil.which("opusenc") and shutil.which("opusdec")):
        notes.append("Opus is left out: opusenc and opusdec are not installed")
        opus_rates = ()
    for rate in opus_rates:
        systems[f"Opus {rate} kb/s"] = partial(opus, kilobits=rate)
    for iterations in griffin_lim:
        systems[f"codec, {iterations} Griffin-Lim"] = partial(_round_trip, codec, griffin_lim=iterations)
    default = codec.config.griffin_lim
    for level in noise:
        name = f"codec, {default} Griffin-Lim, noise {level} sigma"
        systems[name] = partial(_round_trip, codec, griffin_lim=default, noise=level)
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
        generator = torch.Generator().manual_seed(0)
        latents = latents + noise * 0.5 * torch.randn(latents.shape, generator=generator).to(latents)
    decoded: np.ndarray = codec.decode(latents, clip.shape[1], griffin_lim)[0].cpu().numpy()
    return decoded


def time_codec(codec: Codec, seconds: float = 32.0, repeats: int = 5) -> dict[str, float]:
    """Median wall seconds of each stage for `seconds` of stereo.

    The stages are the encoder, the decoder network, and decoding with 0, 2 and 4 Griffin-Lim iterations.
    """
    samples = 0.1 * torch.randn(1, 2, int(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    latents = codec.encode(samples)

    def network() -> None:
        with torch.inference_mode():
            codec.decode_features(latents)

    tasks: dict[str, Callable[[], object]] = {"encode": partial(codec.encode, samples), "decode network": network}
    for n in (0, 2, 4):
        tasks[f"decode, {n} Griffin-Lim"] = partial(codec.decode, latents, griffin_lim=n)
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
    """Format the results of `evaluate_codec` as a markdown table: one row for each system, groups side by side."""
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
    """Draw the spectrograms of stereo clips (2, n), by title, one above the other, into a PNG file.

    Raises MissingDependencyError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("spectrograms need matplotlib; run: pip install matplotlib") from error
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
