"""Conversion to integers: C++ against its reference, exact arithmetic, and the statistics of the dither."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from presto_rt import native
from presto_rt.audio.pcm import DITHER_STREAM, to_pcm, to_pcm_reference
from presto_rt.diffusion.noise import random_words
from presto_rt.errors import InvalidInputError

SPECIAL = [
    math.nan,
    math.inf,
    -math.inf,
    1.0,
    -1.0,
    2.0,
    -2.0,
    0.0,
    -0.0,
    0.5 / 32768,
    1.5 / 32768,
    -2.5 / 32768,
    1e-38,
    1e30,
]


def needs_native() -> None:
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 31, 32, 33, 64, 1001])
@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("dither", [False, True])
def test_to_pcm_native_equals_reference(channels: int, frames: int, bits: int, dither: bool) -> None:
    needs_native()
    samples = torch.randn(channels, frames) * 0.7
    samples.flatten()[: len(SPECIAL)] = torch.tensor(SPECIAL)[: samples.numel()]
    out = torch.full((frames, channels), 12345, dtype=torch.int16 if bits == 16 else torch.int32)
    native.lib.to_pcm(samples, out, dither, 99, DITHER_STREAM)
    assert torch.equal(out, to_pcm_reference(samples, bits, dither=dither, seed=99))


@pytest.mark.parametrize("bits", [16, 24])
def test_to_pcm_restores_every_integer(bits: int) -> None:
    scale = 2 ** (bits - 1)
    step = 1 if bits == 16 else 97
    integers = torch.arange(-scale, scale, step)
    samples = (integers.double() / scale).float().reshape(1, -1)
    assert torch.equal(to_pcm(samples, bits, dither=False).flatten().long(), integers)


def test_to_pcm_clamps_or_silences_special_values() -> None:
    got = to_pcm(torch.tensor([SPECIAL]), dither=False).flatten().tolist()
    assert got == [0, 32767, -32768, 32767, -32768, 32767, -32768, 0, 0, 0, 2, -2, 0, 32767]


def test_dither_is_the_documented_function_of_seed_and_position() -> None:
    samples = torch.randn(2, 500) * 0.1
    words = random_words(17, 1000, stream=DITHER_STREAM).reshape(500, 2)
    exact = samples.T.double() * 32768 + ((words & 0xFFFF) - (words >> 16)).double() / 65536
    got = to_pcm(samples, seed=17)
    sure = (exact - exact.floor() - 0.5).abs() > 1e-3  # fp32 may round a near tie either way
    assert sure.double().mean() > 0.99
    assert torch.equal(got[sure].long(), exact.round()[sure].long())
    assert not torch.equal(got, to_pcm(samples, seed=18))
    assert torch.equal(to_pcm(samples[:, :123].contiguous(), seed=17), got[:123])


def test_dither_decouples_error_mean_and_power_from_the_signal() -> None:
    """A constant of x steps has mean x and error power 1/4 for every x."""
    n = 200_000
    for x in (0.0, 0.25, 0.5, 0.75):
        samples = torch.full((1, n), x / 32768)
        error = to_pcm(samples, seed=3).double() - x
        assert abs(error.mean()) < 5 * math.sqrt(0.25 / n)
        assert abs(error.square().mean() - 0.25) < 0.01
    undithered = to_pcm(torch.full((1, n), 0.25 / 32768), dither=False).double() - 0.25
    assert abs(undithered.mean()) > 0.2


def test_to_pcm_rejects_bad_arguments() -> None:
    samples = torch.zeros(2, 4)
    for bad in (samples[0], samples.double(), samples.int()):
        with pytest.raises(InvalidInputError, match="samples must be"):
            to_pcm(bad)
    with pytest.raises(InvalidInputError, match="bits must be"):
        to_pcm(samples, 8)
    with pytest.raises(InvalidInputError, match="seed must be"):
        to_pcm(samples, seed=-1)


def test_to_pcm_native_checks_sizes_and_dtypes() -> None:
    needs_native()
    samples = torch.zeros(2, 8)
    for shape, dtype in (((2, 8), torch.int16), ((8, 1), torch.int32), ((16,), torch.int16), ((8, 2), torch.int64)):
        with pytest.raises(ValueError, match="out: expected int"):
            native.lib.to_pcm(samples, torch.zeros(shape, dtype=dtype), False, 0, 0)


@pytest.mark.parametrize("convert", [to_pcm, to_pcm_reference])
def test_to_pcm_returns_interleaved_memory(convert: Callable[..., torch.Tensor]) -> None:
    """A file's bytes are a view of these integers."""
    assert convert(torch.randn(2, 5), 16, dither=False, seed=0).is_contiguous()
