"""`load`: a checkpoint, a backend and one precision become a `Pipeline`."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

from .checkpoints.folder import DEFAULT_MODEL
from .checkpoints.house import load_model
from .checkpoints.model import Model
from .conditioning.text_conditioner import TextConditioner
from .errors import BackendUnavailableError, InvalidInputError
from .models.codec import Codec
from .pipeline import Pipeline
from .runtime.backend import Backend
from .runtime.cpu import autodtype
from .runtime.cpu import ops as cpu_ops
from .runtime.precision import Precision
from .runtime.spec import NetworkSpec

if TYPE_CHECKING:  # Triton is imported where it is used
    from .runtime.cuda.backend import Limits

log = logging.getLogger("presto_rt")

BACKENDS = ("auto", "eager", "cpu", "graph")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "fp8")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.bfloat16}


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    limits: Limits | None = None,
    auto_tune: bool = False,
) -> Pipeline:
    """Load a shipped model by name, or a folder with config.json and safetensors shards.

    "small-random" and the like are a preset with random weights, for timing.

    Args:
        name: of a shipped model, or a folder.
        device: "auto" takes a CUDA GPU where there is one; "cpu" or "cuda".
        dtype: of the transformer's products. "auto" is bfloat16 on a GPU, and on a CPU the fastest of bfloat16, float32
            and "int8" there (`runtime.cpu.autodtype`). "int8" computes products in 8-bit integers, with a scale for
            each token and output channel (docs/cpu.md has its error). "fp8" is bfloat16 with the products in fp8 whose
            error is small (backend "graph"). Name one where every processor must round alike.
        backend: "cpu" for C++ and oneDNN; "graph" for a request as one CUDA graph (on a CPU: as one recorded function);
            "eager" for plain torch; "auto" takes the device's backend where it is available, else eager, and logs why.
        threads: of the CPU backend; None for torch's number.
        limits: streams, graphs and memory of the graph backend.
        auto_tune: measure this machine when a deadline is asked for and no table of timings covers the clip.

    Returns:
        The pipeline.

    Raises:
        WeightsError: where the weights are missing or damaged.
        BackendUnavailableError: where the device, backend or dtype is not available here.
        InvalidInputError: for values of another kind.
    """
    if backend not in BACKENDS:
        raise BackendUnavailableError(f"unknown backend {backend!r}; choose from: {', '.join(BACKENDS)}")
    if dtype not in DTYPES:
        raise InvalidInputError(f"unknown dtype {dtype!r}; choose from: {', '.join(DTYPES)}")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise InvalidInputError(f"threads must be a whole number from 1 to 1024, not {threads!r}")
    target = find_device(device)
    model = load_model(name, target)
    chosen = choose_backend(backend, target, float_dtype(dtype, target), model.spec)
    precision = choose_precision(dtype, target, chosen)
    return Pipeline(model, create_backend(model, chosen, target, precision, threads, limits), auto_tune=auto_tune)


def find_device(name: str) -> torch.device:
    """Return the device of a name. Raises InvalidInputError, and BackendUnavailableError where there is no GPU."""
    if name not in DEVICES:
        raise InvalidInputError(f"unknown device {name!r}; choose from: {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("no CUDA GPU is available here; choose device='auto' or 'cpu'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def float_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations."""
    if dtype in FLOATS:
        return FLOATS[dtype]
    return torch.bfloat16 if device.type == "cuda" else autodtype.preferred_float()


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, spec: NetworkSpec) -> str:
    """Return "cpu", "graph" or "eager". Raises BackendUnavailableError where a backend named by the caller is not
    available."""
    on_cpu = device.type == "cpu"
    reasons = {"cpu": cpu_ops.unsupported_reason(dtype) if on_cpu else "the device is not a CPU", "graph": None}
    if not on_cpu:
        from .runtime.cuda.ops import unsupported_reason

        reasons["graph"] = unsupported_reason(spec, dtype, device)
    if reasons.get(name) is not None:
        raise BackendUnavailableError(f"the {name} backend is not available: {reasons[name]}; choose backend='eager'")
    if name != "auto":
        return name
    fused = "cpu" if on_cpu else "graph"
    if reasons[fused] is not None:
        log.info("the model runs in plain torch: %s", reasons[fused])
        return "eager"
    return fused


def choose_precision(dtype: str, device: torch.device, backend: str) -> Precision:
    """Return the precision of a backend. Raises BackendUnavailableError where the backend has no such products."""
    activations = float_dtype(dtype, device)
    if dtype == "int8" and backend != "cpu":
        raise BackendUnavailableError(
            'dtype="int8" needs the CPU backend: choose device="cpu", backend="auto" or "cpu"'
        )
    if dtype == "fp8" and backend != "graph":
        raise BackendUnavailableError("fp8 needs backend='graph'; choose it, or another dtype")
    if dtype == "int8" or (dtype == "auto" and backend == "cpu" and autodtype.int8_is_faster()):
        return Precision("int8", activations)
    return Precision("fp8", activations) if dtype == "fp8" else Precision.of(activations)


def create_backend(
    model: Model,
    name: str,
    device: torch.device,
    precision: Precision,
    threads: int | None = None,
    limits: Limits | None = None,
) -> Backend:
    """Return a backend for a model. A fused backend packs the model's networks, which the model then lets go.

    Args:
        model: with its networks.
        name: "eager", "cpu" or "graph".
        device: where it runs.
        precision: of matrix products.
        threads: of the CPU backend.
        limits: of the graph backend.

    Raises:
        BackendUnavailableError: for a fused backend and a model without weights under neutral names.
    """
    if name == "eager":
        from .runtime.eager.backend import EagerBackend

        assert model.network is not None
        for part in (model.network, model.autoencoder):
            if isinstance(part, torch.nn.Module):
                part.to(device, precision.dtype if part is model.network else torch.float32)
        return EagerBackend(
            model.network,
            model.autoencoder,
            model.conditioner,
            channels=model.spec.channels,
            device=device,
            dtype=precision.dtype,
        )
    codec, conditioner = model.autoencoder, model.conditioner
    if model.transformer is None or not isinstance(codec, Codec) or not isinstance(conditioner, TextConditioner):
        raise BackendUnavailableError(f"{model.name} has no fused program: choose backend='eager'")
    weights = model.transformer(device)
    backend: Backend
    if name == "cpu":
        from .runtime.cpu.backend import CpuBackend

        backend = CpuBackend(weights, model.spec, codec, conditioner, precision=precision, threads=threads)
    else:
        from .runtime.cuda.backend import GraphBackend
        from .runtime.cuda.fp8 import Fp8
        from .runtime.cuda.ops import CudaOps

        ops = CudaOps(precision.dtype, device, backend="torch" if device.type == "cpu" else "auto")
        fp8 = Fp8() if precision.name == "fp8" else None
        backend = GraphBackend(weights, model.spec, codec, conditioner, ops, limits=limits, fp8=fp8)
    # Packed and unpacked weights are not both kept; the codec's encoder stays for `Pipeline.encode`.
    model.network = model.transformer = None
    codec.release_decoder()
    return backend
