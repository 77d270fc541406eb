"""cross_attention: normalized queries over a prompt's held keys and values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from presto_rt.errors import InvalidInputError
from presto_rt.kernels import cross_attention as op
from presto_rt.kernels.cross_attention import cross_attention, cross_attention_reference
from tests.support.kernels import assert_no_worse, poisoned, strided


def eager(q, k, v, q_weight, lengths):
    """Norm and attention by eager torch, in the dtype of q."""
    heads, dim = k.shape[1], k.shape[3]
    queries = q.unflatten(-1, (heads, dim)).transpose(1, 2)
    if q_weight is not None:
        queries = F.rms_norm(queries, (dim,), q_weight.to(q.dtype), eps=1e-6)
    mask = None if lengths is None else (torch.arange(k.shape[2], device=q.device) < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(queries, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


# batch, tokens, heads, head dim, keys; key lengths
CASES = [
    ((1, 1, 1, 64, 1), None, torch.float32),
    ((3, 17, 2, 64, 77), (77, 1, 40), torch.float32),
    ((2, 113, 2, 64, 96), (12, 96), torch.float16),
    ((1, 70, 2, 96, 33), None, torch.bfloat16),
    ((1, 345, 1, 128, 256), (200,), torch.float16),
    ((1, 689, 2, 64, 64), (9,), torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "lengths", "dtype"), CASES)
@pytest.mark.parametrize("normed", [True, False])
def test_cross_attention_is_no_worse_than_eager_torch_against_fp64(device, shape, lengths, dtype, normed):
    batch, tokens, heads, dim, keys = shape
    q = strided(torch.randn(batch, tokens, heads * dim, device=device).to(dtype))
    k, v = torch.randn(2, batch, keys, heads, dim, device=device).to(dtype).transpose(2, 3)
    weight = torch.rand(dim, device=device) + 0.5 if normed else None
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    out = poisoned(*q.shape, dtype=dtype, device=device)
    cross_attention(q, k, v, q_weight=weight, key_lengths=lengths, out=out, backend="triton")
    truth = eager(q.double(), k.double(), v.double(), None if weight is None else weight.double(), lengths)
    assert_no_worse(out, eager(q, k, v, weight, lengths), truth)


def test_cross_attention_is_zero_without_visible_keys(device):
    q, kv = torch.randn(2, 5, 64, device=device), torch.randn(2, 2, 1, 9, 64, device=device)
    lengths = torch.tensor([0, 9], dtype=torch.int32, device=device)
    for backend in ("triton", "torch"):
        out = cross_attention(q, *kv, key_lengths=lengths, backend=backend)
        assert (out[0] == 0).all()
        assert torch.isfinite(out[1]).all()
        assert (out[1] != 0).all()


@settings(max_examples=10, deadline=None)
@given(
    data=st.data(),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 50),
    keys=st.integers(1, 100),
    heads=st.integers(1, 2),
)
def test_cross_attention_equals_its_reference_for_any_shape(data, batch, tokens, keys, heads):
    if not op.runtime.interpreting:
        pytest.skip("random shapes would compile one kernel each")
    lengths = torch.tensor(
        data.draw(st.lists(st.integers(0, keys + 2), min_size=batch, max_size=batch)), dtype=torch.int32
    )
    q, kv = torch.randn(batch, tokens, heads * 48), torch.randn(2, batch, heads, keys, 48)
    ours = cross_attention(q, *kv, key_lengths=lengths, backend="triton")
    torch.testing.assert_close(ours, cross_attention_reference(q, *kv, key_lengths=lengths), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 4, 100)}, "q has width 100, the keys have 2 heads of 64"),
        ({"q": torch.randn(1, 0, 128)}, "q is empty"),
        ({"q": torch.randn(1, 4, 128).half()}, "k has dtype float32; use one of float16"),
        ({"k": torch.randn(1, 2, 300, 64)}, "300 keys are over 256"),
        ({"k": torch.randn(1, 2, 9, 40)}, "head dim 40 is not supported"),
        ({"v": torch.randn(1, 2, 8, 64)}, "v has shape"),
        ({"q_weight": torch.ones(32)}, "q_weight has shape"),
        ({"key_lengths": torch.zeros(2, dtype=torch.int32)}, "key_lengths has shape"),
        ({"out": torch.empty(1, 4, 128).half()}, "out has dtype float16"),
    ],
)
def test_cross_attention_rejects_bad_input(change, message):
    arguments = {"q": torch.randn(1, 4, 128), "k": torch.randn(1, 2, 9, 64), "v": torch.randn(1, 2, 9, 64)}
    with pytest.raises(InvalidInputError, match=message):
        cross_attention(**(arguments | change))
