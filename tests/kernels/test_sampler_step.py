"""sampler_step and normal: the update after a network call, and noise equal to the package's to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from presto_rt.diffusion import noise as package
from presto_rt.errors import InvalidInputError
from presto_rt.kernels import runtime
from presto_rt.kernels.sampler_step import (
    Inpainting,
    NoiseStream,
    normal,
    normal_reference,
    sampler_step,
    sampler_step_reference,
    seeds_tensor,
)
from tests.support.kernels import assert_no_worse, poisoned


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 1, 16, 2**32 - 1])
def test_normal_equals_the_package_noise_to_the_bit(device, seed, stream):
    out = poisoned(2, 37, 29, dtype=torch.float32, device=device)
    ours = normal(seeds_tensor([seed, 5], device), (37, 29), stream=stream, out=out, backend="triton")
    for clip, number in zip(ours.cpu(), (seed, 5), strict=True):
        assert torch.equal(clip, package.normal(number, (37, 29), stream=stream))
        assert torch.equal(clip, package.normal_torch(number, 37 * 29, stream=stream).reshape(37, 29))


def test_normal_has_unit_moments_and_independent_streams(device):
    n = normal(seeds_tensor([1, 2], device), (20_000,), backend="triton").double().cpu()
    other = normal(seeds_tensor([1, 2], device), (20_000,), stream=1, backend="triton").double().cpu()
    assert (n.mean(1).abs() < 0.03).all()
    assert ((n.std(1) - 1).abs() < 0.03).all()
    for a, b in ((n[0], n[1]), (n[0], other[0])):
        assert abs(float((a * b).mean())) < 0.03


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 3000),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
)
def test_normal_equals_the_package_noise_for_any_seed_and_length(batch, count, seed, stream):
    if not runtime.interpreting:
        pytest.skip("drawn for the interpreter")
    ours = normal(seeds_tensor([seed] * batch), (count,), stream=stream, backend="triton")
    for clip in ours:
        assert torch.equal(clip, package.normal(seed, (count,), stream=stream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("guided", "stream", "copies", "inpainted"),
    [(False, None, 1, False), (True, None, 2, False), (True, 4, 2, True), (False, 7, 0, True), (True, 3, 2, False)],
)
def test_sampler_step_equals_its_reference_to_the_bit(device, dtype, guided, stream, copies, inpainted):
    """In place, and the network input beyond the copies is untouched."""
    shape, seeds = (2, 31, 13), seeds_tensor([5, 2**64 - 2], device)
    x, history, init = (torch.randn(shape, device=device) for _ in range(3))
    f_c, f_u = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    coefficients = torch.randn(9, device=device)
    network_input = poisoned(4, *shape[1:], dtype=dtype, device=device)
    keep = torch.rand(2, 31, device=device).round()
    options = {
        "unconditional": f_u if guided else None,
        "noise": NoiseStream(seeds, stream),
        "inpainting": Inpainting(init, keep, torch.tensor([0.7], device=device)) if inpainted else None,
    }
    state, memory = x.clone(), history.clone()
    sampler_step(
        state, memory, f_c, coefficients, network_input=network_input, copies=copies, backend="triton", **options
    )
    x_next, history_next, scaled = sampler_step_reference(x, history, f_c, coefficients, **options)
    assert torch.equal(state, x_next)
    assert torch.equal(memory, history_next)
    for copy in range(copies):
        assert torch.equal(network_input[2 * copy : 2 * copy + 2], scaled.to(dtype))
    assert torch.isnan(network_input[2 * copies :]).all()
    if inpainted:
        noisy = init + 0.7 * normal_reference(seeds, shape[1:])
        assert torch.equal(state[keep == 1], noisy[keep == 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("stream", [None, 4])
def test_sampler_step_is_no_worse_than_eager_torch_against_fp64(device, dtype, guided, stream):
    shape, seeds = (2, 113, 17), seeds_tensor([3, 2**63 + 9], device)
    x, history = (torch.randn(shape, device=device) for _ in range(2))
    f_c, f_u = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    coefficients = torch.randn(9, device=device)
    n = torch.zeros(shape, device=device) if stream is None else normal_reference(seeds, shape[1:], stream=stream)

    def formula(dt):
        a, b, c, h, s, p, q, r, _ = coefficients.to(dt)
        state, memory, conditional, noise = x.to(dt), history.to(dt), f_c.to(dt), n.to(dt)
        unconditional = f_u.to(dt) if guided else torch.zeros_like(state)
        return (
            a * state + b * conditional + c * unconditional + h * memory + s * noise,
            p * state + q * conditional + r * unconditional,
        )

    state, memory = x.clone(), history.clone()
    options = {"unconditional": f_u if guided else None, "noise": NoiseStream(seeds, stream)}
    network_input = torch.empty(shape, dtype=dtype, device=device)
    sampler_step(state, memory, f_c, coefficients, network_input=network_input, backend="triton", **options)
    for ours, eager, truth in zip((state, memory), formula(torch.float32), formula(torch.float64), strict=True):
        assert_no_worse(ours, eager, truth)


def test_sampler_step_reads_coefficients_and_seeds_from_the_device(device):
    """As in a replayed graph: the same buffers with other coefficients and seeds."""
    x, f = torch.randn(1, 50, 8, device=device), torch.randn(1, 50, 8, device=device)
    coefficients = torch.tensor([0.5, 0.5, 0, 0, 1.0, 0, 0, 0, 1], device=device)
    seeds, state, results = seeds_tensor([1], device), x.clone(), []
    for seed, s in ((1, 1.0), (2, 1.0), (2, 0.0)):
        state.copy_(x)
        seeds.fill_(seed)
        coefficients[4] = s
        sampler_step(
            state,
            torch.zeros_like(x),
            f,
            coefficients,
            network_input=torch.empty_like(x),
            noise=NoiseStream(seeds, 1),
            backend="triton",
        )
        results.append(state.clone())
    assert not torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], 0.5 * x + 0.5 * f, rtol=1e-6, atol=1e-6)


SEEDS = torch.zeros(1, dtype=torch.int64)
CLIP = torch.randn(1, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": torch.randn(5)}, "coefficients has shape"),
        ({"x": torch.randn(1, 3, 4).half()}, "x has dtype float16"),
        ({"x": torch.randn(3, 4)}, "x has 2 dimensions"),
        ({"x": torch.randn(1, 4, 3).transpose(1, 2)}, "not contiguous"),
        ({"conditional": torch.randn(1, 3, 5)}, "conditional has shape"),
        ({"unconditional": torch.randn(1, 3, 4).half()}, "unconditional has dtype"),
        ({"history": torch.randn(1, 3, 5)}, "history has shape"),
        ({"copies": 2}, "holds no 2 copies"),
        ({"copies": -1}, "copies=-1 must be 0 or more"),
        ({"noise": NoiseStream(SEEDS, -1)}, "stream=-1 must lie"),
        ({"noise": NoiseStream(torch.zeros(1), 1)}, "seeds has dtype float32"),
        ({"inpainting": Inpainting(CLIP, torch.ones(1, 3), torch.ones(1))}, "inpainting needs seeds"),
        (
            {"inpainting": Inpainting(CLIP, torch.ones(1, 4), torch.ones(1)), "noise": NoiseStream(SEEDS)},
            "keep has shape",
        ),
    ],
)
def test_sampler_step_rejects_bad_input(change, message):
    arguments = {
        "x": torch.randn(1, 3, 4),
        "history": torch.randn(1, 3, 4),
        "conditional": torch.randn(1, 3, 4),
        "coefficients": torch.randn(9),
        "network_input": torch.empty(1, 3, 4),
    }
    with pytest.raises(InvalidInputError, match=message):
        sampler_step(**arguments | change)


def test_normal_rejects_bad_input():
    with pytest.raises(InvalidInputError, match="stream=-1 must lie"):
        normal(SEEDS, (3,), stream=-1)
    with pytest.raises(InvalidInputError, match="out has shape"):
        normal(SEEDS, (3,), out=torch.empty(1, 4))
