"""Manifest of a data set: one record per audio file, written atomically, with a hash of the content.

The hash covers ids, MIDI bytes and captions of rendered pieces and source bytes of recordings, never sample values.
The same seed therefore gives the same hash with any number of workers and on any processor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...errors import InvalidInputError

VERSION = 1
SAMPLE_RATE = 44100  # of all audio files, in Hz
KINDS = ("solo", "duo", "band", "recording")
SPLITS = ("train", "val", "test")


@dataclass
class Item:
    """Record of one audio file.

    Times are in seconds from the start of the file; `beat_offset_seconds` is the time of the first downbeat. `content`
    is the SHA-256 of the source of the sound; for recordings, the cut follows it. Fields that are unknown for
    recordings are empty or None. Field names are those of the JSON records on disk.
    """

    id: str
    kind: str
    split: str
    path: str
    seconds: float
    composition: str
    content: str
    source: str
    licence: str
    captions: list[str] = field(default_factory=list)
    instruments: list[str] = field(default_factory=list)
    style: str | None = None
    bpm: float | None = None
    beats_per_bar: int | None = None
    beat_offset_seconds: float | None = None
    key: str | None = None
    mode: str | None = None

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Item:
        """Build an item from a JSON object; unknown fields are ignored.

        Raises InvalidInputError if a required field is missing.
        """
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{k: v for k, v in record.items() if k in known})
        except TypeError as error:
            raise InvalidInputError(
                f"manifest record {record.get('id', '?')!r} is incomplete ({error}); rebuild the data set"
            ) from error


@dataclass
class Manifest:
    """Items of a data set below `root`; `complete` is False during a build and after failed pieces."""

    root: Path
    seed: int
    items: list[Item]
    complete: bool = True
    version: int = VERSION

    @property
    def hash(self) -> str:
        """SHA-256 over (id, content) of all items, independent of their order."""
        digest = hashlib.sha256()
        for item in sorted(self.items, key=lambda i: i.id):
            digest.update(f"{item.id} {item.content}\n".encode())
        return digest.hexdigest()

    def hours(self, kind: str | None = None, split: str | None = None) -> float:
        """Return the hours of audio of a kind and split; None selects all."""
        selected = (i for i in self.items if kind in (None, i.kind) and split in (None, i.split))
        return sum(i.seconds for i in selected) / 3600

    def save(self) -> Path:
        """Write `root/manifest.json` atomically and return its path."""
        record = {
            "version": self.version,
            "seed": self.seed,
            "hash": self.hash,
            "complete": self.complete,
            "items": [asdict(i) for i in self.items],
        }
        path = self.root / "manifest.json"
        write_atomic(path, json.dumps(record, indent=0).encode())
        return path


def load_manifest(root: str | os.PathLike[str]) -> Manifest:
    """Read `root/manifest.json`.

    Raises InvalidInputError if the file is missing, damaged, or of another version.
    """
    path = Path(root) / "manifest.json"
    if not path.is_file():
        raise InvalidInputError(f"no data set at {root}; build one with `presto-rt lab data build --root {root}`")
    try:
        record = json.loads(path.read_text())
        if record.get("version") != VERSION:
            raise InvalidInputError(
                f"{path} has version {record.get('version')}, expected {VERSION}; rebuild the data set"
            )
        items = [Item.from_dict(r) for r in record["items"]]
        return Manifest(Path(root), record["seed"], items, record.get("complete", True))
    except InvalidInputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{path} is damaged ({error}); repeat `presto-rt lab data build --root {root}`, which keeps the audio"
        ) from error


def collect(root: Path, folders: Iterable[str] = ("recordings", "rendered")) -> list[Item]:
    """Read the records beside the audio files, ordered by id; a record is written only after its audio is complete."""
    found: list[Item] = []
    for folder in folders:
        found += [Item.from_dict(json.loads(path.read_text())) for path in (root / folder).glob("**/*.json")]
    return sorted(found, key=lambda i: i.id)


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file by renaming a temporary one, so that no reader sees a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(payload)
    os.replace(temporary, path)


def write_item(root: Path, item: Item) -> None:
    """Write the record of a complete audio file as JSON beside it."""
    path = (root / item.path).with_suffix(".json")
    write_atomic(path, json.dumps(asdict(item), indent=0).encode())


def fraction(text: str) -> float:
    """Return a hash of `text` as a number in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split_of(composition: str, val: float = 0.05, test: float = 0.05) -> str:
    """Return the split of a composition from its name alone, so that all its renderings share a split.

    `val` and `test` are the fractions of compositions in these splits.
    """
    position = fraction("split " + composition)
    return "test" if position < test else "val" if position < test + val else "train"
