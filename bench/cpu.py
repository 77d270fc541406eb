"""How fast is a CPU? `python bench/cpu.py [--model nano | --random nano] [--seconds 32] [--repeats 20]`

One process, one set of weights, one plan: the denoising trajectory by eager torch in fp32 and bf16, by torch.compile
with freezing in both, and by the engine in both, interleaved so that a busy moment meets all of them; then the stages
of a whole clip, one thread against two, the machine's own rates and the roofline that follows. `--micro`
times each C++ operator against torch and against copying as many bytes. Medians; wall clock; nothing is left out when
ours is slower.

ONNX Runtime and OpenVINO are not rows: a trajectory would be exported layer schedule by layer schedule, and OpenVINO is
no dependency of this project.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from results import save, spread, table
from torch import Tensor

from presto_rt import native
from presto_rt.config import preset
from presto_rt.engine.cpu import GELU_TANH, CpuOps, pack
from presto_rt.engine.plan import block_cost, plan_cost
from presto_rt.engine.threads import limited
from presto_rt.engine.trajectory import write_out
from presto_rt.models.codec import Codec
from presto_rt.models.codec_features import SpectralFrames
from presto_rt.models.dit import DiT, rotary_table
from presto_rt.pipeline import Pipeline, load

PROMPT = "calm piano with warm strings, 84 bpm"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Row = dict[str, Any]


def timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def interleaved(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Each way once to warm up, then by turns."""
    for function in ways.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, function in ways.items():
            times[name].append(timed(function))
    return {name: spread(values) for name, values in times.items()}


def pipelines(a: argparse.Namespace, threads: int) -> dict[str, Pipeline]:
    """The same weights as eager torch and as engine, in both dtypes; the engine on `threads` threads."""

    def made(dtype: str, backend: str) -> Pipeline:
        if a.random is None:
            name = str(DTYPES[dtype]).removeprefix("torch.")
            return load(a.model, device="cpu", dtype=name, backend=backend, threads=threads)
        torch.manual_seed(0)
        dit = DiT(preset(a.random))
        for p in dit.parameters():
            torch.nn.init.normal_(p, std=0.03)
        return Pipeline(
            dit,
            Codec(),
            device=torch.device("cpu"),
            dtype=DTYPES[dtype],
            backend=backend,
            threads=threads,
            name=f"{a.random} (random)",
        )

    return {
        f"{name} {dtype}": made(dtype, backend)
        for name, backend in (("eager", "torch"), ("ours", "cpu"))
        for dtype in DTYPES
    }


