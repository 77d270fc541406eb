"""The memory and the price of a plan, printed: `python -m presto_rt.cli.describe [model] [--seconds 32] ...`

Every buffer that a forward pass writes with its place, size and life time (positions in the pass), then operations and
bytes of each operator of a block and of the whole trajectory. Exits with 1 if two buffers that live together share
memory, which must never be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ..diffusion.guidance import Guidance
from ..diffusion.schedule import karras_sigmas, parse_layers
from ..diffusion.trajectory import compile_trajectory
from ..models.config import HOP, SAMPLE_RATE, ModelConfig, preset
from ..models.dit import Condition, DiT
from ..runtime.cuda.buffers import bucket
from ..runtime.cuda.ops import CudaOps
from ..runtime.dit import buffers
from ..runtime.memory import aliased, describe, place
from ..runtime.plan import Plan, Planner, block_cost, plan_cost


def plan_of(config: ModelConfig, frames: int, steps: int, guidance: float, layers: str, sampler: str, clips: int,
            dtype: torch.dtype) -> Plan:  # fmt: skip
    """A plan's shape, without numbers: on the meta device, where nothing is computed."""
    levels = karras_sigmas(steps, config.sigma_min, config.sigma_max, config.rho)
    schedule = parse_layers(layers, config.blocks, levels=levels)
    runs = compile_trajectory(sampler, levels, Guidance(guidance), schedule, config.network, config.sigma_data)
    with torch.device("meta"):
        planner = Planner(DiT(config), "meta")
        copies = 1 + any(run.guided for run in runs)
        b, n, length = clips * copies, (len(runs), 12), config.text_tokens
        both = Condition(torch.empty(b, length, config.text_dim), torch.ones(b, length, dtype=torch.bool),
                         torch.empty(b, config.text_dim), torch.ones(b), torch.empty(b, frames, 5),
                         torch.empty(b, 24))  # fmt: skip
        lengths = torch.empty(b, dtype=torch.int32)
        return planner.build(planner.form(runs, frames), torch.empty(n), torch.empty(2), both, lengths, dtype, lengths)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints; 0, or 1 where buffers alias."""
    parser = argparse.ArgumentParser(prog="python -m presto_rt.cli.describe", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="nano", help="a preset")
    parser.add_argument("--seconds", type=float, default=32.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sampler", default="few_step")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--layers", default="100%")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    a = parser.parse_args(arguments)
    config, dtype = preset(a.model), getattr(torch, a.dtype)
    frames = bucket(-(-round(a.seconds * SAMPLE_RATE) // HOP))
    plan = plan_of(config, frames, a.steps, a.guidance, a.layers, a.sampler, a.clips, dtype)
    listed = buffers(plan, CudaOps(dtype, "cpu", backend="torch"))
    offsets = place(listed)
    print(f"{config.name}: {a.clips} x {frames} latent frames, {len(plan.runs)} evaluations, {a.dtype}\n")
    print(describe(listed, offsets))
    whole, alone = max(offsets[b.name] + b.size for b in listed), sum(b.size for b in listed)
    print(f"\n{whole / 2**20:.2f} MiB in all; {alone / 2**20:.2f} MiB if nothing shared memory\n")
    clips = plan.batch * plan.copies
    print(f"{'one block':<16} {'GFLOP':>10} {'MB moved':>10}")
    for name, cost in block_cost(config, clips, frames, plan.keys.shape[3], dtype.itemsize).items():
        print(f"{name:<16} {cost.flops / 1e9:>10.4f} {cost.bytes / 1e6:>10.3f}")
    total = plan_cost(plan, dtype.itemsize)
    print(f"{'the trajectory':<16} {total.flops / 1e9:>10.2f} {total.bytes / 1e6:>10.1f}")
    shared = aliased(listed, offsets)
    for first, second in shared:
        print(f"ALIAS: {first} and {second} live together and share memory", file=sys.stderr)
    return 1 if shared else 0


if __name__ == "__main__":
    sys.exit(main())
