"""Matrix products in fp8 where the error is small: weights with a scale for each output, inputs with a static scale for
each product of each network call.

The schedule of noise levels is fixed, so the range of every product's input is measured beforehand, on four prompts.
The operator before the product then leaves its result in fp8, divided by that scale: the norm for "qkv", "cross_q" and
"up", GELU for "down". Attention's results and the layers at both ends stay in the activations' dtype. A product whose
error against the same product unrounded is over a threshold stays too: the choice is part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...conditioning.ports import NEGATIVE, ClipControls, Conditioner
from ...kernels import gemm, runtime
from ..backend import Job
from ..dit import Memory, PackedTransformer, denoise
from ..ops import PackedLinear
from ..plan import CompiledPlan, LatentEdit
from .ops import FP8, CudaLinear, CudaOps

LAYERS = ("qkv", "cross_q", "up", "down")
PROMPTS = (
    "calm piano with warm strings, 84 bpm",
    "fast drum and bass, deep sub bass, 174 bpm",
    "solo violin, slow and sad, in D minor",
    "bright brass band march",
)


@dataclass(frozen=True)
class Fp8:
    """Settings of the calibration.

    threshold: relative root-mean-square error above which a product is not computed in fp8; rounding to e4m3's 3 bits
    of mantissa alone costs a product 3.7 %. margin: room above the largest input of the calibration.
    """

    threshold: float = 0.045
    margin: float = 1.25


@dataclass(frozen=True)
class ProductChoice:
    """Calibration of one product.

    call, block, layer: name the product. input_scale: divisor of its input. error: relative error in fp8. fp8: it runs
    in fp8.
    """

    call: int
    block: int
    layer: str
    input_scale: float
    error: float
    fp8: bool


@dataclass
class ProductStatistics:
    """Statistics of one product, on the device: largest input magnitude, summed squares of error and of result."""

    rounded: CudaLinear
    largest: Tensor
    squared_error: Tensor
    squared_result: Tensor


class RangeObserver(CudaOps):
    """A CUDA table that measures the inputs of some products: their ranges, or, with `scales`, their fp8 errors.

    Args:
        ops: the table that is observed.
        statistics: of each observed product, by the identity of its weights.
        scales: input scale of each observed product; None in the first pass.
    """

    def __init__(self, ops: CudaOps, statistics: dict[int, ProductStatistics], scales: dict[int, float] | None) -> None:
        super().__init__(ops.dtype, ops.device, ops.unfused, ops.backend)
        self.statistics, self.scales = statistics, scales

    def linear(
        self,
        x: Tensor,
        weights: PackedLinear,
        out: Tensor | None,
        activation: str = "none",
        out_scale: float | None = None,
    ) -> Tensor:
        """See `Ops.linear`."""
        product = self.statistics.get(id(weights))
        if product is not None and self.scales is None:
            product.largest = torch.maximum(product.largest, x.abs().amax().float())
        elif product is not None and self.scales is not None:
            scale = self.scales[id(weights)]
            rounded = gemm.linear(
                runtime.saturating_cast(x.float() / scale, FP8),
                product.rounded.weight,
                scales=gemm.Fp8Scales(scale, product.rounded.weight_scale),
                out_dtype=torch.float32,
                backend="auto" if x.is_cuda else "torch",
            )
            exact = torch.nn.functional.linear(x, dense(weights).weight).float()
            product.squared_error = product.squared_error + (rounded - exact).square().sum()
            product.squared_result = product.squared_result + exact.square().sum()
        return super().linear(x, weights, out, activation, out_scale)


def calibration_jobs(job: Job, conditioner: Conditioner) -> Iterator[Job]:
    """Yield the calibration: PROMPTS with seeds 0, 1, ... in place of a job's, without tempo, key and edit.

    So the result does not depend on which request comes first. job: gives the trajectory and the number of clips.
    """
    clips = len(job.seeds)
    negative = any(name.startswith(NEGATIVE) for name in job.inputs)
    for seed, prompt in enumerate(PROMPTS):
        controls = ClipControls(prompt, prompt if negative else None)
        edit = None
        if job.edit is not None:
            edit = LatentEdit(torch.zeros_like(job.edit.init), torch.zeros_like(job.edit.keep))
        inputs = conditioner.prepare([controls] * clips, job.frames)
        yield replace(job, inputs=inputs, seeds=[seed] * clips, edit=edit)


def calibrate(
    ops: CudaOps,
    packed: PackedTransformer,
    plans: Iterable[tuple[CompiledPlan, Tensor]],
    memory: Callable[[CompiledPlan], Memory],
    settings: Fp8,
) -> tuple[tuple[PackedTransformer, ...], tuple[ProductChoice, ...]]:
    """Return weights for each network call, some products in fp8, and the calibration of every product.

    Args:
        ops: table of operators.
        packed: weights in the activations' dtype.
        plans: with their seeds; each runs twice.
        memory: static tensors of a plan.
        settings: threshold and margin.
    """
    rounded = [{name: ops.to_fp8(dense(getattr(block, name)), 1.0) for name in LAYERS} for block in packed.blocks]
    per_call: list[PackedTransformer] = []
    statistics: dict[int, ProductStatistics] = {}
    scales: dict[int, float] = {}
    runs = list(plans)
    zero = torch.zeros((), device=ops.device)
    for call in runs[0][0].calls:
        blocks = list(packed.blocks)
        for block in call.blocks:
            copies: dict[str, Any] = {
                name: replace(dense(getattr(blocks[block], name))) for name in LAYERS
            }  # this call's own objects
            blocks[block] = replace(blocks[block], **copies)
            for name, weights in copies.items():
                statistics[id(weights)] = ProductStatistics(rounded[block][name], zero, zero, zero)
        per_call.append(replace(packed, blocks=tuple(blocks)))
    for measured in (None, scales):
        observer = RangeObserver(ops, statistics, measured)
        for plan, seeds in runs:
            denoise(observer, per_call, plan, memory(plan), seeds)
        if measured is None:
            limit = runtime.fp8_limit(FP8)
            for key, product in statistics.items():
                scales[key] = max(settings.margin * float(product.largest) / limit, 1e-12)
    choices: list[ProductChoice] = []
    result: list[PackedTransformer] = []
    for number, (call, weights_of_call) in enumerate(zip(runs[0][0].calls, per_call, strict=True)):
        blocks = list(weights_of_call.blocks)
        for block in call.blocks:
            replaced: dict[str, Any] = {}
            for name in LAYERS:
                key = id(getattr(weights_of_call.blocks[block], name))
                product = statistics[key]
                error = float((product.squared_error / product.squared_result.clamp_min(1e-30)).sqrt())
                accepted = error <= settings.threshold
                choices.append(ProductChoice(number, block, name, scales[key], error, accepted))
                if accepted:
                    replaced[name] = replace(rounded[block][name], input_scale=scales[key])
            blocks[block] = replace(blocks[block], **replaced)
        result.append(replace(weights_of_call, blocks=tuple(blocks)))
    return tuple(result), tuple(choices)


def dense(weights: PackedLinear) -> CudaLinear:
    """Return the weights as the CUDA table's."""
    assert isinstance(weights, CudaLinear)
    return weights
