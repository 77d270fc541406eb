"""The linear denoiser against theory: AR(1) data, white data, known covariances."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from presto_rt.errors import InvalidInputError
from presto_rt.lab.evaluation import denoising


def ar1(rho: float, frames: int, channels: int, seed: int = 0) -> np.ndarray:
    """Independent stationary AR(1) processes of variance 1, (frames, channels)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((frames + 500, channels)) * np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=0)[500:].astype(np.float32)


def wiener_error(rho: float, sigma: float) -> float:
    """Least error of any linear denoiser that sees all time: mean over frequency of S s^2 / (S + s^2)."""
    w = (np.arange(200_000) + 0.5) / 200_000 * np.pi
    spectrum = (1 - rho**2) / (1 - 2 * rho * np.cos(w) + rho**2)
    return float(np.mean(spectrum * sigma**2 / (spectrum + sigma**2)))


def test_autocovariance_of_ar1_is_geometric():
    mean, autocov = denoising.autocovariance([ar1(0.8, 60_000, 2) + 3.0, ar1(0.8, 40_000, 2, 1) + 3.0], 6)
    assert mean.numpy() == pytest.approx([3.0, 3.0], abs=0.03)
    for k in range(6):
        assert autocov[k].diagonal().numpy() == pytest.approx([0.8**k] * 2, abs=0.03)
        assert abs(autocov[k][0, 1]) < 0.03


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_error_equals_the_analytic_wiener_error_on_ar1(rho):
    linear = denoising.LinearDenoiser.fit([ar1(rho, 200_000, 1)])
    clean = torch.from_numpy(ar1(rho, 128 * 400, 1, seed=7).reshape(400, 128, 1))
    rows = denoising.denoising_errors(clean, linear, sigmas=(0.2, 0.8, 3.2), sigma_data=1.0)
    for row in rows:
        want = wiener_error(rho, row.sigma)
        # the ends of a crop see less of the past or future, hence a little above the bound
        assert 0.97 * want < row.linear.value < 1.08 * want, (row.sigma, row.linear.value, want)


def test_exact_statistics_give_the_exact_filter():
    """With a known cross-channel covariance, every frame's estimate is the conditional mean of its window."""
    rng = np.random.default_rng(2)
    mix = rng.standard_normal((3, 3))
    lags = torch.stack([torch.from_numpy(mix @ np.diag([0.9**k, 0.5**k, float(k == 0)]) @ mix.T) for k in range(4)])
    linear = denoising.LinearDenoiser(torch.tensor([1.0, -2.0, 0.5]), lags)
    cov = np.block([[lags[abs(i - j)].numpy() for j in range(4)] for i in range(4)])
    y = rng.standard_normal((1, 6, 3)).astype(np.float32)
    got = linear(torch.from_numpy(y), 0.7).numpy()[0]
    for frame, window in enumerate([0, 0, 0, 1, 2, 2]):
        part = (y[0, window : window + 4] - [1.0, -2.0, 0.5]).reshape(-1)
        want = (cov @ np.linalg.solve(cov + 0.49 * np.eye(12), part)).reshape(4, 3)[frame - window] + [1.0, -2.0, 0.5]
        np.testing.assert_allclose(got[frame], want, atol=2e-5)


def test_noise_levels_and_errors_are_relative_to_the_data():
    x = ar1(0.7, 40_000, 4)
    crops, places = denoising.crops([x, x[:10]], 64, 30)
    assert crops.shape == (30, 64, 4)
    assert {p[0] for p in places} == {0}
    full = denoising.denoising_errors(crops, denoising.LinearDenoiser.fit([x]), sigmas=(0.5,), sigma_data=1.0)
    half = denoising.denoising_errors(
        0.5 * crops, denoising.LinearDenoiser.fit([0.5 * x]), sigmas=(0.5,), sigma_data=0.5
    )
    assert half[0].added == 0.25
    assert half[0].sigma == full[0].sigma == 0.5
    assert half[0].linear.value == pytest.approx(full[0].linear.value, rel=1e-4)
    absolute = denoising.denoising_errors(
        0.5 * crops, denoising.LinearDenoiser.fit([0.5 * x]), sigmas=(0.25,), sigma_data=0.5, relative=False
    )
    assert absolute[0].sigma == 0.5
    assert absolute[0].linear.value == pytest.approx(half[0].linear.value)


def test_a_model_is_measured_on_the_same_noise():
    x = ar1(0.9, 20_000, 2)
    linear = denoising.LinearDenoiser.fit([x])
    crops, _ = denoising.crops([x], 64, 24)
    seen: list[int] = []

    def oracle(noisy: torch.Tensor, sigma: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        seen.extend(chosen)
        return 0.9 * crops[chosen] + 0.1 * linear(noisy, float(sigma[0]))

    row = denoising.denoising_errors(crops, linear, oracle, sigmas=(0.8,), sigma_data=1.0, batch=10)[0]
    assert sorted(seen) == list(range(24))
    assert row.model.value == pytest.approx(0.01 * row.linear.value, rel=1e-3)
    text = denoising.table([row])
    assert "model / linear | 0.0100" in text


def test_bad_input_is_refused(tmp_path):
    x = ar1(0.5, 300, 2)
    with pytest.raises(InvalidInputError, match="too few"):
        denoising.LinearDenoiser.fit([x[:60]])
    linear = denoising.LinearDenoiser.fit([x])
    with pytest.raises(InvalidInputError, match="needs crops"):
        linear(torch.zeros(1, 16, 2), 1.0)
    with pytest.raises(InvalidInputError, match="no recording"):
        denoising.crops([x], 1000, 1)
    with pytest.raises(InvalidInputError, match="no latents"):
        denoising.load_pieces(tmp_path, "test")


def test_pieces_are_cut_out_of_a_split(tmp_path):
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
    assert [len(p) for p in denoising.load_pieces(tmp_path, "train", most=7)] == [5]


def test_a_pipeline_is_measured_on_a_data_sets_latents(tmp_path):
    from presto_rt.lab.data.manifest import Item, Manifest
    from presto_rt.pipeline import load
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
    model = load(write_tiny_model(tmp_path / "tiny"), dtype="float32")
    rows = denoising.model_errors(model, tmp_path, clips=4, frames=64)
    assert [r.sigma for r in rows] == pytest.approx(denoising.SIGMAS)
    for row in rows:
        assert row.model.low <= row.model.value <= row.model.high
        assert row.model.value > row.linear.value  # an untrained network cannot beat the Wiener filter of such data
