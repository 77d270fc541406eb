"""Build a data set in parallel: deterministic for a seed, and resumable after any interruption."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ...errors import InvalidInputError, PrestoError
from .captions import captions
from .compose import compose, plan_piece
from .grooves import check_mma
from .manifest import KINDS, SAMPLE_RATE, SPLITS, Item, Manifest, collect, split_of, write_item
from .midi import to_bytes
from .recordings import build_recordings
from .render import render, soundfont
from .tunes import load_tunes

REFRESH_SECONDS = 120.0
SOURCE = "composed by presto_rt.data; rendered with MuseScore_General (MIT)"


def build(
    root: str | os.PathLike[str],
    hours: float = 25.0,
    seed: int = 0,
    workers: int = 2,
    recordings: bool = True,
    progress: bool = True,
) -> Manifest:
    """Build a data set of `hours` of captioned music, and optionally the recordings, and return its manifest.

    The same seed and hours give the same manifest hash with any number of workers. Finished items below `root` are
    kept, and each file is written atomically, so an interrupted build can be repeated. `manifest.json` is refreshed
    every 120 s; its "complete" becomes true at the end, unless a piece failed.

    Args:
        root: folder of the data set; created if it does not exist.
        hours: hours of rendered music, without the recordings.
        seed: seed of every random draw.
        workers: processes; 1 builds in this process.
        recordings: also fetch and cut the Debian recordings.
        progress: print progress to stderr and a summary to stdout.

    Returns:
        The saved manifest.

    Raises:
        InvalidInputError: hours or workers are out of range, or `root` holds a data set of another seed.
        MissingDependencyError: mma, the soundfont, tinysoundfont or music21 is not installed.
        PrestoError: a worker process died.
    """
    folder = Path(root)
    if not 0 <= hours < math.inf or workers < 1:
        raise InvalidInputError(f"hours must be 0 or more and workers 1 or more, got {hours:g} and {workers}")
    check_mma()
    soundfont()
    load_tunes()
    _check_seed(folder, seed)
    indices = _piece_indices(seed, hours)
    if recordings:
        build_recordings(folder, lambda line: _print(line, progress))
    (folder / "rendered").mkdir(parents=True, exist_ok=True)
    known = {item.id: item for item in collect(folder)}
    missing = [i for i in indices if _id(seed, i) not in known]
    Manifest(folder, seed, _select(known, seed, indices), complete=not missing).save()
    started, rendered, saved = time.monotonic(), 0.0, time.monotonic()
    failed = 0
    for result in _run([(str(folder), seed, i) for i in missing], workers):
        if isinstance(result, str):
            failed += 1
            print(result, file=sys.stderr)
            continue
        known[result.id] = result
        rendered += result.seconds
        if time.monotonic() - saved > REFRESH_SECONDS:
            Manifest(folder, seed, _select(known, seed, indices), complete=False).save()
            saved = time.monotonic()
        if progress:
            _print_progress(rendered, time.monotonic() - started, hours, known)
    manifest = Manifest(folder, seed, _select(known, seed, indices), complete=not failed)
    manifest.save()
    _print("\n" + summary(manifest), progress)
    if failed:
        print(f"{failed} pieces failed (see above); repeat the command to try them again", file=sys.stderr)
    return manifest


def make_item(root: Path, seed: int, index: int) -> Item:
    """Compose, render and write one piece, and return its record.

    The audio is 44.1 kHz stereo PCM16 WAV; the record is written after it, so a record implies a complete file.

    Raises MissingDependencyError without mma, soundfont or tinysoundfont, PrestoError if MMA fails.
    """
    import numpy as np
    import soundfile

    piece = compose(seed, index)
    texts = captions(piece, seed)
    midi = to_bytes(piece.score, piece.bpm)
    content = hashlib.sha256(midi + json.dumps(texts).encode()).hexdigest()
    samples = render(piece.score, piece.bpm, piece.offset, piece.seconds, int(content[:8], 16))
    path = root / "rendered" / f"{index // 256:03d}" / f"{piece.id}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pcm = np.round(samples.T * 32767).astype(np.int16)
    soundfile.write(temporary, pcm, SAMPLE_RATE, subtype="PCM_16", format="WAV")
    temporary.replace(path)
    item = Item(
        id=piece.id,
        kind=piece.kind,
        split=split_of(piece.composition),
        path=str(path.relative_to(root)),
        seconds=samples.shape[1] / SAMPLE_RATE,
        composition=piece.composition,
        content=content,
        source=SOURCE,
        licence="Apache-2.0",
        captions=texts,
        instruments=piece.instruments,
        style=piece.style,
        bpm=float(piece.bpm),
        beats_per_bar=piece.beats_per_bar,
        beat_offset_seconds=piece.offset,
        key=piece.key.name if piece.key else None,
        mode=piece.key.mode if piece.key else None,
    )
    write_item(root, item)
    return item


def summary(manifest: Manifest) -> str:
    """Table of hours by kind and split, with the number of items and the hash."""
    lines = [f"{'':12}" + "".join(f"{split:>9}" for split in SPLITS) + "    hours"]
    for kind in KINDS:
        row = [manifest.hours(kind, split) for split in SPLITS]
        lines.append(f"{kind:12}" + "".join(f"{h:9.2f}" for h in row) + f"{sum(row):9.2f}")
    state = "complete" if manifest.complete else "incomplete"
    lines.append(f"{len(manifest.items)} items, {manifest.hours():.2f} hours, {state}, hash {manifest.hash[:16]}")
    return "\n".join(lines)


def _run(jobs: list[tuple[str, int, int]], workers: int) -> Iterator[Item | str]:
    """Yield the item or error message of each job as it finishes, in `workers` processes if there are several."""
    if workers == 1 or len(jobs) < 2:
        yield from map(_run_job, jobs)
        return
    # Spawned, not forked: numerical libraries may have started threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_ignore_interrupts) as pool:
        try:
            for future in as_completed([pool.submit(_run_job, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise PrestoError(
                "a worker process died, possibly out of memory; repeat the command with fewer --workers to continue"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run_job(job: tuple[str, int, int]) -> Item | str:
    root, seed, index = job
    try:
        return make_item(Path(root), seed, index)
    except PrestoError as error:
        return f"piece {index}: {error}"


def _ignore_interrupts() -> None:
    """Ignore SIGINT in a worker; the parent process handles it and ends the pool."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _piece_indices(seed: int, hours: float) -> list[int]:
    """Indices of the pieces that make up `hours`; kinds are drawn independently, so every prefix is representative."""
    total = 0.0
    indices: list[int] = []
    while total < hours * 3600:
        indices.append(len(indices))
        total += plan_piece(seed, indices[-1]).seconds
    return indices


