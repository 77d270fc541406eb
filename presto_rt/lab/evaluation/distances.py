"""Distances between two sets of clips, from embeddings of their windows and from plain level statistics.

- `fad`: Frechet distance between Gaussians fitted to both sets (Kilgour et al. 2019), on the reference's leading
  principal
  directions: a covariance of d dimensions needs many more than d windows, and a few hundred clips are few.
- `kid`: squared maximum mean discrepancy with the kernel (x.y/d + 1)^3, unbiased (Binkowski et al. 2018). Pairs are
  taken between
  different clips only: windows of one clip resemble each other and would bias it.
- `prdc`: precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020), on one embedding per
  clip.
- `levels`: the tagger hears mono below 8 kHz, so stereo width and the 8-16 kHz band are compared on their own, in dB.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence

import numpy as np

from ...errors import InvalidInputError, MissingDependencyError
from .statistics import Estimate, half_samples

FLOOR_DB = -80.0


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|ma - mb|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)): squared 2-Wasserstein distance between two Gaussians."""
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


class Principal:
    """The reference's leading principal directions, and its mean and covariance there."""

    def __init__(self, reference: np.ndarray, dims: int | None) -> None:
        reference = np.asarray(reference, dtype=np.float64)
        self.centre = reference.mean(0)
        _, _, directions = np.linalg.svd(reference - self.centre, full_matrices=False)
        self.directions = directions[:dims].T
        self.mean, self.cov = _gaussian(self(reference))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (np.asarray(x, dtype=np.float64) - self.centre) @ self.directions


def _gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


def fad(
    reference: np.ndarray,
    candidate: np.ndarray,
    clips: np.ndarray | None = None,
    dims: int | None = 16,
    rounds: int = 200,
) -> Estimate:
    """Frechet distance of candidate windows (N, d) from reference windows (M, d), on `dims` principal directions
    (None: all).

    `clips` (N,) names the clip of each candidate window; the interval is over clips (default: every window its own).
    Raises InvalidInputError when either set has fewer windows than dimensions.
    """
    dims = reference.shape[1] if dims is None else dims
    if min(len(reference), len(candidate)) <= dims:
        raise InvalidInputError(
            f"a Frechet distance in {dims} dimensions needs more than {dims} windows in each set; use fewer dims"
        )
    space = Principal(reference, dims)
    points = space(candidate)
    groups = _groups(clips, len(points))
    return half_samples(
        lambda chosen: frechet(space.mean, space.cov, *_gaussian(points[np.concatenate([groups[i] for i in chosen])])),
        len(groups),
        rounds,
    )


def _groups(clips: np.ndarray | None, n: int) -> list[np.ndarray]:
    if clips is None:
        return [np.array([i]) for i in range(n)]
    return [np.flatnonzero(clips == c) for c in np.unique(clips)]


Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y/d + 1)^3 for all pairs: (N, d), (M, d) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian_kernel(reference: np.ndarray) -> Kernel:
    """exp(-|x - y|^2 / 2 h^2) with h the median distance between reference windows (of at most 500): from 0 to 1, so
    a few far windows cannot decide the result.
    """
    few = reference[:: max(1, len(reference) // 500)]
    width = float(np.median(_squares(few, few)[~np.eye(len(few), dtype=bool)]))
    return lambda x, y: np.exp(-_squares(x, y) / (2.0 * width))


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return ((x**2).sum(1)[:, None] + (y**2).sum(1) - 2.0 * x @ y.T).clip(min=0)


def _clip_sums(kernel: np.ndarray, rows: list[np.ndarray], columns: list[np.ndarray]) -> np.ndarray:
    """Mean kernel value per pair of clips, (clips, clips)."""
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
    """Unbiased kernel distance between windows (M, d) and (N, d); may be slightly negative when the sets are alike.

    `..._clips` name each window's clip (default: every window its own). The interval is over clips of both sets.
    `captions`, vectors per clip of the reference and the candidate (rows of length 1 or 0), multiply the kernel by
    their cosine: the distance is then one between (sound, caption) pairs and grows when sounds come with the wrong
    captions.
    """
    x, y = np.asarray(reference, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    groups_x, groups_y = _groups(reference_clips, len(x)), _groups(candidate_clips, len(y))
    if min(len(groups_x), len(groups_y)) < 4:
        raise InvalidInputError("a kernel distance needs at least 4 clips in each set")
    xx = _clip_sums(kernel(x, x), groups_x, groups_x)
    yy = _clip_sums(kernel(y, y), groups_y, groups_y)
    xy = _clip_sums(kernel(x, y), groups_x, groups_y)

    if captions is not None:
        a, b = captions
        xx, yy, xy = xx * (a @ a.T), yy * (b @ b.T), xy * (a @ b.T)

    def mmd(i: np.ndarray, j: np.ndarray) -> float:
        def between(k: np.ndarray, c: np.ndarray) -> float:
            part = k[np.ix_(c, c)]
            return (part.sum() - np.trace(part)) / (len(c) * (len(c) - 1))

        return float(between(xx, i) + between(yy, j) - 2.0 * xy[np.ix_(i, j)].mean())

    rng = np.random.default_rng(0)
    m, n = len(groups_x), len(groups_y)
    value = mmd(np.arange(m), np.arange(n))
    draws = np.array([mmd(rng.permutation(m)[: m // 2], rng.permutation(n)[: n // 2]) for _ in range(rounds)])
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5])  # halves, as in statistics.half_samples, of both sets
    return Estimate(value, value + float(low), value + float(high), n)


def prdc(reference: np.ndarray, candidate: np.ndarray, neighbours: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of clip embeddings (M, d), (N, d). Raises MissingDependencyError without
    `prdc`.
    """
    try:
        from prdc import compute_prdc
    except ImportError as error:
        raise MissingDependencyError(
            "precision, recall, density and coverage need the prdc package: pip install prdc"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the sizes
        result = compute_prdc(real_features=reference, fake_features=candidate, nearest_k=neighbours)
    return {name: float(value) for name, value in result.items()}


LEVELS = ("rms_db", "side_mid_db", "high_band_db", "high_side_mid_db")


def levels(clip: np.ndarray, rate: int = 44100) -> np.ndarray:
    """Level statistics of one stereo clip (2, n), (4,) float64 in the order of LEVELS.

    rms_db: dB below full scale. side_mid_db: energy of (L-R)/2 over (L+R)/2. high_band_db: energy of 8-16 kHz over
    all. high_side_mid_db: side over mid within 8-16 kHz. All are kept within [-80, 80] dB.
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


def level_distances(
    reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray], rounds: int = 200
) -> dict[str, Estimate]:
    """1-Wasserstein distance, in dB, between the clips' distributions of each statistic in LEVELS.

    Arguments: lists of what `levels` returns. 1 dB means that the distributions differ as if shifted by 1 dB.
    """
    from scipy.stats import wasserstein_distance

    a, b = np.stack(reference), np.stack(candidate)
    return {
        name: half_samples(lambda i, c=c: wasserstein_distance(a[:, c], b[i, c]), len(b), rounds)
        for c, name in enumerate(LEVELS)
    }
