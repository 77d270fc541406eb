"""Training of the base model (the teacher): denoising of codec latents conditioned on text, tempo, key and length.

Loss (EDM, Karras et al. 2022, equation 8): E lambda(s) |D(x + s n; s, c) - x|^2, s ~ p(s_train), with stratified sigmas
and an additional loss on window means (`window_mean_loss.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...diffusion.precond import loss_weight, precondition
from ...diffusion.schedule import P_MEAN, P_STD, LayerSchedule, training_sigmas
from ...errors import InvalidInputError
from ...models.config import ModelConfig, preset
from ...models.dit import Condition, DiT, drop_text
from .averaging import Ema
from .checkpoint import checkpoint_meta, saved_name, saved_options
from .conditions import LatentSet
from .device import autocast, compile_blocks, large_batches
from .loop import RunOptions, Trainer, adamw
from .networks import load_network
from .window_mean_loss import WindowMeanLoss

VALIDATION_SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 4.0)
VALIDATION_SEED = 1
GPU_TOKENS = 65_536  # default of `tokens` on a CUDA GPU


@dataclass(frozen=True)
class BaseTraining(RunOptions):
    """Options of the base trainer, besides those of every trainer.

    Args:
        learning_rate: peak learning rate of AdamW.
        tokens: latent frames in a batch, approximately.
        frames: crop lengths in latent frames, each with the share of steps that use it.
        text_dropout: share of crops trained without text and key, for classifier-free guidance.
        p_mean: mean of ln sigma.
        p_std: standard deviation of ln sigma.
        window_mean_weight: weight of `WindowMeanLoss`; 0 disables it.
        ema_decay: decay of the averaged weights.
        weight_decay: of AdamW, on matrices only.

    Raises:
        InvalidInputError: `tokens` is less than 1.
    """

    learning_rate: float = 1e-3
    tokens: int = 2_048
    frames: tuple[tuple[int, float], ...] = ((128, 0.5), (256, 0.25), (689, 0.2), (1_378, 0.05))
    text_dropout: float = 0.1
    p_mean: float = P_MEAN
    p_std: float = P_STD
    window_mean_weight: float = field(default=0.2, metadata={"saved_as": "slow_weight"})
    ema_decay: float = 0.998
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InvalidInputError(f"tokens must be at least 1, not {self.tokens}")


def denoising_error(
    denoised: Tensor,
    x: Tensor,
    sigma: Tensor,
    sigma_data: float,
    window_mean_loss: WindowMeanLoss | None = None,
    window_mean_weight: float = 0.0,
) -> Tensor:
    """Return the training loss of the base model (Karras et al. 2022, equation 8), a scalar.

    Args:
        denoised: D(x + s n; s), (B, T, C).
        x: clean latents, (B, T, C).
        sigma: noise levels, (B,).
        sigma_data: standard deviation of the latents.
        window_mean_loss: additional loss on window means.
        window_mean_weight: weight of the additional loss.
    """
    error = denoised - x
    loss = (loss_weight(sigma, sigma_data)[:, None, None] * error**2).mean()
    return loss if window_mean_loss is None else loss + window_mean_weight * window_mean_loss(error, sigma)


@torch.inference_mode()
def held_out_error(
    model: DiT, held_out: LatentSet, clips: int = 16, frames: int = 128, layers: LayerSchedule | None = None
) -> dict[str, float]:
    """Return E|D - x|^2 / sigma_data^2 at VALIDATION_SIGMAS, as {"val_0.05": error, ...}.

    Every call uses the same crops and noise, with all conditions.

    Args:
        model: network to evaluate.
        held_out: latents to draw from.
        clips: number of crops.
        frames: latent frames of each crop.
        layers: blocks to run at each sigma; None for all blocks.
    """
    config = model.config
    layers = layers or LayerSchedule.full(config.blocks)
    x, condition = held_out.batch(np.random.default_rng(VALIDATION_SEED), clips, frames, control_dropout=0.0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(VALIDATION_SEED)).to(x.device)
    errors = {}
    for s in VALIDATION_SIGMAS:
        sigma = torch.full((clips,), s, device=x.device)
        with autocast(x.device):
            denoised = precondition(
                model,
                x + s * noise,
                sigma,
                condition,
                layers.blocks(s),
                layers.budget(s),
                kind=config.network,
                sigma_data=config.sigma_data,
            )
        errors[f"val_{s:g}"] = float(((denoised - x) ** 2).mean()) / config.sigma_data**2
    return errors


def draw_batch(
    data: LatentSet,
    rng: np.random.Generator,
    tokens: int,
    frames: tuple[tuple[int, float], ...],
    control_dropout: float,
) -> tuple[Tensor, Condition]:
    """Draw a batch of crops of one length.

    Lengths above that of the longest piece are never drawn, as a small data set may have no piece of the longest.

    Args:
        data: latents to draw from.
        rng: source of the random choices.
        tokens: latent frames in the batch, approximately.
        frames: crop lengths in latent frames, each with its probability.
        control_dropout: see `LatentSet.batch`.

    Returns:
        Latents (B, T, C) float32 and their conditions.

    Raises:
        InvalidInputError: no length fits a piece.
    """
    fitting = [pair for pair in frames if pair[0] <= data.frames.max()]
    lengths, shares = zip(*(fitting or [min(frames)]), strict=True)
    length = int(rng.choice(lengths, p=np.array(shares) / sum(shares)))
    return data.batch(rng, max(1, tokens // length), length, control_dropout)


class BaseTrainer(Trainer):
    """Trainer of a diffusion transformer from random weights.

    Args:
        data_root: data set folder with encoded latents.
        run_dir: folder of the checkpoint and the log.
        config: model configuration.
        options: hyperparameters.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(
        self,
        data_root: str | Path,
        run_dir: str | Path,
        config: ModelConfig,
        options: BaseTraining,
        device: str = "auto",
    ) -> None:
        super().__init__(run_dir, options, device)
        self.config, self.options = config, options
        self.model = DiT(config).to(self.device)
        self.train_set = LatentSet(data_root, "train", self.device)
        self.val_set = LatentSet(data_root, "val", self.device)
        self.ema = Ema(self.model, options.ema_decay)
        self.modules = {"model": self.model}
        self.optimizers = {"model": adamw(self.model, options.learning_rate, (0.9, 0.98), options.weight_decay)}
        self.window_mean_loss = WindowMeanLoss(self.train_set.latents) if options.window_mean_weight else None
        compile_blocks(self.model, always=options.compile)

    def describe(self) -> dict[str, Any]:
        return {"options": saved_options(self.options)}

    def resume(self) -> None:
        """Load the run folder's checkpoint.

        Raises:
            InvalidInputError: the checkpoint is of a distillation, or of another model configuration.
        """
        names = {saved_name(f) for f in fields(BaseTraining)}
        unknown = set(checkpoint_meta(self.checkpoint).get("options", {})) - names
        if unknown:
            raise InvalidInputError(
                f"{self.checkpoint} is not of a base model: it was trained with {', '.join(sorted(unknown))}; "
                "choose another --run"
            )
        super().resume()

    def start_from(self, source: str | Path) -> None:
        """Initialize the weights and averages, but not the optimizer, from anything `networks.load_network` reads.

        Raises:
            InvalidInputError: the source has another model configuration.
        """
        network = load_network(source)
        if network.config != self.config:
            raise InvalidInputError(f"{source} has another model configuration; choose another --start-from or --model")
        self.model.load_state_dict(network.state_dict())
        self.ema.load_state_dict(network.state_dict(), 0)

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """D(x; sigma) of latents x (B, T, C) at noise levels sigma (B,)."""
        return precondition(
            self.model, x, sigma, condition, kind=self.config.network, sigma_data=self.config.sigma_data
        )

    def train_step(self, progress: float) -> dict[str, float]:
        o = self.options
        x, condition = draw_batch(self.train_set, self.rng, o.tokens, o.frames, o.control_dropout)
        dropped = torch.rand(len(x), generator=self.generator, device=self.device) < o.text_dropout
        condition = drop_text(self.model, condition, dropped)
        sigma = training_sigmas(self.uniforms(len(x)), o.p_mean, o.p_std)
        with autocast(self.device):
            noisy = x + sigma[:, None, None] * self.gaussian(x)
            denoised = self.denoise(noisy, sigma, condition)
            loss = denoising_error(
                denoised, x, sigma, self.config.sigma_data, self.window_mean_loss, o.window_mean_weight
            )
        loss.backward()
        self.update("model", o.learning_rate, progress, o.clip)
        self.count(x)
        return {"loss": float(loss.detach())}

    def validate(self) -> dict[str, float]:
        return held_out_error(self.averaged(), self.val_set)


