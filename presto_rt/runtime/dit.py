"""The diffusion transformer over fused operators and static buffers: `models/dit.py` once more, as it runs.

`Ops` is the table of operators; reference.py (torch), cpu.py (C++ and oneDNN) and the CUDA table offer the same ones.
The signatures are those of `presto_rt.kernels` where there is such a kernel. All that a block needs was made by
plan.py, so this only executes: no decision depends on a tensor, and nothing is computed that was known before the first
step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .memory import Arena, Buffer
from .plan import Edit, Plan, Run

Linear = Any  # weights as the table packed them
Seeds = Any  # list of int, or for captured plans an int64 tensor (B,)


class Ops(Protocol):
    """The operators. T is the activations' dtype; a residual is fp32; `out` is written and returned, but `linear` may
    return a tensor of its own instead (then `allocates_matmul_output` is True and the arena holds none for it).

    Some things only the CUDA table must do, because only its plans ask for them: `attention` with `lengths` (B,) int32
    of keys that count; weights with a number `x_scale`, whose input the operator before leaves in fp8, divided by it
    (`out_scale`); seeds as a tensor. And it may offer `fused_step`, all of an evaluation's end in one kernel."""

    dtype: torch.dtype
    allocates_matmul_output: bool

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Weights (N, K) fp32 and bias (N,) in the form that `linear` wants, made once at load."""

    def linear(self, x: Tensor, weights: Linear, out: Tensor | None, activation: str = "none") -> Tensor:
        """act(x W^T + bias): (B, T, K) -> (B, T, N), both T; activation "none" or "gelu_tanh"."""

    def adaln(
        self,
        source: Tensor,
        branch: Tensor,
        table: Tensor,
        gate: int | None,
        shift: int | None,
        scale: int | None,
        residual: Tensor,
        out: Tensor,
    ) -> None:
        """residual = source + table[gate] * branch; out = norm(residual) * (1 + table[scale]) + table[shift].

        source, residual (B, T, D) fp32, may be the same; branch, out (B, T, D) T; table (B, rows, D) fp32; None: 1, 0,
        0.
        """  # fmt: skip

    def qk_norm_rope(self, qkv: Tensor, angles: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], q: Tensor,
                     k: Tensor) -> Tensor:  # fmt: skip
        """qkv (B, T, 3 H D) -> q, k (B, H, T, D), normalised and rotated; returns v (B, H, T, D), a view of qkv."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None, out: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v into out (B, T, H D). v may have gaps between its tokens."""

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, lengths: Tensor,
                        scratch: Tensor | None, out: Tensor) -> Tensor:  # fmt: skip
        """The same for q (B, T, H D), normalised on the way in, and k, v (B, H, S, D) of which `lengths` (B,) int32
        count."""

    def scratch_bytes(self, batch: int, heads: int, keys: int, dim: int) -> int:
        """Bytes of working memory that both attentions need."""

    def normal(self, seeds: Seeds, stream: int, out: Tensor) -> Tensor:
        """Standard normal noise of each clip's seed: out (B, T, C) fp32."""

    def step(self, x: Tensor, history: Tensor, conditional: Tensor, unconditional: Tensor | None, noise: Tensor | None,
             update: Tensor, copies: int, network_input: Tensor) -> None:  # fmt: skip
        """The update of `trajectory`: x and history (B, T, C) fp32 in place, `copies` of the next input, T."""


@dataclass(frozen=True)
class Layer:
    """One block's weights."""

    qkv: Linear
    out: Linear
    cross_q: Linear
    cross_out: Linear
    up: Linear
    down: Linear
    qk_norm: tuple[Tensor, Tensor]
    cross_q_norm: Tensor


@dataclass(frozen=True)
class Weights:
    """The network's weights in a table's own form."""

    input: Linear
    output: Linear
    layers: tuple[Layer, ...]


# Positions in the forward pass, for the buffers' life times. A block's are the same for every block.
INPUT, FIRST, QKV, ROPE, ATTEND, OUT, NORM1, CROSS_Q, CROSS, CROSS_OUT, NORM2, UP, DOWN, NORM3, OUTPUT, STEP = range(16)


