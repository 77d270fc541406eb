"""Absence of write races: every store of every kernel is counted, and each output element is written exactly once.

The interpreter runs programs sequentially, so results alone would not show a race. Each kernel's docstring names the
program that writes each output.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from presto_rt.kernels import (
    OPERATORS,
    adaln,
    conv_transpose1d,
    qk_norm_rope,
    runtime,
    sampler_step,
    snake_conv1d,
    spsi,
)
from presto_rt.kernels.attention import attention
from presto_rt.kernels.cross_attention import cross_attention
from presto_rt.kernels.gemm import linear
from presto_rt.kernels.pcm import pcm
from tests.support.kernels import assert_written_once, interpreted_only, rotary_table, strided

MODULES = [importlib.import_module(f"presto_rt.kernels.{name}") for name in OPERATORS]
KERNELS = {name: kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")}
SHAPE = (2, 5, 96)


def adaln_writes():
    x, table = torch.randn(SHAPE), torch.randn(3, 96)
    r, y = strided(torch.zeros(SHAPE)), torch.empty(SHAPE)
    m = adaln.Modulation(table, gate=0, shift=1, scale=2)
    yield lambda: adaln.adaln(x, x, m, residual_out=r, out=y, backend="triton"), r, y
    yield lambda: adaln.adaln(r, x, residual_out=r, out=y, backend="triton"), r, y  # in place


def qk_norm_rope_writes():
    qkv = torch.randn(2, 19, 3 * 2 * 64)
    q, k = torch.empty(2, 2, 19, 64), torch.empty(2, 19, 2, 64).transpose(1, 2)
    for turned, pairs in itertools.product((64, 40), qk_norm_rope.PAIRS):
        rotary, options = qk_norm_rope.Rotary(*rotary_table(19, turned), pairs), {"q_out": q, "k_out": k}
        yield lambda r=rotary, o=options: qk_norm_rope.qk_norm_rope(qkv, 2, r, backend="triton", **o), q, k


def attention_writes():
    q, k, v = torch.randn(3, 2, 2, 70, 96).half()
    out = torch.empty(2, 70, 2, 96, dtype=torch.float16).transpose(1, 2)
    for window in (None, 9):
        yield lambda w=window: attention(q, k, v, window=w, out=out, backend="triton"), out


def cross_attention_writes():
    q, kv, out = torch.randn(2, 70, 192), torch.randn(2, 2, 2, 9, 96), strided(torch.zeros(2, 70, 192))
    yield lambda: cross_attention(q, *kv, out=out, backend="triton"), out


def gemm_writes():
    x, weight, out = torch.randn(2, 37, 48), torch.randn(80, 48), torch.empty(2, 37, 80)
    for target in (out, strided(out)):
        yield lambda y=target: linear(x, weight, activation="gelu_tanh", out=y, backend="triton"), target


def normal_writes():
    seeds, out = sampler_step.seeds_tensor([1, 2]), torch.empty(2, 401, 5)
    yield lambda: sampler_step.normal(seeds, (401, 5), out=out, backend="triton"), out


def sampler_step_writes():
    x, f, coefficients = torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.randn(9)
    history, doubled = torch.zeros(2, 7, 5), torch.empty(4, 7, 5)
    noise = sampler_step.NoiseStream(sampler_step.seeds_tensor([1, 2]), 1)
    options = {"unconditional": f, "noise": noise, "network_input": doubled, "copies": 2, "backend": "triton"}
    yield lambda: sampler_step.sampler_step(x, history, f, coefficients, **options), x, history, doubled


def spsi_peaks_writes():
    shape, magnitude = (2, 3, 9), torch.rand(2, 3, 9)
    peaks, turns = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=torch.int32)
    arguments = (magnitude, peaks, turns, 3, 9, 2**30, 27, 9)
    yield lambda: runtime.launch(spsi.spsi_peaks_kernel, (3, 2), *arguments, BLOCK=16), peaks, turns


def spsi_compose_writes():
    shape = (2, 3, 9)
    peaks, turns = torch.zeros(2, *shape, dtype=torch.int16), torch.zeros(2, *shape, dtype=torch.int32)
    arguments = (peaks[0], turns[0], peaks[1], turns[1], 3, 9, 1)
    yield lambda: runtime.launch(spsi.spsi_compose_kernel, (3, 2), *arguments, BLOCK=16), peaks[1], turns[1]


def spsi_phasor_writes():
    turns, out = torch.zeros(2, 3, 9, dtype=torch.int32), torch.empty(2, 3, 9, 2)
    yield lambda: runtime.launch(spsi.spsi_phasor_kernel, (1,), turns, out, 54, 9, BLOCK=64), out


def pcm_writes():
    samples, out = torch.randn(2, 2, 611), torch.empty(2, 611, 2, dtype=torch.int16)
    yield lambda: pcm(samples, sampler_step.seeds_tensor([1, 2]), out=out, backend="triton"), out


def conv_writes():
    x, out, weight = torch.randn(2, 5, 70), torch.empty(2, 20, 64), snake_conv1d.pack(torch.randn(20, 5, 3))
    yield lambda: snake_conv1d.snake_conv1d(x, weight, dilation=3, out=out, backend="triton"), out
    for stride, size, padding in ((5, 10, 3), (4, 3, 0), (2, 4, 1)):
        packed = conv_transpose1d.pack(torch.randn(5, 6, size), stride)
        up = torch.empty(2, 6, 69 * stride - 2 * padding + size)
        options = {"stride": stride, "kernel_size": size, "padding": padding, "out": up, "backend": "triton"}
        yield lambda w=packed, o=options: conv_transpose1d.conv_transpose1d(x, w, **o), up


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_docstring_names_program_and_outputs(name):
    _, _, writes = KERNELS[name].fn.__doc__.partition("Writes: program ")
    assert "_ptr" in writes, f"{name}'s docstring does not say which program writes which output"


@interpreted_only
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_writes_every_element_once(name):
    """Needs a generator `NAME_writes` above for every kernel `NAME_kernel`."""
    for call, *outputs in globals()[name.replace("_kernel", "_writes")]():
        assert_written_once(call, *outputs)
