"""Inference implementation of a diffusion transformer over fused operators and preallocated buffers.

`denoise` is the hot path: the loop over a plan's network calls. It executes only: no decision depends on a tensor, and
nothing is computed that was known before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import Arena, Buffer
from .ops import Modulation, Ops, PackedLinear, SamplerBuffers, Seeds
from .plan import BLOCK_ROWS, CompiledPlan, PlannedCall
from .weights import BlockWeights, LinearWeights, TransformerWeights


@dataclass(frozen=True)
class PackedBlock:
    """One block's weights, packed for a table of operators; norm weights are fp32."""

    qkv: PackedLinear
    out: PackedLinear
    cross_q: PackedLinear
    cross_out: PackedLinear
    up: PackedLinear
    down: PackedLinear
    qk_norm: tuple[Tensor, Tensor]
    cross_q_norm: Tensor


@dataclass(frozen=True)
class PackedTransformer:
    """A transformer's weights, packed for a table of operators."""

    input: PackedLinear
    output: PackedLinear
    blocks: tuple[PackedBlock, ...]


def pack_transformer(weights: TransformerWeights, ops: Ops) -> PackedTransformer:
    """Pack the weights for a table of operators; norm weights are copied in fp32 to its device."""

    def linear(layer: LinearWeights) -> PackedLinear:
        return ops.pack(layer.weight.float(), None if layer.bias is None else layer.bias.float())

    def norm(weight: Tensor) -> Tensor:
        return weight.detach().to(ops.device, torch.float32, copy=True)

    def block(b: BlockWeights) -> PackedBlock:
        qkv, out, cross_q, cross_out = (linear(layer) for layer in (b.qkv, b.out, b.cross_q, b.cross_out))
        qk_norm = norm(b.q_norm), norm(b.k_norm)
        return PackedBlock(qkv, out, cross_q, cross_out, linear(b.up), linear(b.down), qk_norm, norm(b.cross_q_norm))

    return PackedTransformer(linear(weights.input), linear(weights.output), tuple(block(b) for b in weights.blocks))


# Positions in the forward pass, for the buffers' life times. A block's are the same for every block.
INPUT, FIRST, QKV, ROPE, ATTEND, OUT, NORM1, CROSS_Q, CROSS, CROSS_OUT, NORM2, UP, DOWN, NORM3, OUTPUT, STEP = range(16)


def buffers(plan: CompiledPlan, ops: Ops) -> list[Buffer]:
    """Return every buffer that a forward pass writes, with its life time."""
    spec, inputs, t = plan.spec, plan.batch * plan.copies, plan.frames
    d, heads, dim, dtype = spec.width, spec.heads, spec.head_dim, ops.dtype
    state = (plan.batch, t, spec.channels)
    listed = [
        Buffer("state", state, torch.float32, ((INPUT, STEP),)),
        Buffer("history", state, torch.float32, ((INPUT, STEP),)),
        Buffer("noise", state, torch.float32, ((STEP, STEP),)),
        Buffer("input", (inputs, t, spec.channels), dtype, ((INPUT, INPUT), (STEP, STEP))),
        Buffer("residual", (inputs, t, d), torch.float32, ((FIRST, NORM3),)),
        Buffer("normed", (inputs, t, d), dtype, ((FIRST, QKV), (NORM1, CROSS_Q), (NORM2, UP), (NORM3, OUTPUT))),
        Buffer("q", (inputs, heads, t, dim), dtype, ((ROPE, ATTEND),)),
        Buffer("k", (inputs, heads, t, dim), dtype, ((ROPE, ATTEND),)),
        Buffer("attended", (inputs, t, d), dtype, ((ATTEND, OUT), (CROSS, CROSS_OUT))),
    ]
    scratch = max(ops.scratch_bytes(inputs, heads, keys, dim) for keys in (t, plan.keys.shape[3]))
    if scratch:
        listed.append(Buffer("scratch", (scratch,), torch.uint8, ((ATTEND, ATTEND), (CROSS, CROSS))))
    if not ops.capabilities.allocates_matmul_output:
        branch = ((INPUT, FIRST), (OUT, NORM1), (CROSS_OUT, NORM2), (DOWN, NORM3))
        listed += [
            Buffer("qkv", (inputs, t, 3 * d), dtype, ((QKV, ATTEND),)),
            Buffer("branch", (inputs, t, d), dtype, branch),
            Buffer("cross_q", (inputs, t, d), dtype, ((CROSS_Q, CROSS),)),
            Buffer("hidden", (inputs, t, spec.hidden), dtype, ((UP, DOWN),)),
            Buffer("output", (inputs, t, spec.channels), dtype, ((OUTPUT, STEP),)),
        ]
    return listed


class Views:
    """Views of an arena's buffers for the first `inputs` network inputs; optional ones are None where the table
    allocates outputs of matrix products."""

    def __init__(self, arena: Arena, inputs: int) -> None:
        def optional(name: str) -> Tensor | None:
            buffer = arena.find(name)
            return None if buffer is None else buffer[:inputs]

        self.input, self.residual, self.normed, self.q, self.k, self.attended = (
            arena.tensor(name)[:inputs] for name in ("input", "residual", "normed", "q", "k", "attended")
        )
        self.qkv, self.branch, self.cross_q = optional("qkv"), optional("branch"), optional("cross_q")
        self.hidden, self.output = optional("hidden"), optional("output")
        self.scratch = arena.find("scratch")


