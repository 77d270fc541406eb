"""Fake score network of Presto-S: the teacher's architecture, also conditioned on the generator's noise level.

The generator is trained at a continuum of noise levels s_g. A fake score that is not conditioned on s_g learns the
mixture of the outputs of all levels. The mixture can match the data while no single level does, because the errors of
different levels cancel; sampling with one or two steps uses single levels and shows these errors. Conditioning mu_fake
on s_g matches the distribution at every level separately. docs/distillation.md has measurements on a toy problem.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models.dit import DiT, fourier

FEATURES = 256  # sinusoidal features of the additional input


class FakeScore(DiT):
    """A copy of `teacher` with an additional, zero-initialized input, so that it starts as the teacher.

    The additional input takes the place of `DiT`'s argument `budget`: ln(s_g) / 4, (B,). The teacher's own budget input
    is always 1, as the network runs all blocks.
    """

    def __init__(self, teacher: DiT) -> None:
        super().__init__(teacher.config)
        self.load_state_dict(teacher.state_dict())
        self.origin = nn.Linear(FEATURES, teacher.config.width)
        nn.init.zeros_(self.origin.weight)
        nn.init.zeros_(self.origin.bias)

    def embedding_sum(self, c_noise: Tensor, vector: Tensor, budget: Tensor) -> Tensor:
        """Return `DiT.embedding_sum` at full budget plus the embedding of `budget`, here ln(s_g) / 4 (B,)."""
        embedding: Tensor = self.origin(fourier(budget, FEATURES).to(self.origin.weight.dtype))
        return super().embedding_sum(c_noise, vector, torch.ones_like(budget)) + embedding
