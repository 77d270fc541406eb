"""Everything about a request that is known before the first step, as tensors: what the hot path in forward.py reads.

Noise levels, blocks of each evaluation and update coefficients come from `trajectory`; the modulation rows of all
evaluations and blocks are one matrix product; rotary angles, the beat input's projection and the text's keys and values
for all blocks are made once. Also the plan's price: operations and bytes, counted, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..errors import InvalidInput
from ..models.dit import Condition, DiT, rotary_table
from .trajectory import Evaluation

ROWS = 6  # shift, scale, gate of attention and of the perceptron
LAST = 2  # shift and scale before the output


@dataclass(frozen=True)
class Run:
    """One evaluation for the hot path. row: where its rows begin in the modulation table; copies: of its next input."""

    sigma: float
    c_in: float
    blocks: tuple[int, ...]
    guided: bool
    row: int
    update: Tensor
    stream: int | None
    copies: int
    step: int


@dataclass(frozen=True)
class Plan:
    """A request as tensors. B clips, N = copies * B network inputs (the conditional ones first), T frames, S text
    tokens.

    table (N, rows, width) fp32; beat (N, T, width) fp32, the projected beat input; angles: cos, sin (T, head_dim / 2)
    fp32; keys, values (blocks, N, heads, S, head_dim) in the activations' dtype, keys normalised; lengths (N,) int32:
    real tokens.
    """

    config: ModelConfig
    batch: int
    copies: int
    tokens: int
    steps: int
    runs: tuple[Run, ...]
    table: Tensor
    beat: Tensor
    angles: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor
    lengths: Tensor


class Planner:
    """Makes plans. Holds, in fp32, the parts of the network that depend on the condition alone."""

    def __init__(self, dit: DiT) -> None:
        state = {name: value.float() for name, value in dit.state_dict().items()}
        # The same formulas as in training: a network without blocks keeps all that makes the condition vector.
        self.head = DiT(replace(dit.config, blocks=0)).eval().requires_grad_(False)
        self.head.load_state_dict({name: value for name, value in state.items() if not name.startswith("blocks.")})
        self.config = dit.config

        def stacked(name: str) -> Tensor:
            return torch.stack([state[f"blocks.{i}.{name}"] for i in range(dit.config.blocks)])

        self.modulation = torch.cat([stacked("modulation.weight").flatten(0, 1), state["modulation.weight"]])
        self.modulation_bias = torch.cat([stacked("modulation.bias").flatten(0, 1), state["modulation.bias"]])
        self.cross_kv, self.k_norm = stacked("cross_kv.weight"), stacked("cross_k_norm.weight")

    def plan(self, evaluations: Sequence[Evaluation], condition: Condition, unconditional: Condition, tokens: int,
             dtype: torch.dtype) -> Plan:  # fmt: skip
        """The plan for B clips. dtype: of activations. Raises InvalidInput where masks are not "real tokens first"."""
        batch = len(condition.text)
        guided = any(e.guided for e in evaluations)
        both = condition.cat(unconditional) if guided else condition
        table, starts = self._table(evaluations, both)
        keys, values, lengths = self._text(both, dtype)
        runs = []
        for i, e in enumerate(evaluations):
            following = evaluations[i + 1] if i + 1 < len(evaluations) else None
            copies = 0 if following is None else 1 + following.guided
            runs.append(
                Run(e.sigma, e.c_in, e.blocks, e.guided, starts[i], torch.tensor(e.update, dtype=torch.float32),
                    e.stream, copies, e.step)
            )  # fmt: skip
        return Plan(
            self.config, batch, 1 + guided, tokens, evaluations[-1].step, tuple(runs), table,
            F.linear(both.beat.float(), self.head.beat.weight), rotary_table(tokens, self.config.head_dim), keys,
            values, lengths,
        )  # fmt: skip

    def _table(self, evaluations: Sequence[Evaluation], both: Condition) -> tuple[Tensor, list[int]]:
        """Modulation rows (N, rows, width) of every evaluation, and where each evaluation's begin."""
        n, depth, width = len(both.text), self.config.blocks, self.config.width
        times = torch.tensor([e.time for e in evaluations], dtype=torch.float64).float()
        budgets = torch.tensor([e.budget for e in evaluations], dtype=torch.float32)
        repeated = Condition(*(getattr(both, k).repeat(len(evaluations), *[1] * (getattr(both, k).ndim - 1))
                               for k in both.__dataclass_fields__))  # fmt: skip
        vector = self.head.condition_vector(times.repeat_interleave(n), repeated, budgets.repeat_interleave(n))
        rows = F.linear(vector, self.modulation, self.modulation_bias).view(len(evaluations), n, -1, width)
        chosen, starts, begin = [], [], 0
        for i, e in enumerate(evaluations):
            index = [b * ROWS + r for b in e.blocks for r in range(ROWS)] + [depth * ROWS + r for r in range(LAST)]
            chosen.append(rows[i][:, index])
            starts.append(begin)
            begin += len(index)
        return torch.cat(chosen, 1), starts

    def _text(self, both: Condition, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (blocks, N, heads, S, head_dim) and the number of real tokens (N,)."""
        mask = both.text_mask
        lengths = mask.sum(1, dtype=torch.int32)
        if not torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None]):
            raise InvalidInput("the engine needs text masks with the real tokens first")
        heads, dim = self.config.heads, self.config.head_dim
        kv = F.linear(both.text.float(), self.cross_kv.flatten(0, 1))
        kv = kv.unflatten(-1, (self.config.blocks, 2, heads, dim)).permute(
            3, 2, 0, 4, 1, 5
        )  # 2, blocks, N, heads, S, dim
        keys = F.rms_norm(kv[0], (dim,), eps=1e-6) * self.k_norm[:, None, None, None]
        return keys.to(dtype).contiguous(), kv[1].to(dtype).contiguous(), lengths


# ---- what a plan costs


@dataclass(frozen=True)
class Cost:
    """Operations (a multiply-add is two) and bytes moved: each input read once, each output written once."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, count: int) -> Cost:
        return Cost(self.flops * count, self.bytes * count)


def linear_cost(rows: int, inputs: int, outputs: int, size: int) -> Cost:
    """A matrix product with weights and activations of `size` bytes; the bias is not counted."""
    return Cost(2 * rows * inputs * outputs, size * (rows * inputs + inputs * outputs + rows * outputs))


def attention_cost(clips: int, tokens: int, keys: int, width: int, size: int) -> Cost:
    """Both products of attention; the softmax is not counted."""
    return Cost(4 * clips * tokens * keys * width, size * clips * width * (2 * tokens + 2 * keys))


def block_cost(c: ModelConfig, clips: int, tokens: int, keys: int, size: int) -> dict[str, Cost]:
    """One block for `clips` network inputs, operator by operator."""
    rows, d, hidden = clips * tokens, c.width, c.mlp_ratio * c.width
    norm = Cost(0, rows * d * (4 + size + 4 + size))  # residual and branch in, residual and norm out
    return {
        "qkv": linear_cost(rows, d, 3 * d, size),
        "qk_norm_rope": Cost(0, 4 * rows * d * size),
        "attention": attention_cost(clips, tokens, tokens, d, size),
        "out": linear_cost(rows, d, d, size),
        "norms": norm * 3,
        "cross_q": linear_cost(rows, d, d, size),
        "cross_attention": attention_cost(clips, tokens, keys, d, size),
        "cross_out": linear_cost(rows, d, d, size),
        "up": linear_cost(rows, d, hidden, size),
        "down": linear_cost(rows, hidden, d, size),
    }


def plan_cost(plan: Plan, size: int) -> Cost:
    """The whole trajectory without text and codec. size: bytes of an activation."""
    c, total = plan.config, Cost(0, 0)
    for run in plan.runs:
        clips = plan.batch * (plan.copies if run.guided else 1)
        rows = clips * plan.tokens
        block = sum(block_cost(c, clips, plan.tokens, plan.keys.shape[3], size).values(), Cost(0, 0))
        ends = linear_cost(rows, c.latent_channels, c.width, size) + linear_cost(rows, c.width, c.latent_channels, size)
        total = total + block * len(run.blocks) + ends
    return total
