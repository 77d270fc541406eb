"""Compare runtimes on a CPU: `python -m bench.cpu [--model nano | --random nano] [--seconds 32] [--repeats 20]`.

In one process, with the same weights and the same plan, with one thread and with all:

1. the denoising trajectory by eager torch (fp32, bf16), torch.compile with freezing (fp32, bf16), ONNX Runtime and
   OpenVINO if they are installed, and the CPU backend (fp32, bf16, int8);
2. the codec's decoder network and the text encoder by eager torch and by the CPU backend;
3. whole clips by eager torch, compiled torch and the CPU backend;
4. the stages of a whole clip, the machine's own rates, and the roofline that follows from them.

All ways are interleaved, so that a busy moment of the machine affects each of them. Times are wall clock, medians.
bench/operators.py times single operators, bench/clips.py whole clips in processes of their own.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.results import save, spread, table
from bench.runtimes import others
from presto_rt import native
from presto_rt.conditioning.minilm import load_text_encoder
from presto_rt.conditioning.ports import ClipControls, Conditioning
from presto_rt.loading import load
from presto_rt.models.codec import Codec
from presto_rt.models.dit import DiT
from presto_rt.pipeline import Pipeline
from presto_rt.runtime.backend import Job
from presto_rt.runtime.cost import block_cost, plan_cost
from presto_rt.runtime.cpu import autodtype
from presto_rt.runtime.cpu.backend import CpuBackend
from presto_rt.runtime.cpu.ops import CpuOps
from presto_rt.runtime.cpu.products import pack_int8, pack_linear
from presto_rt.runtime.cpu.threads import thread_limit
from presto_rt.runtime.dit import Memory, denoise
from presto_rt.runtime.eager.backend import EagerBackend
from presto_rt.runtime.text_encoder import TextProgram

PROMPT = "calm piano with warm strings, 84 bpm"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}
Row = dict[str, Any]


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def interleaved(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Call each way once to warm up, then in turn `repeats` times; return the spread of the seconds of each."""
    for function in ways.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, function in ways.items():
            times[name].append(timed(function))
    return {name: spread(values) for name, values in times.items()}


def pipeline(a: argparse.Namespace, threads: int, dtype: str, backend: str) -> Pipeline:
    """Load the model for a backend, "eager" or "cpu", with a number of threads; dtype is fp32, bf16 or int8."""
    model = a.model if a.random is None else f"{a.random}-random"
    name = dtype if dtype == "int8" else str(DTYPES[dtype]).removeprefix("torch.")
    return load(model, device="cpu", dtype=name, backend=backend, threads=threads)


