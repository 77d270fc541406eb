"""linear: matrix products with bias, activation and fp8 scales."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from presto_rt.errors import InvalidInputError
from presto_rt.kernels import runtime
from presto_rt.kernels.gemm import ACTIVATIONS, Fp8Scales, linear, linear_reference, tile
from tests.support.kernels import assert_no_worse, error, poisoned, strided

FP8 = torch.float8_e4m3fn


def activated(z, activation):
    return F.gelu(z, approximate="tanh") if activation == "gelu_tanh" else z


# batch, tokens, K, N; activation; bias
CASES = [
    ((1, 1, 64, 64), "none", False, torch.float32),
    ((2, 17, 96, 80), "gelu_tanh", True, torch.float32),
    ((2, 33, 40, 130), "none", True, torch.float32),
    ((1, 113, 320, 200), "gelu_tanh", True, torch.float16),
    ((4, 17, 100, 64), "gelu_tanh", False, torch.bfloat16),
    ((1, 70, 1536, 72), "none", True, torch.bfloat16),
    ((1, 345, 128, 192), "none", False, torch.float16),
    ((1, 689, 64, 64), "gelu_tanh", True, torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "activation", "biased", "dtype"), CASES)
def test_linear_is_no_worse_than_eager_torch_against_fp64(device, shape, activation, biased, dtype):
    batch, tokens, depth, columns = shape
    x = strided(torch.randn(batch, tokens, depth, device=device).to(dtype))
    weight = (torch.randn(columns, depth, device=device) * depth**-0.5).to(dtype)
    bias = torch.randn(columns, device=device).to(dtype) if biased else None
    out = poisoned(batch, tokens, columns, dtype=dtype, device=device)
    linear(x, weight, bias, activation=activation, out=out, backend="triton")
    truth = activated(F.linear(x.double(), weight.double(), None if bias is None else bias.double()), activation)
    # Contiguous for torch: on CPUs with AMX its bf16 product multiplies what lies behind a row by 0; NaN is there.
    assert_no_worse(out, activated(F.linear(x.contiguous(), weight, bias), activation), truth)


def test_linear_fp8_multiplies_the_fp8_numbers_exactly(device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9 or more")
    x = (torch.randn(2, 30, 96, device=device) * 20).to(FP8)
    weight = (torch.randn(64, 96, device=device) * 20).to(FP8)
    scale, bias = torch.rand(64, device=device) * 1e-3, torch.randn(64, device=device).bfloat16()
    out = linear(x, weight, bias, scales=Fp8Scales(0.05, scale), out_dtype=torch.float32, backend="triton")
    truth = F.linear(x.double(), weight.double() * scale.double()[:, None]) * 0.05 + bias.double()
    # Only the sum rounds; a GPU's matrix units keep about 14 bits of a sum of fp8 products.
    assert error(out, truth) < (1e-3 if device == "cuda" else 1e-5)


def test_linear_fp8_output_saturates(device):
    x, weight = torch.randn(1, 9, 32, device=device), torch.randn(16, 32, device=device)
    y = linear(x, weight, activation="gelu_tanh", backend="triton")
    scales = Fp8Scales(out_scale=0.01)
    y8 = linear(x, weight, activation="gelu_tanh", scales=scales, out_dtype=FP8, backend="triton")
    assert y.max() > 4.48
    assert y8.float().max() == 448
    expected = (y / 0.01).clamp(-448, 448).to(FP8)
    assert ((y8.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs() <= 1).all()


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    depth=st.integers(1, 70),
    columns=st.integers(1, 40),
    activation=st.sampled_from(ACTIVATIONS),
    scaled=st.booleans(),
)
def test_linear_equals_its_reference_for_any_shape(batch, tokens, depth, columns, activation, scaled):
    if not runtime.interpreting:
        pytest.skip("random shapes would compile one kernel each")
    x, weight, bias = torch.randn(batch, tokens, depth), torch.randn(columns, depth), torch.randn(columns)
    scales = Fp8Scales(0.3, torch.rand(columns) if scaled else None)
    expected = linear_reference(x, weight, bias, activation=activation, scales=scales)
    for backend in ("triton", "torch"):
        ours = linear(x, weight, bias, activation=activation, scales=scales, backend=backend)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_tile_keeps_half_of_the_chip_busy():
    """At the shapes of small and medium, the waves of the selected tile use at least 45 % of the multiprocessors."""
    x = torch.empty(1, dtype=torch.bfloat16)
    for rows in (345, 689, 1378):
        for columns in (1024, 3072, 4096, 1536, 4608, 6144):
            m, n, *_ = tile(rows, columns, 1, x)
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
        ({"scales": Fp8Scales(weight_scale=torch.ones(3))}, "weight_scale has shape"),
        ({"activation": "relu"}, "use one of none, gelu_tanh"),
        ({"out_dtype": torch.int8}, "out_dtype"),
        ({"scales": Fp8Scales(out_scale=-1.0)}, "must be positive"),
        ({"out": torch.empty(1, 4, 7)}, "out has shape"),
    ],
)
def test_linear_rejects_bad_input(change, message):
    with pytest.raises(InvalidInputError, match=message):
        linear(**({"x": torch.randn(1, 4, 8), "weight": torch.randn(6, 8)} | change))
