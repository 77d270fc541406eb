"""spsi: phases by a parallel prefix, against the loop over frames."""

from __future__ import annotations

import math

import pytest
import torch

from presto_rt.errors import InvalidInputError
from presto_rt.kernels.spsi import spsi, spsi_reference
from presto_rt.models.spectral import spsi_numpy


def poisoned(*shape, device):
    return torch.full((*shape, 2), math.nan, device=device).view(*shape, 2)


def angle_between(a, b):
    """Return the largest angle in radians between unit phasors."""
    return float(torch.angle(a.cpu().to(torch.complex128) * b.cpu().to(torch.complex128).conj()).abs().max())


@pytest.mark.parametrize(
    ("batch", "frames", "size", "hop"), [(1, 1, 64, 16), (2, 19, 64, 16), (1, 40, 64, 32), (1, 2, 2048, 512)]
)
def test_spsi_equals_the_loop_over_frames(device, batch, frames, size, hop):
    magnitude = torch.rand(batch, frames, size // 2 + 1, device=device).square()
    magnitude[0, -1, : size // 4] = 0.25  # a plateau: one peak, at its start
    out = torch.view_as_complex(poisoned(batch, frames, size // 2 + 1, device=device))
    got = spsi(magnitude, hop, size, out=out, backend="triton")
    want = torch.from_numpy(spsi_numpy(magnitude.cpu().numpy(), hop, size))
    assert got is out
    assert angle_between(spsi_reference(magnitude, hop, size), want) < 1e-5
    assert angle_between(got, want) < 2e-6 * (frames + 2)  # fp32 frequencies, summed over the frames
    torch.testing.assert_close(got.abs().cpu(), torch.ones(magnitude.shape))


def test_spsi_accepts_strides_and_silence(device):
    magnitude = torch.rand(2, 33, 40, device=device)[..., :33]  # rows with a gap
    flat = torch.full((1, 5, 33), 1e-8, device=device)  # all equal: one peak, at bin 0
    got = spsi(magnitude, 16, 64, backend="triton")
    assert torch.equal(got, spsi(magnitude.contiguous(), 16, 64, backend="triton"))
    signs = 1.0 - 2.0 * (torch.arange(33) % 2)
    torch.testing.assert_close(
        torch.view_as_real(spsi(flat, 16, 64, backend="triton")).cpu()[..., 0], signs.expand(1, 5, 33)
    )


def test_spsi_frame_depends_on_no_later_frame(device):
    """So a padded clip starts with the phases of the clip alone."""
    magnitude = torch.rand(1, 12, 33, device=device)
    longer = torch.cat([magnitude, torch.rand(1, 9, 33, device=device)], 1)
    alone, among = (spsi(m, 16, 64, backend="triton") for m in (magnitude, longer))
    assert torch.equal(alone, among[:, :12])


def test_spsi_keeps_nan_within_its_clip(device):
    magnitude = torch.rand(2, 9, 33, device=device)
    broken = magnitude.clone()
    broken[0] = math.nan
    got = spsi(broken, 16, 64, backend="triton")
    assert torch.equal(got[1], spsi(magnitude, 16, 64, backend="triton")[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(1, 3, 33).half(), 16, 64), "magnitude has dtype float16"),
        ((torch.rand(1, 3, 32), 16, 64), "33 bins"),
        ((torch.rand(1, 3, 33), 24, 64), "must divide"),
        ((torch.rand(3, 33), 16, 64), "dimensions"),
    ],
)
def test_spsi_rejects_bad_input(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        spsi(*arguments)
