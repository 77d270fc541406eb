"""Distances between sets: exact values where they are known, no bias, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from presto_rt.errors import InvalidInputError
from presto_rt.lab.evaluation import distances
from presto_rt.lab.evaluation.statistics import bootstrap, half_samples, mean


def test_frechet_equals_the_textbook_formula():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 300, 7)) @ rng.standard_normal((7, 7))
    ca, cb = np.cov(a, rowvar=False), np.cov(b + 1, rowvar=False)
    want = ((a.mean(0) - b.mean(0) - 1) ** 2).sum() + np.trace(ca + cb - 2 * np.real(sqrtm(ca @ cb)))
    assert distances.frechet(a.mean(0), ca, b.mean(0) + 1, cb) == pytest.approx(want, rel=1e-8)


def test_fad_of_a_set_with_itself_is_nothing_and_of_a_shift_is_its_square():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 20)) * np.linspace(3, 0.1, 20)
    assert distances.fad(x, x, dims=None).value == pytest.approx(0, abs=1e-6)
    shift = np.zeros(20)
    shift[[0, 3]] = 2.0, -1.0
    assert distances.fad(x, x + shift, dims=None).value == pytest.approx(5.0, rel=1e-6)
    leading = distances.Principal(x, 4).directions
    want = ((shift @ leading) ** 2).sum()
    assert distances.fad(x, x + shift, dims=4).value == pytest.approx(want, rel=1e-6)


def test_fad_of_scaled_gaussians_matches_the_analytic_value():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 200_000, 3))
    assert distances.fad(x, 2 * y, dims=None, rounds=4).value == pytest.approx(3.0, rel=0.03)  # sum (2 - 1)^2


def test_fad_needs_more_windows_than_dimensions():
    x = np.zeros((10, 12))
    with pytest.raises(InvalidInputError, match="more than 12"):
        distances.fad(x, x, dims=None)


def test_kid_is_the_plain_unbiased_estimate():
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


def test_kid_of_one_distribution_is_zero_on_average_even_when_windows_repeat():
    rng = np.random.default_rng(4)
    values = []
    for _ in range(150):
        x, y = np.repeat(rng.standard_normal((2, 25, 6)), 3, axis=1)  # three equal windows per clip
        clips = np.repeat(np.arange(25), 3)
        values.append(distances.kid(x, y, clips, clips, rounds=4).value)
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert np.std(values) > 0


def test_kid_interval_covers_the_truth_and_a_shift_lies_outside():
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(60):
        x, y = rng.standard_normal((2, 60, 4))
        e = distances.kid(x, y, rounds=100)
        inside += e.low <= 0 <= e.high
    assert inside >= 50  # 57 expected
    shifted = distances.kid(x, y + 1.0)
    assert shifted.low > 0


def test_kid_with_captions_sees_a_wrong_pairing():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 2, (2, 80))
    x, y = (rng.standard_normal((80, 4)) + 3 * labels[i][:, None] for i in (0, 1))
    a, b = np.eye(2)[labels[0]], np.eye(2)[labels[1]]
    kernel = distances.gaussian_kernel(x)
    right = distances.kid(x, y, captions=(a, b), kernel=kernel)
    wrong = distances.kid(x, y, captions=(a, b[::-1]), kernel=kernel)
    assert right.low <= 0 <= right.high
    assert wrong.low > right.high


def test_prdc_knows_collapse():
    pytest.importorskip("prdc")
    rng = np.random.default_rng(7)
    real, same = rng.standard_normal((2, 200, 5))
    good = distances.prdc(real, same)
    collapsed = distances.prdc(real, np.repeat(same[:2], 100, 0) + 1e-3 * rng.standard_normal((200, 5)))
    assert good["coverage"] > 0.85 > 0.3 > collapsed["coverage"]
    assert collapsed["recall"] < 0.1 < good["recall"]


def test_levels_of_known_signals():
    t = np.arange(44100) / 44100
    low, high = np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 10000 * t)
    measured = dict(zip(distances.LEVELS, distances.levels(np.stack([low, low])), strict=True))
    assert measured["rms_db"] == pytest.approx(-3.01, abs=0.01)
    assert measured["side_mid_db"] < -79
    assert measured["high_band_db"] < -60
    measured = dict(
        zip(distances.LEVELS, distances.levels(np.stack([low + high, low - high]).astype(np.float32)), strict=True)
    )
    assert measured["side_mid_db"] == pytest.approx(0.0, abs=0.01)
    assert measured["high_band_db"] == pytest.approx(-3.01, abs=0.01)
    assert measured["high_side_mid_db"] > 60
    assert np.isfinite(distances.levels(np.zeros((2, 1000)))).all()
    with pytest.raises(InvalidInputError, match="stereo"):
        distances.levels(np.zeros(1000))


def test_level_distance_of_a_shift_is_the_shift():
    rng = np.random.default_rng(8)
    a = list(rng.standard_normal((50, 4)))
    found = distances.level_distances(a, [x + np.array([0, 2.5, 0, -1]) for x in a])
    assert [round(found[n].value, 6) for n in distances.LEVELS] == [0, 2.5, 0, 1]


def test_intervals_have_the_width_of_theory():
    rng = np.random.default_rng(9)
    x = rng.standard_normal(400)
    for e in (mean(x), half_samples(lambda i: float(x[i].mean()), len(x), rounds=2000)):
        assert e.value == pytest.approx(x.mean())
        assert e.high - e.low == pytest.approx(2 * 1.96 / 20, rel=0.12)
    assert mean(np.array([np.nan, 2.0, 4.0])).value == 3.0
    assert mean(np.array([np.nan])).as_dict() == {"value": None, "low": None, "high": None, "n": 0}
    assert bootstrap(lambda i: float(i.mean()), 1).high == 0
