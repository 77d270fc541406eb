"""attention: the Triton kernel and its backends, with key lengths and windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from presto_rt.errors import BackendUnavailableError, InvalidInputError, MissingDependencyError
from presto_rt.kernels import attention as op
from presto_rt.kernels.attention import AttentionMask, attention, attention_reference
from tests.support.kernels import assert_no_worse, poisoned

# batch, heads, queries, keys, head dim; key lengths; window
CASES = [
    ((1, 1, 1, 1, 64), None, None, torch.float32),
    ((2, 2, 17, 17, 64), (17, 5), None, torch.float32),
    ((2, 2, 113, 113, 64), (113, 1), None, torch.float16),
    ((1, 2, 113, 113, 96), None, 9, torch.float16),
    ((1, 1, 129, 65, 128), None, None, torch.bfloat16),
    ((4, 1, 40, 70, 32), (70, 64, 3, 65), None, torch.bfloat16),
    ((1, 1, 345, 345, 128), None, 33, torch.float32),
    ((1, 2, 689, 689, 64), None, None, torch.float16),
]


def tensors(shape, dtype, device):
    """Return q, k, v with the strides of the network: q and k contiguous, v a view of packed QKV."""
    batch, heads, tokens, keys, dim = shape
    q = torch.randn(batch, heads, tokens, dim, device=device).to(dtype) * 2
    k = torch.randn(batch, heads, keys, dim, device=device).to(dtype)
    v = torch.randn(batch, keys, 3, heads, dim, device=device).to(dtype)[:, :, 2].transpose(1, 2)
    return q, k, v


@pytest.mark.parametrize(("shape", "lengths", "window", "dtype"), CASES)
def test_attention_is_no_worse_than_sdpa_against_fp64(device, shape, lengths, window, dtype):
    q, k, v = tensors(shape, dtype, device)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    out = poisoned(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=dtype, device=device).transpose(1, 2)
    attention(q, k, v, key_lengths=lengths, window=window, out=out, backend="triton")
    mask = AttentionMask(lengths, window).dense(q.shape[2], k.shape[2], q.device)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    eager = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_no_worse(out, eager, truth)


def test_attention_does_not_overflow_on_large_scores(device):
    q, k, v = tensors((1, 1, 20, 40, 64), torch.float16, device)
    q, k = q * 40, k * 40
    truth = attention_reference(q.double(), k.double(), v.double())
    assert_no_worse(attention(q, k, v, backend="triton"), attention_reference(q, k, v), truth)


@pytest.mark.parametrize("backend", ["triton", "torch", "sdpa"])
def test_attention_is_zero_in_rows_without_visible_keys(device, backend):
    q, k, v = tensors((2, 1, 40, 40, 64), torch.float32, device)
    lengths = torch.tensor([0, 3], dtype=torch.int32, device=device)
    out = attention(q, k, v, key_lengths=lengths, window=4, backend=backend)
    assert torch.isfinite(out).all()
    assert (out[0] == 0).all()
    assert (out[1, :, 7:] == 0).all()
    assert (out[1, :, :7] != 0).any()


@pytest.mark.parametrize("backend", ["sdpa", "torch"])
def test_attention_backends_agree(device, backend):
    q, k, v = tensors((2, 2, 21, 21, 64), torch.float32, device)
    lengths = torch.tensor([21, 9], dtype=torch.int32, device=device)
    arguments = {"key_lengths": lengths, "window": 6, "scale": 0.3}
    ours = attention(q, k, v, backend="triton", **arguments)
    torch.testing.assert_close(ours, attention(q, k, v, backend=backend, **arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_attention_auto_measures_a_shape_once():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    q, k, v = tensors((1, 4, 256, 256, 64), torch.bfloat16, "cuda")
    before = set(op.selector.selected)
    first = attention(q, k, v)
    (key,) = set(op.selector.selected) - before
    assert op.selector.selected[key] in op.MEASURED
    assert torch.equal(first, attention(q, k, v, backend=op.selector.selected[key]))


@settings(max_examples=12, deadline=None)
@given(data=st.data(), batch=st.integers(1, 2), tokens=st.integers(1, 80), dim=st.sampled_from([16, 48, 64]))
def test_attention_equals_its_reference_for_any_mask(data, batch, tokens, dim):
    if not op.runtime.interpreting:
        pytest.skip("random shapes would compile one kernel each")
    window = data.draw(st.none() | st.integers(0, 90), "window")
    keys = tokens if window is not None else data.draw(st.integers(1, 80), "keys")
    lengths = data.draw(st.none() | st.lists(st.integers(0, keys + 5), min_size=batch, max_size=batch), "lengths")
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    q, k, v = tensors((batch, 1, tokens, keys, dim), torch.float32, "cpu")
    ours = attention(q, k, v, key_lengths=lengths, window=window, backend="triton")
    torch.testing.assert_close(
        ours, attention_reference(q, k, v, key_lengths=lengths, window=window), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 2, 4, 40)}, "head dim 40 is not supported"),
        ({"q": torch.randn(1, 2, 4, 256)}, "head dim 256 is not supported"),
        ({"q": torch.randn(2, 4, 64)}, "q has 3 dimensions"),
        ({"q": torch.randn(1, 2, 0, 64)}, "q is empty"),
        ({"q": torch.randn(1, 2, 64, 4).transpose(2, 3)}, "not contiguous"),
        ({"k": torch.randn(1, 3, 4, 64)}, "k has shape"),
        ({"v": torch.randn(1, 2, 5, 64)}, "v has shape"),
        ({"k": torch.randn(1, 2, 4, 64).half()}, "make them one"),
        ({"key_lengths": torch.zeros(1)}, "key_lengths has dtype float32"),
        ({"key_lengths": torch.zeros(3, dtype=torch.int32)}, "key_lengths has shape"),
        ({"window": -1}, "must be 0 or more"),
        ({"window": 2, "k": torch.randn(1, 2, 6, 64), "v": torch.randn(1, 2, 6, 64)}, "as many keys as queries"),
        ({"out": torch.empty(1, 2, 4, 32)}, "out has shape"),
        ({"backend": "xformers"}, "use 'auto' or one of triton, sdpa"),
    ],
)
def test_attention_rejects_bad_input(change, message):
    with pytest.raises(InvalidInputError, match=message):
        attention(**({name: torch.randn(1, 2, 4, 64) for name in "qkv"} | change))


def test_attention_rejects_named_backends_that_are_unavailable():
    q, k, v = tensors((1, 1, 4, 4, 64), torch.float32, "cpu")
    with pytest.raises(BackendUnavailableError, match="takes no mask"):
        attention(q, k, v, window=1, backend="sdpa-flash")
    if not torch.cuda.is_available():
        with pytest.raises(MissingDependencyError, match="pip install flash-attn"):
            attention(q, k, v, backend="flash-attn")
