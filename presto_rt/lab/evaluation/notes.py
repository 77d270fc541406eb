"""Notes heard in a clip, by basic-pitch (Bittner et al. 2022, arXiv 2203.09893) through onnxruntime.

The 230 kB network in the basic-pitch package hears 22,050 Hz mono in windows of 43,844 samples and gives, 86 times a
second, the probability that each of the 88 piano pitches sounds and that it starts. Neighbouring windows overlap by
30 frames, of which half is cut at each side, as in the package.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import MissingDependencyError
from .musicnn import mono

RATE, WINDOW, FRAME, OVERLAP = 22050, 43844, 256, 30
STEP = WINDOW - OVERLAP * FRAME
LOWEST = 21  # MIDI number of the first of the 88 pitches


@dataclass(frozen=True)
class Notes:
    """Per frame (86.1 Hz) and pitch (88, from MIDI 21): probability that it sounds, and that it starts. (T, 88)
    float32.
    """

    sounding: np.ndarray
    starting: np.ndarray
    seconds: float

    def onsets(self, threshold: float = 0.5, lasting: float = 0.3) -> np.ndarray:
        """(N, 2) int: frame and pitch of every note that starts.

        A start is a local maximum in time of `starting` that reaches `threshold`, after which the pitch sounds with a
        mean probability of at least `lasting` for 116 ms: without that, the overtones of an attack would count.
        """
        p = np.pad(self.starting, ((1, 1), (0, 0)))
        peaks = (p[1:-1] >= threshold) & (p[1:-1] > p[:-2]) & (p[1:-1] >= p[2:])
        sums = np.concatenate([np.zeros((1, 88)), np.cumsum(self.sounding, axis=0, dtype=np.float64)])
        ends = np.minimum(np.arange(len(self.sounding)) + 10, len(self.sounding))
        means = (sums[ends] - sums[:-1]) / (ends - np.arange(len(ends)))[:, None]
        return np.argwhere(peaks & (means >= lasting))

    def density(self) -> float:
        """Note onsets per second."""
        return len(self.onsets()) / max(self.seconds, 1e-9)

    def chroma(self, threshold: float = 0.2) -> np.ndarray:
        """How long each pitch class sounds, (12,) from C, summing to 1 (zeros if nothing sounds)."""
        return _fold((self.sounding * (self.sounding >= threshold)).sum(0))

    def chromas(self) -> np.ndarray:
        """Chroma and bass chroma, (2, 12): what `tonality.key_scores` judges keys by."""
        return np.stack([self.chroma(), self.bass_chroma()])

    def bass_chroma(self, threshold: float = 0.3) -> np.ndarray:
        """How long each pitch class is the lowest that sounds, (12,) from C, summing to 1 (zeros if nothing
        sounds).
        """
        heard = self.sounding >= threshold
        lowest = np.zeros(heard.shape, dtype=np.float32)
        rows = np.flatnonzero(heard.any(1))
        lowest[rows, heard[rows].argmax(1)] = 1.0
        return _fold(lowest.sum(0))


def _fold(weights: np.ndarray) -> np.ndarray:
    """Weights of 88 pitches -> 12 pitch classes, normalised."""
    classes = np.bincount((LOWEST + np.arange(len(weights))) % 12, weights=weights, minlength=12)
    return (classes / max(classes.sum(), 1e-9)).astype(np.float32)


class NoteTracker:
    """A loaded basic-pitch network. Raises MissingDependencyError when onnxruntime or the package is not installed."""

    def __init__(self, threads: int = 1) -> None:
        spec = importlib.util.find_spec("basic_pitch")
        if spec is None or not spec.submodule_search_locations:
            raise MissingDependencyError(
                "note tracking needs the network in basic-pitch: pip install --no-deps basic-pitch"
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError("note tracking needs onnxruntime: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        model = Path(spec.submodule_search_locations[0]) / "saved_models" / "icassp_2022" / "nmp.onnx"
        self.net = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def track(self, clip: np.ndarray, rate: int = 44100) -> Notes:
        """Notes of a clip (channels, n) or (n,)."""
        samples = mono(clip, rate, RATE)
        half = OVERLAP // 2
        padded = np.pad(samples, (half * FRAME, WINDOW))
        # the last quarter second alone is not worth a window
        starts = range(0, max(1, len(samples) - RATE // 4), STEP)
        batch = np.stack([padded[s : s + WINDOW] for s in starts])[..., None].astype(np.float32)
        names = ["StatefulPartitionedCall:1", "StatefulPartitionedCall:2"]  # notes, onsets; :0 are finer pitch contours
        notes, onsets = self.net.run(names, {self.net.get_inputs()[0].name: batch})
        frames = int(len(samples) / FRAME)
        sounding, starting = (x[:, half:-half].reshape(-1, x.shape[-1])[:frames] for x in (notes, onsets))
        return Notes(sounding, starting, len(samples) / RATE)
