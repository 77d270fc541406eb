"""snake_conv1d and conv_transpose1d: one kernel, two launchers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from presto_rt.errors import InvalidInputError
from presto_rt.kernels import conv_transpose1d as up
from presto_rt.kernels import snake_conv1d as op
from presto_rt.kernels.conv_transpose1d import conv_transpose1d
from presto_rt.kernels.snake_conv1d import Snake, snake_conv1d
from tests.support.kernels import assert_no_worse, poisoned, strided


def snake(x, alpha, beta):
    """Snake by eager torch, in the dtype of x."""
    alpha, beta = alpha.to(x.dtype)[:, None], (alpha if beta is None else beta).to(x.dtype)[:, None]
    return x + (1.0 / (beta + 1e-9)) * torch.sin(alpha * x) ** 2


# batch, channels in, channels out, samples, taps, dilation, padding
@pytest.mark.parametrize(
    ("shape", "activated", "dtype"),
    [
        ((1, 1, 1, 1, 1, 1, 0), True, torch.float32),
        ((2, 17, 20, 113, 7, 3, 9), True, torch.float32),
        ((2, 40, 33, 130, 7, 9, 27), True, torch.float16),
        ((1, 64, 64, 345, 1, 1, 0), True, torch.bfloat16),
        ((1, 32, 2, 300, 7, 1, 3), True, torch.float16),
        ((1, 24, 130, 41, 3, 1, 0), False, torch.bfloat16),
    ],
)
def test_snake_conv1d_is_no_worse_than_eager_torch_against_fp64(device, shape, activated, dtype):
    batch, inward, outward, length, taps, dilation, padding = shape
    x = strided(torch.randn(batch, inward, length, device=device).to(dtype) * 2)
    weight = (torch.randn(outward, inward, taps, device=device) * (inward * taps) ** -0.5).to(dtype)
    bias = torch.randn(outward, device=device).to(dtype)
    alpha, beta = (
        (torch.rand(inward, device=device) + 0.5, torch.rand(inward, device=device) + 0.2)
        if activated
        else (None, None)
    )
    length_out = length + 2 * padding - dilation * (taps - 1)
    residual = strided(torch.randn(batch, outward, length_out, device=device).to(dtype))
    out = poisoned(batch, outward, length_out, dtype=dtype, device=device)
    snake_conv1d(
        x,
        op.pack(weight),
        bias,
        snake=Snake(alpha, beta) if activated else None,
        dilation=dilation,
        padding=padding,
        residual=residual,
        out=out,
        backend="triton",
    )

    def eager(dt):
        s = snake(x.to(dt), alpha, beta) if activated else x.to(dt)
        return F.conv1d(s, weight.to(dt), bias.to(dt), dilation=dilation, padding=padding) + residual.to(dt)

    assert_no_worse(out, eager(dtype), eager(torch.float64))


# batch, channels in, channels out, samples, kernel size, stride, padding, output padding
@pytest.mark.parametrize(
    ("shape", "activated", "dtype"),
    [
        ((1, 1, 1, 1, 4, 2, 1, 0), False, torch.float32),
        ((2, 17, 9, 33, 16, 8, 4, 0), True, torch.float32),
        ((2, 20, 12, 41, 10, 5, 3, 1), True, torch.float32),
        ((1, 64, 32, 130, 8, 4, 2, 0), True, torch.float16),
        ((1, 48, 24, 100, 4, 2, 1, 0), True, torch.bfloat16),
        ((1, 16, 8, 20, 3, 4, 0, 3), False, torch.float16),
    ],
)
def test_conv_transpose1d_is_no_worse_than_eager_torch_against_fp64(device, shape, activated, dtype):
    batch, inward, outward, length, size, stride, padding, extra = shape
    x = strided(torch.randn(batch, inward, length, device=device).to(dtype) * 2)
    weight = (torch.randn(inward, outward, size, device=device) * (2 * inward) ** -0.5).to(dtype)
    bias = torch.randn(outward, device=device).to(dtype)
    alpha = torch.rand(inward, device=device) + 0.5 if activated else None

    def eager(dt):
        s = snake(x.to(dt), alpha, None) if activated else x.to(dt)
        return F.conv_transpose1d(s, weight.to(dt), bias.to(dt), stride, padding, extra)

    truth = eager(torch.float64)
    out = poisoned(*truth.shape, dtype=dtype, device=device)
    geometry = {"stride": stride, "kernel_size": size, "padding": padding, "output_padding": extra}
    activation = Snake(alpha) if activated else None
    conv_transpose1d(x, up.pack(weight, stride), bias, snake=activation, out=out, backend="triton", **geometry)
    assert_no_worse(out, eager(dtype), truth)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), inward=st.integers(1, 20), outward=st.integers(1, 20), length=st.integers(1, 50))
def test_convolutions_equal_their_references_for_any_geometry(data, inward, outward, length):
    if not op.runtime.interpreting:
        pytest.skip("random shapes would compile one kernel each")
    x, alpha = torch.randn(1, inward, length), torch.rand(inward) + 0.1
    taps, dilation = data.draw(st.integers(1, 5), "taps"), data.draw(st.integers(1, 4), "dilation")
    padding = data.draw(st.integers(max(0, dilation * (taps - 1) - length + 1), 20), "padding")
    weight = op.pack(torch.randn(outward, inward, taps))
    arguments = {"snake": Snake(alpha), "dilation": dilation, "padding": padding}
    ours = snake_conv1d(x, weight, backend="triton", **arguments)
    torch.testing.assert_close(ours, op.snake_conv1d_reference(x, weight, **arguments), rtol=1e-4, atol=1e-4)

    stride, size = data.draw(st.integers(1, 6), "stride"), data.draw(st.integers(1, 9), "size")
    extra = data.draw(st.integers(0, stride - 1), "extra")
    arguments = {"stride": stride, "kernel_size": size, "output_padding": extra, "snake": Snake(alpha)}
    weight = torch.randn(inward, outward, size)
    assert torch.equal(up.unpack(up.pack(weight, stride), stride, size), weight)
    ours = conv_transpose1d(x, up.pack(weight, stride), backend="triton", **arguments)
    expected = up.conv_transpose1d_reference(x, up.pack(weight, stride), **arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, 9)}, "x has 2 dimensions"),
        ({"x": torch.randn(1, 4, 0)}, "x is empty"),
        ({"x": torch.randn(1, 9, 4).transpose(1, 2)}, "not contiguous"),
        ({"x": torch.randn(1, 4, 9).half()}, "weight has dtype float32"),
        ({"weight": torch.randn(6, 4, 3)}, "pack Conv1d's weight"),
        ({"weight": torch.randn(3, 4, 6).transpose(1, 2)}, "weight is not contiguous"),
        ({"bias": torch.randn(5)}, "bias has shape"),
        ({"snake": Snake(torch.ones(3))}, "alpha has shape"),
        ({"snake": Snake(torch.ones(4), torch.ones(3))}, "beta has shape"),
        ({"dilation": 5}, "3 taps with dilation 5 reach over 9 samples"),
        ({"dilation": 0}, "must be 1 or more"),
        ({"residual": torch.randn(1, 6, 9)}, "residual has shape"),
    ],
)
def test_snake_conv1d_rejects_bad_input(change, message):
    with pytest.raises(InvalidInputError, match=message):
        snake_conv1d(**({"x": torch.randn(1, 4, 9), "weight": torch.randn(3, 6, 4)} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 0}, "stride=0 must lie in 1..64"),
        ({"kernel_size": 9}, "was not packed for kernel_size 9"),
        ({"output_padding": 2}, "must be less than the stride"),
        ({"padding": 50}, "leaves no samples"),
        ({"x": torch.randn(1, 5, 9)}, "weight takes 4 channels, x has 5"),
    ],
)
def test_conv_transpose1d_rejects_bad_input(change, message):
    weight = up.pack(torch.randn(4, 6, 4), 2)
    with pytest.raises(InvalidInputError, match=message):
        conv_transpose1d(**({"x": torch.randn(1, 4, 9), "weight": weight, "stride": 2, "kernel_size": 4} | change))
