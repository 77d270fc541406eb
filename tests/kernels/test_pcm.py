"""pcm: dithered 16-bit integers equal to the package's to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from presto_rt.audio import pcm as package
from presto_rt.errors import InvalidInputError
from presto_rt.kernels import pcm as op
from presto_rt.kernels.pcm import pcm
from presto_rt.kernels.sampler_step import seeds_tensor


def test_pcm_dither_stream_is_the_packages():
    assert op.DITHER_STREAM == package.DITHER_STREAM


@pytest.mark.parametrize("dithered", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 1, 17), (2, 2, 3001)])
def test_pcm_equals_the_package_conversion_to_the_bit(device, shape, dithered):
    samples = torch.randn(shape, device=device) * 0.7
    numbers = [11, 2**64 - 1][: shape[0]]
    ours = pcm(samples, seeds_tensor(numbers, device) if dithered else None, backend="triton")
    for clip, integers, seed in zip(samples, ours, numbers, strict=True):
        assert torch.equal(integers.cpu(), package.to_pcm(clip.cpu(), 16, dither=dithered, seed=seed))
        assert torch.equal(integers.cpu(), package.to_pcm_reference(clip.cpu(), 16, dither=dithered, seed=seed))


def test_pcm_clamps_and_rounds_at_the_edges(device):
    """Full scale, overload, ties to even, NaN, infinities."""
    steps = [-40000, -32768.5, -32768, -1.5, -0.5, 0.5, 1.5, 2.5, 32766.5, 32767.5, 32768, float("inf"), -float("inf")]
    samples = torch.tensor([[[*(s / 32768 for s in steps), float("nan")]]], device=device)
    expected = [-32768, -32768, -32768, -2, 0, 0, 2, 2, 32766, 32767, 32767, 32767, -32768, 0]
    assert pcm(samples, backend="triton").flatten().tolist() == expected


@settings(max_examples=10, deadline=None)
@given(channels=st.integers(1, 3), frames=st.integers(1, 700), seed=st.integers(0, 2**64 - 1))
def test_pcm_equals_the_package_conversion_for_any_shape(channels, frames, seed):
    if not op.runtime.interpreting:
        pytest.skip("drawn for the interpreter")
    samples = torch.randn(1, channels, frames + 3)[..., 1 : frames + 1]
    ours = pcm(samples, seeds_tensor([seed]), backend="triton")
    assert torch.equal(ours[0], package.to_pcm(samples[0].contiguous(), 16, seed=seed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": torch.randn(2, 5)}, "samples has 2 dimensions"),
        ({"samples": torch.randn(1, 2, 0)}, "samples is empty"),
        ({"samples": torch.randn(1, 2, 5).half()}, "samples has dtype float16"),
        ({"samples": torch.randn(1, 5, 2).transpose(1, 2)}, "not contiguous"),
        ({"seeds": torch.zeros(1, dtype=torch.int32)}, "seeds has dtype int32"),
        ({"out": torch.empty(1, 2, 5, dtype=torch.int16)}, "out has shape"),
    ],
)
def test_pcm_rejects_bad_input(change, message):
    with pytest.raises(InvalidInputError, match=message):
        pcm(**({"samples": torch.randn(1, 2, 5)} | change))
