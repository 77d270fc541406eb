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

from ..diffusion.trajectory import Evaluation
from ..errors import InvalidInputError
from ..models.config import ModelConfig
from ..models.dit import Condition, DiT, rotary_table

ROWS = 6  # shift, scale, gate of attention and of the perceptron
LAST = 2  # shift and scale before the output


# What is told of an evaluation in numbers: a row of fp32 (see `numbers`).
TIME, BUDGET, UPDATE, AFTER, NUMBERS = 0, 1, slice(2, 11), slice(11, 12), 12


@dataclass(frozen=True)
class Step:
    """What one evaluation does, apart from its numbers. row: where its rows begin in the modulation table; copies: of
    its next input; step: the sampler step that ends with it, or 0."""

    blocks: tuple[int, ...]
    guided: bool
    row: int
    stream: int | None
    copies: int
    step: int


@dataclass(frozen=True)
class Run(Step):
    """One evaluation for the hot path. update (9,), after (1,): fp32, on the plan's device."""

    update: Tensor
    after: Tensor


@dataclass(frozen=True)
class Form:
    """What fixes the shape of a plan, with the tensors that depend on nothing else. Two requests of one form differ
    only in numbers: noise levels, guidance scale, texts, seeds. rows: which of all modulation rows are used, in order;
    None for all."""

    steps: tuple[Step, ...]
    tokens: int
    rows: Tensor | None
    angles: tuple[Tensor, Tensor]

    @property
    def guided(self) -> bool:
        return any(step.guided for step in self.steps)


@dataclass(frozen=True)
class Edit:
    """What stays of a clip: init (B, T, C) fp32 latents; keep (B, T) fp32, 1 where they stay, 0 where they may change.
    The start is init + noise, so with keep = 0 it is a variation of the clip."""

    init: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Plan:
    """A request as tensors. B clips, N = copies * B network inputs (the conditional ones first), T frames, S text
    tokens.

    table (N, rows, width) fp32; beat (N, T, width) fp32, the projected beat input; angles: cos, sin (T, head_dim / 2)
    fp32; keys, values (blocks, N, heads, S, head_dim) in the activations' dtype, keys normalised; lengths (N,) int32:
    real tokens; start (2,) fp32: the first noise level and c_in; frames (N,) int32: real latent frames of each input,
    None for all.
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
    start: Tensor
    frames: Tensor | None = None
    edit: Edit | None = None


def numbers(evaluations: Sequence[Evaluation]) -> Tensor:
    """(E, 12) fp32: time, budget, the update's nine numbers, the level after it."""
    rows = [(e.time, e.budget, *e.update, e.after) for e in evaluations]
    return torch.tensor(rows, dtype=torch.float64).float()


def start(evaluations: Sequence[Evaluation]) -> Tensor:
    """(2,) fp32: the first noise level and its c_in."""
    return torch.tensor([evaluations[0].sigma, evaluations[0].c_in], dtype=torch.float64).float()


class Planner:
    """Makes plans. Holds, in fp32, the parts of the network that depend on the condition alone."""

    def __init__(self, dit: DiT, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        state = {name: value.to(device, torch.float32) for name, value in dit.state_dict().items()}
        # The same formulas as in training: a network without blocks keeps all that makes the condition vector.
        with torch.device(device):
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
        """The plan for B clips. dtype: of activations. Raises InvalidInputError where masks are not "real tokens first"."""
        guided = any(e.guided for e in evaluations)
        both = condition.cat(unconditional) if guided else condition
        mask = both.text_mask
        lengths = mask.sum(1, dtype=torch.int32)
        if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
            raise InvalidInputError("the engine needs text masks with the real tokens first")
        form = self.form(evaluations, tokens)
        told, begin = numbers(evaluations).to(self.device), start(evaluations).to(self.device)
        return self.build(form, told, begin, both, lengths, dtype)

    def form(self, evaluations: Sequence[Evaluation], tokens: int) -> Form:
        """The form of plans with these evaluations and `tokens` latent frames."""
        every = ROWS * self.config.blocks + LAST
        chosen: list[int] = []
        steps = []
        for i, e in enumerate(evaluations):
            following = evaluations[i + 1] if i + 1 < len(evaluations) else None
            copies = 0 if following is None else 1 + following.guided
            steps.append(Step(e.blocks, e.guided, len(chosen), e.stream, copies, e.step))
            used = [b * ROWS + r for b in e.blocks for r in range(ROWS)] + list(range(every - LAST, every))
            chosen += [i * every + row for row in used]
        whole = len(chosen) == every * len(evaluations)
        rows = None if whole else torch.tensor(chosen, device=self.device)
        return Form(tuple(steps), tokens, rows, rotary_table(tokens, self.config.head_dim, self.device))

    def build(self, form: Form, told: Tensor, begin: Tensor, both: Condition, lengths: Tensor, dtype: torch.dtype,
              frames: Tensor | None = None, edit: Edit | None = None) -> Plan:  # fmt: skip
        """The plan of a form from numbers and conditions on the planner's device: no tensor is looked at on the way, so
        a CUDA graph may hold all of it.

        told, begin: from `numbers` and `start`; both: the conditions, then, where the form is guided, the unconditional
        ones; lengths (N,) int32: text tokens of each; frames, edit: see Plan.
        """
        copies = 1 + form.guided
        table = self._table(form, told, both)
        keys, values = self._text(both, dtype)
        runs = tuple(Run(**vars(step), update=row[UPDATE], after=row[AFTER])
                     for step, row in zip(form.steps, told.unbind(), strict=True))  # fmt: skip
        return Plan(
            self.config, len(both.text) // copies, copies, form.tokens, form.steps[-1].step, runs, table,
            F.linear(both.beat.float(), self.head.beat.weight), form.angles, keys, values, lengths, begin, frames, edit,
        )  # fmt: skip

    def _table(self, form: Form, told: Tensor, both: Condition) -> Tensor:
        """Modulation rows (N, rows, width) of every evaluation."""
        n, count = len(both.text), len(told)
        repeated = replace(both, **{k: getattr(both, k).repeat(count, *[1] * (getattr(both, k).ndim - 1))
                                    for k in ("pooled", "seconds", "key")})  # fmt: skip
        times, budgets = (told[:, i].repeat_interleave(n) for i in (TIME, BUDGET))
        vector = self.head.condition_vector(times, repeated, budgets)
        rows = F.linear(vector, self.modulation, self.modulation_bias).view(count, n, -1, self.config.width)
        rows = rows.transpose(0, 1).flatten(1, 2)
        return rows.contiguous() if form.rows is None else rows.index_select(1, form.rows)

    def _text(self, both: Condition, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of all blocks, (blocks, N, heads, S, head_dim) each."""
        heads, dim = self.config.heads, self.config.head_dim
        kv = F.linear(both.text.float(), self.cross_kv.flatten(0, 1))
        kv = kv.unflatten(-1, (self.config.blocks, 2, heads, dim)).permute(
            3, 2, 0, 4, 1, 5
        )  # 2, blocks, N, heads, S, dim
        keys = F.rms_norm(kv[0], (dim,), eps=1e-6) * self.k_norm[:, None, None, None]
        return keys.to(dtype).contiguous(), kv[1].to(dtype).contiguous()


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
