"""Weights folders: config.json beside safetensors shards under 15 MB, every file checked by its SHA-256 when loaded.

config.json   {"format": 1, "model": {...}, "codec": {...}, "defaults": {...}, "training": {...},
               "layers": {"70%": schedule, ...}, "quality": [{"steps", "layers", "kid"}, ...],
               "files": {"dit-00001.safetensors": {"sha256": ..., "bytes": ...}, ...}}
<part>-NNNNN.safetensors   tensors of one part ("dit", "codec"), named as in `presto_rt.models`

A file's name may lead into a folder beside ("../nano/codec-00001.safetensors"): two models then share that part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OutputError, WeightsError

FORMAT = 1
SHARD_BYTES = 14_500_000
_HERE = Path(__file__).parents[1] / "weights"


@dataclass
class Weights:
    """A loaded folder: its config.json without the file table, and the tensors of each part by name.

    digest: SHA-256 of config.json, which holds the shards' own; it names the weights.
    """

    config: dict[str, Any]
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    digest: str = ""


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in _HERE.glob("*/config.json"))


def locate(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder of a shipped model, or the folder itself. Raises WeightsError, listing what there is."""
    text = os.fspath(name_or_folder)
    for folder in (_HERE / text if text and os.sep not in text and not text.startswith(".") else None, Path(text)):
        if folder is not None and text and (folder / "config.json").is_file():
            return folder
    names = ", ".join(shipped()) or "none"
    raise WeightsError(f"no model {text!r}: shipped models are {names}; or name a folder that holds config.json")


def load(name_or_folder: str | os.PathLike[str]) -> Weights:
    """Read and check a weights folder. Raises WeightsError naming the file that is missing or damaged."""
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
    weights = Weights(config, digest=hashlib.sha256(text.encode()).hexdigest())
    for name, expected in files.items():
        path = folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise WeightsError(f"{path} is missing ({error.strerror}); restore it") from error
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise WeightsError(f"{path} is damaged (its SHA-256 differs from config.json); restore it")
        try:
            weights.parts.setdefault(Path(name).name.rpartition("-")[0], {}).update(load_bytes(data))
        except SafetensorError as error:
            raise WeightsError(f"{path} is no safetensors file ({error}); restore it") from error
    return weights


def narrow(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices in `dtype`; vectors, scalars and integers as they are."""
    return {k: v.to(dtype) if v.is_floating_point() and v.dim() > 1 else v for k, v in tensors.items()}


def save(folder: str | os.PathLike[str], config: dict[str, Any], parts: dict[str, dict[str, Tensor]],
         shared: dict[str, str | os.PathLike[str]] | None = None,
         copied: dict[str, str | os.PathLike[str]] | None = None) -> None:  # fmt: skip
    """Write a weights folder, each tensor in its own dtype.

    shared: parts that are not written but stay in another weights folder or shipped model, for both; copied: parts
    whose files are taken over from there byte by byte, so that what shares them with this folder still can. A new
    folder is written beside the old one and renamed into its place. Raises OutputError, also where the folder holds
    something else than weights, which would be lost; WeightsError where such a part is not there.
    """
    from safetensors.torch import save as to_bytes

    target = Path(folder).resolve()
    _check_replaceable(target)
    fresh, old = (target.with_name(target.name + suffix) for suffix in (".new", ".old"))
    shutil.rmtree(fresh, ignore_errors=True)
    files: dict[str, dict[str, Any]] = {}
    for part, source in (shared or {}).items():
        if locate(source).resolve() == target:
            raise WeightsError(f"{target} cannot share {part!r} with itself; let its files be copied instead")
        lead = Path(os.path.relpath(locate(source).resolve(), target))
        files |= {(lead / name).as_posix(): entry for name, entry in _files(part, source, own=True).items()}
    try:
        fresh.mkdir(parents=True)
        for part, source in (copied or {}).items():
            for name, entry in _files(part, source).items():
                shutil.copyfile(locate(source) / name, fresh / Path(name).name)
                files[Path(name).name] = entry
        for part, tensors in parts.items():
            stored = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            for number, shard in enumerate(_shards(stored), 1):
                name, data = f"{part}-{number:05d}.safetensors", to_bytes(shard)
                (fresh / name).write_bytes(data)
                files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        text = json.dumps({"format": FORMAT, **config, "files": files}, indent=1)
        (fresh / "config.json").write_text(text + "\n")
        for kept in target.glob("*.md") if target.is_dir() else ():
            shutil.copy2(kept, fresh)
        shutil.rmtree(old, ignore_errors=True)
        if target.is_dir():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write weights to {target}: {error.strerror or error}") from error


def _check_replaceable(folder: Path) -> None:
    """Raises OutputError where a folder holds something that `save` did not write."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        ours = "files" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise OutputError(f"{folder} holds something else than weights, which would be lost; choose another folder")


def _files(part: str, source: str | os.PathLike[str], own: bool = False) -> dict[str, dict[str, Any]]:
    """The rows of a part in the file table of `source`; own: only of files that lie there and are not shared
    themselves. Raises WeightsError where there is none."""
    folder = locate(source)
    table = json.loads((folder / "config.json").read_text())["files"]
    found = {n: row for n, row in table.items() if Path(n).name.startswith(f"{part}-") and not (own and "/" in n)}
    if not found:
        raise WeightsError(f"{folder} has no part {part!r}{' of its own to share' if own else ''}")
    return found


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, value in tensors.items():
        if value.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = value
        room -= value.nbytes
    return shards
