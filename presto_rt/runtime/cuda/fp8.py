"""Matrix products in fp8, where it does little harm: weights with a scale for each output, inputs with a static scale
for each product of each evaluation.

The schedule of noise levels is fixed, so the range of every product's input can be measured beforehand, on a few
prompts. The operator before the product then leaves its result in fp8, divided by that scale: the norm for "qkv",
"cross_q" and "up", GELU for "down". Attention's results, and the layers at both ends, stay as they are.
A product whose error against the same product unrounded is over a threshold stays too: the choice is part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...conditioning.minilm import TextEncoder
from ...kernels import gemm, runtime
from ...models.config import ModelConfig
from ..dit import Layer, Memory, Weights, run_plan
from ..plan import Plan
from .buffers import Request
from .ops import CudaOps, Packed

LAYERS = ("qkv", "cross_q", "up", "down")
PROMPTS = (
    "calm piano with warm strings, 84 bpm",
    "fast drum and bass, deep sub bass, 174 bpm",
    "solo violin, slow and sad, in D minor",
    "bright brass band march",
)
NARROW = torch.float8_e4m3fn


@dataclass(frozen=True)
class Fp8:
    """threshold: the relative root-mean-square error of a product, over which it is not computed in fp8. e4m3 rounds
    numbers to 3 bits of mantissa: 3.7 % is what rounding alone costs a product. margin: room above the largest input
    that the calibration has seen."""

    threshold: float = 0.045
    margin: float = 1.25


@dataclass(frozen=True)
class Choice:
    """What was found for one product: scale of its input, error in fp8, and whether it runs in fp8."""

    evaluation: int
    block: int
    layer: str
    scale: float
    error: float
    fp8: bool


@dataclass
class _Seen:
    """What the calibration saw of one product: its largest input, and the squares of error and result summed. The
    numbers stay on the device."""

    narrow: Packed
    largest: Tensor
    error: Tensor
    size: Tensor


class _Watch:
    """A table of operators that measures the inputs of some products on the way. In a first pass the ranges, in a
    second, `scales` given, the errors."""

    def __init__(self, ops: CudaOps, seen: dict[int, _Seen], scales: dict[int, float] | None) -> None:
        self.ops, self.seen, self.scales = ops, seen, scales

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def linear(self, x: Tensor, weights: Packed, out: Tensor, activation: str = "none") -> Tensor:
        seen = self.seen.get(id(weights))
        if seen is not None and self.scales is None:
            seen.largest = torch.maximum(seen.largest, x.abs().amax().float())
        elif seen is not None and self.scales is not None:
            scale = self.scales[id(weights)]
            narrow = runtime.narrow(x.float() / scale, NARROW)
            rounded = gemm.linear(narrow, seen.narrow.weight, x_scale=scale, weight_scale=seen.narrow.weight_scale,
                                  out_dtype=torch.float32, backend="torch" if not x.is_cuda else "auto")  # fmt: skip
            plain = torch.nn.functional.linear(x, weights.weight).float()
            seen.error = seen.error + (rounded - plain).square().sum()
            seen.size = seen.size + plain.square().sum()
        return self.ops.linear(x, weights, out, activation)


def requests(like: Request, encoder: TextEncoder, config: ModelConfig) -> Iterator[Request]:
    """The calibration: PROMPTS with seeds 0, 1, ... in the place of a request's, without tempo, key and edit, so that
    it does not depend on who comes first."""
    clips = len(like.prompts)
    for seed, ids in enumerate(encoder.tokens(list(PROMPTS), config.text_tokens)):
        again = None if like.negative is None else [ids] * clips
        init = None if like.init is None else torch.zeros_like(like.init)
        yield replace(like, prompts=[ids] * clips, seeds=[seed] * clips, negative=again, init=init, keep=None,
                      beat=torch.zeros_like(like.beat), key=torch.zeros_like(like.key))  # fmt: skip


def calibrate(
    ops: CudaOps, weights: Weights, plans: Iterable[tuple[Plan, Tensor]], memory: Callable[[Plan], Memory], how: Fp8
) -> tuple[tuple[Weights, ...], tuple[Choice, ...]]:
    """Weights for each evaluation, some products in fp8, and what was found for every product that could be.

    plans: with their seeds; each is run twice.
    """
    narrowed = [{name: ops.narrow(getattr(layer, name), 1.0) for name in LAYERS} for layer in weights.layers]
    own: list[Weights] = []
    seen: dict[int, _Seen] = {}
    scales: dict[int, float] = {}
    plain_steps = list(plans)  # plans hold tensors of their own; only the inputs' block is shared
    zero = torch.zeros((), device=ops.device)
    for run in plain_steps[0][0].runs:
        layers = list(weights.layers)
        for block in run.blocks:
            copies = {name: replace(getattr(layers[block], name)) for name in LAYERS}  # objects of this evaluation
            layers[block] = replace(layers[block], **copies)
            for name, packed in copies.items():
                seen[id(packed)] = _Seen(narrowed[block][name], zero, zero, zero)
        own.append(replace(weights, layers=tuple(layers)))
    for measured in (None, scales):
        watch: Any = _Watch(ops, seen, measured)
        for plan, seeds in plain_steps:
            run_plan(watch, own, plan, memory(plan), seeds)
        if measured is None:
            limit = runtime.fp8_limit(NARROW)
            scales |= {key: max(how.margin * float(s.largest) / limit, 1e-12) for key, s in seen.items()}
    found: list[Choice] = []
    out: list[Weights] = []
    for number, (run, mine) in enumerate(zip(plain_steps[0][0].runs, own, strict=True)):
        layers = list(mine.layers)
        for block in run.blocks:
            chosen: dict[str, Packed] = {}
            for name in LAYERS:
                key = id(getattr(mine.layers[block], name))
                error = float((seen[key].error / seen[key].size.clamp_min(1e-30)).sqrt())
                good = error <= how.threshold
                found.append(Choice(number, block, name, scales[key], error, good))
                if good:
                    chosen[name] = replace(narrowed[block][name], x_scale=scales[key])
            layers[block] = replace_layer(layers[block], chosen)
        out.append(replace(mine, layers=tuple(layers)))
    return tuple(out), tuple(found)


def replace_layer(layer: Layer, chosen: dict[str, Packed]) -> Layer:
    """The layer with some of its products in fp8."""
    return replace(layer, **chosen)
