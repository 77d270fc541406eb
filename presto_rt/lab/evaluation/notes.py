"""Note tracking with basic-pitch (Bittner et al. 2022, arXiv 2203.09893) through onnxruntime.

The 230 kB network of the basic-pitch package takes windows of 43,844 samples of 22,050 Hz mono audio. It returns, 86
times a second, the probability of each of the 88 piano pitches to sound and to start. Adjacent windows overlap by 30
frames; 15 are cut at each side, as in the package.
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
    """Note probabilities of a clip, (T, 88) float32: 86.1 frames a second, pitches from MIDI key 21.

    `sounding` is the probability that a pitch sounds, `starting` that it starts; `seconds` is the length of the clip.
    """

    sounding: np.ndarray
    starting: np.ndarray
    seconds: float

    def onsets(self, threshold: float = 0.5, lasting: float = 0.3) -> np.ndarray:
        """Frame and pitch index of each note onset: (N, 2) int.

        An onset is a local maximum of `starting` over time that reaches `threshold`, after which the pitch sounds with
        a mean probability of at least `lasting` for 116 ms; this excludes the overtones of an attack.
        """
        p = np.pad(self.starting, ((1, 1), (0, 0)))
        peaks = (p[1:-1] >= threshold) & (p[1:-1] > p[:-2]) & (p[1:-1] >= p[2:])
        sums = np.concatenate([np.zeros((1, 88)), np.cumsum(self.sounding, axis=0, dtype=np.float64)])
        ends = np.minimum(np.arange(len(self.sounding)) + 10, len(self.sounding))
        means = (sums[ends] - sums[:-1]) / (ends - np.arange(len(ends)))[:, None]
        return np.argwhere(peaks & (means >= lasting))

    def density(self) -> float:
        """Return the number of note onsets per second."""
        return len(self.onsets()) / max(self.seconds, 1e-9)

    def chroma(self, threshold: float = 0.2) -> np.ndarray:
        """Duration of each pitch class, (12,) float32 from C, normalized to sum 1; zeros for silence."""
        return _fold((self.sounding * (self.sounding >= threshold)).sum(0))

    def key_chroma(self) -> np.ndarray:
        """Chroma and bass chroma, (2, 12) float32: the input of `tonality.key_scores`."""
        return np.stack([self.chroma(), self.bass_chroma()])

    def bass_chroma(self, threshold: float = 0.3) -> np.ndarray:
        """Time of each pitch class as the lowest that sounds, (12,) float32, normalized to sum 1; zeros for silence."""
        active = self.sounding >= threshold
        lowest = np.zeros(active.shape, dtype=np.float32)
        rows = np.flatnonzero(active.any(1))
        lowest[rows, active[rows].argmax(1)] = 1.0
        return _fold(lowest.sum(0))


def _fold(weights: np.ndarray) -> np.ndarray:
    """Sum the weights of 88 pitches by pitch class and normalize them to sum 1."""
    classes = np.bincount((LOWEST + np.arange(len(weights))) % 12, weights=weights, minlength=12)
    chroma: np.ndarray = (classes / max(classes.sum(), 1e-9)).astype(np.float32)
    return chroma


class NoteTracker:
    """The basic-pitch network, on `threads` threads.

    Raises MissingDependencyError without onnxruntime or the basic-pitch package.
    """

    def __init__(self, threads: int = 1) -> None:
        spec = importlib.util.find_spec("basic_pitch")
        if spec is None or not spec.submodule_search_locations:
            raise MissingDependencyError(
                "note tracking needs the network in basic-pitch; run: pip install --no-deps basic-pitch"
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError("note tracking needs onnxruntime; run: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        model = Path(spec.submodule_search_locations[0]) / "saved_models" / "icassp_2022" / "nmp.onnx"
        self.net = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def track(self, clip: np.ndarray, rate: int = 44100) -> Notes:
        """Track the notes of a clip, (channels, n) or (n,) at `rate` Hz."""
        samples = mono(clip, rate, RATE)
        half = OVERLAP // 2
        padded = np.pad(samples, (half * FRAME, WINDOW))
        # a window that would start in the last quarter second is omitted
        starts = range(0, max(1, len(samples) - RATE // 4), STEP)
        batch = np.stack([padded[s : s + WINDOW] for s in starts])[..., None].astype(np.float32)
        names = ["StatefulPartitionedCall:1", "StatefulPartitionedCall:2"]  # notes, onsets; :0 are finer pitch contours
        notes, onsets = self.net.run(names, {self.net.get_inputs()[0].name: batch})
        frames = int(len(samples) / FRAME)
        sounding, starting = (x[:, half:-half].reshape(-1, x.shape[-1])[:frames] for x in (notes, onsets))
        return Notes(sounding, starting, len(samples) / RATE)
