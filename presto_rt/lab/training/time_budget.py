"""Budgets in minutes instead of steps: the clock of a run, and the learning rate as a function of the share used.

A run reaches its final learning rate at the end of its budget, at any speed of the machine.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from types import FrameType
from typing import Any, Self

from ...errors import InvalidInputError

WARMUP = 0.02  # share of the budget


def learning_rate_factor(progress: float, *, final: float = 0.02) -> float:
    """Return the learning rate's factor, in (0, 1], after a share `progress` in [0, 1] of the budget.

    Linear warm-up over the first 2 % of the budget, then a cosine decay to `final`.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < WARMUP:
        return max(progress / WARMUP, 1e-3)
    rest = (progress - WARMUP) / (1.0 - WARMUP)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * rest))


class TimeBudget:
    """The clock of a run: used up at its deadline, and stopped by SIGINT or SIGTERM.

    Use it as a context manager: signal handlers are installed on entry and restored on exit. Outside the main thread,
    where Python allows no handlers, the deadline alone ends the run.

    Args:
        minutes: the budget of the whole training, in minutes.
        used_seconds: seconds of it that earlier calls of the same training used.
        limit: minutes after which this call stops even if budget is left; None for no limit.

    Raises:
        InvalidInputError: `minutes` is not positive.
    """

    def __init__(self, minutes: float, used_seconds: float = 0.0, limit: float | None = None) -> None:
        if not minutes > 0:
            raise InvalidInputError(f"minutes must be above 0, not {minutes}")
        self.budget_seconds = minutes * 60.0
        self.limit_seconds = math.inf if limit is None else limit * 60.0
        self.used_before = used_seconds
        self.signaled = False
        self._start = time.monotonic()
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        with contextlib.suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signaled = True

    def elapsed(self) -> float:
        """Seconds of the budget used so far, earlier calls included."""
        return self.used_before + time.monotonic() - self._start

    def progress(self) -> float:
        """Used share of the budget, in [0, 1]."""
        return min(self.elapsed() / self.budget_seconds, 1.0)

    def should_stop(self) -> bool:
        """Return True after a signal, at the deadline and at this call's limit."""
        used = self.elapsed()
        return self.signaled or used >= self.budget_seconds or used - self.used_before >= self.limit_seconds
