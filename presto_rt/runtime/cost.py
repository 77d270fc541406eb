"""Operations and bytes of a plan, counted from its shapes."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import CompiledPlan
from .spec import NetworkSpec


@dataclass(frozen=True)
class Cost:
    """Operations (a multiply-add counts as two) and bytes moved: each input read once, each output written once."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, count: int) -> Cost:
        return Cost(self.flops * count, self.bytes * count)


def linear_cost(rows: int, inputs: int, outputs: int, itemsize: int) -> Cost:
    """Return the cost of a matrix product with weights and activations of `itemsize` bytes, without the bias."""
    return Cost(2 * rows * inputs * outputs, itemsize * (rows * inputs + inputs * outputs + rows * outputs))


def attention_cost(batch: int, queries: int, keys: int, width: int, itemsize: int) -> Cost:
    """Return the cost of both products of attention, without the softmax.

    Args:
        batch: network inputs.
        queries: tokens.
        keys: tokens that are attended to.
        width: heads times head dimension.
        itemsize: bytes of an activation.
    """
    return Cost(4 * batch * queries * keys * width, itemsize * batch * width * (2 * queries + 2 * keys))


def block_cost(spec: NetworkSpec, batch: int, frames: int, keys: int, itemsize: int) -> dict[str, Cost]:
    """Return the cost of each operator of one block.

    Args:
        spec: of the network.
        batch: network inputs.
        frames: latent frames.
        keys: tokens of cross-attention.
        itemsize: bytes of an activation.
    """
    rows, width, hidden = batch * frames, spec.width, spec.hidden
    norm = Cost(0, rows * width * (4 + itemsize + 4 + itemsize))  # residual and branch in, residual and norm out
    return {
        "qkv": linear_cost(rows, width, 3 * width, itemsize),
        "qk_norm_rope": Cost(0, 4 * rows * width * itemsize),
        "attention": attention_cost(batch, frames, frames, width, itemsize),
        "out": linear_cost(rows, width, width, itemsize),
        "norms": norm * 3,
        "cross_q": linear_cost(rows, width, width, itemsize),
        "cross_attention": attention_cost(batch, frames, keys, width, itemsize),
        "cross_out": linear_cost(rows, width, width, itemsize),
        "up": linear_cost(rows, width, hidden, itemsize),
        "down": linear_cost(rows, hidden, width, itemsize),
    }


def plan_cost(plan: CompiledPlan, itemsize: int) -> Cost:
    """Return the cost of the whole trajectory, without text encoder and codec. itemsize: bytes of an activation."""
    spec, total = plan.spec, Cost(0, 0)
    for call in plan.calls:
        batch = plan.batch * (plan.copies if call.guided else 1)
        rows = batch * plan.frames
        block = sum(block_cost(spec, batch, plan.frames, plan.keys.shape[3], itemsize).values(), Cost(0, 0))
        ends = linear_cost(rows, spec.channels, spec.width, itemsize)
        ends += linear_cost(rows, spec.width, spec.channels, itemsize)
        total = total + block * len(call.blocks) + ends
    return total
