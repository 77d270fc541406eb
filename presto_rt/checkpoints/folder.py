"""Weights folders: config.json beside safetensors shards under 15 MB, each verified by its SHA-256 when loaded.

config.json   {"format": 1, "model": {...}, "codec": {...}, "defaults": {...}, "training": {...},
               "layers": {"70%": schedule, ...}, "quality": [{"steps", "layers", "kid"}, ...],
               "files": {"dit-00001.safetensors": {"sha256": ..., "bytes": ...}, ...}}
<part>-NNNNN.safetensors   tensors of one part ("dit", "codec"), named as in `presto_rt.models`

A file name may lead into a neighboring folder ("../nano/codec-00001.safetensors"): two models then share that part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..errors import OutputError, WeightsError

DEFAULT_MODEL = "nano"  # name of the shipped model that `load` takes without a name
FORMAT = 1
SHARD_BYTES = 14_500_000

SHIPPED = Path(__file__).parents[1] / "weights"
# Models of the repository that are not in a wheel, which would be too large with them.
REPOSITORY_ONLY = ("nano-base",)


class FileEntry(TypedDict):
    """One row of the file table in config.json: SHA-256 in hexadecimal and size."""

    sha256: str
    bytes: int


@dataclass
class Checkpoint:
    """A loaded weights folder.

    Attributes:
        config: Contents of config.json without the file table.
        parts: Tensors of each part ("dit", "codec") by name.
        digest: SHA-256 of config.json, which holds the hashes of all shards; identifies the weights.
    """

    config: dict[str, Any]
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    digest: str = ""


def shipped() -> list[str]:
    """Return the names of the models that are installed with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def locate(name_or_folder: str | os.PathLike[str]) -> Path:
    """Return the folder of a shipped model, or the given folder. Raises WeightsError if neither holds a config.json."""
    text = os.fspath(name_or_folder)
    candidates = [Path(text)] if text else []
    if text and os.sep not in text and not text.startswith("."):
        candidates.insert(0, SHIPPED / text)
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    if text in REPOSITORY_ONLY:
        raise WeightsError(
            f"the model {text!r} is not in the installed package: clone the repository and name the folder "
            f"presto_rt/weights/{text} of the clone, or train the model there with `make model`"
        )
    names = ", ".join(shipped()) or "none"
    raise WeightsError(f"no model {text!r}: shipped models are {names}; or name a folder that holds config.json")


