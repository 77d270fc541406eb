from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from presto_rt.kernels import edm_step as op
from presto_rt.kernels.edm_step import (
    coefficients,
    edm_step,
    edm_step_reference,
    normal,
    seeds_tensor,
    trajectory_step,
    trajectory_step_reference,
)

from presto_rt.diffusion import noise
from presto_rt.errors import InvalidInputError
from tests.support.kernels import assert_no_worse, poisoned


def edm(sigma, sigma_data=0.5):
    total = math.hypot(sigma, sigma_data)
    return sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total


def sampler_step(x, conditional, unconditional, sigma, sigma_next, w, plus_plus, fresh):
    """The formulas of the samplers, one by one, in fp64."""
    c_skip, c_out, _ = edm(sigma)
    d_c, d_u = (c_skip * x + c_out * f for f in (conditional, unconditional))
    d = d_u + w * (d_c - d_u)
    if fresh is not None:
        return d + sigma_next * fresh
    return d + sigma_next / sigma * (x - (d_u if plus_plus else d))


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 1, 16, 2**32 - 1])
def test_noise_is_the_packages_to_the_bit(device, seed, stream):
    seeds = seeds_tensor([seed, 5], device)
    ours = normal(
        seeds, (37, 29), stream=stream, out=poisoned(2, 37, 29, dtype=torch.float32, device=device), backend="triton"
    )
    for clip, number in zip(ours.cpu(), (seed, 5), strict=True):
        assert torch.equal(clip, noise.normal(number, (37, 29), stream=stream))
        twin = noise.normal_torch(number, 37 * 29, stream=stream).reshape(37, 29)
        assert torch.equal(clip, twin)


def test_noise_has_the_moments_and_no_stream_repeats(device):
    n = normal(seeds_tensor([1, 2], device), (20_000,), backend="triton").double().cpu()
    other = normal(seeds_tensor([1, 2], device), (20_000,), stream=1, backend="triton").double().cpu()
    assert (n.mean(1).abs() < 0.03).all()
    assert ((n.std(1) - 1).abs() < 0.03).all()
    for a, b in ((n[0], n[1]), (n[0], other[0])):
        assert abs(float((a * b).mean())) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("w", "plus_plus", "few"), [(1.0, False, False), (3.5, False, False), (0.6, True, False), (2.0, False, True)]
)
def test_one_step_of_each_sampler(device, dtype, w, plus_plus, few):
    sigma, sigma_next = 3.0, 0.8
    x = torch.randn(2, 113, 17, device=device) * sigma
    f_c, f_u = (torch.randn(2, 113, 17, device=device).to(dtype) for _ in range(2))
    seeds = seeds_tensor([3, 2**63 + 9], device)
    c_skip, c_out, _ = edm(sigma)
    c_in_next = edm(sigma_next)[2]
    ratio = 0.0 if few else sigma_next / sigma
    made = coefficients(
        c_skip, c_out, ratio, guidance=w, plus_plus=plus_plus, noise=sigma_next if few else 0.0, c_in_next=c_in_next
    ).to(device)
    out = poisoned(2, 113, 17, dtype=torch.float32, device=device)
    doubled = poisoned(4, 113, 17, dtype=dtype, device=device)
    arguments = {"unconditional": f_u, "seeds": seeds if few else None, "stream": 4}
    edm_step(x, f_c, made, out=out, input_out=doubled, backend="triton", **arguments)

    fresh = op.normal_reference(seeds, (113, 17), stream=4) if few else None
    wide = [t.double() for t in (x, f_c, f_u)]
    truth = sampler_step(*wide, sigma, sigma_next, w, plus_plus, None if fresh is None else fresh.double())
    eager = sampler_step(x, f_c.float(), f_u.float(), sigma, sigma_next, w, plus_plus, fresh)
    assert_no_worse(out, eager, truth)
    twin, scaled = edm_step_reference(x, f_c, made, **arguments)
    assert torch.equal(out, twin)
    assert torch.equal(doubled, torch.cat([scaled, scaled]))


def test_the_last_step_is_the_denoised_clip(device):
    """sigma' = 0: x' = D."""
    c_skip, c_out, _ = edm(0.4)
    x, f = torch.randn(1, 9, 4, device=device), torch.randn(1, 9, 4, device=device)
    out, _ = edm_step(x, f, coefficients(c_skip, c_out, 0.0).to(device), backend="triton")
    torch.testing.assert_close(out, c_skip * x + c_out * f, rtol=1e-6, atol=1e-6)


