"""The engine: a request's plan, run over fused operators and static buffers. See docs/engine.md.

`Engine` is a transformer made ready for one backend. A plan (plan.py) holds everything that is known before the first
step; forward.py executes it over a table of operators: reference.py in torch, cpu.py in C++ and oneDNN, cuda.py in
Triton. graph.py records all of a request as one CUDA graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..diffusion.trajectory import Evaluation
from ..models.dit import Condition, DiT
from .cpu.threads import thread_limit
from .dit import Layer, Memory, Ops, Weights, run_plan
from .plan import Plan, Planner

KEPT = 4  # memories of different shapes that an engine keeps for the next request


def device_of(ops: Ops) -> torch.device:
    """Where a table of operators computes."""
    return torch.device(getattr(ops, "device", "cpu"))


def pack_weights(dit: DiT, ops: Ops) -> Weights:
    """The network's weights as the table of operators wants them, on its device; norm weights stay fp32."""
    device = device_of(ops)

    def norm(layer: torch.nn.Module) -> Tensor:
        return layer.weight.detach().to(device, torch.float32, copy=True)

    def linear(layer: torch.nn.Linear) -> object:
        return ops.pack(layer.weight.float(), None if layer.bias is None else layer.bias.float())

    layers = tuple(
        Layer(
            *(linear(getattr(b, name)) for name in ("qkv", "out", "cross_q", "cross_out", "up", "down")),
            (norm(b.q_norm), norm(b.k_norm)),
            norm(b.cross_q_norm),
        )
        for b in dit.blocks
    )
    return Weights(linear(dit.input), linear(dit.output), layers)


class Engine:
    """A diffusion transformer ready to run. Any number of threads may call `run`: each has its own memory meanwhile.

    threads: how many a run uses, for all operators; None: as many as torch. Made from weights in any dtype; the best
    are fp32, which are rounded once to the table's dtype.
    """

    def __init__(self, dit: DiT, ops: Ops, threads: int | None = None) -> None:
        self.ops = ops
        self.threads = torch.get_num_threads() if threads is None else threads
        self.device = device_of(ops)
        self.planner = Planner(dit, self.device)
        self.weights = pack_weights(dit, ops)
        self._lock = threading.Lock()
        self._idle: list[tuple[tuple[int, ...], Memory]] = []

    def plan(self, evaluations: tuple[Evaluation, ...], condition: Condition, unconditional: Condition,
             tokens: int) -> Plan:  # fmt: skip
        """Everything about a request that is known before its first step."""
        with thread_limit(self.threads):
            return self.planner.plan(evaluations, condition, unconditional, tokens, self.ops.dtype)

    def run(self, plan: Plan, seeds: list[int], callback: Callable[[int, int], None] | None = None) -> Tensor:
        """Latents (B, T, C) fp32 of a plan; one seed for each clip. callback(step, steps) after each step."""
        with torch.inference_mode(), thread_limit(self.threads), self._memory(plan) as memory:
            return run_plan(self.ops, self.weights, plan, memory, seeds, callback).clone()

    @contextlib.contextmanager
    def _memory(self, plan: Plan) -> Iterator[Memory]:
        """Memory for the plan's shape that nobody else uses meanwhile; kept for the next request, the oldest
        dropped."""
        shape = (plan.batch, plan.copies, plan.tokens, plan.keys.shape[3])
        with self._lock:
            at = next((i for i, (key, _) in enumerate(self._idle) if key == shape), None)
            found = None if at is None else self._idle.pop(at)[1]
        memory = found or Memory(plan, self.ops, self.device)
        try:
            yield memory
        finally:
            with self._lock:
                self._idle.append((shape, memory))
                del self._idle[:-KEPT]
