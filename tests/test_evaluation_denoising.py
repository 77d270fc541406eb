"""Tests of the linear denoiser against theory: AR(1) data, exact filters, and a pipeline on a data set's latents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from presto_rt.errors import InvalidInputError
from presto_rt.lab.evaluation import denoising


def identity(noisy: torch.Tensor, sigma: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Denoiser that returns its input, with the error sigma^2."""
    return noisy


def ar1(rho: float, frames: int, channels: int, seed: int = 0) -> np.ndarray:
    """Draw independent stationary AR(1) processes of variance 1: (frames, channels)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((frames + 500, channels)) * np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=0)[500:].astype(np.float32)


def wiener_error(rho: float, sigma: float) -> float:
    """Least error of a linear denoiser with unlimited context: the mean over frequency of S s^2 / (S + s^2)."""
    w = (np.arange(200_000) + 0.5) / 200_000 * np.pi
    spectrum = (1 - rho**2) / (1 - 2 * rho * np.cos(w) + rho**2)
    return float(np.mean(spectrum * sigma**2 / (spectrum + sigma**2)))


def test_autocovariance_of_ar1_is_geometric() -> None:
    mean, autocov = denoising.autocovariance([ar1(0.8, 60_000, 2) + 3.0, ar1(0.8, 40_000, 2, 1) + 3.0], 6)
    assert mean.numpy() == pytest.approx([3.0, 3.0], abs=0.03)
    for k in range(6):
        assert autocov[k].diagonal().numpy() == pytest.approx([0.8**k] * 2, abs=0.03)
        assert abs(autocov[k][0, 1]) < 0.03


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_denoising_errors_match_the_analytic_wiener_error(rho: float) -> None:
    linear = denoising.LinearDenoiser.fit([ar1(rho, 200_000, 1)])
    clean = torch.from_numpy(ar1(rho, 128 * 400, 1, seed=7).reshape(400, 128, 1))
    rows = denoising.denoising_errors(clean, linear, identity, sigmas=(0.2, 0.8, 3.2), sigma_data=1.0)
    for row in rows:
        expected = wiener_error(rho, row.sigma)
        # frames at the ends of a crop have less context, so the error lies slightly above the bound
        assert 0.97 * expected < row.linear.value < 1.08 * expected, (row.sigma, row.linear.value, expected)
        assert row.model.value == pytest.approx(row.sigma**2, rel=0.02)


def test_linear_denoiser_equals_the_conditional_mean() -> None:
    """With a known cross-channel covariance, each frame's estimate is the conditional mean of its window."""
    rng = np.random.default_rng(2)
    mix = rng.standard_normal((3, 3))
    lags = torch.stack([torch.from_numpy(mix @ np.diag([0.9**k, 0.5**k, float(k == 0)]) @ mix.T) for k in range(4)])
    linear = denoising.LinearDenoiser(torch.tensor([1.0, -2.0, 0.5]), lags)
    cov = np.block([[lags[abs(i - j)].numpy() for j in range(4)] for i in range(4)])
    y = rng.standard_normal((1, 6, 3)).astype(np.float32)
    estimate = linear.at(0.7)(torch.from_numpy(y)).numpy()[0]
    for frame, window in enumerate([0, 0, 0, 1, 2, 2]):
        part = (y[0, window : window + 4] - [1.0, -2.0, 0.5]).reshape(-1)
        expected = (cov @ np.linalg.solve(cov + 0.49 * np.eye(12), part)).reshape(4, 3)[frame - window] + [
            1.0,
            -2.0,
            0.5,
        ]
        np.testing.assert_allclose(estimate[frame], expected, atol=2e-5)


def test_denoising_errors_are_relative_to_sigma_data() -> None:
    x = ar1(0.7, 40_000, 4)
    crops = torch.from_numpy(x[: 30 * 64].reshape(30, 64, 4))
    linear = denoising.LinearDenoiser.fit([x])
    full = denoising.denoising_errors(crops, linear, identity, sigmas=(0.5,), sigma_data=1.0)
    linear = denoising.LinearDenoiser.fit([0.5 * x])
    half = denoising.denoising_errors(0.5 * crops, linear, identity, sigmas=(0.5,), sigma_data=0.5)
    assert full[0].added == 0.5
    assert half[0].added == 0.25
    assert half[0].sigma == full[0].sigma == 0.5
    assert half[0].linear.value == pytest.approx(full[0].linear.value, rel=1e-4)
    assert half[0].model.value == pytest.approx(full[0].model.value, rel=1e-4)


