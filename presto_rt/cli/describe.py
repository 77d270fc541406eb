"""Command `presto-rt describe`: memory and cost of a plan.

Prints every buffer that a forward pass writes with its offset, size and lifetime (positions in the pass), then
operations and bytes of each operator of a block and of the whole trajectory. The exit status is 1 if two buffers that
are alive at the same time share memory.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .options import SAMPLERS

if TYPE_CHECKING:
    import torch

    from ..models.config import ModelConfig
    from ..runtime.plan import CompiledPlan
    from .options import Commands


def add_parser(commands: Commands) -> None:
    """Add `describe`."""
    parser = commands.add_parser("describe", help="print the buffers and the cost of a plan")
    parser.add_argument("preset", nargs="?", default="nano", help="a preset: tiny, nano, small, ... (default: nano)")
    parser.add_argument("--seconds", type=float, default=32.0, help="length of each clip (default: 32)")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps (default: 4)")
    parser.add_argument("--sampler", default="few_step", help=f"{SAMPLERS} (default: few_step)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1 is none (default: 1)")
    parser.add_argument("--layers", default="100%", help="blocks that run, as for `generate` (default: 100%%)")
    parser.add_argument("--clips", type=int, default=1, help="clips in a batch (default: 1)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.set_defaults(run=_run)


def plan_of(
    config: ModelConfig,
    frames: int,
    steps: int,
    guidance: float,
    layers: str,
    sampler: str,
    clips: int,
    dtype: torch.dtype,
) -> CompiledPlan:
    """Return a plan of the right shapes on the meta device, where nothing is computed.

    Args:
        config: Shape of the transformer.
        frames: Latent frames of each clip.
        steps: Sampling steps.
        guidance: Guidance scale; 1 is none.
        layers: Layer schedule as users write it: "75%", "8,6,6,4".
        sampler: Name of the sampler.
        clips: Batch size.
        dtype: Type of the activations.
    """
    import torch

    from ..checkpoints.house import network_spec, transformer_weights
    from ..conditioning.keys import KEY_CHANNELS
    from ..conditioning.ports import Conditioning
    from ..conditioning.tempo import BEAT_CHANNELS
    from ..diffusion.guidance import Guidance
    from ..diffusion.schedule import karras_sigmas, parse_layers
    from ..diffusion.trajectory import compile_trajectory
    from ..models.dit import DiT
    from ..runtime.plan import COLUMNS, Planner

    sigmas = karras_sigmas(steps, config.sigma_min, config.sigma_max, config.rho)
    schedule = parse_layers(layers, config.blocks, sigmas=sigmas)
    calls = compile_trajectory(sampler, sigmas, Guidance(guidance), schedule, config.network, config.sigma_data)
    with torch.device("meta"):
        planner = Planner(transformer_weights(DiT(config), "meta"), network_spec(config), "meta")
        inputs = clips * (1 + any(call.guided for call in calls))
        lengths = torch.empty(inputs, dtype=torch.int32)
        conditioning = Conditioning(
            torch.empty(inputs, config.text_tokens, config.text_dim),
            lengths,
            torch.empty(inputs, config.text_dim + 1 + KEY_CHANNELS),
            torch.empty(inputs, frames, BEAT_CHANNELS),
        )
        table, scale = torch.empty(len(calls), COLUMNS), torch.empty(2)
        return planner.build(planner.layout(calls, frames), table, scale, conditioning, dtype, lengths)


def _run(options: argparse.Namespace) -> int:
    import torch

    from ..checkpoints.house import network_spec
    from ..models.config import HOP, SAMPLE_RATE, preset
    from ..runtime.cost import block_cost, plan_cost
    from ..runtime.cuda.buffers import bucket
    from ..runtime.cuda.ops import CudaOps
    from ..runtime.dit import buffers
    from ..runtime.memory import aliased, describe, place

    config, dtype = preset(options.preset), getattr(torch, options.dtype)
    frames = bucket(-(-round(options.seconds * SAMPLE_RATE) // HOP))
    plan = plan_of(
        config,
        frames,
        options.steps,
        options.guidance,
        options.layers,
        options.sampler,
        options.clips,
        dtype,
    )
    listed = buffers(plan, CudaOps(dtype, "cpu", backend="torch"))
    offsets = place(listed)
    print(
        f"{config.name}: {options.clips} x {frames} latent frames, {len(plan.calls)} network calls, {options.dtype}\n"
    )
    print(describe(listed, offsets))
    total_bytes = max(offsets[buffer.name] + buffer.size for buffer in listed)
    unshared_bytes = sum(buffer.size for buffer in listed)
    print(f"\n{total_bytes / 2**20:.2f} MiB in all; {unshared_bytes / 2**20:.2f} MiB if no memory were shared\n")
    inputs = plan.batch * plan.copies
    print(f"{'one block':<16} {'GFLOP':>10} {'MB moved':>10}")
    for name, cost in block_cost(network_spec(config), inputs, frames, plan.keys.shape[3], dtype.itemsize).items():
        print(f"{name:<16} {cost.flops / 1e9:>10.4f} {cost.bytes / 1e6:>10.3f}")
    total = plan_cost(plan, dtype.itemsize)
    print(f"{'the trajectory':<16} {total.flops / 1e9:>10.2f} {total.bytes / 1e6:>10.1f}")
    shared = aliased(listed, offsets)
    for first, second in shared:
        print(f"ALIAS: {first} and {second} are alive at the same time and share memory", file=sys.stderr)
    return 1 if shared else 0
