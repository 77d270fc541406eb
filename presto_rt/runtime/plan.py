"""`CompiledPlan`: everything about a request that is known before the first step, as tensors.

The trajectory's coefficients come from `diffusion.trajectory`. The modulation rows of all calls and blocks are one
matrix product; rotary angles, the projected local port and the cross-attention keys and values of all blocks are
computed once. The loop in `dit.py` only reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning.ports import Conditioning
from ..diffusion.trajectory import NetworkCall, StepCoefficients
from ..models.rotary import rotary_angles
from .spec import NetworkSpec
from .weights import TransformerWeights

BLOCK_ROWS = 6  # shift, scale and gate of attention, then of the MLP
FINAL_ROWS = 2  # shift and scale before the output

# Columns of the call table, (calls, COLUMNS) fp32: see `call_table`.
TIME, BUDGET = 0, 1
COEFFICIENTS = slice(2, 2 + len(StepCoefficients._fields))
NEXT_SIGMA = slice(COEFFICIENTS.stop, COEFFICIENTS.stop + 1)
COLUMNS = NEXT_SIGMA.stop


@dataclass(frozen=True)
class CallLayout:
    """The part of a network call that fixes the shape of its work.

    blocks: indices of the blocks that run. guided: the unconditional branch runs too. first_row: where the call's rows
    begin in the modulation table. noise_stream: of the fresh noise, or None. next_copies: of the next network input.
    step: the sampler step that ends with this call, or 0.
    """

    blocks: tuple[int, ...]
    guided: bool
    first_row: int
    noise_stream: int | None
    next_copies: int
    step: int


@dataclass(frozen=True)
class PlannedCall(CallLayout):
    """A network call for the hot path; coefficients (9,) and next_sigma (1,) are fp32 on the plan's device."""

    coefficients: Tensor
    next_sigma: Tensor


@dataclass(frozen=True)
class PlanLayout:
    """The part of a plan that fixes its shape, with the tensors that depend on nothing else.

    Two requests of one layout differ in numbers alone: noise levels, guidance scale, texts, seeds. rows: index of the
    modulation rows that are used, in order; None for all. angles: cos and sin (frames, head_dim / 2) fp32.
    """

    calls: tuple[CallLayout, ...]
    frames: int
    rows: Tensor | None
    angles: tuple[Tensor, Tensor]

    @property
    def guided(self) -> bool:
        """Any call is guided."""
        return any(call.guided for call in self.calls)


@dataclass(frozen=True)
class LatentEdit:
    """Latents that a clip keeps: init (B, T, C) fp32; keep (B, T) fp32, 1 where init stays, 0 where it may change.

    The start is init + noise, so keep = 0 everywhere makes a variation of the clip.
    """

    init: Tensor
    keep: Tensor


@dataclass(frozen=True)
class CompiledPlan:
    """A request of B clips as tensors; N = copies * B network inputs, the conditional ones first.

    Args:
        spec: of the network.
        batch: B.
        copies: 2 if any call is guided, else 1.
        frames: latent frames T.
        steps: sampler steps.
        calls: network calls in order.
        table: (N, rows, width) fp32 modulation rows.
        local: (N, T, width) fp32, the projected local port.
        angles: cos and sin (T, head_dim / 2) fp32.
        keys: (blocks, N, heads, S, head_dim) in the activations' dtype, normalized.
        values: (blocks, N, heads, S, head_dim) in the activations' dtype.
        cross_lengths: (N,) int32 valid tokens.
        initial_scale: (2,) fp32, the first noise level and its c_in.
        valid_frames: (N,) int32; None for all.
        edit: latents that are kept, or None.
    """

    spec: NetworkSpec
    batch: int
    copies: int
    frames: int
    steps: int
    calls: tuple[PlannedCall, ...]
    table: Tensor
    local: Tensor
    angles: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor
    cross_lengths: Tensor
    initial_scale: Tensor
    valid_frames: Tensor | None = None
    edit: LatentEdit | None = None


def call_table(calls: Sequence[NetworkCall]) -> Tensor:
    """Return (calls, COLUMNS) fp32: time, budget, the nine coefficients, the noise level after the update."""
    rows = [(call.time, call.budget, *call.coefficients, call.next_sigma) for call in calls]
    return torch.tensor(rows, dtype=torch.float64).float()


def initial_scale(calls: Sequence[NetworkCall]) -> Tensor:
    """Return (2,) fp32: the first noise level and its c_in."""
    return torch.tensor([calls[0].sigma, calls[0].c_in], dtype=torch.float64).float()