def buffers(plan: Plan, ops: Ops) -> list[Buffer]:
    """Everything that a forward pass writes, with the time that it is alive."""
    c, clips, t = plan.config, plan.batch * plan.copies, plan.tokens
    d, heads, dim, dtype = c.width, c.heads, c.head_dim, ops.dtype
    always = ((INPUT, STEP),)
    state = (plan.batch, t, c.latent_channels)
    out = [
        Buffer("state", state, torch.float32, always),
        Buffer("history", state, torch.float32, always),
        Buffer("noise", state, torch.float32, ((STEP, STEP),)),
        Buffer("input", (clips, t, c.latent_channels), dtype, ((INPUT, INPUT), (STEP, STEP))),
        Buffer("residual", (clips, t, d), torch.float32, ((FIRST, NORM3),)),
        Buffer("normed", (clips, t, d), dtype, ((FIRST, QKV), (NORM1, CROSS_Q), (NORM2, UP), (NORM3, OUTPUT))),
        Buffer("q", (clips, heads, t, dim), dtype, ((ROPE, ATTEND),)),
        Buffer("k", (clips, heads, t, dim), dtype, ((ROPE, ATTEND),)),
        Buffer("attended", (clips, t, d), dtype, ((ATTEND, OUT), (CROSS, CROSS_OUT))),
    ]
    scratch = max(ops.scratch_bytes(clips, heads, keys, dim) for keys in (t, plan.keys.shape[3]))
    if scratch:
        out.append(Buffer("scratch", (scratch,), torch.uint8, ((ATTEND, ATTEND), (CROSS, CROSS))))
    if not ops.allocates_matmul_output:
        out += [
            Buffer("packed", (clips, t, 3 * d), dtype, ((QKV, ATTEND),)),
            Buffer("branch", (clips, t, d), dtype, ((INPUT, FIRST), (OUT, NORM1), (CROSS_OUT, NORM2), (DOWN, NORM3))),
            Buffer("cross_q", (clips, t, d), dtype, ((CROSS_Q, CROSS),)),
            Buffer("hidden", (clips, t, c.mlp_ratio * d), dtype, ((UP, DOWN),)),
            Buffer("output", (clips, t, c.latent_channels), dtype, ((OUTPUT, STEP),)),
        ]
    return out


class Views:
    """The arena's tensors for `clips` of the plan's clips: all of them, or the conditional half."""

    def __init__(self, arena: Arena, clips: int) -> None:
        def first(name: str) -> Tensor | None:
            return arena.tensor(name)[:clips] if name in arena.buffers else None

        for name in ("input", "residual", "normed", "q", "k", "attended"):
            setattr(self, name, first(name))
        self.packed, self.branch, self.hidden = first("packed"), first("branch"), first("hidden")
        self.cross_q, self.output = first("cross_q"), first("output")
        self.scratch = arena.tensor("scratch") if "scratch" in arena.buffers else None

    input: Tensor
    residual: Tensor
    normed: Tensor
    q: Tensor
    k: Tensor
    attended: Tensor


class Memory:
    """All static tensors of one running plan. One at a time may use it."""

    def __init__(self, plan: Plan, ops: Ops, device: torch.device | str = "cpu") -> None:
        self.arena = Arena(buffers(plan, ops), device)
        self.state, self.history, self.noise = (self.arena.tensor(n) for n in ("state", "history", "noise"))
        self.single = Views(self.arena, plan.batch)
        self.double = Views(self.arena, plan.batch * plan.copies)


