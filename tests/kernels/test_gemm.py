from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from presto_rt.kernels import gemm as op
from presto_rt.kernels.gemm import linear, linear_gate_residual, linear_gate_residual_reference, linear_reference, tile

from presto_rt.errors import InvalidInputError
from tests.support.kernels import assert_no_worse, error, poisoned, strided

FP8 = torch.float8_e4m3fn
ACT = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "swiglu": lambda z: z[..., : z.shape[-1] // 2] * F.silu(z[..., z.shape[-1] // 2 :]),
}

# batch, tokens, K, N of the weight; activation; bias
CASES = [
    ((1, 1, 64, 64), "none", False, torch.float32),
    ((2, 17, 96, 80), "gelu", True, torch.float32),
    ((2, 33, 40, 130), "swiglu", True, torch.float32),
    ((1, 113, 320, 200), "gelu_tanh", True, torch.float16),
    ((4, 17, 100, 64), "silu", True, torch.bfloat16),
    ((1, 70, 1536, 72), "none", True, torch.bfloat16),
    ((1, 345, 128, 192), "swiglu", False, torch.float16),
    ((1, 689, 64, 64), "gelu_tanh", True, torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "activation", "biased", "dtype"), CASES)
def test_linear_against_fp64(device, shape, activation, biased, dtype):
    batch, tokens, depth, columns = shape
    x = strided(torch.randn(batch, tokens, depth, device=device).to(dtype))
    weight = (torch.randn(columns, depth, device=device) * depth**-0.5).to(dtype)
    bias = torch.randn(columns, device=device).to(dtype) if biased else None
    out = poisoned(batch, tokens, columns // (2 if activation == "swiglu" else 1), dtype=dtype, device=device)
    linear(x, weight, bias, activation=activation, out=out, backend="triton")
    truth = ACT[activation](F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    # Contiguous for torch: on CPUs with AMX its bf16 product multiplies what lies behind a row by 0; NaN is there.
    assert_no_worse(out, ACT[activation](F.linear(x.contiguous(), weight, bias)), truth)


@pytest.mark.parametrize(
    ("shape", "dtype", "gated"),
    [
        ((3, 17, 96, 64), torch.float32, True),
        ((2, 40, 256, 72), torch.float16, True),
        ((1, 113, 128, 320), torch.bfloat16, True),
        ((2, 40, 64, 64), torch.bfloat16, False),
    ],
)
def test_linear_gate_residual_against_fp64(device, shape, dtype, gated):
    batch, tokens, depth, columns = shape
    x = torch.randn(batch, tokens, depth, device=device).to(dtype)
    weight = (torch.randn(columns, depth, device=device) * depth**-0.5).to(dtype)
    bias = torch.randn(columns, device=device).to(dtype)
    residual = strided(torch.randn(batch, tokens, columns, device=device).to(dtype))
    table = torch.randn(9, columns, device=device) if gated else None
    base = torch.randint(0, 5, (batch,), dtype=torch.int32, device=device) if gated else None
    out = poisoned(batch, tokens, columns, dtype=dtype, device=device)
    linear_gate_residual(x, weight, bias, residual, table, gate=4, base=base, out=out, backend="triton")

    def plain(dt):
        gate = table[base.long() + 4][:, None].to(dt) if gated else 1
        return residual.to(dt) + gate * F.linear(x.to(dt), weight.to(dt), bias.to(dt))

    assert_no_worse(out, plain(dtype), plain(torch.float64))


@pytest.mark.parametrize("backend", ["triton", "torch", "auto"])
def test_in_place_adds_once(device, backend):
    x, weight, residual = (torch.randn(*s, device=device) for s in ((1, 20, 32), (48, 32), (1, 20, 48)))
    table = torch.randn(2, 48, device=device)
    expected = residual + table[1] * (x @ weight.T)
    result = linear_gate_residual(x, weight, None, residual, table, gate=1, out=residual, backend=backend)
    assert result is residual
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-4)


def test_fp8_product_is_that_of_the_fp8_numbers(device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9 or more")
    x = (torch.randn(2, 30, 96, device=device) * 20).to(FP8)
    weight = (torch.randn(64, 96, device=device) * 20).to(FP8)
    scale, bias = torch.rand(64, device=device) * 1e-3, torch.randn(64, device=device).bfloat16()
    arguments = {"x_scale": 0.05, "weight_scale": scale}
    out = linear(x, weight, bias, out_dtype=torch.float32, backend="triton", **arguments)
    truth = F.linear(x.double(), weight.double() * scale.double()[:, None]) * 0.05 + bias.double()
    # Nothing but the sum rounds; a GPU's matrix units keep about 14 bits of a sum of fp8 products.
    limit = 1e-3 if device == "cuda" else 1e-5
    assert error(out, truth) < limit
    residual, table = torch.randn(2, 30, 64, device=device), torch.randn(1, 64, device=device)
    added = linear_gate_residual(x, weight, bias, residual, table, backend="triton", **arguments)
    assert error(added, residual.double() + table[0].double() * truth) < limit


def test_fp8_output_saturates(device):
    x, weight = torch.randn(1, 9, 32, device=device), torch.randn(16, 32, device=device)
    y = linear(x, weight, activation="gelu_tanh", backend="triton")
    y8 = linear(x, weight, activation="gelu_tanh", out_dtype=FP8, out_scale=0.01, backend="triton")
    assert y.max() > 4.48
    assert y8.float().max() == 448
    expected = (y / 0.01).clamp(-448, 448).to(FP8)
    assert ((y8.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs() <= 1).all()


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 40), depth=st.integers(1, 70), columns=st.integers(1, 40),
    activation=st.sampled_from(["none", "gelu_tanh", "swiglu"]), scaled=st.booleans(),
)  # fmt: skip
def test_any_shape(batch, tokens, depth, columns, activation, scaled):
    if not op.runtime.interpreting:
        pytest.skip("random shapes would compile one kernel each")
    rows = 2 * columns if activation == "swiglu" else columns
    x, weight, bias = torch.randn(batch, tokens, depth), torch.randn(rows, depth), torch.randn(rows)
    arguments = {"activation": activation, "x_scale": 0.3, "weight_scale": torch.rand(rows) if scaled else None}
    ours = linear(x, weight, bias, backend="triton", **arguments)
    torch.testing.assert_close(ours, linear_reference(x, weight, bias, **arguments), rtol=1e-4, atol=1e-4)
    plain = linear(x, weight, bias, backend="torch", **arguments)
    torch.testing.assert_close(plain, linear_reference(x, weight, bias, **arguments), rtol=1e-4, atol=1e-4)
    residual = torch.randn(batch, tokens, rows)
    expected = linear_gate_residual_reference(x, weight, bias, residual, x_scale=0.3)
    for backend in ("triton", "torch"):
        ours = linear_gate_residual(x, weight, bias, residual, x_scale=0.3, backend=backend)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_tiles_fill_the_chip():
    """At the shapes that the kernel is for, the waves of the chosen tile lose at most a third of the chip."""
    x = torch.empty(1, dtype=torch.bfloat16)
    for rows in (345, 689, 1378):
        for columns in (1024, 3072, 4096, 1536, 4608, 6144):
            m, n, *_ = tile(rows, columns, 1, x, False)
            programs = -(-rows // m) * -(-columns // n)
            waves = -(-programs // 132)
            useful = rows * columns / (waves * 132 * m * n)
            assert useful > 0.45, f"{rows} x {columns} in {m} x {n}: {useful:.2f} of the chip"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, 8)}, "x has 2 dimensions"),
        ({"x": torch.randn(1, 0, 8)}, "x is empty"),
        ({"x": torch.randn(1, 4, 9)}, "x has width 9, weight takes 8"),
        ({"x": torch.randn(1, 8, 4).transpose(1, 2)}, "not contiguous"),
        ({"x": torch.randn(1, 4, 8).half()}, "weight has dtype float32; use one of float16"),
        ({"weight": torch.randn(8, 6).T}, "weight is not contiguous"),
        ({"bias": torch.randn(5)}, "bias has shape"),
        ({"weight_scale": torch.ones(3)}, "weight_scale has shape"),
        ({"activation": "relu"}, "use one of none, gelu"),
        ({"activation": "swiglu", "weight": torch.randn(5, 8)}, "even number of weight rows"),
        ({"out_dtype": torch.int8}, "out_dtype"),
        ({"out_scale": -1.0}, "must be positive"),
        ({"out": torch.empty(1, 4, 7)}, "out has shape"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InvalidInputError, match=message):
        linear(**({"x": torch.randn(1, 4, 8), "weight": torch.randn(6, 8)} | change))


def test_bad_gate():
    x, weight, residual = torch.randn(1, 4, 8), torch.randn(6, 8), torch.randn(1, 4, 6)
    with pytest.raises(InvalidInputError, match=r"row offsets \[3\] must lie in 0..1"):
        linear_gate_residual(x, weight, None, residual, torch.randn(2, 6), gate=3)
    with pytest.raises(InvalidInputError, match="residual has shape"):
        linear_gate_residual(x, weight, None, residual[:, :3])
