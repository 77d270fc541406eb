"""Pieces that every trainer shares: averaged weights, crash-proof checkpoints, logs, a clean stop, a time-budget
schedule.

A trainer here has a budget in minutes, not in steps. `Stopper.progress()` runs from 0 to 1 over that budget,
`schedule()` turns it into a learning-rate factor, so that a run always lands on its final learning rate, whatever the
machine's speed was.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import InvalidInputError, OutputError, WeightsError


def schedule(progress: float, *, warmup: float = 0.02, final: float = 0.02, shape: str = "cosine") -> float:
    """Learning-rate factor in (0, 1] at `progress` in [0, 1] of the budget.

    Linear warm-up over the first `warmup` of the budget, then a decay to `final`: "cosine", or "linear".
    Raises InvalidInputError on an unknown shape.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    rest = (progress - warmup) / max(1.0 - warmup, 1e-9)
    if shape == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * rest))
    if shape == "linear":
        return final + (1.0 - final) * (1.0 - rest)
    raise InvalidInputError(f"unknown schedule shape {shape!r}: use 'cosine' or 'linear'")


class Stopper:
    """Says when a run is over: at its deadline, or after SIGINT or SIGTERM.

    `minutes` is the whole budget; `used_seconds` is what earlier runs of the same training have used of it. `limit`:
    minutes after which this run stops with its budget unspent, to go on later. Use it as a context manager: signal
    handlers are installed on entry and put back on exit (only in the main thread, where Python allows it).
    """

    def __init__(self, minutes: float, used_seconds: float = 0.0, limit: float | None = None) -> None:
        if not minutes > 0:
            raise InvalidInputError(f"minutes must be above 0, got {minutes}")
        self.budget_seconds = minutes * 60.0
        self.limit_seconds = math.inf if limit is None else limit * 60.0
        self.used_before = used_seconds
        self.signalled = False
        self._start = time.monotonic()
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        with contextlib.suppress(ValueError):  # not the main thread: the deadline alone decides
            for sig in (signal.SIGINT, signal.SIGTERM):
                self._old[sig] = signal.signal(sig, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for sig, handler in self._old.items():
            signal.signal(sig, handler)
        self._old.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def elapsed(self) -> float:
        """Seconds of the budget used so far, earlier runs included."""
        return self.used_before + time.monotonic() - self._start

    def progress(self) -> float:
        """Used share of the budget, in [0, 1]."""
        return min(self.elapsed() / self.budget_seconds, 1.0)

    def should_stop(self) -> bool:
        """True after a signal, at the deadline or at this run's limit."""
        used = self.elapsed()
        return self.signalled or used >= self.budget_seconds or used - self.used_before >= self.limit_seconds


class Ema:
    """Exponential moving average of a module's floating-point state (parameters and buffers), kept in float32.

    The decay ramps up as min(decay, (1 + n) / (10 + n)) over the first updates, so that early averages are not the
    initialisation.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise InvalidInputError(f"EMA decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.shadow = {name: value.detach().clone().float() for name, value in self._floats(module)}

    @staticmethod
    def _floats(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
        return ((name, value) for name, value in module.state_dict().items() if value.is_floating_point())

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """One step of the average towards the module's present values."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = dict(self._floats(module))
        names = list(self.shadow)
        values = [live[name] for name in names]
        if any(v.dtype != torch.float32 for v in values):
            values = [v.float() for v in values]
        torch._foreach_lerp_([self.shadow[name] for name in names], values, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averaged values into `module`."""
        for name, value in self._floats(module):
            value.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged tensors by name (no copy)."""
        return dict(self.shadow)

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take over saved averages. Raises WeightsError where names or shapes differ."""
        for name, value in self.shadow.items():
            if name not in state or state[name].shape != value.shape:
                raise WeightsError(
                    f"the checkpoint's EMA lacks {name!r} in shape {tuple(value.shape)}: start a new run folder"
                )
            value.copy_(state[name])
        self.updates = updates


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and metadata to one safetensors file so that a kill at any moment leaves the old or the new file
    whole.

    `meta` is anything JSON can hold; it travels in the file's header. Written beside the target, flushed to disk,
    renamed over it. Raises OutputError when the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(path.name + ".tmp*"):
            stale.unlink()
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(plain, temporary, metadata={"meta": json.dumps(dict(meta))})
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write checkpoint {path}: {error}") from error


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what save_checkpoint wrote: (tensors by name, metadata). Raises WeightsError on a missing or damaged
    file."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no checkpoint at {path}: check the run folder, or start without resume")
    try:
        with safe_open(path, framework="pt", device=str(device)) as handle:
            meta = json.loads((handle.metadata() or {}).get("meta", "{}"))
            names = handle.keys()
            return {name: handle.get_tensor(name) for name in names}, meta
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"checkpoint {path} is damaged ({error}): delete it and resume from another") from error


def checkpoint_meta(path: str | Path) -> dict[str, Any]:
    """The metadata alone of what save_checkpoint wrote. Raises WeightsError on a missing or damaged file."""
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(json.loads((handle.metadata() or {}).get("meta", "{}")))
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"checkpoint {path} is missing or damaged ({error})") from error


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str = "optim") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into (tensors named 'prefix.<parameter>.<key>', JSON-ready rest) for
    save_checkpoint."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], prefix: str = "optim"
) -> None:
    """Undo pack_optimizer: load the state into `optimizer`, whose parameters must come in the same order."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["plain"].items()}
    for name, value in tensors.items():
        if name.startswith(prefix + "."):
            index, key = name[len(prefix) + 1 :].split(".", 1)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": list(rest["groups"])})


class TrainLog:
    """Scalars to `folder`/log.csv, and to TensorBoard where it is installed.

    The CSV's columns are fixed by the first row; a resumed run appends under the same header and drops rows past
    `from_step` (those after the last checkpoint), so steps never repeat.
    """

    def __init__(self, folder: str | Path, from_step: int = 0, tensorboard: bool = True) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "log.csv"
        self._fields: list[str] = []
        if self.path.is_file():
            self._trim(from_step)
        self._handle: TextIO = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._board: Any = None
        if tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=from_step or None)

    def _trim(self, from_step: int) -> None:
        with open(self.path, newline="", encoding="utf-8") as handle:
            rows = list(csv.reader(handle))
        if not rows or from_step <= 0:
            self.path.unlink()
            return
        self._fields = rows[0]
        kept = [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= from_step]
        fresh = self.path.with_name("log.csv.tmp")  # a kill here must not cost the rows so far
        with open(fresh, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows([rows[0], *kept])
        fresh.replace(self.path)

    def write(self, step: int, **scalars: float) -> None:
        """Append one row; later rows may leave columns out but not add any."""
        row = {"step": step, **scalars}
        writer: csv.DictWriter[str]
        if not self._fields:
            self._fields = list(row)
            csv.DictWriter(self._handle, self._fields).writeheader()
        writer = csv.DictWriter(self._handle, self._fields, extrasaction="ignore")
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        self._handle.flush()
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._handle.close()
        if self._board is not None:
            self._board.close()
