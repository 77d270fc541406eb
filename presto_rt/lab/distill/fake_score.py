"""The fake score of Presto-S: the teacher's network with one more input.

The generator is trained at a continuum of noise levels s_g. A fake score that knows nothing of s_g learns the mixture
of what all levels make; the mixture can match the data while no single level does (what one level makes too much of,
another makes too little of), and sampling with one or two steps then shows it. So mu_fake is told s_g, and the
divergence is matched at every level by itself. docs/distillation.md has the figures on a toy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models.dit import Condition, DiT, fourier


class FakeScore(DiT):
    """A copy of `teacher`. Its `budget` input is ln(s_g) / 4, (B,): it always runs, and is told it runs, in full."""

    def __init__(self, teacher: DiT) -> None:
        super().__init__(teacher.config)
        self.load_state_dict(teacher.state_dict())
        self.origin = nn.Linear(256, teacher.config.width)
        nn.init.zeros_(self.origin.weight)  # begins as the teacher
        nn.init.zeros_(self.origin.bias)

    def condition_sum(self, c_noise: Tensor, condition: Condition, budget: Tensor) -> Tensor:
        origin = self.origin(fourier(budget, 256).to(self.origin.weight.dtype))
        return super().condition_sum(c_noise, condition, torch.ones_like(budget)) + origin