class Planner:
    """Builds plans; holds, in fp32, the weights that depend on the conditioning alone.

    Args:
        weights: of the transformer, on `device`.
        spec: shape of the transformer.
        device: where plans are built.
    """

    def __init__(self, weights: TransformerWeights, spec: NetworkSpec, device: torch.device | str = "cpu") -> None:
        self.spec, self.device = spec, torch.device(device)
        self.embedding, self.local = weights.embedding, weights.local
        modulations = [*(block.modulation for block in weights.blocks), weights.modulation]
        self.modulation = torch.cat([m.weight for m in modulations])
        self.modulation_bias = torch.cat([m.bias for m in modulations if m.bias is not None])
        self.cross_kv = torch.stack([block.cross_kv.weight for block in weights.blocks])
        self.k_norm = torch.stack([block.cross_k_norm for block in weights.blocks])

    def plan(
        self,
        calls: Sequence[NetworkCall],
        conditional: Conditioning,
        unconditional: Conditioning,
        frames: int,
        dtype: torch.dtype,
        edit: LatentEdit | None = None,
    ) -> CompiledPlan:
        """Return the plan of B clips.

        Args:
            calls: of the trajectory.
            conditional: conditioning of B clips.
            unconditional: the other branch of guidance; not read where no call is guided.
            frames: latent frames.
            dtype: of the activations.
            edit: latents that are kept, or None.
        """
        layout = self.layout(calls, frames)
        conditioning = conditional.cat(unconditional) if layout.guided else conditional
        table, scale = call_table(calls).to(self.device), initial_scale(calls).to(self.device)
        return self.build(layout, table, scale, conditioning, dtype, edit=edit)

    def layout(self, calls: Sequence[NetworkCall], frames: int) -> PlanLayout:
        """Return the layout of plans with these calls and `frames` latent frames."""
        rows_per_call = BLOCK_ROWS * self.spec.blocks + FINAL_ROWS
        final = range(rows_per_call - FINAL_ROWS, rows_per_call)
        used: list[int] = []
        layouts = []
        for i, call in enumerate(calls):
            next_copies = 1 + calls[i + 1].guided if i + 1 < len(calls) else 0
            layouts.append(CallLayout(call.blocks, call.guided, len(used), call.noise_stream, next_copies, call.step))
            rows = [*(block * BLOCK_ROWS + row for block in call.blocks for row in range(BLOCK_ROWS)), *final]
            used += [i * rows_per_call + row for row in rows]
        complete = len(used) == rows_per_call * len(calls)
        index = None if complete else torch.tensor(used, device=self.device)
        return PlanLayout(tuple(layouts), frames, index, rotary_angles(frames, self.spec.head_dim, self.device))

    def build(
        self,
        layout: PlanLayout,
        table: Tensor,
        scale: Tensor,
        conditioning: Conditioning,
        dtype: torch.dtype,
        valid_frames: Tensor | None = None,
        edit: LatentEdit | None = None,
    ) -> CompiledPlan:
        """Build a plan from staged inputs without host synchronization, so that a CUDA graph can capture it.

        Args:
            layout: from `layout`.
            table: from `call_table`, on the planner's device.
            scale: from `initial_scale`, on the planner's device.
            conditioning: conditional inputs, followed by the unconditional ones where the layout is guided.
            dtype: of the activations.
            valid_frames: (N,) int32, or None for all.
            edit: latents that are kept, or None.
        """
        copies = 1 + layout.guided
        keys, values = self._cross_keys_values(conditioning.cross, dtype)
        calls = tuple(
            PlannedCall(**vars(call), coefficients=row[COEFFICIENTS], next_sigma=row[NEXT_SIGMA])
            for call, row in zip(layout.calls, table.unbind(), strict=True)
        )
        return CompiledPlan(
            spec=self.spec,
            batch=len(conditioning.cross) // copies,
            copies=copies,
            frames=layout.frames,
            steps=layout.calls[-1].step,
            calls=calls,
            table=self._modulation_rows(layout, table, conditioning.vector),
            local=F.linear(conditioning.local.float(), self.local),
            angles=layout.angles,
            keys=keys,
            values=values,
            cross_lengths=conditioning.cross_lengths,
            initial_scale=scale,
            valid_frames=valid_frames,
            edit=edit,
        )

    def _modulation_rows(self, layout: PlanLayout, table: Tensor, vector: Tensor) -> Tensor:
        """Modulation rows (N, rows, width) of every call."""
        inputs, calls = len(vector), len(table)
        times, budgets = (table[:, column].repeat_interleave(inputs) for column in (TIME, BUDGET))
        embedded = self.embedding(times, vector.repeat(calls, 1), budgets)
        rows = F.linear(embedded, self.modulation, self.modulation_bias).view(calls, inputs, -1, self.spec.width)
        rows = rows.transpose(0, 1).flatten(1, 2)
        return rows.contiguous() if layout.rows is None else rows.index_select(1, layout.rows)

    def _cross_keys_values(self, cross: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of all blocks, (blocks, N, heads, S, head_dim) each."""
        spec = self.spec
        kv = F.linear(cross.float(), self.cross_kv.flatten(0, 1))
        kv = kv.unflatten(-1, (spec.blocks, 2, spec.heads, spec.head_dim))
        kv = kv.permute(3, 2, 0, 4, 1, 5)  # 2, blocks, N, heads, S, head_dim
        keys = F.rms_norm(kv[0], (spec.head_dim,), eps=spec.norm_eps) * self.k_norm[:, None, None, None]
        return keys.to(dtype).contiguous(), kv[1].to(dtype).contiguous()
