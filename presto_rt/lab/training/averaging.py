"""Exponential moving average (EMA) of a module's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ...errors import InvalidInputError, WeightsError


class Ema:
    """Exponential moving average of a module's floating-point parameters and buffers, kept in float32.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the initialization does not dominate the first
    averages.

    Raises:
        InvalidInputError: `decay` is outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise InvalidInputError(f"EMA decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.updates = 0
        self.shadow = {name: value.detach().clone().float() for name, value in self._floats(module)}

    @staticmethod
    def _floats(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
        return ((name, value) for name, value in module.state_dict().items() if value.is_floating_point())

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the averages one step towards the module's current values."""
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
        """Write the averages into `module`."""
        for name, value in self._floats(module):
            value.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by name, without copying."""
        return dict(self.shadow)

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Copy saved averages, made in `updates` updates, into this object.

        Raises:
            WeightsError: a name is missing or a shape differs.
        """
        for name, value in self.shadow.items():
            if name not in state or state[name].shape != value.shape:
                raise WeightsError(
                    f"the checkpoint's EMA has no tensor {name!r} of shape {tuple(value.shape)}; start a new run folder"
                )
            value.copy_(state[name])
        self.updates = updates
