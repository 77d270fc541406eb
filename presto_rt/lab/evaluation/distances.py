"""Distances between two sets of clips, from embeddings of their windows and from level statistics.

- `fad`: Frechet distance between Gaussians fitted to the sets (Kilgour et al. 2019), on the reference's leading
  principal directions, since the covariance of d dimensions needs many more than d windows.
- `kid`: unbiased squared maximum mean discrepancy with the kernel (x.y/d + 1)^3 (Binkowski et al. 2018). Only pairs of
  different clips count: windows of one clip are correlated and would bias the estimate.
- `prdc`: precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), with one embedding
  per clip.
- `level_distances`: the embedding comes from mono audio below 8 kHz, so stereo width and the 8-16 kHz band are compared
  separately, in dB.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial

import numpy as np

from ...errors import InvalidInputError, MissingDependencyError
from .statistics import Estimate, half_samples

FLOOR_DB = -80.0


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance between two Gaussians: |ma - mb|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)).

    Means are (d,), covariances (d, d). Source: Dowson and Landau 1982.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


class Principal:
    """Projection on the `dims` leading principal directions of a reference (M, d).

    `mean` (dims,) and `cov` (dims, dims) are those of the projected reference.
    """

    def __init__(self, reference: np.ndarray, dims: int) -> None:
        reference = np.asarray(reference, dtype=np.float64)
        self.center: np.ndarray = reference.mean(0)
        _, _, directions = np.linalg.svd(reference - self.center, full_matrices=False)
        self.directions: np.ndarray = directions[:dims].T
        self.mean, self.cov = _gaussian(self(reference))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        projected: np.ndarray = (np.asarray(x, dtype=np.float64) - self.center) @ self.directions
        return projected


def _gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


def fad(
    reference: np.ndarray,
    candidate: np.ndarray,
    clips: np.ndarray | None = None,
    dims: int = 16,
    rounds: int = 200,
) -> Estimate:
    """Frechet distance of candidate windows from reference windows, on the reference's principal directions.

    Args:
        reference: (M, d) embeddings of windows.
        candidate: (N, d) embeddings of windows.
        clips: (N,) clip of each candidate window, for the interval over clips; None treats each window as a clip.
        dims: number of principal directions.
        rounds: random halves for the interval.

    Returns:
        Distance with its 95 % interval over candidate clips.

    Raises:
        InvalidInputError: a set has no more windows than `dims`.
    """
    if min(len(reference), len(candidate)) <= dims:
        raise InvalidInputError(
            f"a Frechet distance in {dims} dimensions needs more than {dims} windows in each set; use fewer dims"
        )
    principal = Principal(reference, dims)
    points = principal(candidate)
    groups = _groups(clips, len(points))

    def distance(indices: np.ndarray) -> float:
        windows = np.concatenate([groups[i] for i in indices])
        return frechet(principal.mean, principal.cov, *_gaussian(points[windows]))

    return half_samples(distance, len(groups), rounds)


def _groups(clips: np.ndarray | None, n: int) -> list[np.ndarray]:
    if clips is None:
        return [np.array([i]) for i in range(n)]
    return [np.flatnonzero(clips == c) for c in np.unique(clips)]


Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kernel (x.y/d + 1)^3 of all pairs of rows: (N, d), (M, d) -> (N, M)."""
    values: np.ndarray = (x @ y.T / x.shape[1] + 1.0) ** 3
    return values


