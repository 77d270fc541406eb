"""Music tagger musicnn (Pons and Serra 2019, arXiv 1909.06654) in torch, with the weights of the musicnn package.

The network takes windows of 187 log-mel frames (3 s) of 16 kHz mono audio, and returns 50 tag probabilities and a
200-dimensional penultimate layer, which the distances use as an embedding.

The package's weights are a TensorFlow 1 checkpoint, read by `tf_checkpoint` without TensorFlow. `logmel` follows the
package's front-end with one exception: the package rounds mel powers to float16 before it multiplies them by 10,000,
which overflows on loud tones; here all arithmetic is float32.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InvalidInputError, MissingDependencyError, WeightsError
from .tf_checkpoint import read_checkpoint

RATE, N_FFT, HOP, MELS, FRAMES = 16000, 512, 256, 96, 187
BN_EPS = 1e-3  # the default of tf.layers.batch_normalization

MODEL = "MTT_musicnn"  # trained on MagnaTagATune, whose tags name instruments

# MagnaTagATune's 50 most frequent tags, in the order of the network's outputs.
TAGS = tuple(
    """
    guitar,classical,slow,techno,strings,drums,electronic,rock,fast,piano,ambient,beat,violin,vocal,synth,female,
    indian,opera,male,singing,vocals,no vocals,harpsichord,loud,quiet,flute,woman,male vocal,no vocal,pop,soft,
    sitar,solo,man,classic,choir,voice,new age,dance,male voice,female vocal,beats,harp,cello,no voice,weird,country,
    metal,female voice,choral
    """.replace("\n", "")
    .replace("    ", "")
    .split(",")
)


def mel_matrix(rate: int = RATE, n_fft: int = N_FFT, mels: int = MELS) -> np.ndarray:
    """Return Slaney mel filters of unit area from 0 Hz to rate / 2: (mels, n_fft // 2 + 1) float32.

    The scale (Slaney 1998, Auditory Toolbox) is linear up to 1 kHz, 200/3 Hz per mel, then logarithmic, ln(6.4)/27 per
    mel.
    """
    knee, step = 15.0, np.log(6.4) / 27.0
    top = knee + np.log(rate / 2 / 1000.0) / step if rate > 2000 else rate / 2 * 3 / 200
    points = np.linspace(0.0, top, mels + 2)
    hertz = np.where(points < knee, points * 200 / 3, 1000.0 * np.exp(step * (points - knee)))
    bins = np.linspace(0.0, rate / 2, n_fft // 2 + 1)
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    triangles: np.ndarray = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(min=0)
    filters: np.ndarray = (triangles * 2.0 / (high - low)).astype(np.float32)
    return filters


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resample (..., n) from `rate` to `target` Hz with a polyphase filter: (..., ceil(n target / rate)) float32."""
    if rate == target:
        return np.asarray(samples, dtype=np.float32)
    from math import gcd

    from scipy.signal import resample_poly

    divisor = gcd(rate, target)
    resampled: np.ndarray = resample_poly(samples, target // divisor, rate // divisor, axis=-1).astype(np.float32)
    return resampled


def mono(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Mix a clip, (channels, n) or (n,), to mono and resample it to `target` Hz: (m,) float32."""
    samples = np.asarray(samples, dtype=np.float32)
    return resample(samples.mean(axis=0) if samples.ndim == 2 else samples, rate, target)


def logmel(samples: np.ndarray) -> Tensor:
    """Return log10(1 + 10000 mel power) of mono 16 kHz samples (n,): (1 + n // 256, 96) float32.

    Raises InvalidInputError for other shapes and for signals of at most 256 samples.
    """
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


def windows(frames: Tensor) -> Tensor:
    """Cut frames (T, 96) into adjacent windows (T // 187, 187, 96); a shorter input is repeated to fill one window."""
    if len(frames) < FRAMES:
        frames = frames.repeat(-(-FRAMES // len(frames)), 1)[:FRAMES]
    return frames.unfold(0, FRAMES, FRAMES).transpose(1, 2)


class MusicNN(nn.Module):
    """Tagging network from log-mel windows (B, T, 96) to tag logits (B, 50) and the penultimate layer (B, 200).

    Front-end: two "timbral" convolutions over 7 frames and 38 or 67 mel bands, and three "temporal" ones over 128, 64
    and 32 frames, each pooled by its maximum over frequency. Mid-end: three residual convolutions over time. Back-end:
    maximum and mean over time of all layers, then two dense layers. Inference only: dropout is left out.
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
        """Map log-mel windows (B, T, 96) to features over time (B, 561, T)."""
        x = self.bn_input(x[:, None])
        features = []
        for conv, bn in zip([*self.timbral, *self.temporal], self.bn_front, strict=True):
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(bn, nn.BatchNorm2d)
            if conv.kernel_size[1] == 1:
                length = conv.kernel_size[0]  # even: TensorFlow's "same" padding adds one frame more after than before
                y = conv(F.pad(x, (0, 0, (length - 1) // 2, length // 2)))
            else:
                y = conv(x)
            # max over frequency of bn(relu(y)); bn is monotonic, so it commutes with the maximum (or the minimum)
            y = torch.where((bn.weight >= 0)[:, None], y.amax(3), y.amin(3)).relu()
            features.append(bn(y[..., None])[..., 0])
        return torch.cat(features, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, 50) and the penultimate layer (B, 200) of log-mel windows (B, T, 96)."""
        layers = [self.front_end(x)]
        y = layers[0]
        for i, (conv, bn) in enumerate(zip(self.mid, self.bn_mid, strict=True)):
            z = bn(conv(y).relu())
            y = z if i == 0 else z + y
            layers.append(y)
        features = torch.cat(layers, 1)
        pooled = torch.stack((features.amax(2), features.mean(2)), 2).flatten(1)
        penultimate = self.bn_dense(self.dense(self.bn_pool(pooled)).relu())
        return self.output(penultimate), penultimate


def state_from_tensorflow(tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert the checkpoint's tensors to a state dict of `MusicNN`.

    TensorFlow numbers the layers of each kind in the order of their construction.
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
        for tensorflow_name, torch_name in torch_names.items():
            state[f"{name}.{torch_name}"] = get("batch_normalization", i, tensorflow_name)
    for i, name in enumerate(["dense", "output"]):
        state[f"{name}.weight"] = get("dense", i, "kernel").T.contiguous()
        state[f"{name}.bias"] = get("dense", i, "bias")
    return state


def package_folder() -> Path:
    """Return the folder of the `musicnn` package without importing it, since the import needs TensorFlow.

    Raises MissingDependencyError if the package is not installed.
    """
    spec = importlib.util.find_spec("musicnn")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "the tagger needs the weights in the musicnn package; run: pip install --no-deps musicnn"
        )
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class WindowTags:
    """Outputs of the tagger for the N windows of a clip: probabilities (N, 50) and embeddings (N, 200), float32."""

    tags: np.ndarray
    penultimate: np.ndarray


class Tagger:
    """The musicnn network with its weights loaded.

    Raises MissingDependencyError without the musicnn package, WeightsError if its checkpoint is damaged.
    """

    def __init__(self) -> None:
        self.net = MusicNN().eval().requires_grad_(False)
        tensors = read_checkpoint(package_folder() / MODEL)
        missing, unexpected = self.net.load_state_dict(state_from_tensorflow(tensors), strict=False)
        if unexpected or any(not key.endswith("num_batches_tracked") for key in missing):
            raise WeightsError(f"the {MODEL} checkpoint does not match the network: {missing} {unexpected}")

    @torch.inference_mode()
    def tag(self, clip: np.ndarray, rate: int = 44100, batch: int = 8) -> WindowTags:
        """Tag the adjacent windows of 3 s of a clip, (channels, n) or (n,) at `rate` Hz, `batch` windows at a time.

        Runs on torch's current number of threads. Raises InvalidInputError for clips of at most 16 ms.
        """
        frames = logmel(mono(clip, rate, RATE))
        outputs = [self.net(part.contiguous()) for part in torch.split(windows(frames), batch)]
        tags = torch.cat([logits.sigmoid() for logits, _ in outputs])
        penultimate = torch.cat([layer for _, layer in outputs])
        return WindowTags(tags.numpy(), penultimate.numpy())
