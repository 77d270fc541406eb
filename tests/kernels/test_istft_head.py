from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from presto_rt.kernels import istft_head as op
from presto_rt.kernels.istft_head import istft_head, overlap_add, overlap_add_reference, spectrum

from presto_rt.errors import InvalidInputError
from tests.support.kernels import DTYPES, assert_no_worse, poisoned, strided


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", op.KINDS)
def test_spectrum_against_fp64(device, kind, dtype):
    head = strided((torch.randn(2, 17, 66, device=device) * 2).to(dtype))
    head[0, 0, 33:40] = torch.tensor([100.0, -50, 3.1415927, 0, 1.5707964, 7, -7], device=device).to(dtype)
    head[0, 1, :3] = torch.tensor([50.0, -50, 4.7], device=device).to(dtype)
    ours = torch.view_as_real(spectrum(head, kind=kind, backend="triton"))
    first, second = head.double().chunk(2, -1)
    if kind == "polar":
        magnitude = first.exp().clamp(max=100)
        first, second = magnitude * second.cos(), magnitude * second.sin()
    second = second.clone()
    second[..., [0, -1]] = 0  # a real signal's first and last bin
    truth = torch.stack([first, second], -1)
    plain = torch.view_as_real(op.spectrum_reference(head, kind))
    assert_no_worse(ours, plain, truth)


def test_sine_and_cosine_over_many_turns(device):
    """Phases that a network may give: absolute error below 3e-7 up to a thousand turns."""
    phase = torch.cat([torch.linspace(-40, 40, 4001), torch.linspace(-6e3, 6e3, 1000)]).to(device)
    head = torch.cat([torch.zeros_like(phase), phase])[None, None]
    ours = torch.view_as_real(spectrum(head, backend="triton"))[0, 0].double()
    exact = torch.stack([phase.double().cos(), phase.double().sin()], -1)
    assert (ours - exact)[1:-1].abs().max() < 3e-7


@pytest.mark.parametrize(
    ("batch", "count", "size", "hop", "padding", "dtype"),
    [
        (1, 5, 64, 16, "center", torch.float32),
        (2, 17, 96, 40, "same", torch.float16),
        (1, 2, 33, 33, "same", torch.float32),
        (2, 9, 512, 128, "same", torch.bfloat16),
    ],
)
def test_overlap_add_against_fp64(device, batch, count, size, hop, padding, dtype):
    frames = strided(torch.randn(batch, count, size, device=device).to(dtype))
    window = torch.hann_window(size, device=device) + 0.1
    expected = overlap_add_reference(frames.double(), window, hop, padding)
    out = poisoned(*expected.shape, dtype=torch.float32, device=device)
    overlap_add(frames, window, hop, padding=padding, out=out, backend="triton")
    assert_no_worse(out, overlap_add_reference(frames, window, hop, padding), expected)


def test_analysis_and_synthesis_give_the_samples_back(device):
    """Against torch's own transform, not our reference: STFT of noise, through the head, is that noise."""
    size, hop = 128, 32
    x = torch.randn(2, 640, device=device)
    window = torch.hann_window(size, device=device)
    analysed = torch.stft(x, size, hop, window=window, return_complex=True).transpose(1, 2)
    cartesian = torch.cat([analysed.real, analysed.imag], -1)
    polar = torch.cat([analysed.abs().clamp_min(1e-9).log(), analysed.angle()], -1)
    for head, kind in ((cartesian, "cartesian"), (polar, "polar")):
        y = istft_head(head, window, hop, kind=kind, padding="center", backend="triton")
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
    same = istft_head(polar, window, hop, padding="same", backend="triton")
    assert same.shape == (2, polar.shape[1] * hop)


def test_samples_that_no_window_reaches_are_zero(device):
    window = torch.zeros(8, device=device)
    window[4:] = 1
    y = overlap_add(torch.ones(1, 3, 8, device=device), window, 8, padding="same", backend="triton")
    assert y[0].tolist() == ([0.0] * 4 + [1.0] * 4) * 3


@pytest.mark.parametrize("size", [64, 1024, 8192])
def test_any_head_is_a_real_signal(device, size):
    """The first and last bin of a network's head have phases; an inverse FFT may or may not ignore what they make
    imaginary, so it must not get any. Against the sum of cosines itself.
    """
    head = torch.randn(1, 3, size + 2, device=device)
    spectra = spectrum(head, backend="triton")
    assert (spectra.imag[..., [0, -1]] == 0).all()
    magnitude, phase = head.double().chunk(2, -1)
    magnitude = magnitude.exp().clamp(max=100)
    x = torch.fft.irfft(spectra, n=size).double()
    for n in (0, 1, size // 2 + 3):
        turns = 2 * math.pi / size * (torch.arange(size // 2 + 1, device=device) * n % size)
        weight = torch.full_like(turns, 2.0)
        weight[[0, -1]] = 1
        expected = (weight * magnitude * (phase + turns).cos())[..., 1:-1].sum(-1)
        expected = expected + (magnitude * phase.cos() * turns.cos())[..., [0, -1]].sum(-1)
        torch.testing.assert_close(x[..., n], expected / size, rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), count=st.integers(2, 12), size=st.integers(2, 60), padding=st.sampled_from(op.PADDINGS))
def test_any_overlap(data, count, size, padding):
    if not op.runtime.interpreting:
        pytest.skip("random shapes would compile one kernel each")
    hop = data.draw(st.integers(1, size), "hop")
    frames, window = torch.randn(1, count, size), torch.rand(size) + 0.1
    ours = overlap_add(frames, window, hop, padding=padding, backend="triton")
    torch.testing.assert_close(ours, overlap_add_reference(frames, window, hop, padding), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum(torch.randn(1, 4, 7)), "must be even"),
        (lambda: spectrum(torch.randn(4, 8)), "head has 2 dimensions"),
        (lambda: spectrum(torch.randn(1, 4, 8), kind="log"), "use 'polar' or 'cartesian'"),
        (lambda: overlap_add(torch.randn(1, 4, 8), torch.ones(7), 2), "window has shape"),
        (lambda: overlap_add(torch.randn(1, 4, 8), torch.ones(8), 9), "hop=9 must lie in 1..8"),
        (lambda: overlap_add(torch.randn(1, 1, 8), torch.ones(8), 2), "makes no samples"),
        (lambda: overlap_add(torch.randn(1, 4, 8), torch.ones(8), 2, padding="valid"), "use 'center' or 'same'"),
        (lambda: istft_head(torch.randn(1, 4, 8), torch.ones(8), 2), "an FFT of 8 needs 10"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()


def test_the_constants_of_the_range_reduction():
    """The parts of pi/2 add up, and the first two leave room for an exact product with the multiple."""
    assert abs(1.5703125 + 4.837512969970703e-4 + 7.549789948768648e-8 - math.pi / 2) < 1e-14
    assert abs(3.140625 + 9.675025939941406e-4 + 1.5099579897537296e-7 - math.pi) < 2e-14