def gaussian_kernel(reference: np.ndarray) -> Kernel:
    """Return the kernel exp(-|x - y|^2 / 2 h^2), with h the median distance between at most 500 reference windows.

    The kernel is bounded by 1, which limits the influence of outliers.
    """
    sample = reference[:: max(1, len(reference) // 500)]
    width = float(np.median(_squared_distances(sample, sample)[~np.eye(len(sample), dtype=bool)]))
    return lambda x, y: np.exp(-_squared_distances(x, y) / (2.0 * width))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squares: np.ndarray = ((x**2).sum(1)[:, None] + (y**2).sum(1) - 2.0 * x @ y.T).clip(min=0)
    return squares


def _clip_means(kernel: np.ndarray, rows: list[np.ndarray], columns: list[np.ndarray]) -> np.ndarray:
    """Mean kernel value of each pair of clips: (clips, clips)."""
    by_row = np.stack([kernel[r].mean(0) for r in rows])
    return np.stack([by_row[:, c].mean(1) for c in columns], 1)


def kid(
    reference: np.ndarray,
    candidate: np.ndarray,
    reference_clips: np.ndarray | None = None,
    candidate_clips: np.ndarray | None = None,
    captions: tuple[np.ndarray, np.ndarray] | None = None,
    kernel: Kernel = polynomial_kernel,
    rounds: int = 200,
) -> Estimate:
    """Unbiased kernel distance between two sets of windows; it may be slightly negative for similar sets.

    Args:
        reference: (M, d) embeddings of windows.
        candidate: (N, d) embeddings of windows.
        reference_clips: (M,) clip of each window; None treats each window as a clip.
        candidate_clips: (N,) clip of each window.
        captions: vectors of length 1 or 0 for each clip of the reference and of the candidate. Their cosine multiplies
            the kernel, so the distance is between (sound, caption) pairs and grows with mismatched captions.
        kernel: (N, d), (M, d) -> (N, M).
        rounds: random halves for the interval.

    Returns:
        Distance with its 95 % interval over the clips of the reference and the candidate.

    Raises:
        InvalidInputError: a set has fewer than 4 clips.
    """
    x, y = np.asarray(reference, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    groups_x, groups_y = _groups(reference_clips, len(x)), _groups(candidate_clips, len(y))
    if min(len(groups_x), len(groups_y)) < 4:
        raise InvalidInputError("a kernel distance needs at least 4 clips in each set")
    xx = _clip_means(kernel(x, x), groups_x, groups_x)
    yy = _clip_means(kernel(y, y), groups_y, groups_y)
    xy = _clip_means(kernel(x, y), groups_x, groups_y)
    if captions is not None:
        a, b = captions
        xx, yy, xy = xx * (a @ a.T), yy * (b @ b.T), xy * (a @ b.T)

    def mmd(i: np.ndarray, j: np.ndarray) -> float:
        def off_diagonal_mean(means: np.ndarray, clips: np.ndarray) -> float:
            part = means[np.ix_(clips, clips)]
            return float((part.sum() - np.trace(part)) / (len(clips) * (len(clips) - 1)))

        return float(off_diagonal_mean(xx, i) + off_diagonal_mean(yy, j) - 2.0 * xy[np.ix_(i, j)].mean())

    rng = np.random.default_rng(0)
    m, n = len(groups_x), len(groups_y)
    value = mmd(np.arange(m), np.arange(n))
    draws = np.array([mmd(rng.permutation(m)[: m // 2], rng.permutation(n)[: n // 2]) for _ in range(rounds)])
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5])  # as statistics.half_samples, for two sets
    return Estimate(value, value + float(low), value + float(high), n)


def prdc(reference: np.ndarray, candidate: np.ndarray, neighbors: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of clip embeddings (N, d) against (M, d), over nearest neighbors.

    Raises MissingDependencyError without the prdc package.
    """
    try:
        from prdc import compute_prdc
    except ImportError as error:
        raise MissingDependencyError(
            "precision, recall, density and coverage need the prdc package; run: pip install prdc"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # compute_prdc prints the sizes
        result = compute_prdc(real_features=reference, fake_features=candidate, nearest_k=neighbors)
    return {name: float(value) for name, value in result.items()}


LEVELS = ("rms_db", "side_mid_db", "high_band_db", "high_side_mid_db")


def level_statistics(clip: np.ndarray, rate: int = 44100) -> np.ndarray:
    """Level statistics of a stereo clip (2, n): (4,) float64 in dB, in the order of LEVELS, clamped to [-80, 80].

    rms_db: RMS relative to full scale. side_mid_db: energy of (L-R)/2 over (L+R)/2. high_band_db: energy of 8-16 kHz
    over the total. high_side_mid_db: side over mid within 8-16 kHz. Raises InvalidInputError for other shapes.
    """
    x = np.asarray(clip, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] != 2:
        raise InvalidInputError(f"level statistics need a stereo clip (2, n), got shape {x.shape}")
    power = np.abs(np.fft.rfft(np.stack([x[0] + x[1], x[0] - x[1]]) / 2)) ** 2
    hertz = np.fft.rfftfreq(x.shape[1], 1 / rate)
    high = (hertz >= 8000) & (hertz < 16000)
    mid, side = power.sum(1)
    high_mid, high_side = power[:, high].sum(1)
    return np.array(
        [
            _ratio_db((x**2).mean(), 1.0),
            _ratio_db(side, mid),
            _ratio_db(high_mid + high_side, mid + side),
            _ratio_db(high_side, high_mid),
        ]
    )


def _ratio_db(a: float, b: float) -> float:
    return float(np.clip(10 * np.log10((a + 1e-12) / (b + 1e-12)), FLOOR_DB, -FLOOR_DB))


def level_distances(reference: np.ndarray, candidate: np.ndarray, rounds: int = 200) -> dict[str, Estimate]:
    """1-Wasserstein distance in dB between the distributions of each statistic in LEVELS.

    `reference` (M, 4) and `candidate` (N, 4) are rows of `level_statistics`. A distribution shifted by 1 dB has a
    distance of 1 dB.
    """
    from scipy.stats import wasserstein_distance

    def distance(column: int, indices: np.ndarray) -> float:
        return float(wasserstein_distance(reference[:, column], candidate[indices, column]))

    return {name: half_samples(partial(distance, column), len(candidate), rounds) for column, name in enumerate(LEVELS)}
