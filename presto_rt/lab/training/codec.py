"""Training the codec within a budget of minutes, on whatever device there is.

`train_codec` starts from a PCA of the data, trains encoder and decoder (or, with the encoder frozen, the decoder
alone), writes a checkpoint every few minutes from which a killed run resumes, and leaves the averaged weights in
`run_dir`/final.

    python -m presto_rt.lab.training.codec --data data --run runs/codec --minutes 45
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...errors import InvalidInputError, WeightsError
from ...models.codec import SIGMA_DATA, Codec, CodecConfig, load_codec
from ...models.spectral import LATENT_HOP, POWER_FLOOR, SAMPLE_RATE, band_centres, mel_filters
from ..data.dataset import frames_of, items, load_manifest, read_audio
from .codec_data import RECORDED, RENDERED, FeatureStore
from .codec_loss import CodecLoss, start_from_pca
from .common import Ema, Stopper, TrainLog, load_checkpoint, pack_optimizer, save_checkpoint, schedule, unpack_optimizer
from .loop import autocast, pick_device

CHECKPOINT = "last.safetensors"


@dataclass(frozen=True)
class CodecTraining:
    """Settings of a run. `latents` is a crop's length in latent frames; linear paths learn at `linear_rate` x
    `rate`."""

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
    """Train for `minutes` of wall time (those of a resumed run included) and return the codec with averaged weights.

    `start_from` is what `load_codec` reads, to start from it instead of a PCA; `freeze_encoder` then trains the decoder
    alone and leaves every latent as it was. A resumed run keeps to what it was begun with. Stops early, cleanly, on
    SIGINT and SIGTERM. Raises InvalidInputError where the data set has no audio for training and rather than overwrite a
    run, WeightsError where `resume` finds no whole checkpoint.
    """
    settings = settings or CodecTraining()
    run, where = Path(run_dir), pick_device(device)
    tensors, meta = load_checkpoint(run / CHECKPOINT) if resume else ({}, {})
    start = None if resume or start_from is None else load_codec(start_from)
    if resume:
        config = CodecConfig.from_dict(meta["config"])
    elif (run / CHECKPOINT).is_file():
        raise InvalidInputError(f"{run / CHECKPOINT} exists: say --resume to go on, or choose another --run")
    elif start is not None:
        config = start.config
    elif freeze_encoder:
        raise InvalidInputError("freeze_encoder needs a trained codec: give start_from or resume")
    freeze_encoder = meta.get("freeze_encoder", freeze_encoder)
    started = meta.get("started", start_from is not None)
    run.mkdir(parents=True, exist_ok=True)
    stopper = Stopper(minutes, meta.get("used_seconds", 0.0))
    with stopper:
        torch.manual_seed(settings.seed)
        codec = Codec(config)
        store = FeatureStore(data_root, codec.frames, hours=settings.hours, seed=settings.seed)
        store.refresh(progress=progress)
        rng = np.random.default_rng(settings.seed)
        if start is not None:
            codec.load_state_dict(start.state_dict())
        elif not resume:
            kept = start_from_pca(codec, store.spread(settings.pca_frames, rng))
            print(f"PCA keeps {100 * kept:.1f} % of the weighted variance; audio seconds: {store.seconds}", flush=True)
        trainer = _Trainer(codec.to(where), settings, where, freeze_encoder)
        trainer.begun = {"freeze_encoder": freeze_encoder, "started": started}
        if resume:
            trainer.restore(tensors, meta)
            rng.bit_generator.state = meta["rng"]
        log = TrainLog(run, from_step=trainer.step)
        validation = _validation(data_root, codec, settings)
        try:
            _loop(trainer, store, rng, stopper, log, run, validation, progress)
        finally:
            log.close()
    trainer.ema.copy_to(codec)
    if not (freeze_encoder or started):
        fit_latent_scale(codec, store, settings)
    codec.ceiling.copy_(store.loudest())
    clips = training_clips(data_root, settings.gain_clips, 5.0, settings.seed)
    if clips:
        fit_synthesis_gain(codec, clips)
    write_codec(codec, run / "final")
    return codec


class _Trainer:
    """One training step, and the state that a checkpoint holds. begun: how the run was, which its checkpoint tells."""

    begun: dict[str, bool]

    def __init__(self, codec: Codec, settings: CodecTraining, device: torch.device, freeze_encoder: bool) -> None:
        self.codec, self.settings, self.device = codec, settings, device
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

        def forward(features: Tensor, noise: Tensor) -> Any:
            return loss(codec, features, noise)

        self.forward = torch.compile(forward) if settings.compile else forward

    def train(self, features: Tensor, rate: float) -> Any:
        """One step at learning rate `rate`; returns the loss's parts."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        batch, frames = features.shape[:2]
        noise = torch.randn(batch, frames // 4, self.codec.config.latent_channels).to(self.device)
        with autocast(self.device):
            parts = self.forward(features.to(self.device), noise)
        parts.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        if torch.isfinite(norm):  # a step with a bad gradient is left out, not fatal
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.codec)
        self.step += 1
        return parts

    @torch.no_grad()
    def evaluate(self, features: Tensor) -> Any:
        """Loss parts of the averaged weights on fixed crops, without noise."""
        live = {name: value.clone() for name, value in self.codec.state_dict().items()}
        self.ema.copy_to(self.codec)
        noise = torch.zeros(features.shape[0], features.shape[1] // 4, self.codec.config.latent_channels)
        with autocast(self.device):
            parts = self.loss(self.codec, features.to(self.device), noise.to(self.device))
        self.codec.load_state_dict(live)
        return parts

    def save(self, path: Path, stopper: Stopper, rng: np.random.Generator) -> None:
        """Write everything that resuming needs."""
        optim, rest = pack_optimizer(self.optimizer)
        tensors = {f"model.{k}": v for k, v in self.codec.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()} | optim
        tensors["torch_rng"] = torch.get_rng_state()
        meta = {
            "config": self.codec.config.to_dict(),
            "settings": asdict(self.settings),
            "step": self.step,
            "ema_updates": self.ema.updates,
            "used_seconds": stopper.elapsed(),
            "rng": rng.bit_generator.state,
            "optim": rest,
            **self.begun,
        }
        save_checkpoint(path, tensors, meta)

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Undo `save`. Raises WeightsError when the checkpoint is of another model."""
        try:
            self.codec.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            unpack_optimizer(self.optimizer, tensors, meta["optim"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(
                f"the checkpoint does not fit this training ({error}): start a new run folder"
            ) from error
        self.ema.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}, meta["ema_updates"])
        self.step = meta["step"]
        torch.set_rng_state(tensors["torch_rng"])


def _loop(
    trainer: _Trainer,
    store: FeatureStore,
    rng: np.random.Generator,
    stopper: Stopper,
    log: TrainLog,
    run: Path,
    validation: Tensor | None,
    progress: bool,
) -> None:
    settings = trainer.settings
    seconds_per_step = settings.batch * settings.latents * LATENT_HOP / SAMPLE_RATE
    saved = mark = time.monotonic()
    bar = tqdm(total=round(stopper.budget_seconds), unit="s", desc="codec", disable=not progress, mininterval=2.0)
    bar.update(round(stopper.elapsed()))
    sums: dict[str, float] = {}
    summed = timed = 0  # steps in `sums`, and since `mark`
    while not stopper.should_stop():
        rate = settings.rate * schedule(stopper.progress())
        parts = trainer.train(store.sample(settings.batch, settings.latents, rng, settings.rendered_share), rate)
        summed, timed = summed + 1, timed + 1
        for key, value in parts._asdict().items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        if trainer.step % settings.log_every == 0:
            now = time.monotonic()
            speed = seconds_per_step * timed / (now - mark)
            mark, timed = now, 0
            sums = {key: value / summed for key, value in sums.items()}
            log.write(trainer.step, **sums, rate=rate, audio_seconds_per_second=speed, elapsed=stopper.elapsed())
            bar.set_postfix_str(
                f"step {trainer.step} loss {sums['total']:.3f} mel {sums['mel']:.2f} dB {speed:.0f} audio-s/s"
            )
            bar.update(round(stopper.elapsed()) - bar.n)
            sums, summed = {}, 0
        if time.monotonic() - saved > settings.checkpoint_minutes * 60.0:
            trainer.save(run / CHECKPOINT, stopper, rng)
            if validation is not None:
                parts = trainer.evaluate(validation)
                tqdm.write(
                    f"step {trainer.step}: validation loss {parts.total:.4f}, mel {parts.mel:.3f} dB, kl {parts.kl:.1f}"
                )
            if store.refresh(limit_seconds=900.0) > 0:
                tqdm.write(f"audio seconds in memory: {store.seconds}")
            saved = mark = time.monotonic()
            timed = 0
    bar.close()
    trainer.save(run / CHECKPOINT, stopper, rng)


def _validation(root: str | os.PathLike[str], codec: Codec, settings: CodecTraining) -> Tensor | None:
    """Forty fixed crops of the validation split, or None where it is empty."""
    store = FeatureStore(root, codec.frames, hours=(0.2, 0.2), split="val", seed=settings.seed)
    store.refresh()
    if not any(store.groups.values()):
        return None
    return store.sample(40, settings.latents, np.random.default_rng(1), rendered_share=0.5, augment=False)


@torch.no_grad()
def fit_latent_scale(codec: Codec, store: FeatureStore, settings: CodecTraining, crops: int = 400) -> None:
    """Set the latents' mean and scale: training audio encodes to mean 0 and standard deviation 0.5 per channel."""
    rng = np.random.default_rng(settings.seed + 1)
    means = []
    for _ in range(crops // 20):
        features = store.sample(20, settings.latents, rng, settings.rendered_share, augment=False)
        features = features.to(codec.latent_mean.device).float()
        means.append(codec.encoder(codec.normalize(features[:, :, :2]))[0].flatten(0, 1))
    latents = torch.cat(means)
    codec.latent_mean.copy_(latents.mean(0))
    codec.latent_scale.copy_(SIGMA_DATA / latents.std(0).clamp_min(1e-3))


@torch.inference_mode()
def fit_synthesis_gain(codec: Codec, clips: Sequence[np.ndarray], rounds: int = 2, bands: int = 40) -> None:
    """Set the gain per band so that decoded clips have the level of the originals, in the median over frames.

    Frames of imperfect phase cancel in part where they overlap, noise-like high bands by 3 dB. `clips` are training
    clips (2, n) float32 at 44.1 kHz; levels are compared in mel bands of left and right where the original is above
    -75 dB.
    """
    mels = torch.from_numpy(mel_filters(bands)).float()
    peaks = mels.argmax(1).numpy()
    bins = band_centres(codec.config.break_hz)
    codec.synthesis_gain.zero_()
    latents = [codec.encode(torch.from_numpy(clip)[None]) for clip in clips]
    for _ in range(rounds):
        missing: list[list[Tensor]] = [[] for _ in range(bands)]
        for clip, z in zip(clips, latents, strict=True):
            decoded = codec.decode(z, clip.shape[1])[0].cpu()
            whole = clip.shape[1] // LATENT_HOP * LATENT_HOP
            pair = torch.stack([torch.from_numpy(clip)[:, :whole], decoded[:, :whole]])
            power = codec.frames.cpu().stft(pair).abs().square() @ mels.T
            difference = 0.5 * ((power[0] + POWER_FLOOR).log() - (power[1] + POWER_FLOOR).log())
            heard = power[0] > 10.0**-7.5
            for band in range(bands):
                missing[band].append(difference[..., band][heard[..., band]])
        medians = [float(torch.cat(m).median()) if sum(map(len, m)) > 100 else 0.0 for m in missing]
        correction = np.interp(bins, peaks, medians)
        codec.frames.to(codec.latent_mean.device)
        codec.synthesis_gain += torch.from_numpy(correction).to(codec.synthesis_gain)


def training_clips(root: str | os.PathLike[str], count: int, seconds: float, seed: int = 0) -> list[np.ndarray]:
    """`count` random clips (2, n) float32 of the training split, half rendered, half recorded if there are any."""
    manifest, rng, frames = load_manifest(root), np.random.default_rng(seed), int(seconds * SAMPLE_RATE)
    clips = []
    for kinds in (RENDERED, RECORDED):
        long = [i for i in items(manifest, "train", kinds) if frames_of(i) >= frames]
        for index in rng.permutation(len(long))[: count // 2]:
            start = int(rng.integers(0, frames_of(long[index]) - frames + 1))
            clips.append(read_audio(long[index], start, frames, root=root))
    return clips


def write_codec(codec: Codec, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write codec.safetensors, weight matrices in `dtype` and all else in float32, and config.json to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.to(dtype) if value.ndim > 1 else value for name, value in codec.state_dict().items()}
    save_checkpoint(folder / "codec.safetensors", state, {})
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(codec.config.to_dict(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "config.json")


def main() -> None:
    """Command line of the codec trainer."""
    parser = argparse.ArgumentParser(prog="python -m presto_rt.lab.training.codec", description="Train the codec.")
    parser.add_argument("--data", default="data", help="data set folder")
    parser.add_argument("--run", default="runs/codec", help="run folder: checkpoints, log, final weights")
    parser.add_argument(
        "--minutes", type=float, required=True, help="wall time to train for, earlier parts of a resumed run included"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    parser.add_argument(
        "--freeze-encoder", action="store_true", help="train the decoder alone: latents stay as they are"
    )
    parser.add_argument("--start-from", help="folder of a trained codec to start from")
    parser.add_argument("--batch", type=int, default=CodecTraining.batch)
    parser.add_argument("--rate", type=float, default=CodecTraining.rate)
    parser.add_argument("--no-compile", action="store_true")
    a = parser.parse_args()
    settings = CodecTraining(batch=a.batch, rate=a.rate, compile=not a.no_compile)
    train_codec(
        a.data,
        a.run,
        a.minutes,
        a.device,
        a.resume,
        settings=settings,
        freeze_encoder=a.freeze_encoder,
        start_from=a.start_from,
    )


if __name__ == "__main__":
    main()
