"""Overlap-add: C++ against its twin to the bit, and against torch.istft and a plain double loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from presto_rt import native
from presto_rt.errors import InvalidInputError
from presto_rt.overlap import overlap_add, overlap_add_torch

SIZES = [
    (1, 1, 8, 8),
    (1, 1, 7, 3),
    (2, 5, 16, 4),
    (3, 9, 17, 5),
    (2, 33, 31, 1),
    (1, 21, 257, 100),
    (2, 40, 2048, 512),
]


def needs_native() -> None:
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")


def by_loops(frames: np.ndarray, window: np.ndarray, hop: int) -> np.ndarray:
    """The equation in fp64, sample by sample."""
    batch, count, size = frames.shape
    total = (count - 1) * hop + size
    top, bottom = np.zeros((batch, total)), np.zeros(total)
    for f in range(count):
        top[:, f * hop : f * hop + size] += frames[:, f].astype(float) * window.astype(float)
        bottom[f * hop : f * hop + size] += window.astype(float) ** 2
    return top / bottom


@pytest.mark.parametrize(("batch", "count", "size", "hop"), SIZES)
def test_cpp_equals_its_twin_and_overwrites_what_was_there(batch: int, count: int, size: int, hop: int) -> None:
    needs_native()
    frames, window = torch.randn(batch, count, size), torch.rand(size) + 0.1
    total = (count - 1) * hop + size
    out, envelope = np.full((batch, total), np.nan, np.float32), np.full(total, np.nan, np.float32)
    native.lib.overlap_add(frames.numpy(), window.numpy(), hop, out, envelope)
    samples, squares = overlap_add_torch(frames, window, hop)
    assert torch.equal(torch.from_numpy(out), samples)
    assert torch.equal(torch.from_numpy(envelope), squares)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_size_agrees_with_the_equation(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    hop = data.draw(st.integers(1, size))
    batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    frames = rng.standard_normal((batch, count, size)).astype(np.float32)
    window = (rng.random(size) + 0.1).astype(np.float32)
    got = overlap_add(torch.from_numpy(frames), torch.from_numpy(window), hop, center=False).numpy()
    assert np.abs(got - by_loops(frames, window, hop)).max() < 2e-5


@pytest.mark.parametrize("length", [None, 1, 20_000, 21_504])
def test_it_is_the_second_half_of_torch_istft(length: int | None) -> None:
    size, hop = 2048, 512
    window = torch.hann_window(size)
    spectrum = torch.randn(2, size // 2 + 1, 43, dtype=torch.complex64)
    wanted = torch.istft(spectrum, size, hop, window=window, length=length)
    frames = torch.fft.irfft(spectrum, n=size, dim=1).transpose(1, 2).contiguous()
    got = overlap_add(frames, window, hop, length=length)
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() < 2e-6


def test_frames_of_a_signal_give_the_signal_back() -> None:
    samples = torch.randn(2, 4096 + 300)
    window = torch.hamming_window(400)
    frames = samples.unfold(1, 400, 100) * window
    assert (
        overlap_add(frames, window, 100, center=False) - samples[:, : frames.shape[1] * 100 + 300]
    ).abs().max() < 2e-6


def test_gradients_flow_and_match_finite_differences() -> None:
    frames = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    window = torch.rand(6, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda x: overlap_add_torch(x, window, 2)[0], frames)
    single = frames.detach().float().requires_grad_()
    overlap_add(single, window.float(), 2, center=False).sum().backward()
    assert single.grad is not None


def test_strided_frames_are_the_same_as_contiguous_ones() -> None:
    frames, window = torch.randn(2, 16, 9), torch.rand(16) + 0.1
    strided = frames.transpose(1, 2)
    assert torch.equal(overlap_add(strided, window, 4), overlap_add(strided.contiguous(), window, 4))


def test_bad_arguments_are_refused() -> None:
    frames, window = torch.zeros(1, 4, 8), torch.ones(8)
    for bad in (frames[0], frames.double(), frames[:, :0]):
        with pytest.raises(InvalidInputError, match="frames must be"):
            overlap_add(bad, window, 4)
    for bad in (torch.ones(7), window.double(), torch.ones(1, 8)):
        with pytest.raises(InvalidInputError, match="window must be"):
            overlap_add(frames, bad, 4)
    for hop in (0, 9, -1):
        with pytest.raises(InvalidInputError, match="hop must be"):
            overlap_add(frames, window, hop)
    for length in (0, 17, -3):
        with pytest.raises(InvalidInputError, match="length must be"):
            overlap_add(frames, window, 4, length=length)
    with pytest.raises(InvalidInputError, match="uncovered"):
        overlap_add(frames, torch.hann_window(8), 8)


def test_cpp_checks_sizes_before_it_touches_memory() -> None:
    needs_native()
    frames, window = np.zeros((1, 4, 8), np.float32), np.ones(8, np.float32)
    out, envelope = np.zeros((1, 20), np.float32), np.zeros(20, np.float32)
    native.lib.overlap_add(frames, window, 4, out, envelope)
    for arguments in (
        (frames[0], window, 4, out, envelope),
        (frames, window[:7].copy(), 4, out, envelope),
        (frames, window, 0, out, envelope),
        (frames, window, 9, out, envelope),
        (frames, window, 5, out, envelope),
        (frames, window, 4, out[:, :19].copy(), envelope),
        (frames, window, 4, out, envelope[:19].copy()),
        (frames[:, :0].copy(), window, 4, out, envelope),
    ):
        with pytest.raises(ValueError, match="overlap_add"):
            native.lib.overlap_add(*arguments)