def settings(a: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling settings, as `Pipeline.plan` and `generate` take them."""
    return {"steps": a.steps, "sampler": a.sampler, "guidance": a.guidance, "layers": a.layers}


def eager_parts(model: Pipeline) -> tuple[EagerBackend, DiT, Codec]:
    """Return the backend of a pipeline in plain torch, with its network and its codec."""
    backend = model.backend
    assert isinstance(backend, EagerBackend)
    network, codec = backend.network, backend.autoencoder
    assert isinstance(network, DiT)
    assert isinstance(codec, Codec)
    return backend, network, codec


def torch_pipeline(a: argparse.Namespace, threads: int, dtype: str, compiled: bool = False) -> Pipeline:
    """Load the model in plain torch, transformer and decoder in `dtype`, both of them compiled or neither."""
    model = pipeline(a, threads, dtype, "eager")
    _, network, codec = eager_parts(model)
    decoder = codec.decoder.to(DTYPES[dtype])
    if compiled:
        network.forward = torch.compile(network.forward)  # type: ignore[method-assign]
        decoder.forward = torch.compile(decoder.forward)  # type: ignore[method-assign]
    decoder.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(DTYPES[dtype]),))
    decoder.register_forward_hook(lambda _, inputs, output: output.float())
    return model


def dtypes() -> list[str]:
    """Return the dtypes for which the processor has instructions; the others take minutes a clip."""
    rates = autodtype.matmul_rates()
    return [short for name, short in SHORT.items() if rates[name] > 0]


def every_way(a: argparse.Namespace, threads: int) -> tuple[dict[str, Pipeline], dict[str, str]]:
    """Load the same model for each way; return them by name, and for each missing way the reason."""
    here = dtypes()
    floats = [dtype for dtype in here if dtype in DTYPES]
    absent = [dtype for dtype in SHORT.values() if dtype not in here]
    missing = {f"ours {dtype}": "the processor has no instructions for it" for dtype in absent}
    models = {f"eager {dtype}": torch_pipeline(a, threads, dtype) for dtype in floats}
    models |= {f"ours {dtype}": pipeline(a, threads, dtype, "cpu") for dtype in here}
    if a.compile:
        import torch._inductor.config as inductor

        inductor.freezing = True
        models |= {f"compiled {dtype}": torch_pipeline(a, threads, dtype, compiled=True) for dtype in floats}
    if a.others and a.guidance == 1.0:
        first = models["eager fp32"]
        job = clip_job(a, first)
        conditioning, _ = embed(first, job)
        x = torch.randn(1, job.frames, first.model.spec.channels)
        example = (x, torch.zeros(1), conditioning.cross, conditioning.cross_lengths, conditioning.vector)
        for name, network in others(eager_parts(first)[1], (*example, conditioning.local), threads).items():
            if isinstance(network, str):
                missing[name] = network
            else:
                models[name] = torch_pipeline(a, threads, "fp32")
                eager_parts(models[name])[0].network = network
    return models, missing


def clip_job(a: argparse.Namespace, model: Pipeline) -> Job:
    """Return the job of one clip."""
    plan = model.plan(a.seconds, **settings(a))
    return model.job(plan, [ClipControls(PROMPT, bpm=84.0)], [1])


def embed(model: Pipeline, job: Job) -> tuple[Conditioning, Conditioning]:
    """Return the conditional and the unconditional conditioning of a job."""
    return model.model.conditioner.embed(job.inputs)


def trajectories(a: argparse.Namespace, models: dict[str, Pipeline]) -> dict[str, Callable[[], Tensor]]:
    """Return the denoising of one plan by each way, on equal inputs."""
    return {name: denoiser(model, clip_job(a, model)) for name, model in models.items()}


def denoiser(model: Pipeline, job: Job) -> Callable[[], Tensor]:
    """Return the denoising of a job, without text encoder and decoder."""
    backend, conditioning = model.backend, embed(model, job)
    if isinstance(backend, EagerBackend):
        return partial(backend.denoise, job, *conditioning)
    assert isinstance(backend, CpuBackend)
    compile_plan = partial(backend.planner.plan, job.calls, *conditioning, job.frames, backend.precision.dtype)
    memory = Memory(compile_plan(), backend.ops)

    def run() -> Tensor:
        with thread_limit(backend.threads):
            return denoise(backend.ops, backend.transformer, compile_plan(), memory, job.seeds)

    return run


def networks(a: argparse.Namespace, threads: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Return the codec's decoder and the text encoder, by eager torch in fp32 and bf16 and by the CPU backend."""
    auto = SHORT[autodtype.preferred_dtype()]
    ours, encoder = pipeline(a, threads, auto, "cpu"), load_text_encoder()
    assert isinstance(ours.backend, CpuBackend)
    program = ours.backend.codec
    latents = torch.randn(1, ours.plan(a.seconds).frames, ours.model.spec.channels) * 0.5
    codecs = {t: eager_parts(torch_pipeline(a, threads, t))[2] for t in dtypes() if t in DTYPES}
    ids = torch.tensor([encoder.tokenizer.encode(PROMPT).ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    text = TextProgram(encoder, CpuOps(ours.backend.precision.dtype, threads))
    return {
        "codec's decoder network": {
            **{f"eager {t}": partial(codec.decode_features, latents) for t, codec in codecs.items()},
            f"ours {auto}": lambda: program.features(latents),
        },
        "text encoder": {"eager fp32": lambda: encoder(ids, mask), f"ours {auto}": lambda: text(ids, mask)},
    }


def whole_clips(a: argparse.Namespace, models: dict[str, Pipeline]) -> dict[str, Callable[[], object]]:
    """Return prompt to samples by torch without the C++ module, and by the CPU backend."""
    request = {"seconds": a.seconds, "seed": 1, **settings(a)}

    def torch_alone(model: Pipeline) -> object:
        with mock.patch.object(native, "lib", None):
            return model.generate(PROMPT, **request)

    return {
        name: partial(model.generate, PROMPT, **request) if name.startswith("ours") else partial(torch_alone, model)
        for name, model in models.items()
        if name.split()[0] in ("eager", "compiled", "ours")
    }


def rates(threads: int) -> dict[str, float]:
    """Measure the machine: matrix products in G operations/s for each dtype, copies in GB/s, read and written."""
    out = {}
    rows, inputs, outputs = 689, 1024, 4096
    with thread_limit(threads), torch.inference_mode():
        work = 2 * rows * inputs * outputs / 1e9
        here = dtypes()
        for name in (name for name in here if name in DTYPES):
            dtype = DTYPES[name]
            x, product = torch.randn(rows, inputs).to(dtype), pack_linear(torch.randn(outputs, inputs), None, dtype)
            out[f"{name} GFLOP/s"] = work / min(timed(lambda x=x, p=product: p(x)) for _ in range(20))
        if "int8" in here:
            x, int8_product = (
                torch.randint(1, 256, (rows, inputs)).to(torch.uint8),
                pack_int8(torch.randn(outputs, inputs), None),
            )
            out["int8 Gop/s"] = work / min(timed(lambda: int8_product(x, torch.bfloat16)) for _ in range(20))
        source, target = torch.ones(64 << 18), torch.empty(64 << 18)
        out["copy GB/s"] = 8 * source.numel() / min(timed(lambda: target.copy_(source)) for _ in range(20)) / 1e9
    return out


def measure(a: argparse.Namespace) -> Row:
    """Return all measurements, and the floor of the transformer by the counts of its plan."""
    scaling, parts, missing = {}, {}, {}
    with torch.inference_mode():
        for threads in sorted({1, a.threads}):
            with thread_limit(threads):
                models, missing = every_way(a, threads)
                scaling[threads] = interleaved(trajectories(a, models), a.repeats)
                several = networks(a, threads)
                if threads == a.threads:
                    several["whole clip"] = whole_clips(a, models)
                parts[threads] = {n: interleaved(w, a.repeats) for n, w in several.items()}
        auto = SHORT[autodtype.preferred_dtype()]
        ours = pipeline(a, a.threads, auto, "cpu")
        backend, job = ours.backend, clip_job(a, ours)
        assert isinstance(backend, CpuBackend)
        compiled = backend.planner.plan(job.calls, *embed(ours, job), job.frames, backend.precision.dtype)
    request = {"seconds": a.seconds, "seed": 1, **settings(a)}
    clips = [ours.generate(PROMPT, **request).timings for _ in range(a.repeats + 1)][1:]
    size = compiled.keys.dtype.itemsize
    cost, rate = plan_cost(compiled, size), rates(a.threads)
    blocks = block_cost(compiled.spec, 1, compiled.frames, compiled.keys.shape[3], size)
    attended = sum(blocks[name].flops for name in ("attention", "cross_attention"))
    attended *= sum(len(call.blocks) for call in job.calls)
    float_rate = rate["bf16 GFLOP/s" if size == 2 else "fp32 GFLOP/s"]
    product_rate = rate["int8 Gop/s"] if backend.precision.name == "int8" else float_rate
    products = attended / float_rate + (cost.flops - attended) / product_rate
    floor = max(products, cost.bytes / rate["copy GB/s"]) / 1e9
    return {
        "model": ours.model.name,
        "seconds": a.seconds,
        **settings(a),
        "auto": auto,
        "threads": a.threads,
        "isa": native.lib.isa(),
        "evaluations": len(job.calls),
        "rates": rate,
        "transformer": scaling,
        "missing": missing,
        "networks": parts,
        "stages": {s: spread([c[s] for c in clips]) for s in clips[0]},
        "flops": cost.flops,
        "bytes": cost.bytes,
        "floor_s": floor,
        "block": {name: {"flops": c.flops, "bytes": c.bytes} for name, c in blocks.items()},
        "peak_memory_of_all_ways_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def compare(title: str, auto: str, ways: dict[str, dict[str, float]], missing: dict[str, str] | None = None) -> str:
    """Return one table: medians, absolute and relative to the CPU backend in this processor's fastest dtype."""
    best = ways[f"ours {auto}"]["median"]
    cells = [[n, f"{1e3 * s['median']:.1f} ms", f"{s['median'] / best:.2f}"] for n, s in ways.items()]
    cells += [[name, f"not measured: {why}", "-"] for name, why in (missing or {}).items()]
    return table([title, "median", f"against ours {auto}"], cells)


def render(row: Row) -> str:
    """Return the tables of docs/cpu.md."""
    out, auto = [], row.get("auto", "bf16")
    for threads, ways in row["transformer"].items():
        out.append(compare(f"transformer, threads: {threads}", auto, ways, row.get("missing")))
        for name, part in row.get("networks", {}).get(threads, {}).items():
            out.append(compare(f"{name}, threads: {threads}", auto, part))
    stages = [[name, f"{1e3 * s['median']:.0f} ms", f"{1e3 * s['p90']:.0f} ms"] for name, s in row["stages"].items()]
    out.append(table(["stage", "median", "p90"], stages))
    rate = ", ".join(f"{name} {value:.0f}" for name, value in row["rates"].items())
    spent = row["transformer"][max(row["transformer"], key=int)][f"ours {auto}"]["median"]
    floor = row["floor_s"]
    out.append(
        f"Machine: {rate}, instruction set {row['isa']}. Floor of the transformer: {1e3 * floor:.0f} ms "
        f"({row['flops'] / 1e9:.0f} GFLOP, {row['bytes'] / 1e9:.1f} GB); reached: {1e3 * spent:.0f} ms, "
        f"{100 * floor / spent:.0f} % of it."
    )
    return "\n\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--random", help="a preset, with random weights, in place of a model")
    parser.add_argument("--seconds", type=float, default=32.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sampler", default="few_step")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--layers", default="100%", help="all by default, so that compilers and exports have one graph")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--others",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ONNX Runtime and OpenVINO; only without guidance",
    )
    parser.add_argument("--name", default="cpu", help="bench/results/NAME.json; '-' writes no file")
    a = parser.parse_args()
    if native.lib is None:
        raise SystemExit(f"the CPU backend is not available: {native.why}")
    row = measure(a)
    print(render(row))
    if a.name != "-":
        print(save(a.name, row))


if __name__ == "__main__":
    main()
