"""Sets of clips for an evaluation: real clips, generated clips, codec reconstructions and noise controls."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...diffusion.noise import normal
from ...errors import InvalidInputError, MissingDependencyError
from ...models.codec import Codec
from ...models.config import HOP
from ...pipeline import Pipeline
from ..data.dataset import SAMPLE_RATE, frames_of, read_audio
from ..data.manifest import Item
from .adherence import ClipRecord, requested_bpm, requested_key

log = logging.getLogger("presto_rt")
RENDERED = ("solo", "duo", "band")  # kinds of items that have captions


class LazyClips(Sequence[np.ndarray]):
    """Sequence of `count` clips (2, n) float32 that are loaded or generated on access by `load(index)`."""

    def __init__(self, load: Callable[[int], np.ndarray], count: int) -> None:
        self._load, self._count = load, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._count:
            raise IndexError(i)
        return self._load(i)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._load(i) for i in range(self._count))


def _hash(text: str, n: int) -> int:
    """Hash a text to a number in 0..n-1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % n


def choose_records(all_items: Sequence[Item], count: int, seconds: float, seed: int = 0) -> list[ClipRecord]:
    """Choose items, crops and captions, deterministically for a set of items and a seed.

    No item is repeated before all are used. The prompt is one of the captions that name most of tempo and key, since
    only named facts can be evaluated.

    Args:
        all_items: items to choose from, in any order.
        count: number of records.
        seconds: length of the crops.
        seed: seed of items, crops and captions.

    Returns:
        Fields of the items with `start_frame`, the first sample frame of the crop, and `prompt`.

    Raises:
        InvalidInputError: no item has a caption and is longer than `seconds`.
    """
    frames = round(seconds * SAMPLE_RATE)
    usable = [i for i in all_items if i.captions and frames_of(i) > frames]
    if not usable:
        raise InvalidInputError(
            f"no captioned item is longer than {seconds:g} s; build a larger data set or request shorter clips"
        )
    usable.sort(key=lambda i: _hash(f"{seed} {i.id}", 2**62))
    records = []
    for n in range(count):
        item, repeat = usable[n % len(usable)], n // len(usable)
        name = f"{seed} {item.id} {repeat}"
        # the first and last half second may hold silence before the first note or after the last
        margin = min(SAMPLE_RATE // 2, (frames_of(item) - frames) // 4)
        start = margin + _hash("start " + name, max(1, frames_of(item) - frames - 2 * margin))
        record = asdict(item)
        options = [{**record, "prompt": caption} for caption in sorted(item.captions)]
        facts = [(requested_bpm(r) is not None) + (requested_key(r) is not None) for r in options]
        best = [r for r, f in zip(options, facts, strict=True) if f == max(facts)]
        chosen = best[(_hash(f"caption {seed} {item.id}", len(best)) + repeat) % len(best)]
        records.append({**chosen, "start_frame": start})
    return records


def real_clips(records: Sequence[ClipRecord], root: Path, seconds: float) -> LazyClips:
    """Crops of the data set's audio that the records describe."""
    frames = round(seconds * SAMPLE_RATE)

    def load(i: int) -> np.ndarray:
        record = {k: v for k, v in records[i].items() if k not in ("prompt", "start_frame")}
        return read_audio(Item.from_dict(record), records[i]["start_frame"], frames, root=root)

    return LazyClips(load, len(records))


def cached_clips(clips: LazyClips, folder: Path, names: Sequence[str]) -> LazyClips:
    """Cache clips as 16-bit FLAC files `folder`/NAME.flac: written on the first access, read afterwards."""

    def load(i: int) -> np.ndarray:
        file = folder / f"{names[i]}.flac"
        if not file.is_file():
            save_clip(file, clips[i])
        return load_clip(file)

    return LazyClips(load, len(clips))


def save_clip(file: Path, samples: np.ndarray) -> None:
    """Write a clip (2, n) float32 as a 16-bit FLAC file, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    _soundfile().write(unfinished, samples.T, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    unfinished.replace(file)


def load_clip(file: Path) -> np.ndarray:
    """Read a clip (2, n) float32 from a file."""
    return np.ascontiguousarray(_soundfile().read(file, dtype="float32", always_2d=True)[0].T)


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise MissingDependencyError("storing clips needs soundfile; run: pip install soundfile") from error
    return soundfile


def reconstructions(codec: Codec, clips: Sequence[np.ndarray]) -> LazyClips:
    """Encode and decode clips with the codec: the upper bound of any generator that uses it."""

    def load(i: int) -> np.ndarray:
        with torch.inference_mode():
            samples = torch.from_numpy(np.ascontiguousarray(clips[i]))[None].to(_device(codec))
            return _to_numpy(codec.decode(codec.encode(samples), frames=samples.shape[-1])[0])

    return LazyClips(load, len(clips))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _to_numpy(samples: Tensor) -> np.ndarray:
    array: np.ndarray = samples.float().cpu().numpy()
    return array


def gaussian_latents(codec: Codec, count: int, seconds: float, seed: int = 0) -> LazyClips:
    """Decode white Gaussian latents with the data's standard deviation: the lower bound, without a model."""
    frames = round(seconds * SAMPLE_RATE)
    shape = (1, -(-frames // HOP), codec.config.latent_channels)

    def load(i: int) -> np.ndarray:
        with torch.inference_mode():
            latents = 0.5 * normal(seed, shape, stream=i).to(_device(codec))
            return _to_numpy(codec.decode(latents, frames=frames)[0])

    return LazyClips(load, count)


def shaped_noise(clips: Sequence[np.ndarray], count: int, seconds: float, seed: int = 0) -> LazyClips:
    """Draw Gaussian noise with the average spectrum and level of at most 32 clips, independent left and right."""
    frames = round(seconds * SAMPLE_RATE)
    power = np.zeros((2, frames // 2 + 1))
    for i in range(min(len(clips), 32)):
        power += np.abs(np.fft.rfft(clips[i], frames, axis=1)) ** 2 / min(len(clips), 32)
    # smooth over a third of an octave, since an average of at most 32 clips still shows the peaks of their notes
    bins = np.arange(power.shape[1])
    low, high = (bins * 2 ** (-1 / 6)).astype(int), np.minimum((bins * 2 ** (1 / 6)).astype(int) + 1, power.shape[1])
    sums = np.concatenate([np.zeros((2, 1)), power.cumsum(1)], axis=1)
    shape = np.sqrt((sums[:, high] - sums[:, low]) / (high - low) / frames)

    def load(i: int) -> np.ndarray:
        white = np.random.default_rng([seed, i]).standard_normal((2, frames))
        return np.fft.irfft(np.fft.rfft(white, axis=1) * shape, frames, axis=1).astype(np.float32)

    return LazyClips(load, count)


def generated_clips(
    model: Pipeline,
    prompts: Sequence[str],
    folder: Path,
    *,
    seconds: float,
    seed: int = 0,
    batch: int = 8,
    **options: Any,
) -> LazyClips:
    """Generate a clip for each prompt and cache it as a 16-bit FLAC file; an interrupted run resumes.

    The file names contain a hash of weights, precision, backend, prompt, seed, length and options.

    Args:
        model: loaded pipeline.
        prompts: one prompt for each clip.
        folder: folder of the files.
        seconds: length of each clip.
        seed: seed of the first clip; clip i uses `seed` + i.
        batch: clips in one call of `generate`.
        options: further arguments of `Pipeline.generate`.

    Returns:
        Clips (2, n) float32, read from the files on access.
    """
    frames = round(seconds * SAMPLE_RATE)
    origin = {"weights": model.model.digest, **model.backend.fingerprint()}
    settings = json.dumps({"seconds": seconds, **origin, **options}, sort_keys=True, default=str)
    files = [folder / f"{i:04d}-{_digest(f'{prompt}|{seed}|{settings}')}.flac" for i, prompt in enumerate(prompts)]
    start_time, finished = time.monotonic(), 0
    for start in range(0, len(prompts), batch):
        part = range(start, min(start + batch, len(prompts)))
        if all(files[i].is_file() for i in part):
            continue
        clips = model.generate([prompts[i] for i in part], seconds=seconds, seed=seed + start, **options)
        for i, audio in zip(part, clips, strict=True):
            samples = audio.samples if audio.samples.shape[0] == 2 else np.repeat(audio.samples, 2, 0)
            save_clip(files[i], samples[:, :frames])
        finished += len(part)
        seconds_each = (time.monotonic() - start_time) / finished
        log.info("generated %d of %d clips, %.1f s each", part.stop, len(prompts), seconds_each)

    return LazyClips(lambda i: load_clip(files[i]), len(prompts))


def fingerprint(*modules: nn.Module) -> str:
    """Hash the weights of modules and the source files of their classes, so that cached clips match the code."""
    digest = hashlib.sha256()
    classes: set[str] = set()
    for module in modules:
        classes |= {type(part).__module__ for part in module.modules()}
        for key, value in sorted(module.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for name in sorted(c for c in classes if c.startswith("presto_rt.")):
        digest.update(Path(str(sys.modules[name].__file__)).read_bytes())
    return digest.hexdigest()[:12]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def codec_controls(
    codec: Codec,
    held_out: LazyClips,
    records: Sequence[ClipRecord],
    folder: Path,
    *,
    noise_count: int,
    seconds: float,
    seed: int,
) -> dict[str, LazyClips]:
    """Make the sets that depend on the codec: reconstructions and decoded Gaussian latents, cached in `folder`.

    Args:
        codec: the codec.
        held_out: real clips to reconstruct.
        records: records of the real clips, which name the cached files.
        folder: folder of the cached files.
        noise_count: number of clips of Gaussian latents.
        seconds: length of each clip.
        seed: seed of the Gaussian latents.

    Returns:
        Clips by the name of the set.
    """
    stamp = fingerprint(codec)
    names = [f"{stamp}-{r['id']}-{r['start_frame']}-{seconds:g}" for r in records]
    noises = [f"{stamp}-gaussian-{seed}-{i}-{seconds:g}" for i in range(noise_count)]
    return {
        "codec reconstruction": cached_clips(reconstructions(codec, held_out), folder, names),
        "Gaussian latents": cached_clips(gaussian_latents(codec, noise_count, seconds, seed), folder, noises),
    }
