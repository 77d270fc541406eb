"""Training of the codec within a time budget.

The codec starts from a PCA of the data or from a trained codec. Encoder and decoder are trained together, or the
decoder alone with the encoder frozen. A checkpoint is written every few minutes, from which a killed run resumes; the
calibrated, averaged weights are written to `run_dir`/final.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...checkpoints.house import load_codec
from ...errors import InvalidInputError, WeightsError
from ...models.codec import Codec, CodecConfig
from ...models.spectral import FRAMES_PER_LATENT, LATENT_HOP, SAMPLE_RATE
from .averaging import Ema
from .checkpoint import (
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
    with_prefix,
    without_prefix,
)
from .codec_calibration import fit_latent_scale, fit_synthesis_gain, training_clips
from .codec_data import FeatureStore
from .codec_loss import CodecLoss, LossParts, start_from_pca
from .device import autocast, pick_device
from .time_budget import TimeBudget, learning_rate_factor
from .train_log import TrainLog

CHECKPOINT = "last.safetensors"
VALIDATION_CROPS = 40
REFRESH_SECONDS = 900.0  # most audio taken in from a growing data set at each checkpoint
GAIN_CLIP_SECONDS = 5.0


@dataclass(frozen=True)
class CodecTraining:
    """Options of the codec trainer.

    Args:
        batch: crops in a batch.
        latents: length of a crop, in latent frames.
        rate: peak learning rate of AdamW.
        linear_rate: factor of the learning rate for the linear paths, which start from the PCA.
        betas: decay rates of AdamW's moments.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights.
        kl_weight: weight of the posterior's divergence in the loss.
        rendered_share: share of crops of rendered audio; the others are recorded.
        hours: most hours of audio in memory, (rendered, recorded).
        pca_frames: spectral frames that the PCA is fitted on.
        gain_clips: clips of 5 s that the synthesis gain is fitted on.
        checkpoint_minutes: time between checkpoints.
        log_every: steps between rows of the log.
        compile: compile the loss, which needs a C++ compiler.
        seed: seed of initialization, crops and noise.
    """

    batch: int = 10
    latents: int = 24
    rate: float = 1e-3
    linear_rate: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 2.0
    ema: float = 0.998
    kl_weight: float = 1e-3
    rendered_share: float = 0.6
    hours: tuple[float, float] = (3.0, 2.0)
    pca_frames: int = 60000
    gain_clips: int = 32
    checkpoint_minutes: float = 3.0
    log_every: int = 50
    compile: bool = True
    seed: int = 0


def train_codec(
    data_root: str | os.PathLike[str],
    run_dir: str | os.PathLike[str],
    minutes: float,
    device: str = "auto",
    resume: bool = False,
    *,
    config: CodecConfig | None = None,
    settings: CodecTraining | None = None,
    freeze_encoder: bool = False,
    start_from: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Codec:
    """Train a codec within a time budget. SIGINT and SIGTERM end the training early with everything written.

    Args:
        data_root: data set folder.
        run_dir: folder of the checkpoint, the log and final/.
        minutes: time budget; a resumed run counts the minutes it has used.
        device: "auto", "cpu" or "cuda".
        resume: continue from the checkpoint in `run_dir`, with its `config`, `freeze_encoder` and `start_from`.
        config: architecture; None for the default.
        settings: options; None for the defaults.
        freeze_encoder: train the decoder only, so that latents encoded before stay valid; needs `start_from`.
        start_from: trained codec to start from instead of a PCA, as `load_codec` reads.
        progress: show a progress bar.

    Returns:
        The codec with averaged, calibrated weights.

    Raises:
        InvalidInputError: no training audio, a run that exists while `resume` is False, or `freeze_encoder` without
            `start_from`.
        WeightsError: `resume` without a checkpoint, or damaged weights.
    """
    settings = settings or CodecTraining()
    run, target = Path(run_dir), pick_device(device)
    tensors, meta = load_checkpoint(run / CHECKPOINT) if resume else ({}, {})
    trained = None if resume or start_from is None else load_codec(start_from)
    if resume:
        config = CodecConfig.from_dict(meta["config"])
    elif (run / CHECKPOINT).is_file():
        raise InvalidInputError(f"{run / CHECKPOINT} exists; pass --resume to continue, or choose another --run")
    elif trained is not None:
        config = trained.config
    elif freeze_encoder:
        raise InvalidInputError("freeze_encoder needs a trained codec; pass start_from, or resume a run")
    freeze_encoder = meta.get("freeze_encoder", freeze_encoder)
    from_trained = meta.get("started", start_from is not None)
    run.mkdir(parents=True, exist_ok=True)
    budget = TimeBudget(minutes, meta.get("used_seconds", 0.0))
    with budget:
        torch.manual_seed(settings.seed)
        codec = Codec(config)
        store = FeatureStore(data_root, codec.frames, hours=settings.hours, seed=settings.seed)
        store.refresh(progress=progress)
        rng = np.random.default_rng(settings.seed)
        if trained is not None:
            codec.load_state_dict(trained.state_dict())
        elif not resume:
            retained = start_from_pca(codec, store.spread(settings.pca_frames, rng))
            print(f"PCA retains {retained:.1%} of the weighted variance; audio seconds: {store.seconds}", flush=True)
        trainer = CodecTrainer(codec.to(target), settings, target, freeze_encoder, from_trained)
        if resume:
            trainer.restore(tensors, meta)
            rng.bit_generator.state = meta["rng"]
        log = TrainLog(run, from_step=trainer.step)
        validation = _validation_features(data_root, codec, settings)
        try:
            trainer.run(store, rng, budget, log, run / CHECKPOINT, validation, progress)
        finally:
            log.close()
    trainer.ema.copy_to(codec)
    if not (freeze_encoder or from_trained):
        fit_latent_scale(
            codec,
            store,
            latents=settings.latents,
            rendered_share=settings.rendered_share,
            seed=settings.seed,
        )
    codec.max_log_magnitude.copy_(store.loudest())
    clips = training_clips(data_root, settings.gain_clips, GAIN_CLIP_SECONDS, settings.seed)
    if clips:
        fit_synthesis_gain(codec, clips)
    write_codec(codec, run / "final")
    return codec


class CodecTrainer:
    """Training step, loop and checkpoints of a codec.

    Args:
        codec: codec to train, in place, on `device`.
        settings: options.
        device: device of the training.
        freeze_encoder: train the decoder only.
        from_trained: the codec started from a trained one; recorded in the checkpoint, as its latent scale is kept.
    """

    def __init__(
        self,
        codec: Codec,
        settings: CodecTraining,
        device: torch.device,
        freeze_encoder: bool = False,
        from_trained: bool = False,
    ) -> None:
        self.codec, self.settings, self.device = codec, settings, device
        self.freeze_encoder, self.from_trained = freeze_encoder, from_trained
        if freeze_encoder:
            codec.freeze_encoder()
        self.loss = CodecLoss(codec, settings.kl_weight).to(device)
        trained = [(name, p) for name, p in codec.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in trained]
        groups = [
            {"params": [p for n, p in trained if ".linear." not in n], "factor": 1.0},
            {"params": [p for n, p in trained if ".linear." in n], "factor": settings.linear_rate},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.ema = Ema(codec, settings.ema)
        self.step = 0
        loss = self.loss

        def forward(features: Tensor, noise: Tensor) -> LossParts:
            parts: LossParts = loss(codec, features, noise)
            return parts

        self.forward: Callable[[Tensor, Tensor], LossParts] = torch.compile(forward) if settings.compile else forward

    def train(self, features: Tensor, rate: float) -> LossParts:
        """Update the weights once on features (B, 4 T, 3, bands) at learning rate `rate`; return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        batch, frames = features.shape[:2]
        noise = torch.randn(batch, frames // FRAMES_PER_LATENT, self.codec.config.latent_channels).to(self.device)
        with autocast(self.device):
            parts = self.forward(features.to(self.device), noise)
        parts.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        if torch.isfinite(norm):  # a gradient that is not finite would destroy the weights
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.codec)
        self.step += 1
        return parts

    @torch.no_grad()
    def evaluate(self, features: Tensor) -> LossParts:
        """Return the loss of the averaged weights on features (B, 4 T, 3, bands), without noise in the latents."""
        live = {name: value.clone() for name, value in self.codec.state_dict().items()}
        self.ema.copy_to(self.codec)
        shape = features.shape[0], features.shape[1] // FRAMES_PER_LATENT, self.codec.config.latent_channels
        with autocast(self.device):
            parts: LossParts = self.loss(self.codec, features.to(self.device), torch.zeros(shape).to(self.device))
        self.codec.load_state_dict(live)
        return parts

    def save(self, path: Path, used_seconds: float, rng: np.random.Generator) -> None:
        """Write a checkpoint of a run that has used `used_seconds` of its budget."""
        packed, rest = pack_optimizer(self.optimizer)
        tensors = with_prefix("model", self.codec.state_dict()) | with_prefix("ema", self.ema.state_dict()) | packed
        tensors["torch_rng"] = torch.get_rng_state()
        meta = {
            "config": self.codec.config.to_dict(),
            "settings": asdict(self.settings),
            "step": self.step,
            "ema_updates": self.ema.updates,
            "used_seconds": used_seconds,
            "rng": rng.bit_generator.state,
            "optim": rest,
            "freeze_encoder": self.freeze_encoder,
            "started": self.from_trained,
        }
        save_checkpoint(path, tensors, meta)

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Load weights, averages, optimizer, step and torch's random state from a checkpoint written by `save`.

        Raises:
            WeightsError: the checkpoint is of another architecture.
        """
        try:
            self.codec.load_state_dict(without_prefix("model", tensors))
            unpack_optimizer(self.optimizer, tensors, meta["optim"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(f"the checkpoint does not fit this codec ({error}); start a new run folder") from error
        self.ema.load_state_dict(without_prefix("ema", tensors), meta["ema_updates"])
        self.step = meta["step"]
        torch.set_rng_state(tensors["torch_rng"])

    def run(
        self,
        store: FeatureStore,
        rng: np.random.Generator,
        budget: TimeBudget,
        log: TrainLog,
        checkpoint: Path,
        validation: Tensor | None = None,
        progress: bool = True,
    ) -> None:
        """Train until the budget is used or a signal arrives.

        A row of the log is the mean over the steps since the previous row or the resume.

        Args:
            store: training features; refreshed at each checkpoint.
            rng: source of the crops.
            budget: clock of the run.
            log: receives a row every `log_every` steps.
            checkpoint: file to write.
            validation: features (B, 4 T, 3, bands) that are evaluated at each checkpoint; None for none.
            progress: show a progress bar.
        """
        settings = self.settings
        seconds_per_step = settings.batch * settings.latents * LATENT_HOP / SAMPLE_RATE
        saved_at = timed_from = time.monotonic()
        bar = tqdm(total=round(budget.budget_seconds), unit="s", desc="codec", disable=not progress, mininterval=2.0)
        bar.update(round(budget.elapsed()))
        sums: dict[str, float] = {}
        summed = timed = 0  # steps in `sums`, and steps since `timed_from`
        while not budget.should_stop():
            rate = settings.rate * learning_rate_factor(budget.progress())
            parts = self.train(store.sample(settings.batch, settings.latents, rng, settings.rendered_share), rate)
            summed, timed = summed + 1, timed + 1
            for key, value in parts._asdict().items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            if self.step % settings.log_every == 0:
                now = time.monotonic()
                speed = seconds_per_step * timed / (now - timed_from)
                timed_from, timed = now, 0
                means = {key: value / summed for key, value in sums.items()}
                log.write(self.step, **means, rate=rate, audio_seconds_per_second=speed, elapsed=budget.elapsed())
                bar.set_postfix_str(
                    f"step {self.step} loss {means['total']:.3f} mel {means['mel']:.2f} dB {speed:.0f} audio-s/s"
                )
                bar.update(round(budget.elapsed()) - bar.n)
                sums, summed = {}, 0
            if time.monotonic() - saved_at > settings.checkpoint_minutes * 60.0:
                self.save(checkpoint, budget.elapsed(), rng)
                if validation is not None:
                    parts = self.evaluate(validation)
                    tqdm.write(
                        f"step {self.step}: validation loss {parts.total:.4f}, mel {parts.mel:.3f} dB, "
                        f"kl {parts.kl:.1f}"
                    )
                if store.refresh(limit_seconds=REFRESH_SECONDS) > 0:
                    tqdm.write(f"audio seconds in memory: {store.seconds}")
                saved_at = timed_from = time.monotonic()
                timed = 0
        bar.close()
        self.save(checkpoint, budget.elapsed(), rng)


def _validation_features(root: str | os.PathLike[str], codec: Codec, settings: CodecTraining) -> Tensor | None:
    """Fixed crops of the validation split, or None if it is empty."""
    store = FeatureStore(root, codec.frames, hours=(0.2, 0.2), split="val", seed=settings.seed)
    store.refresh()
    if not any(store.groups.values()):
        return None
    rng = np.random.default_rng(1)
    return store.sample(VALIDATION_CROPS, settings.latents, rng, rendered_share=0.5, augment=False)


def write_codec(codec: Codec, folder: Path) -> None:
    """Write codec.safetensors and config.json to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "codec.safetensors", codec.state_dict(), {})
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(codec.config.to_dict(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "config.json")
