"""The C++ operators of the CPU backend against the torch operators, with every instruction set of this processor.

The measure is fp64: an operator's error may be twice that of torch in the same dtype, plus a rounding of its largest
value.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from presto_rt import native
from presto_rt.models.rotary import rotary_angles
from presto_rt.models.spectral import SpectralFrames
from presto_rt.runtime.cpu.ops import CpuOps
from presto_rt.runtime.cpu.products import pack_linear
from presto_rt.runtime.cpu.threads import openmp, thread_limit
from presto_rt.runtime.eager.ops import ReferenceOps
from presto_rt.runtime.ops import Modulation, SamplerBuffers
from presto_rt.runtime.plan import PlannedCall

if native.lib is None:
    pytest.skip(f"no C++ operators: {native.why}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=native.lib.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run each test once with each instruction set, on the same numbers every time."""
    torch.manual_seed(0)
    before = native.lib.isa()
    native.lib.use_isa(request.param)
    yield request.param
    native.lib.use_isa(before)


def unaligned(x: Tensor) -> Tensor:
    """Copy a tensor to an address that is an odd multiple of the element's size."""
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
def test_adaln_is_near_fp64(
    dtype: torch.dtype, batch: int, tokens: int, width: int, modulated: bool, threads: int
) -> None:
    source, branch = torch.randn(batch, tokens, width) * 3 + 1, torch.randn(batch, tokens, width).to(dtype)
    rows = torch.randn(batch, 9, width)
    gate, shift, scale = (2, 4, 5) if modulated else (None, None, None)

    def run(ops: Any, wide: torch.dtype, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
        residual, out = (poisoned(batch, tokens, width, dtype=kind) for kind in (wide, narrow))
        modulation = Modulation(unaligned(rows.to(wide)), gate, shift, scale)
        ops.adaln(unaligned(source.to(wide)), unaligned(branch.to(narrow)), modulation, residual, out, EPS)
        return residual, out

    got = run(CpuOps(dtype, threads), torch.float32, dtype)
    plain, exact = run(ReferenceOps(dtype), torch.float32, dtype), exactly(source, branch, rows, gate, shift, scale)
    for a, b, c in zip(got, plain, exact, strict=True):
        close(a, b, c)


def exactly(
    source: Tensor, branch: Tensor, rows: Tensor, gate: int | None, shift: int | None, scale: int | None
) -> tuple[Tensor, Tensor]:
    """The residual and its norm in fp64, the residual rounded to fp32 in between."""
    rows = rows.double()
    r = source.double() + (1.0 if gate is None else rows[:, gate, None]) * branch.double()
    y = F.layer_norm(r, r.shape[-1:], eps=1e-6)
    if scale is not None and shift is not None:
        y = y * (1 + rows[:, scale, None]) + rows[:, shift, None]
    return r, y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (5, 3, 24), (37, 6, 64), (9, 2, 128), (7, 2, 34)])
