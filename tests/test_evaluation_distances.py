"""Tests of distances between sets: exact values, bias, and coverage of the intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from presto_rt.errors import InvalidInputError
from presto_rt.lab.evaluation import distances
from presto_rt.lab.evaluation.statistics import bootstrap, half_samples, mean


def test_frechet_equals_the_textbook_formula() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 300, 7)) @ rng.standard_normal((7, 7))
    ca, cb = np.cov(a, rowvar=False), np.cov(b + 1, rowvar=False)
    expected = ((a.mean(0) - b.mean(0) - 1) ** 2).sum() + np.trace(ca + cb - 2 * np.real(sqrtm(ca @ cb)))
    assert distances.frechet(a.mean(0), ca, b.mean(0) + 1, cb) == pytest.approx(expected, rel=1e-8)


def test_fad_is_zero_for_equal_sets_and_the_squared_norm_of_a_shift() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 20)) * np.linspace(3, 0.1, 20)
    assert distances.fad(x, x, dims=20).value == pytest.approx(0, abs=1e-6)
    shift = np.zeros(20)
    shift[[0, 3]] = 2.0, -1.0
    assert distances.fad(x, x + shift, dims=20).value == pytest.approx(5.0, rel=1e-6)
    leading = distances.Principal(x, 4).directions
    expected = ((shift @ leading) ** 2).sum()
    assert distances.fad(x, x + shift, dims=4).value == pytest.approx(expected, rel=1e-6)


def test_fad_matches_the_analytic_value_of_scaled_gaussians() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 200_000, 3))
    assert distances.fad(x, 2 * y, dims=3, rounds=4).value == pytest.approx(3.0, rel=0.03)  # sum (2 - 1)^2


def test_fad_needs_more_windows_than_dimensions() -> None:
    x = np.zeros((10, 12))
    with pytest.raises(InvalidInputError, match="more than 12"):
        distances.fad(x, x, dims=12)


def test_kid_equals_the_direct_unbiased_estimate() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((12, 5)), rng.standard_normal((9, 5)) + 0.5
    width = np.median([((x[i] - x[j]) ** 2).sum() for i in range(12) for j in range(12) if i != j])
    kernels = {
        distances.polynomial_kernel: lambda u, v: (u @ v / 5 + 1) ** 3,
        distances.gaussian_kernel(x): lambda u, v: np.exp(-((u - v) ** 2).sum() / (2 * width)),
    }
    for kernel, k in kernels.items():
        xx = np.mean([k(x[i], x[j]) for i in range(12) for j in range(12) if i != j])
        yy = np.mean([k(y[i], y[j]) for i in range(9) for j in range(9) if i != j])
        xy = np.mean([k(u, v) for u in x for v in y])
        assert distances.kid(x, y, kernel=kernel, rounds=10).value == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_kid_is_unbiased_with_repeated_windows() -> None:
    rng = np.random.default_rng(4)
    values = []
    for _ in range(150):
        x, y = np.repeat(rng.standard_normal((2, 25, 6)), 3, axis=1)  # three equal windows per clip
        clips = np.repeat(np.arange(25), 3)
        values.append(distances.kid(x, y, clips, clips, rounds=4).value)
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert np.std(values) > 0


def test_kid_interval_covers_zero_and_excludes_a_shift() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        x, y = rng.standard_normal((2, 60, 4))
        e = distances.kid(x, y, rounds=100)
        covered += e.low <= 0 <= e.high
    assert covered >= 50  # 57 expected
    shifted = distances.kid(x, y + 1.0)
    assert shifted.low > 0


def test_kid_with_captions_detects_mismatched_captions() -> None:
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 2, (2, 80))
    x, y = (rng.standard_normal((80, 4)) + 3 * labels[i][:, None] for i in (0, 1))
    a, b = np.eye(2)[labels[0]], np.eye(2)[labels[1]]
    kernel = distances.gaussian_kernel(x)
    matched = distances.kid(x, y, captions=(a, b), kernel=kernel)
    mismatched = distances.kid(x, y, captions=(a, b[::-1]), kernel=kernel)
    assert matched.low <= 0 <= matched.high
    assert mismatched.low > matched.high


def test_prdc_detects_collapse() -> None:
    pytest.importorskip("prdc")
    rng = np.random.default_rng(7)
    real, same = rng.standard_normal((2, 200, 5))
    good = distances.prdc(real, same)
    collapsed = distances.prdc(real, np.repeat(same[:2], 100, 0) + 1e-3 * rng.standard_normal((200, 5)))
    assert good["coverage"] > 0.85 > 0.3 > collapsed["coverage"]
    assert collapsed["recall"] < 0.1 < good["recall"]


def test_level_statistics_of_known_signals() -> None:
    t = np.arange(44100) / 44100
    low, high = np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 10000 * t)
    measured = dict(zip(distances.LEVELS, distances.level_statistics(np.stack([low, low])), strict=True))
    assert measured["rms_db"] == pytest.approx(-3.01, abs=0.01)
    assert measured["side_mid_db"] < -79
    assert measured["high_band_db"] < -60
    measured = dict(
        zip(
            distances.LEVELS,
            distances.level_statistics(np.stack([low + high, low - high]).astype(np.float32)),
            strict=True,
        )
    )
    assert measured["side_mid_db"] == pytest.approx(0.0, abs=0.01)
    assert measured["high_band_db"] == pytest.approx(-3.01, abs=0.01)
    assert measured["high_side_mid_db"] > 60
    assert np.isfinite(distances.level_statistics(np.zeros((2, 1000)))).all()
    with pytest.raises(InvalidInputError, match="stereo"):
        distances.level_statistics(np.zeros(1000))


def test_level_distances_equal_a_shift() -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((50, 4))
    result = distances.level_distances(x, x + np.array([0, 2.5, 0, -1]))
    assert [round(result[n].value, 6) for n in distances.LEVELS] == [0, 2.5, 0, 1]


def test_intervals_have_the_theoretical_width() -> None:
    rng = np.random.default_rng(9)
    x = rng.standard_normal(400)
    for e in (mean(x), half_samples(lambda i: float(x[i].mean()), len(x), rounds=2000)):
        assert e.value == pytest.approx(x.mean())
        assert e.high - e.low == pytest.approx(2 * 1.96 / 20, rel=0.12)
    assert mean(np.array([np.nan, 2.0, 4.0])).value == 3.0
    assert mean(np.array([np.nan])).as_dict() == {"value": None, "low": None, "high": None, "n": 0}
    assert bootstrap(lambda i: float(i.mean()), 1).high == 0
