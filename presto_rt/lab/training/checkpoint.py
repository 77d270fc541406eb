"""Checkpoints of training runs: one safetensors file each, replaced atomically, with JSON metadata in its header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import OutputError, WeightsError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def run_checkpoint(run_dir: str | Path) -> Path:
    """Path of the checkpoint in a run folder of the base trainer or of a distillation."""
    return Path(run_dir) / "checkpoint.safetensors"


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and metadata to one safetensors file, atomically.

    The file is written beside the target, flushed to disk and renamed over it: after a kill at any moment, `path` holds
    either the previous or the new checkpoint, complete.

    Args:
        path: target file; missing folders are created.
        tensors: tensors by name, of any dtype and device; stored contiguous.
        meta: JSON-serializable metadata, stored in the file's header.

    Raises:
        OutputError: the folder or file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(path.name + ".tmp*"):
            stale.unlink()
        copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(copies, temporary, metadata={"meta": json.dumps(dict(meta))})
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write checkpoint {path}: {error}") from error


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors by name on the CPU, metadata) of a file written by `save_checkpoint`.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no checkpoint at {path}; check the run folder, or start without --resume")
    try:
        with safe_open(path, framework="pt") as handle:
            meta = json.loads((handle.metadata() or {}).get("meta", "{}"))
            names = handle.keys()
            return {name: handle.get_tensor(name) for name in names}, meta
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"checkpoint {path} is damaged ({error}); delete it and resume from another one") from error


def checkpoint_meta(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint without reading its tensors.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(json.loads((handle.metadata() or {}).get("meta", "{}")))
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"checkpoint {path} is missing or damaged ({error}); check the run folder") from error


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors renamed to `prefix.name`, for storing several modules in one checkpoint."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint named `prefix.name`, by `name`: the inverse of `with_prefix`."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str = "optim") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into (tensors named `prefix.<parameter>.<key>`, JSON-serializable remainder)."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"plain": scalars, "groups": state["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], prefix: str = "optim"
) -> None:
    """Load the state saved by `pack_optimizer` into `optimizer`, whose parameters must be in the same order."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["plain"].items()}
    for name, value in without_prefix(prefix, tensors).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": list(rest["groups"])})


def saved_name(option: Field[Any]) -> str:
    """Key of an option in checkpoints: its metadata's "saved_as" for options renamed since, else its name."""
    return str(option.metadata.get("saved_as", option.name))


def saved_options(options: DataclassInstance) -> dict[str, Any]:
    """Options as a JSON-serializable object under the keys that checkpoints use."""
    return {saved_name(option): getattr(options, option.name) for option in fields(options)}
