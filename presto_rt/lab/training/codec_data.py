"""Training data of the codec: spectral features of the data set in memory, as float16, and random crops of them.

Features are computed once per stretch of audio, so that a training step needs no FFT. One second of audio takes 192 kB.
Gain and exchange of left and right, the augmentations, are an addition and a sign in this domain.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...errors import InvalidInputError
from ...models.spectral import FRAMES_PER_LATENT, LATENT_HOP, POWER_FLOOR, SAMPLE_RATE, SpectralFrames
from ..data.dataset import frames_of, items, read_audio
from ..data.manifest import Item, load_manifest

RENDERED = ("solo", "duo", "band")
RECORDED = ("recording",)
LOWEST = 0.5 * float(np.log(POWER_FLOOR))  # smallest log-magnitude
SHORTEST = 4.0  # seconds; shorter items are not used


class FeatureStore:
    """Features (frames, 3, bands), float16, of stretches of a split's items, in two groups: "rendered" and "recorded".

    A stretch starts at a random place of its item and has a limited length, so that a group at its limit of hours still
    covers many pieces.

    Args:
        root: data set folder.
        frames: analysis that computes the features.
        hours: most hours of audio, (rendered, recorded).
        split: "train", "val" or "test".
        stretch_seconds: longest stretch.
        seed: seed of the order of items and of the stretches' starts.
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
        self.limits = {"rendered": hours[0] * 3600.0, "recorded": hours[1] * 3600.0}  # seconds
        self.groups: dict[str, list[Tensor]] = {"rendered": [], "recorded": []}
        self.seconds = {"rendered": 0.0, "recorded": 0.0}
        self._seen: set[str] = set()
        self._seed = seed

    def _waiting(self) -> Iterator[tuple[str, list[Item]]]:
        manifest = load_manifest(self.root)
        order = np.random.default_rng(self._seed)
        for group, kinds in (("rendered", RENDERED), ("recorded", RECORDED)):
            new = [i for i in items(manifest, self.split, kinds) if i.id not in self._seen and i.seconds >= SHORTEST]
            yield group, [new[j] for j in order.permutation(len(new))]

    @torch.inference_mode()
    def refresh(self, limit_seconds: float = float("inf"), progress: bool = False) -> float:
        """Add items that the manifest has gained, up to each group's hours and to `limit_seconds` of audio in all.

        Returns:
            Seconds of audio added.
        """
        added = 0.0
        for group, waiting in self._waiting():
            room = min(self.limits[group] - self.seconds[group], limit_seconds - added)
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

    def _add(self, group: str, item: Item) -> float:
        total = frames_of(item)
        count = min(self.stretch, total // LATENT_HOP * LATENT_HOP)
        draw = np.random.default_rng([self._seed, len(self._seen)])
        start = int(draw.integers(0, max(total - count, 0) + 1))
        samples = torch.from_numpy(read_audio(item, start, count, root=self.root))[None]
        self.groups[group].append(self.frames.features(samples, with_cosine=True)[0].half())
        self._seen.add(item.id)
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
        """Draw random crops.

        Args:
            batch: number of crops, B.
            latents: length of a crop in latent frames, T.
            generator: source of the random choices.
            rendered_share: probability of a crop of the group "rendered".
            augment: apply a random gain (-7 to +2.6 dB) and exchange left and right at random.

        Returns:
            Features (B, 4 T, 3, bands), float16.

        Raises:
            InvalidInputError: no stretch is long enough.
        """
        count = latents * FRAMES_PER_LATENT
        usable = {g: [f for f in parts if len(f) >= count] for g, parts in self.groups.items()}
        if not any(usable.values()):
            raise InvalidInputError(
                f"no {self.split} audio of {latents} latent frames in {self.root}; run `presto-rt lab data build`"
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
        features = torch.stack(crops)
        if augment:
            gain = torch.from_numpy(generator.uniform(-0.8, 0.3, (batch, 1, 1, 1))).half()  # nats of magnitude
            swap = torch.from_numpy(np.where(generator.random((batch, 1, 1)) < 0.5, -1.0, 1.0)).half()
            features[:, :, :2] = (features[:, :, :2] + gain).clamp_min(LOWEST)
            features[:, :, 2] *= swap
        return features

    def loudest(self) -> Tensor:
        """Highest log-magnitude of mid and side in each band over all audio in the store, (2, bands) float32."""
        parts = [part[:, :2].amax(0) for group in self.groups.values() for part in group]
        return torch.stack(parts).amax(0).float()

    def spread(self, frames: int, generator: np.random.Generator) -> Tensor:
        """Draw about `frames` frames in runs of 4, half of them rendered: (n, 4, 3, bands) float32, to fit the PCA."""
        return self.sample(max(frames // FRAMES_PER_LATENT, 1), 1, generator, rendered_share=0.5, augment=False).float()