def trajectories(models: dict[str, Pipeline], a: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """The denoising of one plan by each way, on equal inputs."""
    first = next(iter(models.values()))
    plan = first.plan(a.seconds, steps=a.steps, sampler=a.sampler, guidance=a.guidance)
    condition = first._condition(plan, [PROMPT], [84.0], [None])
    ways: dict[str, Callable[[], Tensor]] = {}
    for name, model in models.items():
        other = model.dit.null(condition)
        ways[name] = lambda model=model, other=other: model.denoise(plan, condition, other, [1])
    if a.compile:
        import torch._inductor.config as inductor

        inductor.freezing = True
        for dtype in DTYPES:
            model = pipelines(a, 1)[f"eager {dtype}"]
            model.dit.forward = torch.compile(model.dit.forward)
            other = model.dit.null(condition)
            ways[f"compiled {dtype}"] = lambda model=model, other=other: model.denoise(plan, condition, other, [1])
    return ways


def rates(threads: int) -> dict[str, float]:
    """The machine's own: products in GFLOP/s in both dtypes, copying in GB/s of bytes read and written."""
    out = {}
    with limited(threads), torch.inference_mode():
        for name, dtype in DTYPES.items():
            x, product = torch.randn(689, 1024).to(dtype), pack(torch.randn(4096, 1024), None, dtype)
            out[f"{name} GFLOP/s"] = (
                2 * 689 * 1024 * 4096 / min(timed(lambda x=x, p=product: p(x)) for _ in range(20)) / 1e9
            )
        source, target = torch.ones(64 << 18), torch.empty(64 << 18)
        out["copy GB/s"] = 8 * source.numel() / min(timed(lambda: target.copy_(source)) for _ in range(20)) / 1e9
    return out


def operators(threads: int, tokens: int) -> list[tuple[str, Callable[[], object], Callable[[], object], int]]:
    """Name, ours, torch and bytes moved (each input read once, each output written once), in bf16 at nano's shapes."""
    ops, dtype, heads, dim = CpuOps(torch.bfloat16, threads), torch.bfloat16, 6, 64
    width = heads * dim
    residual, rows = torch.randn(1, tokens, width), torch.randn(1, 3, width)
    branch, out = torch.randn(1, tokens, width).to(dtype), torch.empty(1, tokens, width, dtype=dtype)
    qkv, angles, ones = torch.randn(1, tokens, 3 * width).to(dtype), rotary_table(tokens, dim), torch.ones(dim)
    q, k = (torch.randn(1, heads, tokens, dim).to(dtype) for _ in range(2))
    v, hidden = q.clone(), torch.randn(1, tokens, 4 * width).to(dtype)
    text = torch.randn(1, heads, 20, dim).to(dtype)
    lengths, scratch = (
        torch.tensor([20], dtype=torch.int32),
        torch.empty(ops.scratch_bytes(1, heads, tokens, dim), dtype=torch.uint8),
    )
    x, history, update = torch.randn(1, tokens, 64), torch.zeros(1, tokens, 64), torch.randn(9)
    raw, network_input = torch.randn(1, tokens, 64).to(dtype), torch.empty(1, tokens, 64, dtype=dtype)
    frames = SpectralFrames(2500.0)
    features = torch.randn(1, 4 * tokens, 3, frames.bands) - 4.0

    def norm_torch() -> Tensor:
        r = residual + rows[:, 0] * branch.float()
        return (F.layer_norm(r, (width,), eps=1e-6) * (1 + rows[:, 2]) + rows[:, 1]).to(dtype)

    def rope_torch() -> Tensor:
        part = F.rms_norm(qkv.unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)[:2].float(), (dim,))
        first, second = part.chunk(2, -1)
        return torch.cat([first * angles[0] - second * angles[1], second * angles[0] + first * angles[1]], -1).to(dtype)

    def cross_torch() -> Tensor:
        normed = F.rms_norm(branch.unflatten(-1, (heads, dim)).transpose(1, 2).float(), (dim,)).to(dtype)
        return F.scaled_dot_product_attention(normed, text, text)

    cell = tokens * width
    return [
        (
            "gate, residual, norm, modulate",
            lambda: ops.residual_norm_modulate(residual, branch, rows, 0, 1, 2, residual.clone(), out),
            norm_torch,
            12 * cell,
        ),
        (
            "QK-norm and rotary positions",
            lambda: ops.qk_norm_rope(qkv, angles, (ones, ones), q, k),
            rope_torch,
            8 * cell,
        ),
        (
            "attention",
            lambda: ops.attention(q, k, v, scratch, out),
            lambda: F.scaled_dot_product_attention(q, k, v),
            8 * cell,
        ),
        (
            "cross-attention, 20 keys",
            lambda: ops.cross_attention(branch, text, text, ones, lengths, scratch, out),
            cross_torch,
            4 * cell,
        ),
        (
            "tanh GELU",
            lambda: ops.activation(hidden, GELU_TANH, hidden.clone()),
            lambda: F.gelu(hidden, approximate="tanh"),
            16 * cell,
        ),
        (
            "sampler step",
            lambda: ops.step(x, history, raw, None, None, update, 1, network_input),
            lambda: x * 0.5 + raw.float() * 0.5,
            20 * tokens * 64,
        ),
        (
            "spectra to samples, 2 Griffin-Lim",
            lambda: frames.synthesise(features, 2),
            lambda: frames.synthesise_torch(features, 2),
            4 * (features.numel() + 4096 * tokens),
        ),
    ]


def micro(a: argparse.Namespace) -> list[Row]:
    """Each C++ operator beside torch, and the share of copying speed that it reaches."""
    out = []
    with limited(a.threads), torch.inference_mode():
        copy = rates(a.threads)["copy GB/s"]
        for name, ours, plain, moved in operators(a.threads, a.tokens):
            seconds = interleaved({"ours": ours, "torch": plain}, a.repeats)
            speed = moved / seconds["ours"]["median"] / 1e9
            out.append({"operator": name, "seconds": seconds, "gb_per_s": speed, "of_copy": speed / copy})
    return out