def test_denoising_errors_use_the_same_noise_for_model_and_filter() -> None:
    x = ar1(0.9, 20_000, 2)
    linear = denoising.LinearDenoiser.fit([x])
    crops = torch.from_numpy(x[: 24 * 64].reshape(24, 64, 2))
    seen: list[int] = []

    def oracle(noisy: torch.Tensor, sigma: torch.Tensor, indices: list[int]) -> torch.Tensor:
        seen.extend(indices)
        return 0.9 * crops[indices] + 0.1 * linear.at(float(sigma[0]))(noisy)

    row = denoising.denoising_errors(crops, linear, oracle, sigmas=(0.8,), sigma_data=1.0, batch=10)[0]
    assert sorted(seen) == list(range(24))
    assert row.model.value == pytest.approx(0.01 * row.linear.value, rel=1e-3)
    assert "model / linear | 0.0100" in denoising.table([row])


def test_denoising_rejects_invalid_input(tmp_path: Path) -> None:
    x = ar1(0.5, 300, 2)
    with pytest.raises(InvalidInputError, match="too few"):
        denoising.LinearDenoiser.fit([x[:60]])
    linear = denoising.LinearDenoiser.fit([x])
    with pytest.raises(InvalidInputError, match="needs crops"):
        linear.at(1.0)(torch.zeros(1, 16, 2))
    with pytest.raises(InvalidInputError, match="no latents"):
        denoising.load_pieces(tmp_path, "test")


def test_load_pieces_slices_a_split(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.float16).reshape(20, 2)
    np.save(tmp_path / "train.npy", rows)
    entries = [
        {"id": "a", "start": 0, "frames": 5},
        {"id": "b", "start": 5, "frames": 8},
        {"id": "c", "start": 13, "frames": 7},
    ]
    (tmp_path / "train.json").write_text(json.dumps({"items": entries, "done": 2}))
    pieces = denoising.load_pieces(tmp_path, "train")
    assert [len(p) for p in pieces] == [5, 8]
    np.testing.assert_array_equal(pieces[1], rows[5:13])
    assert [len(p) for p in denoising.load_pieces(tmp_path, "train", max_frames=7)] == [5]


def test_model_errors_measures_a_model_on_held_out_latents(tmp_path: Path) -> None:
    from presto_rt.checkpoints.house import load_model
    from presto_rt.lab.data.manifest import Item, Manifest
    from tests.support.models import write_tiny_model

    items = []
    (tmp_path / "latents").mkdir()
    for split, frames in (("train", 8000), ("test", 200)):
        rows = (0.5 * ar1(0.9, frames, 64, frames)).astype(np.float16)
        np.save(tmp_path / "latents" / f"{split}.npy", rows)
        entry = {"items": [{"id": split, "start": 0, "frames": frames}], "done": 1}
        (tmp_path / "latents" / f"{split}.json").write_text(json.dumps(entry))
        items.append(
            Item(
                split, "solo", split, "none.wav", 9.3, split, "0", "synthetic", "CC0-1.0", captions=["piano"], bpm=90.0
            )
        )
    Manifest(tmp_path, 0, items).save()
    model = load_model(write_tiny_model(tmp_path / "tiny"))
    rows = denoising.model_errors(model, tmp_path, clips=4, frames=64)
    assert [r.sigma for r in rows] == pytest.approx(denoising.SIGMAS)
    for row in rows:
        assert row.model.low <= row.model.value <= row.model.high
        assert row.model.value > row.linear.value  # an untrained network cannot beat the Wiener filter of such data
    model.network = None  # as after a fused backend has packed it
    with pytest.raises(InvalidInputError, match="load_model"):
        denoising.model_errors(model, tmp_path, clips=4, frames=64)
