"""The generator: published vectors, the distribution, bit equality of C++ and torch, and what an element depends on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from presto_rt import native
from presto_rt.diffusion import noise
from presto_rt.errors import InvalidInputError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SEEDS = [0, 1, 7, 2**32 - 1, 2**32, 2**63, 2**64 - 1]

# counter, key, words: the known answers that Random123 publishes for philox4x32-10.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def needs_native() -> None:
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")


def hex_words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.int32)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, words: str) -> None:
    low, high = hex_words(key)
    counters = torch.tensor(hex_words(counter)).reshape(4, 1)
    assert noise.philox4x32(counters, low | high << 32).flatten().tolist() == hex_words(words)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_in_cpp_gives_the_published_words(counter: str, key: str, words: str) -> None:
    needs_native()
    low, high = hex_words(key)
    counters = torch.tensor([hex_words(counter)] * 33, dtype=torch.uint32)  # a full batch of lanes and a part of one
    out = torch.zeros_like(counters)
    native.lib.philox(counters, low | high << 32, out)
    assert out.tolist() == [hex_words(words)] * 33


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("device", DEVICES)
def test_normal_in_cpp_equals_torch_to_the_bit(seed: int, device: str) -> None:
    needs_native()
    out = torch.full((150_001,), math.nan)
    native.lib.normal(out, seed, 3)
    assert torch.equal(bits(out), bits(noise.normal_torch(seed, len(out), stream=3, device=device)))


def test_normal_in_cpp_equals_torch_for_a_million_elements() -> None:
    needs_native()
    out = torch.full((1_000_000,), math.nan)
    native.lib.normal(out, 20261122, 0)
    assert torch.equal(bits(out), bits(noise.normal_torch(20261122, len(out))))


def test_normal_is_within_1e_6_of_the_exact_formula_at_extreme_words() -> None:
    edges = [0, 1, 2, 255, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**29, 2**32 - 256, 2**32 - 1]
    words = torch.tensor(edges)
    u = (words.double() * 2.0**-32 + 2.0**-33).float().double()
    radius = noise.polar_radius(words)
    assert torch.isfinite(radius).all()
    assert (radius.double() - (-2 * u.log()).sqrt()).abs().max() < 1e-6
    cosine, sine = noise.polar_direction(words)
    angle = words.double() * (2 * math.pi * 2.0**-32)
    assert (cosine.double() - angle.cos()).abs().max() < 1e-6
    assert (sine.double() - angle.sin()).abs().max() < 1e-6


def test_normal_is_box_and_muller_of_the_words() -> None:
    words = noise.random_words(11, 200_000, stream=2).reshape(-1, 4).double()
    z = noise.normal(11, (200_000,), stream=2).reshape(-1, 4).double()
    for first in (0, 2):
        radius = (-2 * (words[:, first] * 2.0**-32 + 2.0**-33).log()).sqrt()
        angle = words[:, first + 1] * (2 * math.pi * 2.0**-32)
        # u is rounded to fp32, which near u = 1 moves the radius by up to 2^-24 / (2 radius): where the radius is
        # below 0.05 the values, still normal, are others than this formula's.
        usual = radius > 0.05
        assert usual.double().mean() > 0.99
        assert (z[:, first] - radius * angle.cos())[usual].abs().max() < 2e-6
        assert (z[:, first + 1] - radius * angle.sin())[usual].abs().max() < 2e-6


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_normal_has_the_moments_and_tails_of_a_normal(seed: int) -> None:
    n = 1_000_000
    z = noise.normal(seed, (n,)).double()
    root = math.sqrt(n)
    assert abs(z.mean()) < 5 / root
    assert abs(z.var() - 1) < 5 * math.sqrt(2) / root
    assert abs((z**3).mean()) < 5 * math.sqrt(15) / root
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96) / root
    for limit in (1.0, 2.0, 3.0, 4.0):
        expected = math.erfc(limit / math.sqrt(2))
        share = (z.abs() > limit).double().mean()
        assert abs(share - expected) < 5 * math.sqrt(expected / n)
    assert z.abs().max() < math.sqrt(66 * math.log(2)) + 1e-5


def test_normal_passes_kolmogorov_and_smirnov() -> None:
    """On one long clip, and the p-values of a hundred short ones must be uniform: neither too bad nor too good."""
    assert stats.kstest(noise.normal(5, (4_000_000,)).numpy(), "norm").pvalue > 1e-3
    pvalues = [stats.kstest(noise.normal(seed, (20_000,)).numpy(), "norm").pvalue for seed in range(100)]
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-3


def test_normal_neighbours_are_not_correlated() -> None:
    z = noise.normal(9, (400_000,)).double()
    for lag in (1, 2, 3, 4, 5, 64):
        assert abs((z[:-lag] * z[lag:]).mean()) < 5 / math.sqrt(400_000)


def test_normal_streams_and_seeds_are_independent() -> None:
    n = 400_000
    clips = [
        noise.normal(s, (n,), stream=k).double() for s, k in ((3, 0), (3, 1), (4, 0), (3, 2**32 - 1), (3 + 2**32, 0))
    ]
    for i, a in enumerate(clips):
        for b in clips[:i]:
            assert abs((a * b).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("device", DEVICES)
def test_normal_of_a_longer_clip_begins_with_the_same_noise(device: str) -> None:
    long = noise.normal(42, (1, 100, 64), device=device).flatten()
    for length in (1, 2, 3, 4, 5, 63, 64, 65, 6399):
        assert torch.equal(noise.normal(42, (length,), device=device), long[:length])


def test_normal_has_the_requested_shape_and_dtype() -> None:
    for shape in ((), (0,), (3, 0, 2), (5,), (2, 3, 7), [2, 2]):
        z = noise.normal(1, shape)
        assert z.shape == tuple(shape)
        assert z.dtype == torch.float32
    assert noise.normal(np.int64(7), (np.int32(4),)).equal(noise.normal(7, (4,)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "7", None, float("nan"), np.float32(3)])
def test_normal_refuses_bad_seeds(seed: object) -> None:
    with pytest.raises(InvalidInputError, match="seed must be an integer from 0"):
        noise.normal(seed, (4,))  # type: ignore[arg-type]


def test_normal_refuses_bad_streams_and_shapes() -> None:
    for stream in (-1, 2**32, 0.5, False):
        with pytest.raises(InvalidInputError, match="stream"):
            noise.normal(0, (4,), stream=stream)
    for shape in ((-1,), (2.0,), (True,)):
        with pytest.raises(InvalidInputError, match="shape"):
            noise.normal(0, shape)  # type: ignore[arg-type]


def test_normal_in_cpp_refuses_what_it_cannot_write_to() -> None:
    needs_native()
    for wrong in (torch.zeros(4).double(), torch.zeros(4, 4)[:, ::2], torch.zeros(4, device="meta"), np.zeros(4), None):
        with pytest.raises(ValueError, match="out: expected"):
            native.lib.normal(wrong, 0, 0)
