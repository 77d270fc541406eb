"""The C++ operators of the CPU engine against the torch table, with every instruction set of this processor in turn.

The measure is fp64: an operator's error may be twice that of torch in the same dtype, plus a rounding of its largest
value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from presto_rt import native
from presto_rt.models.dit import rotary_table
from presto_rt.models.spectral import SpectralFrames
from presto_rt.runtime.cpu.ops import GELU_TANH, SILU, SWIGLU, CpuOps, pack
from presto_rt.runtime.cpu.threads import openmp, thread_limit
from presto_rt.runtime.eager.ops import ReferenceOps

if native.lib is None:
    pytest.skip(f"no C++ operators: {native.why}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=native.lib.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test runs once with each instruction set, on the same numbers every time."""
    torch.manual_seed(0)
    before = native.lib.isa()
    native.lib.use_isa(request.param)
    yield request.param
    native.lib.use_isa(before)


def unaligned(x: Tensor) -> Tensor:
    """The same numbers at an address that is a multiple of the element's size and of nothing more."""
    base = torch.empty(x.numel() + 17, dtype=x.dtype)
    start = next(i for i in range(1, 17) if (base.data_ptr() // x.element_size() + i) % 2)
    return base[start : start + x.numel()].view(x.shape).copy_(x)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return unaligned(torch.full(shape, float("nan"), dtype=dtype))


def close(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """got is at most twice as far from fp64 as plain torch is: in the mean square, with one unit of rounding to spare,
    and in every element, with four: the largest of a few rounding errors is luck, for torch as for us.
    """
    unit = UNIT[got.dtype] * float(exact.abs().max())
    ours, torchs = (x.double() - exact for x in (got, plain))
    assert ours.square().mean().sqrt() <= 2 * torchs.square().mean().sqrt() + unit
    assert ours.abs().max() <= 2 * torchs.abs().max() + 4 * unit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 1), (2, 5, 7), (1, 33, 72), (2, 9, 384), (1, 3, 1030)])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_residual_norm_modulate(dtype: torch.dtype, batch: int, tokens: int, width: int, modulated: bool,
                                threads: int) -> None:  # fmt: skip
    source, branch = torch.randn(batch, tokens, width) * 3 + 1, torch.randn(batch, tokens, width).to(dtype)
    rows = torch.randn(batch, 9, width)
    gate, shift, scale = (2, 4, 5) if modulated else (None, None, None)

    def run(ops: Any, wide: torch.dtype, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
        residual, out = (poisoned(batch, tokens, width, dtype=kind) for kind in (wide, narrow))
        inputs = unaligned(source.to(wide)), unaligned(branch.to(narrow)), unaligned(rows.to(wide))
        ops.adaln(*inputs, gate, shift, scale, residual, out)
        return residual, out

    got = run(CpuOps(dtype, threads), torch.float32, dtype)
    plain, exact = run(ReferenceOps(dtype), torch.float32, dtype), exactly(source, branch, rows, gate, shift, scale)
    for a, b, c in zip(got, plain, exact, strict=True):
        close(a, b, c)


def exactly(source: Tensor, branch: Tensor, rows: Tensor, gate: int | None, shift: int | None,
            scale: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual and its norm in fp64, the residual rounded to fp32 in between."""
    rows = rows.double()
    r = source.double() + (1.0 if gate is None else rows[:, gate, None]) * branch.double()
    y = F.layer_norm(r, r.shape[-1:], eps=1e-6)
    if scale is not None and shift is not None:
        y = y * (1 + rows[:, scale, None]) + rows[:, shift, None]
    return r, y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (5, 3, 24), (37, 6, 64), (9, 2, 128), (7, 2, 34)])
def test_qk_norm_rope(dtype: torch.dtype, tokens: int, heads: int, dim: int) -> None:
    qkv = torch.randn(2, tokens, 3 * heads * dim).to(dtype)
    weights, angles = (torch.rand(dim) + 0.5, torch.rand(dim) + 0.5), rotary_table(tokens, dim)
    results = []
    for ops in (CpuOps(dtype, 3), ReferenceOps(dtype)):
        q, k = (poisoned(2, heads, tokens, dim, dtype=dtype) for _ in range(2))
        v = ops.qk_norm_rope(unaligned(qkv), angles, weights, q, k)
        assert torch.equal(v, qkv.unflatten(-1, (3, heads, dim))[:, :, 2].transpose(1, 2))
        results.append((q, k))
    parts = qkv.double().unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    cos, sin = (a.double() for a in angles)
    for got, plain, part, weight in zip(*results, parts[:2], weights, strict=True):
        n = F.rms_norm(part, (dim,), weight.double(), 1e-6)
        a, b = n.chunk(2, -1)
        close(got, plain, torch.cat([a * cos - b * sin, b * cos + a * sin], -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "keys", "heads", "dim"),
    [
        (1, 1, 1, 2),
        (6, 7, 2, 24),
        (50, 50, 3, 64),
        (97, 131, 1, 128),
        (13, 64, 2, 34),
        (49, 20, 6, 64),
        (33, 32, 1, 96),
    ],
)
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_attention(dtype: torch.dtype, tokens: int, keys: int, heads: int, dim: int, threads: int) -> None:
    q, k, v = (torch.randn(2, heads, n, dim).to(dtype) for n in (tokens, keys, keys))
    ops = CpuOps(dtype, threads)
    scratch = torch.full((ops.scratch_bytes(2, heads, keys, dim),), 0xFF, dtype=torch.uint8)
    got = ops.attention(
        unaligned(q), unaligned(k), unaligned(v), scratch, poisoned(2, tokens, heads * dim, dtype=dtype)
    )
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2).flatten(2)
    close(got, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_attention_with_lengths_and_norm(dtype: torch.dtype) -> None:
    tokens, keys, heads, dim = 31, 22, 3, 64
    q, weight = torch.randn(3, tokens, heads * dim).to(dtype), torch.rand(dim) + 0.5
    k, v = (torch.randn(3, heads, keys, dim).to(dtype) for _ in range(2))
    lengths = torch.tensor([22, 5, 1], dtype=torch.int32)
    ops = CpuOps(dtype, 2)
    scratch = torch.full((ops.scratch_bytes(3, heads, keys, dim),), 0xFF, dtype=torch.uint8)
    out = poisoned(3, tokens, heads * dim, dtype=dtype)
    got = ops.cross_attention(q, k, v, weight, lengths, scratch, out)
    plain = ReferenceOps(dtype).cross_attention(q, k, v, weight, lengths, None, torch.empty_like(q))
    exact = ReferenceOps(torch.float64).cross_attention(
        q.double(), k.double(), v.double(), weight, lengths, None, torch.empty(q.shape, dtype=torch.float64)
    )
    close(got, plain, exact)
    unseen = k.clone()
    unseen[1, :, 5:] = float("nan")
    assert torch.equal(ops.cross_attention(q, unseen, v, weight, lengths, scratch, torch.empty_like(q)), got)


ACTIVATIONS: list[tuple[int, Callable[[Tensor], Tensor]]] = [
    (GELU_TANH, lambda x: F.gelu(x, approximate="tanh")),
    (SILU, F.silu),
    (SWIGLU, lambda x: x.chunk(2, -1)[0] * F.silu(x.chunk(2, -1)[1])),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "formula"), ACTIVATIONS, ids=["gelu_tanh", "silu", "swiglu"])
@pytest.mark.parametrize("columns", [1, 7, 64, 1537])
def test_activation(dtype: torch.dtype, kind: int, formula: Callable[[Tensor], Tensor], columns: int) -> None:
    x = (torch.randn(5, columns * (2 if kind == SWIGLU else 1)) * 4).to(dtype)
    got = CpuOps(dtype, 2).activation(unaligned(x), kind, poisoned(5, columns, dtype=dtype))
    close(got, formula(x), formula(x.double()))
    if kind != SWIGLU:
        place = unaligned(x)
        assert torch.equal(CpuOps(dtype, 1).activation(place, kind, place), got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_infinities_and_nan_come_through(dtype: torch.dtype) -> None:
    ops, nan, inf = CpuOps(dtype, 1), float("nan"), float("inf")
    tiny = torch.tensor([1e-39, -1e-39, 0.0, -0.0], dtype=dtype)
    assert torch.equal(ops.activation(tiny, SILU, torch.empty_like(tiny)[None][0]), F.silu(tiny))
    wild = torch.tensor([nan, inf, 300.0, -300.0, 1.0], dtype=dtype)
    for kind, formula in ACTIVATIONS[:2]:
        got = ops.activation(wild, kind, torch.empty_like(wild))
        assert got[0].isnan()
        assert torch.equal(got[1:4], formula(wild)[1:4])
    source, out = torch.zeros(1, 3, 40), torch.empty(1, 3, 40, dtype=dtype)
    source[0, 1, 5] = nan
    residual = torch.empty_like(source)
    ops.adaln(source, torch.ones(1, 3, 40, dtype=dtype), torch.zeros(1, 1, 40), None, None, None,
                               residual, out)  # fmt: skip
    assert out[0, 1].isnan().all()
    assert torch.equal(out[0, 0], torch.zeros(40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wild", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [8, 37])
def test_what_is_not_finite_comes_through_attention(dtype: torch.dtype, wild: float, tokens: int) -> None:
    ops = CpuOps(dtype, 1)
    scratch = torch.empty(ops.scratch_bytes(1, 1, tokens, 16), dtype=torch.uint8)
    base = torch.rand(1, 1, tokens, 16).to(dtype) + 0.1  # one sign: an infinite key is one for all queries
    spoilt = base.clone()
    spoilt[0, 0, 3, 2] = wild
    for which in range(3):
        q, k, v = (spoilt if i == which else base for i in range(3))
        got = ops.attention(q, k, v, scratch, torch.empty(1, tokens, 16, dtype=dtype))
        want = (q.double() @ k.double().mT / 4).softmax(-1) @ v.double()
        assert torch.equal(got.isnan(), want[0].isnan())
        assert torch.equal(got.isinf(), want[0].isinf())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 63, 4099])
def test_sampler_step_is_exact_in_the_order_written(dtype: torch.dtype, count: int) -> None:
    x, history, noise = (torch.randn(2, count, 1) for _ in range(3))
    conditional, unconditional = (torch.randn(2, count, 1).to(dtype) for _ in range(2))
    update = torch.randn(9)
    for other, fresh, copies in ((unconditional, noise, 2), (None, None, 1), (unconditional, None, 0)):
        results = []
        for ops in (CpuOps(dtype, 2), ReferenceOps(dtype)):
            state = [t.clone() for t in (x, history, torch.zeros(4, count, 1, dtype=dtype))]
            ops.sampler_step(*state[:2], conditional, other, fresh, update, copies, state[2])
            results.append(state)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_products_are_products(dtype: torch.dtype) -> None:
    x, w, b = torch.randn(3, 29, 72).to(dtype), torch.randn(50, 72).to(dtype), torch.randn(50).to(dtype)
    close(pack(w, b, dtype)(x), F.linear(x, w, b), F.linear(x.double(), w.double(), b.double()))
    close(pack(w, None, dtype)(x), F.linear(x, w), F.linear(x.double(), w.double()))


def test_addresses_are_given_away_only_for_tensors_that_fit() -> None:
    ops = CpuOps(torch.float32, 1)
    x, good = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    for bad in (good.double(), torch.zeros(1, 4, 7), torch.zeros(1, 8, 4).transpose(1, 2)):
        with pytest.raises(ValueError, match="contiguous"):
            ops.adaln(x, bad, torch.zeros(1, 3, 8), 0, 1, 2, good, good.clone())
    with pytest.raises(ValueError, match="table"):
        ops.adaln(x, good, torch.zeros(1, 3, 7), 0, 1, 2, good, good.clone())
    with pytest.raises(ValueError, match="row 3"):
        ops.adaln(x, good, torch.zeros(1, 3, 8), 0, 1, 3, good, good.clone())
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="scratch"):
        ops.attention(q, q, q, torch.empty(10, dtype=torch.uint8), torch.zeros(1, 4, 16))


# ---- the codec's spectra to samples


@functools.cache
def synthesised(count: int, iterations: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """21 clips: features, gain, and the twin's answers in float64 and float32; the same for all instruction sets."""
    frames, out = SpectralFrames(2500.0), []
    generator = torch.Generator().manual_seed(count * 10 + iterations)
    for _ in range(21):
        features = torch.randn(2, count, 3, frames.bands, generator=generator) * 1.5 - 3
        features[:, :, 2] = torch.rand(2, count, frames.bands, generator=generator) * 2 - 1
        gain = torch.randn(frames.bands, generator=generator) * 0.1
        exact = frames.synthesize_torch(features.double(), iterations, gain.double())
        out.append((features, gain, exact, frames.synthesize_torch(features, iterations, gain)))
    return out


@pytest.mark.parametrize("count", [1, 2, 5, 24])
@pytest.mark.parametrize("iterations", [0, 1, 2, 4])
@pytest.mark.parametrize("threads", [1, 2])
def test_synthesis_equals_its_twin(count: int, iterations: int, threads: int) -> None:
    """Against the twin in float64, at most twice the float32 twin's error: in the median of 21 clips, for a bin
    between two peaks that tie, or one of almost no energy, may turn its phase round for a rounding error in either.
    """
    frames, errors = SpectralFrames(2500.0), []
    for features, gain, exact, plain in synthesised(count, iterations):
        with thread_limit(threads):
            got = frames.synthesize(features, iterations, gain)
        assert got.shape == (2, 2, 512 * count)
        errors.append((relative(got, exact), relative(plain, exact)))
    ours, torchs = torch.tensor(errors).median(0).values
    assert ours <= 2 * torchs + 1e-6


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def test_synthesis_checks_its_tables() -> None:
    frames, out = SpectralFrames(2500.0), np.zeros((1, 2, 1024), np.float32)
    features = np.zeros((1, 2, 3, frames.bands), np.float32)
    gain, below, fraction = np.ones(1088, np.float32), np.zeros(1088, np.int32), np.zeros(1088, np.float32)
    rest = (0, 0.99, 1e-9, 1)
    native.lib.spectral(features, gain, below, fraction, out, *rest)
    jump = below.copy()
    jump[500:] = 2
    beyond = np.minimum(np.arange(1088), frames.bands - 1).astype(np.int32)
    for arguments in (
        (features[0], gain, below, fraction, out),
        (features, gain[:-1].copy(), below, fraction, out),
        (features, gain, jump, fraction, out),
        (features, gain, beyond, fraction, out),
        (features, gain, below, fraction, out[:, :, :-1].copy()),
    ):
        with pytest.raises(ValueError, match="spectral"):
            native.lib.spectral(*arguments, *rest)


def test_threads_belong_to_the_caller() -> None:
    before = torch.get_num_threads()
    with thread_limit(3):
        assert torch.get_num_threads() == (before if openmp() is None else 3)
    assert torch.get_num_threads() == before


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="base, avx2, avx512 and amx"):
        native.lib.use_isa("avx1024")
    assert native.lib.isas()[0] == "base"
