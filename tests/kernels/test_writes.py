"""Races: the interpreter runs programs one after another, so it hides them. Here every store of every kernel is
counted: each output element must be written exactly once, and the docstring must say by which program.
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
    edm_step,
    istft_head,
    qk_norm_rope,
    runtime,
    snake_conv1d,
    spsi,
)
from presto_rt.kernels.attention import attention
from presto_rt.kernels.cross_attention import cross_attention
from presto_rt.kernels.gemm import linear, linear_gate_residual
from presto_rt.kernels.pcm import pcm

from tests.support.kernels import assert_written_once, interpreted_only, strided

MODULES = [importlib.import_module(f"presto_rt.kernels.{name}") for name in OPERATORS]
KERNELS = {
    name: kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")
}  # fmt: skip
SHAPE = (2, 5, 96)


def adaln_writes():
    x, table = torch.randn(SHAPE), torch.randn(3, 96)
    r, y = strided(torch.zeros(SHAPE)), torch.empty(SHAPE)
    rows = {"shift": 1, "scale": 2, "backend": "triton"}
    yield lambda: adaln.gate_residual_norm_modulate(x, x, table, gate=0, residual_out=r, out=y, **rows), r, y
    yield lambda: adaln.norm_modulate(x, table, out=y, **rows), y
    yield lambda: adaln.gate_residual_norm_modulate(x, r, residual_out=r, out=y, backend="triton"), r, y  # in place


def qk_norm_rope_writes():
    qkv = torch.randn(2, 19, 3 * 2 * 64)
    q, k = torch.empty(2, 2, 19, 64), torch.empty(2, 19, 2, 64).transpose(1, 2)
    for turned, pairs in itertools.product((64, 40), qk_norm_rope.PAIRS):
        angles, options = qk_norm_rope.rotary_table(19, turned), {"pairs": pairs, "backend": "triton"}
        yield lambda a=angles, o=options: qk_norm_rope.qk_norm_rope(qkv, 2, *a, q_out=q, k_out=k, **o), q, k


def attention_writes():
    q, k, v = torch.randn(3, 2, 2, 70, 96).half()
    out = torch.empty(2, 70, 2, 96, dtype=torch.float16).transpose(1, 2)
    for window in (None, 9):
        yield lambda w=window: attention(q, k, v, window=w, out=out, backend="triton"), out


def cross_attention_writes():
    q, kv, out = torch.randn(2, 70, 192), torch.randn(2, 2, 2, 9, 96), strided(torch.zeros(2, 70, 192))
    yield lambda: cross_attention(q, *kv, out=out, backend="triton"), out


def gemm_writes():
    x, weight, out = torch.randn(2, 37, 48), torch.randn(80, 48), strided(torch.zeros(2, 37, 80))
    half, residual = out[..., :40], torch.zeros(2, 37, 80)
    yield lambda: linear(x, weight, out=out, backend="triton"), out
    yield lambda: linear(x, weight, activation="swiglu", out=half, backend="triton"), half
    yield lambda: linear_gate_residual(x, weight, None, residual, out=residual, backend="triton"), residual


def edm_step_writes():
    x, f, out, doubled = torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.empty(2, 7, 5), torch.empty(4, 7, 5)
    options = {"seeds": edm_step.seeds_tensor([1, 2]), "out": out, "backend": "triton"}
    five = edm_step.coefficients(0.5, 0.5, 0.0, noise=1.0)
    yield lambda: edm_step.edm_step(x, f, five, input_out=doubled, **options), out, doubled


def normal_writes():
    seeds, out = edm_step.seeds_tensor([1, 2]), torch.empty(2, 401, 5)
    yield lambda: edm_step.normal(seeds, (401, 5), out=out, backend="triton"), out


def trajectory_step_writes():
    x, f, update = torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.randn(9)
    history, doubled, seeds = torch.zeros(2, 7, 5), torch.empty(4, 7, 5), edm_step.seeds_tensor([1, 2])
    options = {"seeds": seeds, "stream": 1, "network_input": doubled, "copies": 2, "backend": "triton"}
    yield lambda: edm_step.trajectory_step(x, history, f, update, unconditional=f, **options), x, history, doubled


def spsi_peaks_writes():
    shape, magnitude = (2, 3, 9), torch.rand(2, 3, 9)
    peaks, turns = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=torch.int32)
    arguments = (magnitude, peaks, turns, 3, 9, 2**30, 27, 9)
    yield lambda: runtime.launch(spsi.spsi_peaks_kernel, (3, 2), *arguments, BLOCK=16), peaks, turns


def spsi_follow_writes():
    shape = (2, 3, 9)
    peaks, turns = torch.zeros(2, *shape, dtype=torch.int16), torch.zeros(2, *shape, dtype=torch.int32)
    arguments = (peaks[0], turns[0], peaks[1], turns[1], 3, 9, 1)
    yield lambda: runtime.launch(spsi.spsi_follow_kernel, (3, 2), *arguments, BLOCK=16), peaks[1], turns[1]


def spsi_phasor_writes():
    turns, out = torch.zeros(2, 3, 9, dtype=torch.int32), torch.empty(2, 3, 9, 2)
    yield lambda: runtime.launch(spsi.spsi_phasor_kernel, (1,), turns, out, 54, 9, BLOCK=64), out


def spectrum_writes():
    for kind in istft_head.KINDS:
        head = torch.randn(2, 7, 402)
        yield (lambda h=head, k=kind: torch.view_as_real(istft_head.spectrum(h, kind=k, backend="triton")),)


def overlap_add_writes():
    frames, out = torch.randn(2, 7, 480), torch.empty(2, 1050)
    options = {"padding": "same", "out": out, "backend": "triton"}
    yield lambda: istft_head.overlap_add(frames, torch.ones(480), 150, **options), out


def pcm_writes():
    samples, out = torch.randn(2, 2, 611), torch.empty(2, 611, 2, dtype=torch.int16)
    yield lambda: pcm(samples, edm_step.seeds_tensor([1, 2]), out=out, backend="triton"), out


def conv_writes():
    x, out, weight = torch.randn(2, 5, 70), torch.empty(2, 20, 64), snake_conv1d.pack(torch.randn(20, 5, 3))
    yield lambda: snake_conv1d.snake_conv1d(x, weight, dilation=3, out=out, backend="triton"), out
    for stride, size, padding in ((5, 10, 3), (4, 3, 0), (2, 4, 1)):
        packed = conv_transpose1d.pack(torch.randn(5, 6, size), stride)
        up = torch.empty(2, 6, 69 * stride - 2 * padding + size)
        options = {"stride": stride, "kernel_size": size, "padding": padding, "out": up, "backend": "triton"}
        yield lambda w=packed, o=options: conv_transpose1d.conv_transpose1d(x, w, **o), up


@pytest.mark.parametrize("name", KERNELS)
def test_the_docstring_says_which_program_writes_what(name):
    doc = KERNELS[name].fn.__doc__
    assert doc.startswith("Who writes what: program "), doc
    assert "_ptr" in doc, f"{name} does not name its outputs"


@interpreted_only
@pytest.mark.parametrize("name", KERNELS)
def test_every_element_is_written_once(name):
    """A kernel without its `..._writes` above fails here."""
    for call, *outputs in globals()[name.replace("_kernel", "_writes")]():
        assert_written_once(call, *outputs)
