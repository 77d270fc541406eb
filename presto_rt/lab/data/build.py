"""Building a data set: parallel, deterministic for a seed, and resumable after any kind of end."""

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
from .compose import compose, plan
from .grooves import check_mma
from .manifest import KINDS, SPLITS, Item, Manifest, collect, split_of, write_item
from .midi import to_bytes
from .recordings import build_recordings
from .render import SAMPLE_RATE, render, soundfont
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
    """Make `hours` of captioned music (and fetch the recordings) below `root`; what is there already is kept.

    The same seed and hours give the same manifest hash with any number of workers. Every item appears whole or not
    at all; `manifest.json` is refreshed about every two minutes and says "complete" at the end, unless a piece could
    not be made.

    Raises MissingDependencyError without mma, soundfont, tinysoundfont or music21; InvalidInputError for a root of another seed.
    """
    folder = Path(root)
    if not 0 <= hours < math.inf or workers < 1:
        raise InvalidInputError(f"hours must be 0 or more and workers 1 or more, not {hours:g} and {workers}")
    check_mma()
    soundfont()
    load_tunes()
    _check_seed(folder, seed)
    wanted = _indices(seed, hours)
    if recordings:
        build_recordings(folder, lambda line: _say(line, progress))
    (folder / "rendered").mkdir(parents=True, exist_ok=True)
    known = {item.id: item for item in collect(folder)}
    todo = [i for i in wanted if _id(seed, i) not in known]
    Manifest(folder, seed, _chosen(known, seed, wanted), complete=not todo).save()
    started, rendered, saved = time.monotonic(), 0.0, time.monotonic()
    failed = 0
    for item in _results([(str(folder), seed, i) for i in todo], workers):
        if isinstance(item, str):
            failed += 1
            print(item, file=sys.stderr)
            continue
        known[item.id] = item
        rendered += item.seconds
        if time.monotonic() - saved > REFRESH_SECONDS:
            Manifest(folder, seed, _chosen(known, seed, wanted), complete=False).save()
            saved = time.monotonic()
        _progress(rendered, started, hours, known, progress)
    manifest = Manifest(folder, seed, _chosen(known, seed, wanted), complete=not failed)
    manifest.save()
    _say(("\n" if progress else "") + summary(manifest), progress)
    if failed:
        print(f"{failed} pieces could not be made (see above); the same command tries them again", file=sys.stderr)
    return manifest


def make_item(root: Path, seed: int, index: int) -> Item:
    """Compose, render and write piece `index` (WAV PCM16, then its record) and return the record."""
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
    """How many hours of what, one line a kind."""
    lines = [f"{'':12}" + "".join(f"{split:>9}" for split in SPLITS) + "    hours"]
    for kind in KINDS:
        row = [manifest.hours(kind, split) for split in SPLITS]
        lines.append(f"{kind:12}" + "".join(f"{h:9.2f}" for h in row) + f"{sum(row):9.2f}")
    state = "complete" if manifest.complete else "incomplete"
    lines.append(f"{len(manifest.items)} items, {manifest.hours():.2f} hours, {state}, hash {manifest.hash[:16]}")
    return "\n".join(lines)


def _results(jobs: list[tuple[str, int, int]], workers: int) -> Iterator[Item | str]:
    """Items (or what went wrong) as they are finished: here with one worker, else in that many processes."""
    if workers == 1 or len(jobs) < 2:
        yield from map(_make, jobs)
        return
    # Spawned, not forked: numerical libraries may have started threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_quiet) as pool:
        try:
            for done in as_completed([pool.submit(_make, job) for job in jobs]):
                yield done.result()
        except BrokenProcessPool as error:
            raise PrestoError("a worker died (out of memory?): run again with fewer --workers, it goes on") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _make(job: tuple[str, int, int]) -> Item | str:
    root, seed, index = job
    try:
        return make_item(Path(root), seed, index)
    except PrestoError as error:
        return f"piece {index}: {error}"


def _quiet() -> None:
    """Workers leave an interrupt to the parent, which ends them."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _indices(seed: int, hours: float) -> list[int]:
    """The pieces that make up `hours`; kinds are drawn independently, so every prefix is representative."""
    total = 0.0
    chosen: list[int] = []
    while total < hours * 3600:
        chosen.append(len(chosen))
        total += plan(seed, chosen[-1]).seconds
    return chosen


def _id(seed: int, index: int) -> str:
    return f"{plan(seed, index).kind}-{seed}-{index:06d}"


def _chosen(known: dict[str, Item], seed: int, wanted: list[int]) -> list[Item]:
    """Recordings, and the pieces that belong to this build."""
    ids = {_id(seed, i) for i in wanted}
    return [item for _, item in sorted(known.items()) if item.kind == "recording" or item.id in ids]


def _check_seed(folder: Path, seed: int) -> None:
    try:
        other = json.loads((folder / "manifest.json").read_text())["seed"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a damaged one is written anew
        return
    if other != seed:
        raise InvalidInputError(f"{folder} holds a data set of seed {other}: give --seed {other} or another --root")


def _progress(rendered: float, started: float, hours: float, known: dict[str, Item], show: bool) -> None:
    if not show:
        return
    speed = rendered / max(time.monotonic() - started, 1e-9)
    done = sum(i.seconds for i in known.values() if i.kind != "recording") / 3600
    left = max(0.0, hours - done) * 3600 / max(speed, 1e-9)
    filled = round(24 * min(1.0, done / max(hours, 1e-9)))
    bar = "#" * filled + "-" * (24 - filled)
    end = "\r" if sys.stderr.isatty() else "\n"
    line = f"[{bar}] {done:6.2f} of {hours:g} h  {speed:5.0f}x real time  {int(left // 60)}:{int(left % 60):02d} left"
    print(line, end=end, file=sys.stderr, flush=True)


def _say(line: str, show: bool) -> None:
    if show:
        print(line, flush=True)
