"""Training data of the codec: spectral features of the data set, held in memory as float16, and random crops of them.

Features are computed once per stretch of audio instead of once per crop: a training step then costs no FFT. One audio
second takes 192 kB; `hours` caps each kind. Gain and left/right swap, the augmentations, are additions and a sign in
this domain.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...errors import InvalidInputError
from ...models.spectral import FRAMES_PER_LATENT, LATENT_HOP, POWER_FLOOR, SpectralFrames
from ..data.dataset import SAMPLE_RATE, frames_of, items, load_manifest, read_audio

RENDERED = ("solo", "duo", "band")
RECORDED = ("recording",)
LOWEST = 0.5 * float(np.log(POWER_FLOOR))


class FeatureStore:
    """Features (frames, 3, bands), float16, of stretches of the training items, by group: "rendered" and "recorded".

    A stretch is at most `stretch_seconds` long, at a random place of its item, so that a capped group still covers
    many pieces.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        frames: SpectralFrames,
        *,
        hours: tuple[float, float] = (4.0, 2.5),
        split: str = "train",
        stretch_seconds: float = 60.0,
        seed: int = 0,
    ) -> None:
        self.root = root
        self.frames = frames
        self.split = split
        self.stretch = int(stretch_seconds * SAMPLE_RATE) // LATENT_HOP * LATENT_HOP
        self.caps = {"rendered": hours[0] * 3600.0, "recorded": hours[1] * 3600.0}
        self.groups: dict[str, list[Tensor]] = {"rendered": [], "recorded": []}
        self.seconds = {"rendered": 0.0, "recorded": 0.0}
        self._seen: set[str] = set()
        self._seed = seed

    def _waiting(self) -> Iterator[tuple[str, list]]:
        manifest = load_manifest(self.root)
        order = np.random.default_rng(self._seed)
        for group, kinds in (("rendered", RENDERED), ("recorded", RECORDED)):
            new = [i for i in items(manifest, self.split, kinds) if i.id not in self._seen and i.seconds >= 4.0]
            yield group, [new[j] for j in order.permutation(len(new))]

    @torch.inference_mode()
    def refresh(self, limit_seconds: float = float("inf"), progress: bool = False) -> float:
        """Take in items that the manifest has gained, up to the caps and to `limit_seconds` of audio; returns the
        seconds added."""
        added = 0.0
        for group, waiting in self._waiting():
            room = min(self.caps[group] - self.seconds[group], limit_seconds - added)
            bar = tqdm(
                total=round(max(room, 0.0)), desc=f"features, {group}", unit="s", disable=not progress, leave=False
            )
            for item in waiting:
                if room <= 0.0:
                    break
                seconds = self._add(group, item)
                room -= seconds
                added += seconds
                bar.update(round(seconds))
            bar.close()
        return added

    def _add(self, group: str, item: object) -> float:
        total = frames_of(item)  # type: ignore[arg-type]
        count = min(self.stretch, total // LATENT_HOP * LATENT_HOP)
        draw = np.random.default_rng([self._seed, len(self._seen)])
        start = int(draw.integers(0, max(total - count, 0) + 1))
        samples = torch.from_numpy(read_audio(item, start, count, root=self.root))[None]  # type: ignore[arg-type]
        self.groups[group].append(self.frames.features(samples, with_cosine=True)[0].half())
        self._seen.add(item.id)  # type: ignore[attr-defined]
        self.seconds[group] += count / SAMPLE_RATE
        return count / SAMPLE_RATE

    def sample(
        self,
        batch: int,
        latents: int,
        generator: np.random.Generator,
        rendered_share: float = 0.6,
        augment: bool = True,
    ) -> Tensor:
        """Random crops (batch, 4 latents, 3, bands) float16; a crop is "rendered" with probability `rendered_share`.

        Raises InvalidInputError when there is no stretch long enough.
        """
        count = latents * FRAMES_PER_LATENT
        usable = {g: [f for f in parts if len(f) >= count] for g, parts in self.groups.items()}
        if not any(usable.values()):
            raise InvalidInputError(
                f"no training audio of {latents} latent frames under {self.root}: build the data set first"
            )
        lengths = {g: np.cumsum([len(f) for f in parts]) for g, parts in usable.items() if parts}
        crops = []
        for _ in range(batch):
            group = "rendered" if generator.random() < rendered_share else "recorded"
            if group not in lengths:
                group = next(iter(lengths))
            index = int(np.searchsorted(lengths[group], generator.integers(lengths[group][-1]), side="right"))
            part = usable[group][index]
            start = int(generator.integers(0, len(part) - count + 1))
            crops.append(part[start : start + count])
        out = torch.stack(crops)
        if augment:
            gain = torch.from_numpy(generator.uniform(-0.8, 0.3, (batch, 1, 1, 1))).half()  # nats: -7 to +2.6 dB
            swap = torch.from_numpy(np.where(generator.random((batch, 1, 1)) < 0.5, -1.0, 1.0)).half()
            out[:, :, :2] = (out[:, :, :2] + gain).clamp_min(LOWEST)
            out[:, :, 2] *= swap
        return out

    def loudest(self) -> Tensor:
        """The highest log-magnitude of mid and of side in each band of all training audio, (2, bands) float32."""
        parts = [part[:, :2].amax(0) for group in self.groups.values() for part in group]
        return torch.stack(parts).amax(0).float()

    def spread(self, frames: int, generator: np.random.Generator) -> Tensor:
        """About `frames` frames in runs of 4, from all groups alike: (n, 4, 3, bands) float32, to fit the PCA on."""
        return self.sample(max(frames // FRAMES_PER_LATENT, 1), 1, generator, rendered_share=0.5, augment=False).float()