def test_qk_norm_rope_is_near_fp64(dtype: torch.dtype, tokens: int, heads: int, dim: int) -> None:
    qkv = torch.randn(2, tokens, 3 * heads * dim).to(dtype)
    weights, angles = (torch.rand(dim) + 0.5, torch.rand(dim) + 0.5), rotary_angles(tokens, dim)
    results = []
    for ops in (CpuOps(dtype, 3), ReferenceOps(dtype)):
        q, k = (poisoned(2, heads, tokens, dim, dtype=dtype) for _ in range(2))
        v = ops.qk_norm_rope(unaligned(qkv), angles, weights, q, k, EPS)
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
def test_attention_is_near_fp64(dtype: torch.dtype, tokens: int, keys: int, heads: int, dim: int, threads: int) -> None:
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
def test_cross_attention_with_lengths_and_norm_is_near_fp64(dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_adaln_propagates_nan_within_its_row(dtype: torch.dtype) -> None:
    ops, nan = CpuOps(dtype, 1), float("nan")
    source, out = torch.zeros(1, 3, 40), torch.empty(1, 3, 40, dtype=dtype)
    source[0, 1, 5] = nan
    residual = torch.empty_like(source)
    ops.adaln(source, torch.ones(1, 3, 40, dtype=dtype), Modulation(torch.zeros(1, 1, 40)), residual, out, EPS)
    assert out[0, 1].isnan().all()
    assert torch.equal(out[0, 0], torch.zeros(40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adaln_of_a_zero_branch_is_the_norm_of_its_source(dtype: torch.dtype) -> None:
    source, out, residual = torch.randn(2, 5, 24), torch.empty(2, 5, 24, dtype=dtype), torch.empty(2, 5, 24)
    modulation = Modulation(torch.zeros(2, 1, 24))
    CpuOps(dtype, 1).adaln(source, torch.zeros(2, 5, 24, dtype=dtype), modulation, residual, out, EPS)
    assert torch.equal(residual, source)
    close(out, F.layer_norm(source, (24,), eps=EPS).to(dtype), F.layer_norm(source.double(), (24,), eps=EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescale_keeps_denormals_infinities_and_nan(dtype: torch.dtype) -> None:
    ops, nan, inf = CpuOps(dtype, 1), float("nan"), float("inf")
    one = torch.ones(1)
    tiny = torch.tensor([[1e-39, -1e-39, 0.0, -0.0]], dtype=dtype)
    assert torch.equal(ops.rescale(tiny.clone(), one, None, "silu"), F.silu(tiny))
    wild = torch.tensor([[nan, inf, 300.0, -300.0, 1.0]], dtype=dtype)
    for name, formula in (("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")), ("silu", F.silu)):
        got = ops.rescale(wild.clone(), one, None, name)
        assert got[0, 0].isnan()
        assert torch.equal(got[0, 1:4], formula(wild)[0, 1:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wild", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [8, 37])
def test_attention_propagates_what_is_not_finite(dtype: torch.dtype, wild: float, tokens: int) -> None:
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


def planned(coefficients: Tensor, copies: int) -> PlannedCall:
    return PlannedCall((0,), False, 0, None, copies, 1, coefficients, torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 63, 4099])
def test_sampler_step_is_exact_in_the_order_written(dtype: torch.dtype, count: int) -> None:
    x, history, noise = (torch.randn(2, count, 1) for _ in range(3))
    conditional, unconditional = (torch.randn(2, count, 1).to(dtype) for _ in range(2))
    coefficients = torch.randn(9)
    for other, fresh, copies in ((unconditional, noise, 2), (None, None, 1), (unconditional, None, 0)):
        results = []
        call = planned(coefficients, copies)
        for ops in (CpuOps(dtype, 2), ReferenceOps(dtype)):
            state = [t.clone() for t in (x, history, torch.zeros(4, count, 1, dtype=dtype))]
            ops.update_state(SamplerBuffers(state[0], state[1], noise, state[2]), conditional, other, fresh, call)
            results.append(state)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_gives_the_linear_product(dtype: torch.dtype) -> None:
    x, w, b = torch.randn(3, 29, 72).to(dtype), torch.randn(50, 72).to(dtype), torch.randn(50).to(dtype)
    close(pack_linear(w, b, dtype)(x), F.linear(x, w, b), F.linear(x.double(), w.double(), b.double()))
    close(pack_linear(w, None, dtype)(x), F.linear(x, w), F.linear(x.double(), w.double()))


def test_tensor_view_names_the_argument_that_does_not_fit() -> None:
    ops = CpuOps(torch.float32, 1)
    x, good, table = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), torch.zeros(1, 3, 8)
    refused: list[tuple[Any, str]] = [
        (good.double(), r"branch: expected float32 \(1, 4, 8\), contiguous; got float64 \(1, 4, 8\)"),
        (torch.zeros(1, 4, 7), r"branch: expected float32 \(1, 4, 8\), contiguous; got float32 \(1, 4, 7\)"),
        (torch.zeros(8), r"branch: expected float32 \(1, 4, 8\), contiguous; got float32 \(8,\)"),
        (torch.zeros(1, 8, 4).mT, r"branch: .* got float32 \(1, 4, 8\) with strides \(32, 1, 4\)"),
        (torch.zeros(1, 4, 8, device="meta"), r"branch: .* got "),
        (np.zeros((1, 4, 8), np.float32), r"branch: .* got numpy.ndarray"),
        (torch.zeros(1, 4, 8).to_sparse(), r"branch: .* got "),
        ([0.0], r"branch: .* got list"),
    ]
    for bad, message in refused:
        with pytest.raises(ValueError, match=message):
            ops.adaln(x, bad, Modulation(table, 0, 1, 2), good, good.clone(), EPS)
    with pytest.raises(ValueError, match=r"source: expected float32 \(1, 4, 8\), contiguous; got None"):
        ops.adaln(None, good, Modulation(table, 0, 1, 2), good, good.clone(), EPS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"residual: expected a tensor of rank 3; got float32 \(4, 8\)"):
        ops.adaln(x, good, Modulation(table, 0, 1, 2), good[0], good.clone(), EPS)
    with pytest.raises(ValueError, match="out: expected float32 or bfloat16; got float16"):
        ops.adaln(x, good, Modulation(table, 0, 1, 2), good, good.half(), EPS)


def test_adaln_refuses_rows_that_its_table_lacks() -> None:
    ops, x, good = CpuOps(torch.float32, 1), torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match=r"table: expected float32 \(1, 3, 8\)"):
        ops.adaln(x, good, Modulation(torch.zeros(1, 3, 7), 0, 1, 2), good, good.clone(), EPS)
    for row in (3, -1):
        with pytest.raises(ValueError, match=f"scale: expected a row of the table, 0 to 2; got {row}"):
            ops.adaln(x, good, Modulation(torch.zeros(1, 3, 8), 0, 1, row), good, good.clone(), EPS)
    with pytest.raises(ValueError, match="table: expected a tensor"):
        ops.adaln(x, good, Modulation(None, 0), good, good.clone(), EPS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shift: expected together with scale"):
        ops.adaln(x, good, Modulation(torch.zeros(1, 3, 8), 0, 1), good, good.clone(), EPS)


def test_attention_refuses_tensors_that_do_not_fit() -> None:
    ops, q, out = CpuOps(torch.float32, 1), torch.zeros(1, 2, 4, 8), torch.zeros(1, 4, 16)
    scratch = torch.empty(ops.scratch_bytes(1, 2, 4, 8), dtype=torch.uint8)
    ops.attention(q, q, q, scratch, out)
    with pytest.raises(ValueError, match=f"scratch: expected at least {len(scratch)} bytes; got 10"):
        ops.attention(q, q, q, torch.empty(10, dtype=torch.uint8), out)
    with pytest.raises(ValueError, match="scratch: expected a tensor of rank 1; got None"):
        ops.attention(q, q, q, None, out)
    with pytest.raises(ValueError, match=r"v: expected float32 \(1, 2, 4, 8\), contiguous in the last dimension"):
        ops.attention(q, q, torch.zeros(1, 2, 8, 4).mT, scratch, out)
    with pytest.raises(ValueError, match=r"k: expected float32 \(1, 2, 4, 8\)"):
        ops.attention(q, torch.zeros(1, 3, 4, 8), q, scratch, out)
    with pytest.raises(ValueError, match=r"lengths: expected int32 \(1,\)"):
        ops.attention(q, q, q, scratch, out, torch.tensor([4]))


def test_sampler_step_refuses_an_input_that_is_too_small() -> None:
    ops, x = CpuOps(torch.float32, 1), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="network_input: 2 copies of 2 clips do not fit an input of 2"):
        ops.update_state(SamplerBuffers(x, x.clone(), x.clone(), x.clone()), x, None, None, planned(torch.zeros(9), 2))


def test_rescale_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation: expected none, gelu_tanh or silu; got 'relu'"):
        CpuOps(torch.float32, 1).rescale(torch.zeros(2, 4), torch.ones(2), None, "relu")
    assert native.lib is not None
    assert native.lib.activations == ("none", "gelu_tanh", "silu")


# ---- the codec's spectra to samples


@functools.cache
def synthesized(count: int, iterations: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Features, gain and the reference's samples in float64 and float32 of 21 clips, for all instruction sets."""
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
def test_spectral_equals_its_reference(count: int, iterations: int, threads: int) -> None:
    """At most twice the error of the float32 reference against float64, in the median of 21 clips: a bin between two
    peaks that tie, or one of almost no energy, may turn its phase for a rounding error in either.
    """
    frames, errors = SpectralFrames(2500.0), []
    for features, gain, exact, plain in synthesized(count, iterations):
        with thread_limit(threads):
            got = frames.synthesize(features, iterations, gain)
        assert got.shape == (2, 2, 512 * count)
        errors.append((relative(got, exact), relative(plain, exact)))
    ours, torchs = torch.tensor(errors).median(0).values
    assert ours <= 2 * torchs + 1e-6


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def test_spectral_refuses_tables_that_do_not_fit() -> None:
    frames, out = SpectralFrames(2500.0), torch.zeros(1, 2, 1024)
    features = torch.zeros(1, 2, 3, frames.bands)
    gain, below, fraction = torch.ones(1088), torch.zeros(1088, dtype=torch.int32), torch.zeros(1088)
    rest = (0, 0.99, 1e-9, 1)
    native.lib.spectral(features, gain, below, fraction, out, *rest)
    jump = below.clone()
    jump[500:] = 2
    beyond = torch.arange(1088, dtype=torch.int32).clamp(max=frames.bands - 1)
    for name, arguments in (
        ("features", (features[0], gain, below, fraction, out)),
        ("gain", (features, gain[:-1], below, fraction, out)),
        ("below", (features, gain, jump, fraction, out)),
        ("below", (features, gain, beyond, fraction, out)),
        ("out", (features, gain, below, fraction, out[:, :, :-1])),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            native.lib.spectral(*arguments, *rest)


def test_thread_limit_belongs_to_the_caller() -> None:
    before = torch.get_num_threads()
    with thread_limit(3):
        assert torch.get_num_threads() == (before if openmp() is None else 3)
    assert torch.get_num_threads() == before


def test_use_isa_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="base, avx2, avx512 or amx; got 'avx1024'"):
        native.lib.use_isa("avx1024")
    assert native.lib.isas()[0] == "base"
