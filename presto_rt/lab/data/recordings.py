"""Fetch recordings under free licenses from Debian's game packages, decode them and cut them into pieces.

The recordings are not part of the repository. They train at most the codec; `marsshooter-data` and
`singularity-music` are held out as the test set of real music.
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
from .manifest import SAMPLE_RATE, Item, split_of, write_item

PIECE_SECONDS = 45.0
SHORTEST_SONG = 20.0
SILENCE_RMS = 10 ** (-55 / 20)
VAL_FRACTION = 0.04

TEST_PACKAGES = ("marsshooter-data", "singularity-music")

# License of each package's music, used if its copyright file has no machine-readable paragraph for the file.
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
    """A song of a package: its path in the package, the encoded stems that sum to it, and its license."""

    package: str
    path: str
    stems: list[bytes]
    license: str

    @property
    def name(self) -> str:
        """Name of the song in file names and splits."""
        stem = re.sub(r"\.(ogg|opus)$", "", self.path)
        parts = stem.split("/")[-2:]
        return f"{self.package}-" + re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def songs(package: str, downloads: Path) -> Iterator[Song]:
    """Fetch a Debian package, which is kept in `downloads`, and yield its songs one at a time.

    Raises MissingDependencyError without apt-get or dpkg-deb, OutputError if the package cannot be fetched or unpacked.
    """
    archive = fetch_package(package, downloads)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        unpack = 'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2"'
        try:
            subprocess.run(["bash", "-o", "pipefail", "-c", unpack, "bash", str(archive), scratch], check=True)
        except subprocess.CalledProcessError as error:
            raise OutputError(f"cannot unpack {archive}; delete it and repeat the build") from error
        root = Path(scratch)
        notices = [p for p in root.glob("usr/share/doc/*/copyright") if p.is_file()]
        rules = license_rules(notices[0].read_text(errors="replace")) if notices else []
        for path, data in sorted(_audio_files(root), key=lambda pair: pair[0]):
            if path.endswith("/guitar.ogg"):
                continue  # a stem of the song.ogg beside it
            stems = [data]
            lead = root / path.replace("/song.ogg", "/guitar.ogg")
            if path.endswith("/song.ogg") and lead.is_file():
                stems.append(lead.read_bytes())
            yield Song(package, path, stems, license_of(rules, path) or PACKAGES[package])


def decode(encoded: bytes) -> np.ndarray:
    """Decode Ogg Vorbis or Opus bytes to (2, frames) float32 at 44.1 kHz; mono is duplicated."""
    import soundfile
    from scipy.signal import resample_poly

    samples, rate = soundfile.read(io.BytesIO(encoded), dtype="float32", always_2d=True)
    stereo = samples[:, :2].T if samples.shape[1] > 1 else np.repeat(samples.T, 2, axis=0)
    if rate != SAMPLE_RATE:
        divisor = np.gcd(rate, SAMPLE_RATE)
        stereo = resample_poly(stereo, SAMPLE_RATE // divisor, rate // divisor, axis=1).astype(np.float32)
    return np.ascontiguousarray(stereo)


def cut(samples: np.ndarray, piece_seconds: float = PIECE_SECONDS) -> list[tuple[int, int]]:
    """Return bounds (start, stop), in sample frames, of equal pieces of about `piece_seconds`, without silent ones."""
    frames = samples.shape[1]
    count = max(1, round(frames / (piece_seconds * SAMPLE_RATE)))
    edges = np.linspace(0, frames, count + 1).astype(int)
    bounds = [(int(a), int(b)) for a, b in pairwise(edges)]
    return [(a, b) for a, b in bounds if float(np.sqrt(np.mean(samples[:, a:b] ** 2))) > SILENCE_RMS]


def add_song(root: Path, song: Song) -> list[Item]:
    """Decode a song, write its pieces (PCM16 WAV) and their records below `root/recordings`, and return the records.

    Songs shorter than 20 s are skipped.
    """
    import soundfile

    samples = decode(song.stems[0])
    for encoded in song.stems[1:]:
        stem = decode(encoded)
        length = min(samples.shape[1], stem.shape[1])
        samples = samples[:, :length] + stem[:, :length]
    if samples.shape[1] < SHORTEST_SONG * SAMPLE_RATE:
        return []
    peak = float(np.abs(samples).max())
    if peak > 0.99:
        samples *= 0.99 / peak
    source_hash = hashlib.sha256(b"".join(song.stems)).hexdigest()
    split = "test" if song.package in TEST_PACKAGES else split_of(song.name, val=VAL_FRACTION, test=0.0)
    folder = root / "recordings" / song.package
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
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
            licence=song.license,
        )
        write_item(root, item)
        pieces.append(item)
    return pieces


def build_recordings(root: Path, report: Callable[[str], None] = print) -> None:
    """Fetch all packages and write their pieces; finished packages are skipped.

    `report` receives one line for each package. Raises the errors of `songs`, and OutputError for a package without
    songs.
    """
    downloads = root / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        marker = root / "recordings" / package / ".done"
        if marker.is_file():
            continue
        items = [item for song in songs(package, downloads) for item in add_song(root, song)]
        if not items:
            raise OutputError(f"the package {package} contains no songs; omit the recordings with --no-recordings")
        marker.write_text(f"{len(items)}\n")
        report(f"{package}: {sum(i.seconds for i in items) / 60:.0f} minutes, {len(items)} pieces")


def fetch_package(package: str, downloads: Path) -> Path:
    """Download a Debian package into `downloads`, unless it is there, and return its path.

    Raises MissingDependencyError without apt-get or dpkg-deb, OutputError if the download fails.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MissingDependencyError(
                f"{tool} is needed to fetch recordings; use Debian, or build with --no-recordings"
            )
    found = sorted(downloads.glob(f"{package}_*.deb"))
    if not found:
        with tempfile.TemporaryDirectory(dir=downloads) as scratch:  # an interrupted download leaves a partial file
            command = ["apt-get", "download", "-q", package]
            result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            fetched = sorted(Path(scratch).glob(f"{package}_*.deb"))
            if result.returncode or not fetched:
                reason = (result.stderr.strip().splitlines() or ["no package file"])[-1]
                raise OutputError(
                    f"cannot fetch {package} ({reason}); run `apt-get update`, or build with --no-recordings"
                )
            found = [path.rename(downloads / path.name) for path in fetched]
    return found[-1]


def _audio_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path in the package, encoded bytes) of each Ogg file, including those in .pk3 (zip) archives."""
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


def license_rules(text: str) -> list[tuple[str, str]]:
    """Parse a machine-readable Debian copyright file into (pattern, license) pairs, in the order of the file."""
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
            name = fields["License"].strip().splitlines()[0]
            rules += [(pattern, name) for pattern in fields["Files"].split()]
    return rules


def license_of(rules: list[tuple[str, str]], path: str) -> str | None:
    """Return the license of the last rule that matches a file's path in the package, or None.

    Patterns are paths of the source package, where the music lies below data/ or base/; this prefix is dropped.
    """
    found = None
    for pattern, name in rules:
        tail = re.sub(r"^(data|base)/", "", pattern)
        if pattern == "*" or (tail not in ("*", "") and fnmatch(path, "*/" + tail)):
            found = name
    return found
