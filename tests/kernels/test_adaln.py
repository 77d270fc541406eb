"""adaln: the gated residual and its modulated norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from presto_rt.errors import InvalidInputError
from presto_rt.kernels import runtime
from presto_rt.kernels.adaln import NORMS, Modulation, Norm, adaln, adaln_reference
from tests.support.kernels import DTYPES, assert_no_worse, poisoned, strided


def eager_norm(x, norm, weight=None):
    """LayerNorm or RMSNorm of torch, in the dtype of x."""
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6) if norm == "layer" else F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return y if weight is None else y * weight.to(x.dtype)


def eager_residual(residual, branch, m):
    return residual + m.rows(m.gate).to(residual.dtype) * branch


def eager_modulated(r, m, norm, weight=None):
    shift, scale = (m.rows(offset).to(r.dtype) for offset in (m.shift, m.scale))
    return eager_norm(r, norm, weight) * (1 + scale) + shift


# batch, tokens, width: odd lengths, widths that are no power of two, the widths of nano, small and medium
CASES = [
    *[((4, 17, 96), norm, dtype) for norm in NORMS for dtype in DTYPES],
    ((1, 1, 64), "layer", torch.float32),
    ((2, 113, 320), "rms", torch.float16),
    ((1, 345, 1024), "layer", torch.float16),
    ((1, 41, 1536), "layer", torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "norm", "dtype"), CASES)
def test_adaln_is_no_worse_than_eager_torch_against_fp64(device, shape, norm, dtype):
    batch, tokens, width = shape
    draws = []
    for _ in range(-(-16 // (batch * tokens))):  # a single row has one mean and one spread, whose rounding is chance
        residual, branch = (strided(torch.randn(shape, device=device).to(dtype)) for _ in range(2))
        residual = residual + 3  # a mean that is not zero tells the two norms apart
        table = torch.randn(12, width, device=device)
        base = torch.randint(0, 7, (batch,), device=device, dtype=torch.int32)
        m = Modulation(table, base, gate=5, shift=0, scale=3)
        r, y = poisoned(*shape, dtype=dtype, device=device), poisoned(*shape, dtype=dtype, device=device)
        adaln(residual, branch, m, norm=Norm(norm), residual_out=r, out=y, backend="triton")
        wide = Modulation(table.double(), base, gate=5, shift=0, scale=3)
        draws.append(
            (
                r,
                eager_residual(residual, branch, m),
                eager_residual(residual.double(), branch.double(), wide),
                y,
                eager_modulated(r, m, norm),
                eager_modulated(r.double(), wide, norm),
            )
        )
    stacked = [torch.stack(several) for several in zip(*draws, strict=True)]
    assert_no_worse(*stacked[:3])
    assert_no_worse(*stacked[3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_adaln_multiplies_by_the_norm_weight(device, norm, dtype):
    x = torch.randn(2, 33, 192, device=device, dtype=dtype) - 1
    table, weight = torch.randn(6, 192, device=device, dtype=dtype), torch.rand(192, device=device, dtype=dtype)
    m, wide = Modulation(table, shift=1, scale=4), Modulation(table.double(), shift=1, scale=4)
    r, y = adaln(x, torch.zeros_like(x), m, norm=Norm(norm, weight=weight), backend="triton")
    assert torch.equal(r, x)
    truth = eager_modulated(x.double(), wide, norm, weight.double())
    assert_no_worse(y, eager_modulated(x, m, norm, weight), truth)


def test_adaln_without_modulation_adds_and_normalizes(device):
    residual, branch = torch.randn(2, 9, 64, device=device), torch.randn(2, 9, 64, device=device)
    r, y = adaln(residual, branch, backend="triton")
    torch.testing.assert_close(r, residual + branch)
    torch.testing.assert_close(y, F.layer_norm(residual + branch, (64,), eps=1e-6))


def test_adaln_updates_an_fp32_residual_in_place(device):
    residual, branch = torch.randn(1, 5, 64, device=device), torch.randn(1, 5, 64, device=device).half()
    table = torch.randn(3, 64, device=device).half()
    before = residual.clone()
    m = Modulation(table, gate=0, shift=1, scale=2)
    r, y = adaln(residual, branch, m, residual_out=residual, backend="triton")
    assert r is residual
    assert r.dtype == torch.float32
    assert y.dtype == torch.float16
    torch.testing.assert_close(r, before + table[0].float() * branch.float())


def test_adaln_fp8_output_is_the_rounded_fp32_output(device):
    x, table = torch.randn(1, 19, 128, device=device), torch.randn(2, 128, device=device)
    x[0, 0, :4] = torch.tensor([1e4, -1e4, 5e3, 0])
    m, zero = Modulation(table, shift=0, scale=1), torch.zeros_like(x)
    _, y = adaln(x, zero, m, backend="triton")
    scale = 0.01  # small enough that the tails saturate
    _, y8 = adaln(x, zero, m, out_dtype=torch.float8_e4m3fn, out_scale=scale, backend="triton")
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
    norm=st.sampled_from(NORMS),
    gated=st.booleans(),
)
def test_adaln_equals_its_reference_for_any_shape(batch, tokens, width, norm, gated):
    if not runtime.interpreting:
        pytest.skip("random shapes would compile one kernel each")
    x, branch, table = torch.randn(batch, tokens, width), torch.randn(batch, tokens, width), torch.randn(5, width)
    m = Modulation(table, torch.zeros(batch, dtype=torch.int32), gate=4 if gated else None, shift=0, scale=2)
    ours = adaln(x, branch, m, norm=Norm(norm), backend="triton")
    torch.testing.assert_close(ours, adaln_reference(x, branch, m, norm=Norm(norm)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.randn(2, 8)}, "residual has 2 dimensions, expected 3"),
        ({"residual": torch.randn(1, 0, 8)}, "residual is empty"),
        ({"residual": torch.randn(1, 4, 8, dtype=torch.float64)}, "dtype float64"),
        ({"residual": torch.randn(1, 8, 4).transpose(1, 2)}, "not contiguous"),
        ({"branch": torch.randn(1, 3, 8)}, "branch has shape (1, 3, 8), expected (1, 4, 8)"),
        ({"table": torch.randn(6, 4)}, "table has width 4, the rows it modulates have 8"),
        ({"scale": 6}, "must lie in 0..5"),
        ({"scale": None}, "shift and scale go together"),
        ({"base": torch.zeros(1)}, "base has dtype float32"),
        ({"base": torch.zeros(2, dtype=torch.int32)}, "base has shape (2,), expected (1,)"),
        ({"norm": "batch"}, "use 'layer' or 'rms'"),
        ({"weight": torch.randn(4)}, "weight has shape (4,), expected (8,)"),
        ({"out_dtype": torch.int8}, "out_dtype"),
        ({"out_scale": 0.0}, "must be positive"),
        ({"backend": "cuda"}, "use 'auto', 'triton' or 'torch'"),
    ],
)
def test_adaln_rejects_bad_input(change, message):
    arguments = {"residual": torch.randn(1, 4, 8), "branch": torch.randn(1, 4, 8), "table": torch.randn(6, 8)}
    arguments |= {"shift": 0, "scale": 1, "norm": "layer"} | change
    rows = {name: arguments.pop(name, None) for name in ("table", "base", "gate", "shift", "scale")}
    norm = Norm(arguments.pop("norm"), weight=arguments.pop("weight", None))
    with pytest.raises(InvalidInputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        adaln(**arguments, modulation=Modulation(**rows), norm=norm)
