from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from presto_rt.kernels import adaln

from presto_rt.errors import InvalidInputError
from tests.support.kernels import DTYPES, assert_no_worse, poisoned, strided


def plain_norm(x, norm, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], eps=eps) if norm == "layer" else F.rms_norm(x, x.shape[-1:], eps=eps)


def plain(residual, branch, table, base, gate, shift, scale, norm, weight=None):
    """The block's own formula in eager torch, in the dtype of its arguments."""
    rows = [table[base.long() + k][:, None].to(residual.dtype) for k in (gate, shift, scale)]
    r = residual if branch is None else residual + rows[0] * branch
    y = plain_norm(r, norm)
    if weight is not None:
        y = y * weight.to(residual.dtype)
    return r, y * (1 + rows[2]) + rows[1]


# batch, tokens, width: odd lengths, widths that are no power of two, the widths of nano, small and medium
CASES = [
    *[((4, 17, 96), norm, dtype) for norm in adaln.NORMS for dtype in DTYPES],
    ((1, 1, 64), "layer", torch.float32),
    ((2, 113, 320), "rms", torch.float16),
    ((1, 345, 1024), "layer", torch.float16),
    ((1, 41, 1536), "layer", torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "norm", "dtype"), CASES)
def test_fused_against_fp64(device, shape, norm, dtype):
    batch, tokens, width = shape
    found = []
    for _ in range(-(-16 // (batch * tokens))):  # one row alone has one mean and one spread, and their rounding is luck
        residual, branch = (strided(torch.randn(shape, device=device).to(dtype)) for _ in range(2))
        residual = residual + 3  # a mean that is not zero tells the two norms apart
        table = torch.randn(12, width, device=device)
        base = torch.randint(0, 7, (batch,), device=device, dtype=torch.int32)
        rows = {"gate": 5, "shift": 0, "scale": 3}
        r, y = poisoned(*shape, dtype=dtype, device=device), poisoned(*shape, dtype=dtype, device=device)
        adaln.gate_residual_norm_modulate(
            residual, branch, table, base=base, norm=norm, residual_out=r, out=y, backend="triton", **rows
        )
        true_r, _ = plain(residual.double(), branch.double(), table.double(), base, **rows, norm=norm)
        _, true_y = plain(r.double(), None, table.double(), base, **rows, norm=norm)
        eager_r, _ = plain(residual, branch, table, base, **rows, norm=norm)
        _, eager_y = plain(r, None, table, base, **rows, norm=norm)
        found.append((r, eager_r, true_r, y, eager_y, true_y))
    each = [torch.stack(several) for several in zip(*found, strict=True)]
    assert_no_worse(*each[:3])
    assert_no_worse(*each[3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", adaln.NORMS)
def test_norm_modulate_with_weight(device, norm, dtype):
    x = torch.randn(2, 33, 192, device=device, dtype=dtype) - 1
    table, weight = torch.randn(6, 192, device=device, dtype=dtype), torch.rand(192, device=device, dtype=dtype)
    base = torch.zeros(2, dtype=torch.int32, device=device)
    y = adaln.norm_modulate(x, table, shift=1, scale=4, weight=weight, norm=norm, backend="triton")
    _, truth = plain(x.double(), None, table.double(), base, 0, 1, 4, norm, weight.double())
    _, eager = plain(x, None, table, base, 0, 1, 4, norm, weight)
    assert_no_worse(y, eager, truth)


def test_ungated_unmodulated(device):
    """The cross-attention's neighbours: no gate on its branch, no modulation of its input."""
    residual, branch = torch.randn(2, 9, 64, device=device), torch.randn(2, 9, 64, device=device)
    r, y = adaln.gate_residual_norm_modulate(residual, branch, backend="triton")
    torch.testing.assert_close(r, residual + branch)
    torch.testing.assert_close(y, F.layer_norm(residual + branch, (64,), eps=1e-6))


def test_fp32_residual_stream(device):
    residual, branch = torch.randn(1, 5, 64, device=device), torch.randn(1, 5, 64, device=device).half()
    table = torch.randn(3, 64, device=device).half()
    before = residual.clone()
    r, y = adaln.gate_residual_norm_modulate(
        residual, branch, table, gate=0, shift=1, scale=2, residual_out=residual, backend="triton"
    )
    assert r is residual
    assert r.dtype == torch.float32
    assert y.dtype == torch.float16
    torch.testing.assert_close(r, before + table[0].float() * branch.float())


def test_fp8_output_is_the_rounded_fp32_output(device):
    x, table = torch.randn(1, 19, 128, device=device), torch.randn(2, 128, device=device)
    x[0, 0, :4] = torch.tensor([1e4, -1e4, 5e3, 0])
    y = adaln.norm_modulate(x, table, shift=0, scale=1, backend="triton")
    scale = 0.01  # small enough that the tails saturate
    y8 = adaln.norm_modulate(
        x, table, shift=0, scale=1, out_dtype=torch.float8_e4m3fn, out_scale=scale, backend="triton"
    )
    expected = (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert (y / scale).abs().max() > 448
    # a value within rounding of a tie may fall to either side: one code apart, and rare
    apart = (y8.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    width=st.integers(2, 130),
    norm=st.sampled_from(adaln.NORMS),
    gated=st.booleans(),
)
def test_any_shape(batch, tokens, width, norm, gated):
    if not adaln.runtime.interpreting:
        pytest.skip("random shapes would compile one kernel each")
    x, branch, table = torch.randn(batch, tokens, width), torch.randn(batch, tokens, width), torch.randn(5, width)
    arguments = {
        "gate": 4 if gated else None,
        "shift": 0,
        "scale": 2,
        "norm": norm,
        "base": torch.zeros(batch, dtype=torch.int32),
    }
    ours = adaln.gate_residual_norm_modulate(x, branch, table, backend="triton", **arguments)
    reference = adaln.gate_residual_norm_modulate_reference(x, branch, table, **arguments)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 8)}, "x has 2 dimensions, expected 3"),
        ({"x": torch.randn(1, 0, 8)}, "x is empty"),
        ({"x": torch.randn(1, 4, 8, dtype=torch.float64)}, "dtype float64"),
        ({"x": torch.randn(1, 8, 4).transpose(1, 2)}, "not contiguous"),
        ({"table": torch.randn(6, 4)}, "table has width 4, the rows it modulates have 8"),
        ({"scale": 6}, "must lie in 0..5"),
        ({"scale": None}, "shift and scale go together"),
        ({"table": None}, "pass the table"),
        ({"norm": "batch"}, "use 'layer' or 'rms'"),
        ({"base": torch.zeros(1)}, "base has dtype float32"),
        ({"base": torch.zeros(2, dtype=torch.int32)}, "base has shape (2,), expected (1,)"),
        ({"weight": torch.randn(4)}, "weight has shape (4,), expected (8,)"),
        ({"out_dtype": torch.int8}, "out_dtype"),
        ({"out_scale": 0.0}, "must be positive"),
        ({"backend": "cuda"}, "use 'auto', 'triton' or 'torch'"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.randn(1, 4, 8), "table": torch.randn(6, 8), "shift": 0, "scale": 1} | change
    with pytest.raises(InvalidInputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        adaln.norm_modulate(**arguments)
