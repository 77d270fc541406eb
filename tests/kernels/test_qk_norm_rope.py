"""qk_norm_rope: normalized and rotated queries and keys from packed QKV."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from presto_rt.errors import InvalidInputError
from presto_rt.kernels import runtime
from presto_rt.kernels.qk_norm_rope import NORMS, PAIRS, QKNorm, Rotary, qk_norm_rope, qk_norm_rope_reference
from tests.support.kernels import assert_no_worse, poisoned, rotary_table, strided


def eager(qkv, heads, angles, norm, pairs, weights):
    """q and k by eager torch in the dtype of qkv, with the rotation by complex numbers."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    results = []
    parts = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    for part, weight in zip(parts[:2], weights, strict=True):
        dim, half = part.shape[-1], angles.shape[-1]
        if norm == "rms":
            part = F.rms_norm(part, (dim,), weight.to(qkv.dtype), eps=1e-6)
        elif norm == "layer":
            part = F.layer_norm(part, (dim,), weight.to(qkv.dtype), eps=1e-6)
        else:
            part = part * weight.to(qkv.dtype)
        turn = torch.polar(torch.ones_like(angles), angles).to(
            torch.complex128 if wide == torch.float64 else torch.complex64
        )
        rotary = part[..., : 2 * half].to(wide)
        rotary = (
            rotary.unflatten(-1, (2, half)).transpose(-1, -2) if pairs == "halves" else rotary.unflatten(-1, (half, 2))
        )
        rotary = torch.view_as_real(torch.view_as_complex(rotary.contiguous()) * turn)
        rotary = rotary.transpose(-1, -2).flatten(-2) if pairs == "halves" else rotary.flatten(-2)
        results.append(torch.cat([rotary.to(qkv.dtype), part[..., 2 * half :]], -1))
    return results


# batch, tokens, heads, head dim, rotary dims
CASES = [
    ((2, 17, 3, 64, 64), "rms", "halves", torch.float32),
    ((2, 17, 3, 64, 64), "rms", "halves", torch.float16),
    ((2, 17, 3, 64, 64), "rms", "halves", torch.bfloat16),
    ((1, 113, 2, 96, 96), "layer", "interleaved", torch.float32),
    ((1, 113, 2, 96, 48), "layer", "halves", torch.float16),
    ((4, 1, 1, 128, 32), "none", "interleaved", torch.bfloat16),
    ((1, 345, 2, 128, 128), "rms", "interleaved", torch.float16),
    ((1, 689, 5, 64, 64), "rms", "halves", torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "kind", "pairs", "dtype"), CASES)
def test_qk_norm_rope_is_no_worse_than_eager_torch_against_fp64(device, shape, kind, pairs, dtype):
    batch, tokens, heads, dim, rotary_dims = shape
    qkv = strided(torch.randn(batch, tokens, 3 * heads * dim, device=device).to(dtype) + 0.5)
    weights = [torch.rand(dim, device=device) + 0.5 for _ in range(2)]
    rotary = Rotary(*rotary_table(tokens, rotary_dims, device), pairs)
    q, k = (poisoned(batch, heads, tokens, dim, dtype=dtype, device=device) for _ in range(2))
    norm = QKNorm(kind, 1e-6, *weights)
    _, _, v = qk_norm_rope(qkv, heads, rotary, norm=norm, q_out=q, k_out=k, backend="triton")
    frequencies = 10_000.0 ** (-torch.arange(0, rotary_dims, 2, dtype=torch.float64, device=device) / rotary_dims)
    angles = torch.arange(tokens, dtype=torch.float64, device=device)[:, None] * frequencies
    truths = eager(qkv.double(), heads, angles, kind, pairs, weights)
    eagers = eager(qkv, heads, angles, kind, pairs, weights)
    for ours, theirs, truth in zip((q, k), eagers, truths, strict=True):
        assert_no_worse(ours, theirs, truth)
    assert torch.equal(v, qkv.unflatten(-1, (3, heads, dim))[:, :, 2].transpose(1, 2))
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 3),
    half=st.integers(1, 20),
    rest=st.integers(0, 20),
    kind=st.sampled_from(NORMS),
    pairs=st.sampled_from(PAIRS),
)
def test_qk_norm_rope_equals_its_reference_for_any_shape(batch, tokens, heads, half, rest, kind, pairs):
    if not runtime.interpreting:
        pytest.skip("random shapes would compile one kernel each")
    dim = 2 * half + rest
    qkv = torch.randn(batch, tokens, 3 * heads * dim)
    rotary, norm = Rotary(*rotary_table(tokens, 2 * half), pairs), QKNorm(kind, 1e-3, torch.rand(dim))
    ours = qk_norm_rope(qkv, heads, rotary, norm=norm, backend="triton")
    torch.testing.assert_close(ours, qk_norm_rope_reference(qkv, heads, rotary, norm=norm), rtol=1e-5, atol=2e-5)


COS, SIN = rotary_table(4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "do not divide"),
        ({"qkv": torch.randn(1, 4, 96, dtype=torch.float64)}, "dtype float64"),
        ({"qkv": torch.randn(1, 96, 4).transpose(1, 2)}, "not contiguous"),
        ({"qkv": torch.randn(1, 0, 96)}, "qkv is empty"),
        ({"rotary": Rotary(torch.randn(4, 9), SIN)}, "cos rotates 18 dims, a head has 16"),
        ({"rotary": Rotary(torch.randn(3, 8), SIN)}, "cos has shape .3, 8., expected .4, 8."),
        ({"rotary": Rotary(COS, torch.randn(4, 8).half())}, "sin has dtype float16"),
        ({"rotary": Rotary(COS, SIN, "thirds")}, "use 'halves' or 'interleaved'"),
        ({"norm": QKNorm("batch")}, "use 'rms', 'layer' or 'none'"),
        ({"norm": QKNorm(q_weight=torch.randn(8))}, "q_weight has shape"),
        ({"q_out": torch.empty(1, 4, 2, 16)}, "q_out has shape"),
    ],
)
def test_qk_norm_rope_rejects_bad_input(change, message):
    with pytest.raises(InvalidInputError, match=message):
        qk_norm_rope(**({"qkv": torch.randn(1, 4, 96), "heads": 2, "rotary": Rotary(COS, SIN)} | change))
