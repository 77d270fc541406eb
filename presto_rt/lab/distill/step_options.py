"""Options of the step distillation, and its methods by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...errors import InvalidInputError
from ..training.loop import RunOptions
from .sigmas import check_distribution
from .trainer import with_method

GPU_TOKENS = 16_384  # latent frames in a batch on a CUDA GPU


@dataclass(frozen=True)
class StepDistillation(RunOptions):
    """Options of the step distillation, besides those of every trainer. The defaults are Presto-S.

    The four distributions of sigmas are named as in `sigmas.py`.

    Args:
        p_gen: distribution of the sigmas at which the generator is trained.
        p_dmd: distribution of the sigmas of distribution matching.
        p_dsm: distribution of the sigmas of the fake score's denoising.
        p_gan: distribution of the sigmas of the discriminator's inputs.
        dmd_weight: weight of distribution matching; 0 disables it.
        gan_weight: weight of the GAN losses; 0 disables them.
        consistency: train the generator by consistency along the teacher's ODE, without updates of the fake score.
        guidance: guidance scale of the teacher.
        guidance_interval: lowest and highest sigma at which the teacher is guided.
        fake_updates: updates of fake score and discriminator before each update of the generator.
        condition_on_origin: condition fake score and discriminator on the generator's noise level s_g.
        fake_layers: run the fake score with the generator's layer schedule instead of all blocks (Presto-LS).
        normalize: weight of the matching gradient, by noise "level" or by "sample"; see
            `losses.distribution_matching_gradient`.
        tap: number of blocks of the fake score whose output feeds the discriminator; None for half of them.
        sampling_steps: sampling steps of the packed model by default.
        generator_rate: peak learning rate of the generator.
        fake_rate: peak learning rate of fake score and discriminator.
        tokens: latent frames in a batch, approximately.
        frames: crop lengths in latent frames, each with the share of steps that use it.
        ema_decay: decay of the averaged weights.

    Raises:
        InvalidInputError: unknown distribution or normalization, or `fake_updates` less than 1.
    """

    p_gen: str = "inference"
    p_dmd: str = "train"
    p_dsm: str = "train"
    p_gan: str = "train"
    dmd_weight: float = 1.0
    gan_weight: float = 0.1
    consistency: bool = False
    guidance: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, 3.0)
    fake_updates: int = 5
    condition_on_origin: bool = field(default=True, metadata={"saved_as": "fake_told"})
    fake_layers: bool = False
    normalize: str = "level"
    tap: int | None = None
    sampling_steps: int = 4
    generator_rate: float = 5e-5
    fake_rate: float = 1e-4
    tokens: int = 1_024
    frames: tuple[tuple[int, float], ...] = ((128, 0.7), (256, 0.2), (689, 0.1))
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        for name in (self.p_gen, self.p_dmd, self.p_dsm, self.p_gan):
            check_distribution(name)
        if self.fake_updates < 1:
            raise InvalidInputError(f"fake_updates must be at least 1, not {self.fake_updates}")
        if self.normalize not in ("level", "sample"):
            raise InvalidInputError(f"normalize must be level or sample, not {self.normalize!r}")


#: methods and ablations, as changes of the default
METHODS: dict[str, dict[str, Any]] = {
    "presto-s": {},
    "dmd2": {
        "p_gen": "ladder:4",
        "p_dmd": "inference",
        "p_dsm": "inference",
        "p_gan": "inference",
        "condition_on_origin": False,
        "normalize": "sample",
    },
    "no-gan": {"gan_weight": 0.0},
    "consistency": {"consistency": True, "dmd_weight": 0.0, "gan_weight": 0.0},
    "gen-train": {"p_gen": "train"},
    "dmd-inference": {"p_dmd": "inference"},
    "dsm-inference": {"p_dsm": "inference"},
    "gan-inference": {"p_gan": "inference"},
    "fake-unconditioned": {"condition_on_origin": False},
    "sample-weight": {"normalize": "sample"},
    "fake-layers": {"fake_layers": True},
}


def settings(method: str, minutes: float, **changes: Any) -> StepDistillation:
    """Return the options of a method in METHODS, with `changes`.

    Raises:
        InvalidInputError: unknown method or option, or a bad value.
    """
    return with_method(StepDistillation(minutes), METHODS, method, changes)
