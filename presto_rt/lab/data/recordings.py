"""Real recordings under free licences, out of Debian's game packages: fetched, decoded and cut into pieces.

Nothing of them is ever committed. They train at most the codec; `marsshooter-data` and `singularity-music` train
nothing at all and are the real-music test set.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import numpy as np

from ...errors import MissingDependencyError, OutputError
from .manifest import Item, split_of, write_item

SAMPLE_RATE = 44100
PIECE_SECONDS = 45.0
SHORTEST_SONG = 20.0
SILENCE_RMS = 10 ** (-55 / 20)
VAL_FRACTION = 0.04

TEST_PACKAGES = ("marsshooter-data", "singularity-music")

# The licence of each package's music where its copyright file is free text without a paragraph for the file.
PACKAGES = {
    "wesnoth-1.16-music": "GPL-2+",
    "ufoai-music": "GPL-2+",
    "warzone2100-music": "GPL-2+",
    "supertux-data": "GPL-2+",
    "nexuiz-music": "GPL-2+",
    "colobot-common-sounds": "GPL-3+",
    "fretsonfire-songs-sectoid": "MIT",
    "fretsonfire-songs-muldjord": "CC-BY-SA-3.0",
    "singularity-music": "CC-BY-SA-3.0",
    "marsshooter-data": "CC-BY-SA-3.0",
}


@dataclass
class Song:
    """One song of a package: encoded stems that are summed (nearly always one), and its place in the package."""

    package: str
    path: str
    stems: list[bytes]
    licence: str

    @property
    def name(self) -> str:
        """A name for file names and splits."""
        stem = re.sub(r"\.(ogg|opus)$", "", self.path)
        parts = stem.split("/")[-2:]
        return f"{self.package}-" + re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def songs(package: str, downloads: Path) -> Iterator[Song]:
    """Fetch a Debian package (kept in `downloads`) and yield its songs, one at a time.

    Raises MissingDependencyError without apt-get or dpkg-deb, OutputError when the package cannot be fetched.
    """
    archive = _fetch(package, downloads)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        unpack = 'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2"'
        try:
            subprocess.run(["bash", "-o", "pipefail", "-c", unpack, "bash", str(archive), scratch], check=True)
        except subprocess.CalledProcessError as error:
            raise OutputError(f"cannot unpack {archive}: delete it and build again") from error
        root = Path(scratch)
        notices = [p for p in root.glob("usr/share/doc/*/copyright") if p.is_file()]
        rules = _licence_rules(notices[0].read_text(errors="replace")) if notices else []
        for path, data in sorted(_audio_files(root), key=lambda pair: pair[0]):
            if path.endswith("/guitar.ogg"):
                continue  # a stem of the song.ogg beside it
            stems = [data]
            lead = root / path.replace("/song.ogg", "/guitar.ogg")
            if path.endswith("/song.ogg") and lead.is_file():
                stems.append(lead.read_bytes())
            yield Song(package, path, stems, _licence(rules, path) or PACKAGES[package])


def decode(encoded: bytes) -> np.ndarray:
    """Decode Ogg Vorbis or Opus bytes to float32 (2, frames) at 44.1 kHz; mono is duplicated."""
    import soundfile
    from scipy.signal import resample_poly

    samples, rate = soundfile.read(io.BytesIO(encoded), dtype="float32", always_2d=True)
    stereo = samples[:, :2].T if samples.shape[1] > 1 else np.repeat(samples.T, 2, axis=0)
    if rate != SAMPLE_RATE:
        shared = np.gcd(rate, SAMPLE_RATE)
        stereo = resample_poly(stereo, SAMPLE_RATE // shared, rate // shared, axis=1).astype(np.float32)
    return np.ascontiguousarray(stereo)


def cut(samples: np.ndarray, piece_seconds: float = PIECE_SECONDS) -> list[tuple[int, int]]:
    """Bounds (start, stop) in frames of equal pieces of about `piece_seconds`, leaving out silent ones."""
    frames = samples.shape[1]
    count = max(1, round(frames / (piece_seconds * SAMPLE_RATE)))
    edges = np.linspace(0, frames, count + 1).astype(int)
    bounds = [(int(a), int(b)) for a, b in pairwise(edges)]
    return [(a, b) for a, b in bounds if float(np.sqrt(np.mean(samples[:, a:b] ** 2))) > SILENCE_RMS]


def add_song(root: Path, song: Song) -> list[Item]:
    """Decode a song, write its pieces (WAV PCM16) and their records below `root/recordings`, return the records."""
    import soundfile

    samples = decode(song.stems[0])
    for other in song.stems[1:]:
        lead = decode(other)
        length = min(samples.shape[1], lead.shape[1])
        samples = samples[:, :length] + lead[:, :length]
    if samples.shape[1] < SHORTEST_SONG * SAMPLE_RATE:
        return []
    peak = float(np.abs(samples).max())
    if peak > 0.99:
        samples *= 0.99 / peak
    source_hash = hashlib.sha256(b"".join(song.stems)).hexdigest()
    split = "test" if song.package in TEST_PACKAGES else split_of(song.name, val=VAL_FRACTION, test=0.0)
    folder = root / "recordings" / song.package
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, (start, stop) in enumerate(cut(samples)):
        name = f"rec-{song.name}-{number:02d}"
        path = folder / f"{name}.wav"
        temporary = path.with_suffix(".part")
        soundfile.write(temporary, samples[:, start:stop].T, SAMPLE_RATE, subtype="PCM_16", format="WAV")
        temporary.replace(path)
        item = Item(
            id=name,
            kind="recording",
            split=split,
            path=str(path.relative_to(root)),
            seconds=(stop - start) / SAMPLE_RATE,
            composition=song.name,
            content=f"{source_hash}:{start}:{stop}",
            source=f"{song.package}: {song.path}",
            licence=song.licence,
        )
        write_item(root, item)
        made.append(item)
    return made


def build_recordings(root: Path, say: Callable[[str], None] = print) -> list[Item]:
    """Fetch all packages and write their pieces; a package that is done is not done again."""
    downloads = root / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    made: list[Item] = []
    for package in PACKAGES:
        done = root / "recordings" / package / ".done"
        if done.is_file():
            continue
        items = [item for song in songs(package, downloads) for item in add_song(root, song)]
        if not items:
            raise OutputError(f"no songs found in the package {package}: leave recordings out with --no-recordings")
        done.write_text(f"{len(items)}\n")
        say(f"{package}: {sum(i.seconds for i in items) / 60:.0f} minutes, {len(items)} pieces")
        made += items
    return made


def _fetch(package: str, downloads: Path) -> Path:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MissingDependencyError(
                f"{tool} is needed to fetch recordings: use Debian, or build with --no-recordings"
            )
    found = sorted(downloads.glob(f"{package}_*.deb"))
    if not found:
        with tempfile.TemporaryDirectory(dir=downloads) as scratch:  # a killed download leaves half a file
            command = ["apt-get", "download", "-q", package]
            result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            fetched = sorted(Path(scratch).glob(f"{package}_*.deb"))
            if result.returncode or not fetched:
                reason = (result.stderr.strip().splitlines() or ["no package file"])[-1]
                raise OutputError(
                    f"cannot fetch {package} ({reason}): run `apt-get update`, or build with --no-recordings"
                )
            found = [path.rename(downloads / path.name) for path in fetched]
    return found[-1]


def _audio_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(path in the package, encoded bytes) of every Ogg file, also inside .pk3 (zip) archives."""
    for path in root.glob("**/*"):
        if not path.is_file() or path.is_symlink():
            continue
        if path.suffix in (".ogg", ".opus"):
            yield str(path.relative_to(root)), path.read_bytes()
        elif path.suffix == ".pk3":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith((".ogg", ".opus")):
                        yield f"{path.relative_to(root)}/{name}", archive.read(name)


def _licence_rules(text: str) -> list[tuple[str, str]]:
    """(pattern, licence) pairs of a machine-readable copyright file, in its order: the last that matches holds."""
    rules = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if match := re.match(r"([A-Za-z-]+):(.*)", line):
                name = match[1]
                fields[name] = match[2]
            elif name:
                fields[name] += "\n" + line
        if "Files" in fields and "License" in fields:
            licence = fields["License"].strip().splitlines()[0]
            rules += [(pattern, licence) for pattern in fields["Files"].split()]
    return rules


def _licence(rules: list[tuple[str, str]], path: str) -> str | None:
    """Patterns name paths of the source package; there the music lies below data/ or base/, which is dropped here."""
    found = None
    for pattern, licence in rules:
        tail = re.sub(r"^(data|base)/", "", pattern)
        if pattern == "*" or (tail not in ("*", "") and fnmatch(path, "*/" + tail)):
            found = licence
    return found
