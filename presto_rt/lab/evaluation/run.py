"""Judging a model on held-out captions: choose them, make every set of clips, keep the clips on disk, report."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InvalidInputError, MissingDependencyError
from ..data.dataset import SAMPLE_RATE, frames_of, items, load_manifest, read_audio
from ..data.manifest import Item
from .adherence import asked_bpm, asked_key
from .report import evaluate, write

log = logging.getLogger("presto_rt")
RENDERED = ("solo", "duo", "band")
JUDGES = ("musicnn", "basic_pitch", "onnxruntime", "prdc", "scipy")


class Lazy(Sequence[np.ndarray]):
    """Clips (2, n) float32 that are made when asked for, so that a set of hundreds need not lie in memory."""

    def __init__(self, make: Callable[[int], np.ndarray], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._count:
            raise IndexError(i)
        return self._make(i)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._make(i) for i in range(self._count))


def _draw(text: str, n: int) -> int:
    """A number in 0..n-1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % n


def choose(all_items: Sequence[Item], count: int, seconds: float, seed: int = 0) -> list[dict[str, Any]]:
    """`count` (item, crop, caption) records, the same for the same items: every item once before any comes again.

    Each record is the item's, plus `start_frame` and `prompt`: of its captions one of those that say most of tempo
    and key. Raises InvalidInputError when no item has a caption and is long enough.
    """
    frames = round(seconds * SAMPLE_RATE)
    usable = [i for i in all_items if i.captions and frames_of(i) > frames]
    if not usable:
        raise InvalidInputError(
            f"no captioned item of at least {seconds:g} s here; build the data set or ask for shorter clips"
        )
    usable.sort(key=lambda i: _draw(f"{seed} {i.id}", 2**62))
    records = []
    for n in range(count):
        item, again = usable[n % len(usable)], n // len(usable)
        name = f"{seed} {item.id} {again}"
        # the first and last half second may hold silence before the first note or after the last
        margin = min(SAMPLE_RATE // 2, (frames_of(item) - frames) // 4)
        start = margin + _draw("start " + name, max(1, frames_of(item) - frames - 2 * margin))
        record = asdict(item)
        said = [{**record, "prompt": caption} for caption in sorted(item.captions)]
        facts = [(asked_bpm(r) is not None) + (asked_key(r) is not None) for r in said]
        told = [r for r, f in zip(said, facts, strict=True) if f == max(facts)]  # what is not said cannot be checked
        chosen = told[(_draw(f"caption {seed} {item.id}", len(told)) + again) % len(told)]
        records.append({**chosen, "start_frame": start})
    return records


def real_clips(records: Sequence[dict[str, Any]], root: Path, seconds: float) -> Lazy:
    """The recordings that the records are about, at their crops."""
    frames = round(seconds * SAMPLE_RATE)

    def make(i: int) -> np.ndarray:
        record = {k: v for k, v in records[i].items() if k not in ("prompt", "start_frame")}
        return np.asarray(
            read_audio(Item.from_dict(record), records[i]["start_frame"], frames, root=root), dtype=np.float32
        )

    return Lazy(make, len(records))


def kept(clips: Lazy, folder: Path, names: Sequence[str]) -> Lazy:
    """The same clips, written to 16-bit FLAC files `folder`/NAME.flac when first asked for and read from there ever
    after.
    """

    def make(i: int) -> np.ndarray:
        file = folder / f"{names[i]}.flac"
        if not file.is_file():
            save_clip(file, clips[i])
        return load_clip(file)

    return Lazy(make, len(clips))


def save_clip(file: Path, samples: np.ndarray) -> None:
    """Write a clip (2, n) as 16-bit FLAC; a killed run leaves no half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    _soundfile().write(unfinished, samples.T, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    unfinished.replace(file)


def load_clip(file: Path) -> np.ndarray:
    """A clip (2, n) float32 from a file."""
    return np.ascontiguousarray(_soundfile().read(file, dtype="float32", always_2d=True)[0].T)


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise MissingDependencyError("keeping clips needs soundfile: pip install soundfile") from error
    return soundfile


def reconstructions(codec: Any, clips: Sequence[np.ndarray]) -> Lazy:
    """Clips after the codec: what a perfect generator could reach."""
    import torch

    def make(i: int) -> np.ndarray:
        with torch.inference_mode():
            samples = torch.from_numpy(np.ascontiguousarray(clips[i]))[None].to(_device(codec))
            return codec.decode(codec.encode(samples), frames=samples.shape[-1])[0].float().cpu().numpy()

    return Lazy(make, len(clips))


def _device(module: Any) -> Any:
    return next(module.parameters()).device


def gaussian_latents(codec: Any, count: int, seconds: float, seed: int = 0) -> Lazy:
    """Decoded white Gaussian latents of the data's standard deviation: what sampling without a model would give."""
    import torch

    from ...diffusion.noise import normal
    from ...models.config import HOP

    frames = round(seconds * SAMPLE_RATE)

    def make(i: int) -> np.ndarray:
        with torch.inference_mode():
            latents = 0.5 * normal(seed, (1, -(-frames // HOP), 64), stream=i).to(_device(codec))
            return codec.decode(latents, frames=frames)[0].float().cpu().numpy()

    return Lazy(make, count)


def shaped_noise(clips: Sequence[np.ndarray], count: int, seconds: float, seed: int = 0) -> Lazy:
    """Gaussian noise with the clips' average spectrum and level, left and right independent."""
    frames = round(seconds * SAMPLE_RATE)
    power = np.zeros((2, frames // 2 + 1))
    for i in range(min(len(clips), 32)):
        power += np.abs(np.fft.rfft(clips[i], frames, axis=1)) ** 2 / min(len(clips), 32)
    # the average of a few clips still has their notes' peaks: smooth over a third of an octave
    bins = np.arange(power.shape[1])
    low, high = (bins * 2 ** (-1 / 6)).astype(int), np.minimum((bins * 2 ** (1 / 6)).astype(int) + 1, power.shape[1])
    sums = np.concatenate([np.zeros((2, 1)), power.cumsum(1)], axis=1)
    shape = np.sqrt((sums[:, high] - sums[:, low]) / (high - low) / frames)

    def make(i: int) -> np.ndarray:
        white = np.random.default_rng([seed, i]).standard_normal((2, frames))
        return np.fft.irfft(np.fft.rfft(white, axis=1) * shape, frames, axis=1).astype(np.float32)

    return Lazy(make, count)


def generated(
    model: Any, prompts: Sequence[str], folder: Path, *, seconds: float, seed: int = 0, batch: int = 8, **options: Any
) -> Lazy:
    """Clips that the model makes for the prompts, kept as 16-bit FLAC files in `folder`: a stopped run goes on where
    it was.

    The files' names hold a hash of weights, precision, backend, prompt, seed, length and options: a change of any makes
    new ones.
    """
    frames = round(seconds * SAMPLE_RATE)
    made_by = {"weights": fingerprint(model.dit, model.codec), "precision": model.precision, "backend": model.backend}
    settings = json.dumps({"seconds": seconds, **made_by, **options}, sort_keys=True, default=str)
    files = [folder / f"{i:04d}-{_digest(f'{prompt}|{seed}|{settings}')}.flac" for i, prompt in enumerate(prompts)]
    began, made = time.monotonic(), 0
    for start in range(0, len(prompts), batch):
        part = range(start, min(start + batch, len(prompts)))
        if all(files[i].is_file() for i in part):
            continue
        clips = model.generate([prompts[i] for i in part], seconds=seconds, seed=seed + start, **options)
        for i, audio in zip(part, clips, strict=True):
            samples = audio.samples if audio.samples.shape[0] == 2 else np.repeat(audio.samples, 2, 0)
            save_clip(files[i], samples[:, :frames])
        made += len(part)
        log.info("generated %d of %d clips, %.1f s each", part.stop, len(prompts), (time.monotonic() - began) / made)

    return Lazy(lambda i: load_clip(files[i]), len(prompts))


def fingerprint(*modules: Any) -> str:
    """A hash of modules' weights and of the source files of their classes: clips kept under it are of this very
    code.
    """
    import torch

    digest, classes = hashlib.sha256(), set()
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
    codec: Any, held_out: Lazy, records: Sequence[dict[str, Any]], folder: Path, few: int, seconds: float, seed: int
) -> dict[str, Lazy]:
    """The codec's reconstructions of the held-out clips, and decoded Gaussian latents, kept in `folder`."""
    stamp = fingerprint(codec)
    names = [f"{stamp}-{r['id']}-{r['start_frame']}-{seconds:g}" for r in records]
    noises = [f"{stamp}-gaussian-{seed}-{i}-{seconds:g}" for i in range(few)]
    return {
        "codec reconstruction": kept(reconstructions(codec, held_out), folder, names),
        "Gaussian latents": kept(gaussian_latents(codec, few, seconds, seed), folder, noises),
    }


def check_judges() -> None:
    """Raises MissingDependencyError where a judge's package is not installed: to be said before hours of generating."""
    if missing := [name for name in JUDGES if importlib.util.find_spec(name) is None]:
        raise MissingDependencyError(
            f"the judges need {', '.join(missing)}: pip install 'presto-rt[eval]', then pip install --no-deps "
            "musicnn==0.1.0 basic-pitch==0.4.0"
        )


def evaluate_model(
    model: Any,
    data_root: str | Path,
    count: int = 200,
    seconds: float = 10.0,
    out: str | Path = "runs/evaluation",
    *,
    name: str = "generated",
    others: Mapping[str, Any] | None = None,
    reference_count: int = 400,
    controls: int = 48,
    seed: int = 0,
    batch: int = 8,
    workers: int | None = None,
    split: str = "test",
    **options: Any,
) -> dict[str, Any]:
    """Judge a model on `count` held-out captions and write `evaluation.json` and `evaluation.md` into `out`.

    model: has `generate(prompts, seconds=, seed=, **options) -> list[Audio]` and `codec`; None judges the data alone
    (the ceilings). others: more models by name, judged on the same captions; the reconstruction is by the first one's
    codec. Controls: the held-out clips themselves, the codec's reconstruction of them, `controls` clips each of
    decoded Gaussian latents and of noise with the music's spectrum; and every set with its captions shuffled. The
    reference is `reference_count` clips of the other splits. Generated clips are kept below `out`, and what was
    heard in any clip in `data_root`/heard by the hash of its samples, so a run can be repeated or resumed. Returns
    what was written. Raises InvalidInputError, and MissingDependencyError before any work where a judge is not installed.
    """
    check_judges()
    root, folder = Path(data_root), Path(out)
    manifest = load_manifest(root)
    records = choose(items(manifest, split, RENDERED), count, seconds, seed)
    rest = [i for i in items(manifest, ("train", "val"), RENDERED) if i.split != split]
    reference_records = choose(rest, reference_count, seconds, seed + 1)
    held_out, reference = real_clips(records, root, seconds), real_clips(reference_records, root, seconds)
    few = min(controls, count)
    sets: dict[str, Sequence[np.ndarray]] = {"real, held out": held_out}
    if model is not None:
        prompts = [r["prompt"] for r in records]
        for label, each in {name: model, **(others or {})}.items():
            sets[label] = generated(
                each, prompts, folder / "clips" / label, seconds=seconds, seed=seed, batch=batch, **options
            )
        sets |= codec_controls(model.codec, held_out, records, root / "heard" / "clips", few, seconds, seed)
    sets["shaped noise"] = shaped_noise(reference, few, seconds, seed)
    total, heard, began = sum(map(len, sets.values())) + len(reference), [0], time.monotonic()

    def progress(n: int) -> None:
        heard[0] += n
        if heard[0] % 100 == 0 or heard[0] == total:
            log.info("heard %d of %d clips in %.0f s", heard[0], total, time.monotonic() - began)

    result = evaluate(
        sets,
        records,
        reference,
        reference_meta=reference_records,
        workers=workers,
        keep=root / "heard",
        progress=progress,
    )
    result["settings"] = {
        "count": count,
        "seconds": seconds,
        "seed": seed,
        "split": split,
        "data": manifest.hash,
        **options,
    }
    result["wall_seconds"] = {"judging": round(time.monotonic() - began, 1)}
    write(result, folder)
    return result