def load_folder(name_or_folder: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify a weights folder.

    Raises:
        WeightsError: The folder or a file of it is missing, damaged, or of another format; the message names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_bytes

    folder = locate(name_or_folder)
    try:
        text = (folder / "config.json").read_text()
        config = json.loads(text)
        files = config.pop("files")
        version = config["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder / 'config.json'} is damaged ({error}); restore it") from error
    if version != FORMAT:
        raise WeightsError(f"{folder} has weights of format {version}; this version reads format {FORMAT}")
    checkpoint = Checkpoint(config, digest=hashlib.sha256(text.encode()).hexdigest())
    for name, entry in files.items():
        path = folder / name
        data = _read_verified(path, entry)
        try:
            checkpoint.parts.setdefault(path.name.rpartition("-")[0], {}).update(load_bytes(data))
        except SafetensorError as error:
            raise WeightsError(f"{path} is no safetensors file ({error}); restore it") from error
    return checkpoint


def cast_matrices(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors with floating-point matrices in `dtype`; vectors, scalars and integers keep their dtype."""
    return {
        name: value.to(dtype) if value.is_floating_point() and value.dim() > 1 else value
        for name, value in tensors.items()
    }


def save_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    shared: Mapping[str, str | os.PathLike[str]] | None = None,
    copied: Mapping[str, str | os.PathLike[str]] | None = None,
) -> None:
    """Write a weights folder, each tensor in its own dtype.

    The new folder is written beside an existing one and renamed into its place; markdown files are kept.

    Args:
        folder: Folder to write. An existing one must be empty or a weights folder.
        config: Entries of config.json other than "format" and "files".
        parts: Tensors to write, by part and name.
        shared: Parts that stay in another weights folder or shipped model, by part; both folders use the same files.
        copied: Parts whose files are copied byte by byte from another weights folder, by part, so that a folder that
            shares them with this one remains valid.

    Raises:
        OutputError: The folder cannot be written, or holds anything other than weights.
        WeightsError: A shared or copied part does not exist.
    """
    target = Path(folder).resolve()
    _check_replaceable(target)
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    files: dict[str, FileEntry] = {}
    for part, source in (shared or {}).items():
        files |= _shared_files(part, source, target)
    try:
        fresh.mkdir(parents=True)
        for part, source in (copied or {}).items():
            for name, entry in _files(part, source).items():
                shutil.copyfile(locate(source) / name, fresh / Path(name).name)
                files[Path(name).name] = entry
        for part, tensors in parts.items():
            files |= _write_shards(fresh, part, tensors)
        text = json.dumps({"format": FORMAT, **config, "files": files}, indent=1)
        (fresh / "config.json").write_text(text + "\n")
        _replace(target, fresh)
    except OSError as error:
        raise OutputError(f"cannot write weights to {target}: {error.strerror or error}") from error


def _read_verified(path: Path, expected: FileEntry) -> bytes:
    """Return the contents of a file. Raises WeightsError if it is missing or its SHA-256 differs."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} is missing ({error.strerror}); restore it") from error
    if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise WeightsError(f"{path} is damaged (its SHA-256 differs from config.json); restore it")
    return data


def _check_replaceable(folder: Path) -> None:
    """Raise OutputError if a folder holds anything that `save_folder` did not write."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        replaceable = "files" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        replaceable = False
    if not replaceable:
        raise OutputError(f"{folder} holds something else than weights, which would be lost; choose another folder")


def _replace(target: Path, fresh: Path) -> None:
    """Rename a fresh folder into the place of an existing one, whose markdown files it takes over."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():
        for document in target.glob("*.md"):
            shutil.copy2(document, fresh)
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _write_shards(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> dict[str, FileEntry]:
    """Write the tensors of a part and return the rows of its files."""
    from safetensors.torch import save as to_bytes

    entries: dict[str, FileEntry] = {}
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    for number, shard in enumerate(_shards(stored), 1):
        name, data = f"{part}-{number:05d}.safetensors", to_bytes(shard)
        (folder / name).write_bytes(data)
        entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return entries


def _shared_files(part: str, source: str | os.PathLike[str], target: Path) -> dict[str, FileEntry]:
    """Return the rows of a part that stays in `source`, their names relative to `target`."""
    origin = locate(source).resolve()
    if origin == target:
        raise WeightsError(f"{target} cannot share {part!r} with itself; let its files be copied instead")
    relative = Path(os.path.relpath(origin, target))
    return {(relative / name).as_posix(): entry for name, entry in _files(part, source, own=True).items()}


def _files(part: str, source: str | os.PathLike[str], own: bool = False) -> dict[str, FileEntry]:
    """Return the rows of a part in the file table of `source`; with `own`, only files that lie in that folder.

    Raises WeightsError if there are none.
    """
    folder = locate(source)
    table: dict[str, FileEntry] = json.loads((folder / "config.json").read_text())["files"]
    rows = {
        name: entry
        for name, entry in table.items()
        if Path(name).name.startswith(f"{part}-") and not (own and "/" in name)
    }
    if not rows:
        raise WeightsError(f"{folder} has no part {part!r}{' of its own to share' if own else ''}")
    return rows


def _shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Divide tensors, in order, into shards of at most SHARD_BYTES unless one tensor alone is larger."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, value in tensors.items():
        if value.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = value
        room -= value.nbytes
    return shards