def train_base(
    data_root: str | Path,
    run_dir: str | Path,
    minutes: float,
    *,
    device: str = "auto",
    resume: bool = False,
    limit: float | None = None,
    model: str = "nano",
    start_from: str | Path | None = None,
    **options: Any,
) -> dict[str, float]:
    """Train the base model within a time budget.

    On a CUDA GPU the blocks are compiled, the data set is held on the device and a batch has GPU_TOKENS latent frames
    unless `tokens` is given.

    Args:
        data_root: data set folder with encoded latents.
        run_dir: folder of the checkpoint and the log.
        minutes: time budget; a resumed run counts the minutes it has used.
        device: "auto", "cpu" or "cuda".
        resume: continue from the run folder's checkpoint if there is one.
        limit: minutes after which this call stops, to be resumed later; None for no limit.
        model: preset of the model configuration.
        start_from: weights to start from, as `networks.load_network` reads; None for random weights.
        **options: further fields of BaseTraining.

    Returns:
        The last held-out errors, by name.

    Raises:
        InvalidInputError: bad option or data set, or a run that exists while `resume` is False.
        WeightsError: missing or damaged checkpoint or weights.
    """
    options.setdefault("tokens", GPU_TOKENS if large_batches(device) else BaseTraining.tokens)
    trainer = BaseTrainer(data_root, run_dir, preset(model), BaseTraining(minutes=minutes, **options), device)
    if start_from is not None and not trainer.checkpoint.is_file():
        trainer.start_from(start_from)
    trainer.start(resume)
    return trainer.run(limit=limit)
