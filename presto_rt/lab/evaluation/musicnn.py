"""The tagger that judges: musicnn (Pons and Serra 2019, arXiv 1909.06654) in torch, from the weights in its own
package.

musicnn hears 16 kHz mono (nothing above 8 kHz) in windows of 187 log-mel frames, 3 s. Per window it gives 50 tag
probabilities and a 200-d penultimate layer, which the distances use as an embedding.

The package's weights are TensorFlow 1 checkpoints, read by `tf_checkpoint`; neither TensorFlow nor librosa is
imported. `logmel` follows the package's front-end with one exception: the package rounds mel powers to float16 before
it multiplies by 10,000, which overflows on loud tones; here everything stays float32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InvalidInputError, MissingDependencyError
from .tf_checkpoint import read_checkpoint

RATE, N_FFT, HOP, MELS, FRAMES = 16000, 512, 256, 96, 187
BN_EPS = 1e-3  # the default of tf.layers.batch_normalization

# The tags in output order, a property of the weights (MagnaTagATune's and the Million Song Dataset's 50 most
# frequent).
MTT_TAGS = tuple(
    """
    guitar,classical,slow,techno,strings,drums,electronic,rock,fast,piano,ambient,beat,violin,vocal,synth,female,
    indian,opera,male,singing,vocals,no vocals,harpsichord,loud,quiet,flute,woman,male vocal,no vocal,pop,soft,
    sitar,solo,man,classic,choir,voice,new age,dance,male voice,female vocal,beats,harp,cello,no voice,weird,country,
    metal,female voice,choral
    """.replace("\n", "")
    .replace("    ", "")
    .split(",")
)
MSD_TAGS = tuple(
    """
    rock,pop,alternative,indie,electronic,female vocalists,dance,00s,alternative rock,jazz,beautiful,metal,chillout,
    male vocalists,classic rock,soul,indie rock,Mellow,electronica,80s,folk,90s,chill,instrumental,punk,oldies,blues,
    hard rock,ambient,acoustic,experimental,female vocalist,guitar,Hip-Hop,70s,party,country,easy listening,sexy,
    catchy,funk,electro,heavy metal,Progressive rock,60s,rnb,indie pop,sad,House,happy
    """.replace("\n", "")
    .replace("    ", "")
    .split(",")
)
TAGS = {"MTT_musicnn": MTT_TAGS, "MSD_musicnn": MSD_TAGS}


def mel_matrix(rate: int = RATE, n_fft: int = N_FFT, mels: int = MELS) -> np.ndarray:
    """Slaney mel filters of unit area, (mels, n_fft // 2 + 1) float32, from 0 Hz to rate / 2.

    Slaney's scale (Auditory Toolbox 1998) is linear, 200/3 Hz per mel, up to 1 kHz, then logarithmic, ln(6.4)/27 per
    mel.
    """
    knee, step = 15.0, np.log(6.4) / 27.0
    top = knee + np.log(rate / 2 / 1000.0) / step if rate > 2000 else rate / 2 * 3 / 200
    points = np.linspace(0.0, top, mels + 2)
    hertz = np.where(points < knee, points * 200 / 3, 1000.0 * np.exp(step * (points - knee)))
    bins = np.linspace(0.0, rate / 2, n_fft // 2 + 1)
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(min=0)
    return (triangles * 2.0 / (high - low)).astype(np.float32)


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """(..., n) at `rate` -> (..., ceil(n target / rate)) float32 at `target`, by a polyphase filter."""
    if rate == target:
        return np.asarray(samples, dtype=np.float32)
    from math import gcd

    from scipy.signal import resample_poly

    common = gcd(rate, target)
    return resample_poly(samples, target // common, rate // common, axis=-1).astype(np.float32)


def mono(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """A clip, (channels, n) or (n,), as one channel at `target` Hz: (m,) float32."""
    samples = np.asarray(samples, dtype=np.float32)
    return resample(samples.mean(axis=0) if samples.ndim == 2 else samples, rate, target)


def logmel(samples: np.ndarray) -> Tensor:
    """Mono 16 kHz samples (n,) -> (frames, 96) float32: log10(1 + 10000 mel power), frames = 1 + n // 256."""
    x = torch.as_tensor(np.ascontiguousarray(samples, dtype=np.float32))
    if x.ndim != 1 or x.numel() <= N_FFT // 2:
        raise InvalidInputError(
            f"the tagger needs a mono signal of more than {N_FFT // 2} samples, got shape {tuple(x.shape)}"
        )
    spectrum = torch.stft(
        x, N_FFT, HOP, window=torch.hann_window(N_FFT), center=True, pad_mode="reflect", return_complex=True
    )
    power = spectrum.real.square() + spectrum.imag.square()
    return torch.log10(1.0 + 10000.0 * (_mel_tensor() @ power)).T


@lru_cache(maxsize=1)
def _mel_tensor() -> Tensor:
    return torch.from_numpy(mel_matrix())


def windows(frames: Tensor, hop: int = FRAMES) -> Tensor:
    """(T, 96) -> (N, 187, 96) windows every `hop` frames; a shorter input is repeated until it fills one window."""
    if len(frames) < FRAMES:
        frames = frames.repeat(-(-FRAMES // len(frames)), 1)[:FRAMES]
    return frames.unfold(0, FRAMES, hop).transpose(1, 2)


class MusicNN(nn.Module):
    """Log-mel windows (B, T, 96) -> tag logits (B, 50) and the penultimate layer (B, 200). Evaluation only.

    Front-end: two "timbral" convolutions, 7 frames high and 38 or 67 mel bands wide, and three "temporal" ones, 128,
    64 and 32 frames long; each is pooled by its maximum over frequency. Mid-end: three residual convolutions over
    time. Back-end: maximum and mean over time of all layers together, then two dense layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bn_input = nn.BatchNorm2d(1, eps=BN_EPS)
        self.timbral = nn.ModuleList(nn.Conv2d(1, 204, (7, width), padding=(3, 0)) for width in (38, 67))
        self.temporal = nn.ModuleList(nn.Conv2d(1, 51, (length, 1)) for length in (128, 64, 32))
        self.bn_front = nn.ModuleList(nn.BatchNorm2d(n, eps=BN_EPS) for n in (204, 204, 51, 51, 51))
        self.mid = nn.ModuleList(nn.Conv1d(n, 64, 7, padding=3) for n in (561, 64, 64))
        self.bn_mid = nn.ModuleList(nn.BatchNorm1d(64, eps=BN_EPS) for _ in range(3))
        self.bn_pool = nn.BatchNorm1d(1506, eps=BN_EPS)
        self.dense = nn.Linear(1506, 200)
        self.bn_dense = nn.BatchNorm1d(200, eps=BN_EPS)
        self.output = nn.Linear(200, 50)

    def front_end(self, x: Tensor) -> Tensor:
        """(B, T, 96) -> (B, 561, T)."""
        x = self.bn_input(x[:, None])
        features = []
        for conv, bn in zip([*self.timbral, *self.temporal], self.bn_front, strict=True):
            if (
                conv.kernel_size[1] == 1
            ):  # TensorFlow's "same" padding of an even kernel: one frame more after than before
                length = conv.kernel_size[0]
                y = conv(F.pad(x, (0, 0, (length - 1) // 2, length // 2)))
            else:
                y = conv(x)
            # max over frequency of bn(relu(y)); bn is monotonic, so it may come after the maximum (or minimum)
            y = torch.where((bn.weight >= 0)[:, None], y.amax(3), y.amin(3)).relu()
            features.append(bn(y[..., None])[..., 0])
        return torch.cat(features, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, 50), penultimate (B, 200), pooled (B, 1506): maximum and mean over time of the 753 features."""
        layers = [self.front_end(x)]
        y = layers[0]
        for i, (conv, bn) in enumerate(zip(self.mid, self.bn_mid, strict=True)):
            z = bn(conv(y).relu())
            y = z if i == 0 else z + y
            layers.append(y)
        features = torch.cat(layers, 1)
        pooled = torch.stack((features.amax(2), features.mean(2)), 2).flatten(1)
        penultimate = self.bn_dense(self.dense(self.bn_pool(pooled)).relu())
        return self.output(penultimate), penultimate, pooled


def state_from_tensorflow(tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """MusicNN's state from the checkpoint's tensors. TensorFlow numbers layers in the order in which they were
    built.
    """

    def get(kind: str, i: int, name: str) -> Tensor:
        return torch.from_numpy(tensors[f"{kind}{f'_{i}' if i else ''}/{name}"])

    state: dict[str, Tensor] = {}
    convs = ["timbral.0", "timbral.1", "temporal.0", "temporal.1", "temporal.2", "mid.0", "mid.1", "mid.2"]
    for i, name in enumerate(convs):
        kernel = get("conv2d", i, "kernel")  # (height, width, in, out)
        kernel = kernel[:, :, 0].permute(2, 1, 0) if name.startswith("mid") else kernel.permute(3, 2, 0, 1)
        state[f"{name}.weight"] = kernel.contiguous()
        state[f"{name}.bias"] = get("conv2d", i, "bias")
    norms = [
        "bn_input",
        *(f"bn_front.{i}" for i in range(5)),
        *(f"bn_mid.{i}" for i in range(3)),
        "bn_pool",
        "bn_dense",
    ]
    torch_names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    for i, name in enumerate(norms):
        for theirs, ours in torch_names.items():
            state[f"{name}.{ours}"] = get("batch_normalization", i, theirs)
    for i, name in enumerate(["dense", "output"]):
        state[f"{name}.weight"] = get("dense", i, "kernel").T.contiguous()
        state[f"{name}.bias"] = get("dense", i, "bias")
    return state


def package_folder() -> Path:
    """Where the `musicnn` package lies, found without importing it (importing it needs TensorFlow)."""
    spec = importlib.util.find_spec("musicnn")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "the tagger needs the weights in the musicnn package: pip install --no-deps musicnn"
        )
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Heard:
    """What the tagger heard: per window i, the clip it is from, tag probabilities and embeddings; all float32
    arrays.
    """

    clip: np.ndarray  # (N,) int64
    tags: np.ndarray  # (N, 50) probabilities
    penultimate: np.ndarray  # (N, 200)

    def clip_tags(self) -> np.ndarray:
        """Mean probabilities per clip, (clips, 50): the package's own way to tag a whole clip."""
        sums = np.zeros((self.clip[-1] + 1, self.tags.shape[1]), dtype=np.float64)
        np.add.at(sums, self.clip, self.tags)
        return (sums / np.bincount(self.clip)[:, None]).astype(np.float32)


class Tagger:
    """A loaded musicnn. `name` is "MTT_musicnn" (instruments) or "MSD_musicnn" (genres).

    Raises InvalidInputError for another name, MissingDependencyError or WeightsError when the weights are not there.
    """

    def __init__(self, name: str = "MTT_musicnn") -> None:
        if name not in TAGS:
            raise InvalidInputError(f"no such tagger: {name!r}; use one of {', '.join(TAGS)}")
        self.tags = TAGS[name]
        self.net = MusicNN().eval().requires_grad_(False)
        missing, unexpected = self.net.load_state_dict(
            state_from_tensorflow(read_checkpoint(package_folder() / name)), strict=False
        )
        if unexpected or any(not key.endswith("num_batches_tracked") for key in missing):
            raise InvalidInputError(f"the {name} checkpoint does not match the network: {missing} {unexpected}")

    @torch.inference_mode()
    def hear(self, clips: Sequence[np.ndarray], rate: int = 44100, hop: int = FRAMES, batch: int = 8) -> Heard:
        """Tags every clip, each (channels, n) or (n,) at `rate`, in windows every `hop` frames (16 ms each).

        Uses torch's current number of threads. Raises InvalidInputError for an empty list.
        """
        if not len(clips):
            raise InvalidInputError("the tagger was given no clips")
        owners: list[int] = []
        tags, penultimates = [], []
        queue: list[Tensor] = []

        def flush() -> None:
            logits, penultimate, _ = self.net(torch.stack(queue))
            tags.append(logits.sigmoid().numpy())
            penultimates.append(penultimate.numpy())
            queue.clear()

        for i, clip in enumerate(clips):
            for window in windows(logmel(mono(clip, rate, RATE)), hop):
                queue.append(window)
                owners.append(i)
                if len(queue) == batch:
                    flush()
        if queue:
            flush()
        return Heard(np.asarray(owners), np.concatenate(tags), np.concatenate(penultimates))