def test_in_place_and_replayed_with_other_numbers(device):
    """What a captured graph does: the same buffers, other coefficients and seeds."""
    x, f = torch.randn(1, 50, 8, device=device), torch.randn(1, 50, 8, device=device)
    five, seeds = coefficients(0.5, 0.5, 0.0, noise=1.0).to(device), seeds_tensor([1], device)
    state, results = x.clone(), []
    for seed, s in ((1, 1.0), (2, 1.0), (2, 0.0)):
        state.copy_(x)
        seeds.fill_(seed)
        five[3] = s
        edm_step(state, f, five, seeds=seeds, out=state, backend="triton")
        results.append(state.clone())
    assert not torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], 0.5 * x + 0.5 * f, rtol=1e-6, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 3000),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
)
def test_any_seed_and_length(batch, count, seed, stream):
    if not op.runtime.interpreting:
        pytest.skip("drawn for the interpreter")
    ours = normal(seeds_tensor([seed] * batch), (count,), stream=stream, backend="triton")
    for clip in ours:
        assert torch.equal(clip, noise.normal(seed, (count,), stream=stream))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 4).half()}, "x has dtype float16"),
        ({"x": torch.randn(4)}, "the first is the clip"),
        ({"x": torch.randn(1, 0)}, "x is empty"),
        ({"conditional": torch.randn(1, 5)}, "conditional has shape"),
        ({"unconditional": torch.randn(1, 4).half()}, "unconditional has dtype"),
        ({"coefficient": torch.randn(4)}, "coefficient has shape"),
        ({"seeds": torch.zeros(1)}, "seeds has dtype float32"),
        ({"stream": -1}, "stream=-1 must lie"),
        ({"input_out": torch.empty(3, 4)}, "input_out has shape"),
        ({"out": torch.empty(2, 4)[::2], "x": torch.randn(1, 4)}, None),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.randn(1, 4), "conditional": torch.randn(1, 4), "coefficient": torch.randn(5)} | change
    if message is None:
        edm_step(**arguments)
        return
    with pytest.raises(InvalidInputError, match=message):
        edm_step(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("guided", "stream", "copies", "edited"), [(0, None, 1, 0), (1, None, 2, 0), (1, 4, 2, 1), (0, 7, 0, 1)]
)
def test_a_step_with_a_memory(device, dtype, guided, stream, copies, edited):
    """Equal to the reference to the bit, in place; what is beyond the copies stays."""
    shape, seeds = (2, 31, 13), seeds_tensor([5, 2**64 - 2], device)
    x, history, init = (torch.randn(shape, device=device) for _ in range(3))
    f_c, f_u = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    update = torch.randn(9, device=device)
    network_input = poisoned(4, *shape[1:], dtype=dtype, device=device)
    options = {"unconditional": f_u if guided else None, "seeds": seeds, "stream": stream}
    if edited:
        keep = torch.rand(2, 31, device=device).round()
        options |= {"init": init, "keep": keep, "after": torch.tensor([0.7], device=device)}
    state, memory = x.clone(), history.clone()
    trajectory_step(state, memory, f_c, update, network_input=network_input, copies=copies, backend="triton", **options)
    want, kept, scaled = trajectory_step_reference(x, history, f_c, update, **options)
    assert torch.equal(state, want)
    assert torch.equal(memory, kept)
    for copy in range(copies):
        assert torch.equal(network_input[2 * copy : 2 * copy + 2], scaled.to(dtype))
    assert torch.isnan(network_input[2 * copies :]).all()
    if edited:
        noisy = init + 0.7 * op.normal_reference(seeds, shape[1:])
        assert torch.equal(state[keep == 1], noisy[keep == 1])
    wide = [t.double() for t in (x, history, f_c, f_u)]
    a, b, c, h, _s, *_ = update.double()
    if not edited:
        truth = a * wide[0] + b * wide[2] + h * wide[1] + (c * wide[3] if guided else 0)
        torch.testing.assert_close(state.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": torch.randn(5)}, "update has shape"),
        ({"stream": 1}, "need seeds"),
        ({"init": torch.randn(1, 3, 4)}, "go together"),
        ({"copies": 2}, "holds no 2 copies"),
        ({"history": torch.randn(1, 3, 5)}, "history has shape"),
        ({"x": torch.randn(1, 4, 3).transpose(1, 2)}, "not contiguous"),
    ],
)
def test_bad_input_of_a_step_with_a_memory(change, message):
    arguments = {"x": torch.randn(1, 3, 4), "history": torch.randn(1, 3, 4), "conditional": torch.randn(1, 3, 4),
                 "update": torch.randn(9), "network_input": torch.empty(1, 3, 4)}  # fmt: skip
    with pytest.raises(InvalidInputError, match=message):
        trajectory_step(**arguments | change)
