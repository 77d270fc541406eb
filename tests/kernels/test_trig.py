"""Sine and cosine of the kernels against fp64."""

from __future__ import annotations

import math

import torch

from presto_rt.kernels import runtime
from presto_rt.kernels.runtime import jit, tl
from presto_rt.kernels.trig import sin_cos, sin_squared


@jit
def trig_kernel(x_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    sine, cosine = sin_cos(x)
    tl.store(out_ptr + offs, sine, mask=mask)
    tl.store(out_ptr + numel + offs, cosine, mask=mask)
    tl.store(out_ptr + 2 * numel + offs, sin_squared(x), mask=mask)


def test_trig_error_is_below_3e7_up_to_a_thousand_turns(device):
    special = torch.tensor([0, 1.5707964, 3.1415927, 4.7, 7, -7])
    x = torch.cat([special, torch.linspace(-40, 40, 4001), torch.linspace(-6e3, 6e3, 1000)]).to(device)
    out = torch.full((3, len(x)), math.nan, device=device)
    runtime.launch(trig_kernel, (runtime.ceil_div(len(x), 1024),), x, out, len(x), BLOCK=1024)
    wide = x.double()
    exact = torch.stack([wide.sin(), wide.cos(), wide.sin().square()])
    assert (out.double() - exact).abs().max() < 3e-7


def test_range_reduction_constants_add_up_to_the_period():
    """The first two parts of pi/2 and pi are short, so that their product with the multiple is exact."""
    assert abs(1.5703125 + 4.837512969970703e-4 + 7.549789948768648e-8 - math.pi / 2) < 1e-14
    assert abs(3.140625 + 9.675025939941406e-4 + 1.5099579897537296e-7 - math.pi) < 2e-14
