"""Calibration of a trained codec: latent mean and scale, and the gain of synthesis in each band."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...models.codec import SIGMA_DATA, Codec
from ...models.spectral import LATENT_HOP, POWER_FLOOR, SAMPLE_RATE, band_centres, mel_filters
from ..data.dataset import frames_of, items, read_audio
from ..data.manifest import load_manifest
from .codec_data import RECORDED, RENDERED, FeatureStore

CROPS, CROPS_PER_BATCH = 400, 20  # training crops that the latent scale is fitted on
GAIN_ROUNDS = 2  # repetitions of decoding and correction
GAIN_BANDS = 40  # mel bands
AUDIBLE_POWER = 10.0**-7.5  # -75 dB; quieter bands are ignored
FEWEST_VALUES = 100  # a band with at most this many audible values keeps its gain


@torch.no_grad()
def fit_latent_scale(codec: Codec, store: FeatureStore, *, latents: int, rendered_share: float, seed: int) -> None:
    """Set the latents' mean and scale so that training audio has mean 0 and standard deviation 0.5 in each channel.

    Args:
        codec: codec to calibrate, in place.
        store: training features.
        latents: length of a crop, in latent frames.
        rendered_share: share of crops of rendered audio.
        seed: the crops are drawn with `seed` + 1.
    """
    rng = np.random.default_rng(seed + 1)
    means = []
    for _ in range(CROPS // CROPS_PER_BATCH):
        features = store.sample(CROPS_PER_BATCH, latents, rng, rendered_share, augment=False)
        features = features.to(codec.latent_mean.device).float()
        means.append(codec.encoder(codec.normalize(features[:, :, :2]))[0].flatten(0, 1))
    encoded = torch.cat(means)
    codec.latent_mean.copy_(encoded.mean(0))
    codec.latent_scale.copy_(SIGMA_DATA / encoded.std(0).clamp_min(1e-3))


@torch.inference_mode()
def fit_synthesis_gain(codec: Codec, clips: Sequence[npt.NDArray[np.float32]]) -> None:
    """Set the synthesis gain so that decoded clips have the originals' level in each band, in the median over frames.

    Overlapping frames of imperfect phase cancel in part, in noise-like high bands by 3 dB. Levels are compared in mel
    bands of left and right where the original is above -75 dB.

    Args:
        codec: codec to calibrate, in place.
        clips: training audio, (2, n) at 44.1 kHz each.
    """
    mels = torch.from_numpy(mel_filters(GAIN_BANDS)).float()
    peaks = mels.argmax(1).numpy()
    bins = band_centres(codec.config.break_hz)
    codec.synthesis_gain.zero_()
    latents = [codec.encode(torch.from_numpy(clip)[None]) for clip in clips]
    for _ in range(GAIN_ROUNDS):
        missing: list[list[Tensor]] = [[] for _ in range(GAIN_BANDS)]
        for clip, z in zip(clips, latents, strict=True):
            decoded = codec.decode(z, clip.shape[1])[0].cpu()
            length = clip.shape[1] // LATENT_HOP * LATENT_HOP
            pair = torch.stack([torch.from_numpy(clip)[:, :length], decoded[:, :length]])
            power = codec.frames.cpu().stft(pair).abs().square() @ mels.T
            difference = 0.5 * ((power[0] + POWER_FLOOR).log() - (power[1] + POWER_FLOOR).log())
            audible = power[0] > AUDIBLE_POWER
            for band in range(GAIN_BANDS):
                missing[band].append(difference[..., band][audible[..., band]])
        medians = [float(torch.cat(m).median()) if sum(map(len, m)) > FEWEST_VALUES else 0.0 for m in missing]
        correction = np.interp(bins, peaks, medians)
        codec.frames.to(codec.latent_mean.device)
        codec.synthesis_gain += torch.from_numpy(correction).to(codec.synthesis_gain)


def training_clips(
    root: str | os.PathLike[str], count: int, seconds: float, seed: int = 0
) -> list[npt.NDArray[np.float32]]:
    """Return random clips (2, n) of the training split, half of them rendered and half recorded if there are any.

    Args:
        root: data set folder.
        count: number of clips.
        seconds: length of a clip; shorter items are not used.
        seed: seed of the choice.
    """
    manifest, rng, frames = load_manifest(root), np.random.default_rng(seed), int(seconds * SAMPLE_RATE)
    clips = []
    for kinds in (RENDERED, RECORDED):
        long_enough = [i for i in items(manifest, "train", kinds) if frames_of(i) >= frames]
        for index in rng.permutation(len(long_enough))[: count // 2]:
            item = long_enough[index]
            start = int(rng.integers(0, frames_of(item) - frames + 1))
            clips.append(read_audio(item, start, frames, root=root))
    return clips