def network(ops: Ops, weights: Weights, plan: Plan, run: Run, m: Views) -> Tensor:
    """The raw network's output (clips, T, C) for the input in `m.input`."""
    clips = len(m.input)
    table, row = plan.table[:clips], run.row
    masked = () if plan.frames is None else (plan.frames[:clips],)

    def norm(source: Tensor, branch: Tensor, gate: int | None, shift: int | None, scale: int | None,
             reader: Linear) -> Tensor:  # fmt: skip
        """The residual moves on; returns its norm in the form that its reader wants."""
        narrow = getattr(reader, "x_scale", None)
        out = m.normed if narrow is None else in_fp8(m.normed)
        ops.adaln(source, branch, table, gate, shift, scale, m.residual, out, *(() if narrow is None else (narrow,)))
        return out

    layers = [weights.layers[index] for index in run.blocks]
    readers = [*(layer.qkv for layer in layers[1:]), weights.output]
    branch = ops.linear(m.input, weights.input, m.branch)
    normed = norm(plan.beat[:clips], branch, None, row, row + 1, layers[0].qkv)
    for index, layer, reader in zip(run.blocks, layers, readers, strict=True):
        packed = ops.linear(normed, layer.qkv, m.packed)
        v = ops.qk_norm_rope(packed, plan.angles, layer.qk_norm, m.q, m.k)
        ops.attention(m.q, m.k, v, m.scratch, m.attended, *masked)
        branch = ops.linear(m.attended, layer.out, m.branch)
        normed = norm(m.residual, branch, row + 2, None, None, layer.cross_q)

        q = ops.linear(normed, layer.cross_q, m.cross_q)
        keys, values = plan.keys[index, :clips], plan.values[index, :clips]
        ops.cross_attention(q, keys, values, layer.cross_q_norm, plan.lengths[:clips], m.scratch, m.attended)
        branch = ops.linear(m.attended, layer.cross_out, m.branch)
        normed = norm(m.residual, branch, None, row + 3, row + 4, layer.up)

        narrow = getattr(layer.down, "x_scale", None)
        if narrow is None:
            hidden = ops.linear(normed, layer.up, m.hidden, "gelu_tanh")
        else:
            hidden = ops.linear(normed, layer.up, in_fp8(m.hidden), "gelu_tanh", narrow)
        branch = ops.linear(hidden, layer.down, m.branch)
        # The norm after a block is that of the next one, or the last before the output: its rows follow in the table.
        normed = norm(m.residual, branch, row + 5, row + 6, row + 7, reader)
        row += 6
    return ops.linear(normed, weights.output, m.output)


def in_fp8(buffer: Tensor) -> Tensor:
    """The first bytes of a contiguous buffer as fp8 numbers of the same shape."""
    narrow = buffer.flatten().view(torch.float8_e4m3fn)
    return narrow[: buffer.numel()].view(buffer.shape)


def run_plan(ops: Ops, weights: Weights | Sequence[Weights], plan: Plan, memory: Memory, seeds: Seeds,
             callback: Callable[[int, int], None] | None = None) -> Tensor:  # fmt: skip
    """The whole trajectory: latents (B, T, C) fp32, a view of the memory. The hot path. weights: one for all
    evaluations, or one for each."""
    m, edit = memory, plan.edit
    each = [weights] * len(plan.runs) if isinstance(weights, Weights) else weights
    fused_step = getattr(ops, "fused_step", None)
    torch.mul(ops.normal(seeds, 0, m.noise), plan.start[0], out=m.state)
    if edit is not None:
        m.state.add_(edit.init)
    torch.mul(m.state, plan.start[1], out=m.noise)
    m.double.input.unflatten(0, (plan.copies, plan.batch)).copy_(m.noise)
    m.history.zero_()
    for run, own in zip(plan.runs, each, strict=True):
        views = m.double if run.guided else m.single
        raw = network(ops, own, plan, run, views)
        conditional, unconditional = raw[: plan.batch], raw[plan.batch :] if run.guided else None
        if fused_step is not None:
            fused_step(m.state, m.history, conditional, unconditional, seeds, run, edit, m.double.input)
        else:
            noise = None if run.stream is None else ops.normal(seeds, run.stream, m.noise)
            ops.step(m.state, m.history, conditional, unconditional, noise, run.update, run.copies, m.double.input)
            if edit is not None and run.step:
                blend(m.state, ops.normal(seeds, 0, m.noise), run, edit, m.double.input)
        if callback is not None and run.step:
            callback(run.step, plan.steps)
    return m.state


def blend(x: Tensor, noise: Tensor, run: Run, edit: Edit, network_input: Tensor) -> None:
    """What is kept of a clip replaces the state x there, at the state's noise level; the network's input follows."""
    known = edit.init + run.after * noise
    x.copy_(edit.keep[..., None] * known + (1.0 - edit.keep[..., None]) * x)
    for copy in range(run.copies):
        network_input[copy * len(x) : (copy + 1) * len(x)].copy_(run.update[8] * x)