def whole(a: argparse.Namespace) -> Row:
    """Trajectories by turns, one thread and all, stages of a clip, memory, and the floor that the plan's counts
    give."""
    models = pipelines(a, a.threads)
    ours = models["ours bf16"]
    plan = ours.plan(a.seconds, steps=a.steps, sampler=a.sampler, guidance=a.guidance)
    with torch.inference_mode():
        scaling = {}
        for threads in sorted({1, a.threads}):
            with limited(threads):
                same = models if threads == a.threads else pipelines(a, threads)
                scaling[threads] = interleaved(trajectories(same, a), a.repeats)
        condition = ours._condition(plan, [PROMPT], [84.0], [None])
        runs = write_out(
            plan.sampler, plan.levels, plan.guidance, plan.layers, ours.config.network, ours.config.sigma_data
        )
        ready = ours.engine.plan(runs, condition, ours.dit.null(condition), plan.frames)
    request = {"seconds": a.seconds, "steps": a.steps, "sampler": a.sampler, "guidance": a.guidance, "seed": 1}
    clips = [ours.generate(PROMPT, **request).timings for _ in range(a.repeats + 1)][1:]
    cost, rate = plan_cost(ready, 2), rates(a.threads)
    floor = max(cost.flops / rate["bf16 GFLOP/s"], cost.bytes / rate["copy GB/s"]) / 1e9
    blocks = block_cost(ours.config, 1, plan.frames, ready.keys.shape[3], 2)
    return {
        "model": ours.name, "seconds": a.seconds, "steps": a.steps, "sampler": a.sampler, "guidance": a.guidance,
        "threads": a.threads, "isa": native.lib.isa(), "evaluations": len(runs), "rates": rate,
        "transformer": scaling, "stages": {s: spread([c[s] for c in clips]) for s in clips[0]},
        "flops": cost.flops, "bytes": cost.bytes, "floor_s": floor,
        "block": {name: {"flops": c.flops, "bytes": c.bytes} for name, c in blocks.items()},
        "peak_memory_of_all_ways_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def render(row: Row) -> str:
    """The tables that docs/cpu.md shows."""
    out = []
    for threads, ways in row["transformer"].items():
        best = ways["ours bf16"]["median"]
        cells = [[n, f"{1e3 * s['median']:.0f} ms", f"{s['median'] / best:.2f}"] for n, s in ways.items()]
        out.append(table([f"transformer, {threads} threads", "median", "against ours bf16"], cells))
    stages = [[name, f"{1e3 * s['median']:.0f} ms", f"{1e3 * s['p90']:.0f} ms"] for name, s in row["stages"].items()]
    out.append(table(["stage", "median", "p90"], stages))
    rate = ", ".join(f"{name} {value:.0f}" for name, value in row["rates"].items())
    out.append(f"Machine: {rate}. Floor of the transformer: {1e3 * row['floor_s']:.0f} ms.")
    return "\n\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--random", help="a preset with random weights instead of a model")
    parser.add_argument("--seconds", type=float, default=32.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sampler", default="few_step")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=689, help="latent frames of the operators' rows")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--micro", action="store_true")
    parser.add_argument("--name", help="bench/results/NAME.json; '-' writes none")
    a = parser.parse_args()
    if native.lib is None:
        raise SystemExit(f"there is no CPU engine to measure: {native.why}")
    if a.micro:
        rows: Any = micro(a)
        cells = [[r["operator"], *(f"{1e3 * r['seconds'][k]['median']:.3f} ms" for k in ("ours", "torch")),
                  f"{r['gb_per_s']:.1f}", f"{r['of_copy']:.2f}"] for r in rows]  # fmt: skip
        print(table(["operator", "ours", "torch", "GB/s", "of copying"], cells))
    else:
        rows = whole(a)
        print(render(rows))
    name = a.name or ("cpu-operators" if a.micro else "cpu")
    if name != "-":
        print(save(name, rows))


if __name__ == "__main__":
    main()