class Memory:
    """All static tensors of one running plan. One caller at a time may use it."""

    def __init__(self, plan: CompiledPlan, ops: Ops) -> None:
        self.arena = Arena(buffers(plan, ops), ops.device)
        self.conditional = Views(self.arena, plan.batch)
        self.guided = Views(self.arena, plan.batch * plan.copies)
        self.sampler = SamplerBuffers(
            self.arena.tensor("state"), self.arena.tensor("history"), self.arena.tensor("noise"), self.guided.input
        )


def memory_key(plan: CompiledPlan) -> tuple[int, ...]:
    """Return the sizes that fix the memory of a plan."""
    return (plan.batch, plan.copies, plan.frames, plan.keys.shape[3])


def forward(ops: Ops, weights: PackedTransformer, plan: CompiledPlan, call: PlannedCall, views: Views) -> Tensor:
    """Return the raw network's output (N, T, C) for the input in `views.input`.

    Args:
        ops: table of operators.
        weights: packed for it.
        plan: the request's tensors.
        call: blocks and modulation rows of this call.
        views: buffers of the call's inputs.
    """
    inputs, eps, row = len(views.input), plan.spec.norm_eps, call.first_row
    table, cross_lengths = plan.table[:inputs], plan.cross_lengths[:inputs]
    valid_frames = None if plan.valid_frames is None else plan.valid_frames[:inputs]

    def adaln(source: Tensor, branch: Tensor, modulation: Modulation, consumer: PackedLinear) -> Tensor:
        """Update the residual and return its norm, quantized to fp8 if the next product takes fp8."""
        out = views.normed if consumer.input_scale is None else as_fp8(views.normed)
        ops.adaln(source, branch, modulation, views.residual, out, eps, consumer.input_scale)
        return out

    blocks = [weights.blocks[index] for index in call.blocks]
    consumers = [*(block.qkv for block in blocks[1:]), weights.output]
    branch = ops.linear(views.input, weights.input, views.branch)
    normed = adaln(plan.local[:inputs], branch, Modulation(table, None, row, row + 1), blocks[0].qkv)
    for index, block, consumer in zip(call.blocks, blocks, consumers, strict=True):
        qkv = ops.linear(normed, block.qkv, views.qkv)
        v = ops.qk_norm_rope(qkv, plan.angles, block.qk_norm, views.q, views.k, eps)
        ops.attention(views.q, views.k, v, views.scratch, views.attended, valid_frames)
        branch = ops.linear(views.attended, block.out, views.branch)
        normed = adaln(views.residual, branch, Modulation(table, row + 2), block.cross_q)

        q = ops.linear(normed, block.cross_q, views.cross_q)
        keys, values = plan.keys[index, :inputs], plan.values[index, :inputs]
        ops.cross_attention(q, keys, values, block.cross_q_norm, cross_lengths, views.scratch, views.attended, eps)
        branch = ops.linear(views.attended, block.cross_out, views.branch)
        normed = adaln(views.residual, branch, Modulation(table, None, row + 3, row + 4), block.up)

        hidden_scale = block.down.input_scale
        hidden = views.hidden if hidden_scale is None or views.hidden is None else as_fp8(views.hidden)
        hidden = ops.linear(normed, block.up, hidden, "gelu_tanh", hidden_scale)
        branch = ops.linear(hidden, block.down, views.branch)
        # The norm after a block is the first one of the next block, or the last before the output: its rows follow.
        normed = adaln(views.residual, branch, Modulation(table, row + 5, row + 6, row + 7), consumer)
        row += BLOCK_ROWS
    return ops.linear(normed, weights.output, views.output)


def as_fp8(buffer: Tensor) -> Tensor:
    """Return the first bytes of a contiguous buffer as an fp8 (e4m3) tensor of the same shape."""
    return buffer.flatten().view(torch.float8_e4m3fn)[: buffer.numel()].view(buffer.shape)


def denoise(
    ops: Ops,
    weights: PackedTransformer | Sequence[PackedTransformer],
    plan: CompiledPlan,
    memory: Memory,
    seeds: Seeds,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run the whole trajectory: the hot path.

    Args:
        ops: table of operators.
        weights: one for all network calls, or one for each.
        plan: the request's tensors.
        memory: static tensors of the plan's sizes.
        seeds: one for each clip.
        on_step: called with (step, steps) after each step.

    Returns:
        Latents (B, T, C) fp32, a view of the memory.
    """
    s, edit = memory.sampler, plan.edit
    per_call = [weights] * len(plan.calls) if isinstance(weights, PackedTransformer) else weights
    torch.mul(ops.normal(seeds, 0, s.noise), plan.initial_scale[0], out=s.x)
    if edit is not None:
        s.x.add_(edit.init)
    torch.mul(s.x, plan.initial_scale[1], out=s.noise)
    s.network_input.unflatten(0, (plan.copies, plan.batch)).copy_(s.noise)
    s.history.zero_()
    for call, packed in zip(plan.calls, per_call, strict=True):
        output = forward(ops, packed, plan, call, memory.guided if call.guided else memory.conditional)
        unconditional = output[plan.batch :] if call.guided else None
        ops.sampler_step(s, output[: plan.batch], unconditional, seeds, call, edit)
        if on_step is not None and call.step:
            on_step(call.step, plan.steps)
    return s.x