def _id(seed: int, index: int) -> str:
    return f"{plan_piece(seed, index).kind}-{seed}-{index:06d}"


def _select(known: dict[str, Item], seed: int, indices: list[int]) -> list[Item]:
    """All recordings and the pieces of this build, ordered by id."""
    ids = {_id(seed, i) for i in indices}
    return [item for _, item in sorted(known.items()) if item.kind == "recording" or item.id in ids]


def _check_seed(folder: Path, seed: int) -> None:
    try:
        existing = json.loads((folder / "manifest.json").read_text())["seed"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a damaged manifest is rewritten
        return
    if existing != seed:
        raise InvalidInputError(
            f"{folder} holds a data set of seed {existing}; pass --seed {existing} or another --root"
        )


def _print_progress(rendered: float, elapsed: float, hours: float, known: dict[str, Item]) -> None:
    speed = rendered / max(elapsed, 1e-9)
    done = sum(i.seconds for i in known.values() if i.kind != "recording") / 3600
    remaining = max(0.0, hours - done) * 3600 / max(speed, 1e-9)
    filled = round(24 * min(1.0, done / max(hours, 1e-9)))
    bar = "#" * filled + "-" * (24 - filled)
    end = "\r" if sys.stderr.isatty() else "\n"
    countdown = f"{int(remaining // 60)}:{int(remaining % 60):02d} left"
    line = f"[{bar}] {done:6.2f} of {hours:g} h  {speed:5.0f}x real time  {countdown}"
    print(line, end=end, file=sys.stderr, flush=True)


def _print(line: str, show: bool) -> None:
    if show:
        print(line, flush=True)
