"""Baselines of bench/cpu.py by other runtimes: one network call, exported to ONNX Runtime and to OpenVINO.

Both are optional (`pip install "presto-rt[bench]"`); if one is not installed or cannot take the network, its row says
why. The export is one network call at one clip length with all blocks; sampler and preconditioning around it remain
torch's, as in the compiled rows. ONNX Runtime's CPU kernels have no bf16, so its row is fp32.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from presto_rt.models.dit import Condition, DiT

FIELDS = ("text", "text_mask", "pooled", "seconds", "beat", "key")
Network = Callable[..., Tensor]


class NetworkCall(torch.nn.Module):
    """The raw network with all blocks, and with the fields of a condition as arguments."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, c_noise: Tensor, *condition: Tensor) -> Tensor:
        return self.dit(x, c_noise, Condition(*condition))


def _network(run: Callable[[list[Any]], Any]) -> Network:
    """Give `run`, which maps numpy arrays to a numpy array, the signature of `DiT.forward`."""

    def forward(
        x: Tensor, c_noise: Tensor, condition: Condition, blocks: object = None, budget: object = None
    ) -> Tensor:
        inputs = (x, c_noise, *(getattr(condition, name) for name in FIELDS))
        return torch.from_numpy(run([t.contiguous().numpy() for t in inputs]))

    return forward


def _checked(network: Network, dit: DiT, example: tuple[Tensor, ...], tolerance: float) -> Network:
    """Return the network, or raise RuntimeError if its result differs from torch's: a wrong result has no speed."""
    with torch.inference_mode():
        want = NetworkCall(dit)(*example)
        got = network(*example[:2], Condition(*example[2:]))
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"it differs from torch by {error:.2g}")
    return network


def onnx_runtime(dit: DiT, example: tuple[Tensor, ...], threads: int) -> Network:
    """Return the network in ONNX Runtime, fp32.

    Raises:
        ImportError: onnxruntime, onnx or onnxscript is not installed.
        RuntimeError: its result differs from torch's.
    """
    import onnxruntime

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        torch.onnx.export(NetworkCall(dit).eval(), example, dynamo=True, verbose=False).save(str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(example):
        raise RuntimeError(f"the export kept {len(names)} of {len(example)} inputs")
    run = _network(lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0])
    return _checked(run, dit, example, 1e-3)


def open_vino(dit: DiT, example: tuple[Tensor, ...], threads: int, precision: str) -> Network:
    """Return the network in OpenVINO; precision is "f32" or "bf16".

    Raises:
        ImportError: openvino is not installed.
        RuntimeError: its result differs from torch's.
    """
    import openvino

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(NetworkCall(dit).eval(), example_input=example)
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    run = _network(lambda arrays: request.infer(arrays)[0])
    return _checked(run, dit, example, 1e-3 if precision == "f32" else 0.1)


def others(dit: DiT, example: tuple[Tensor, ...], threads: int) -> dict[str, Network | str]:
    """Return the network, from fp32 weights, in each runtime, or the reason that a runtime does not have it."""
    ways: dict[str, Callable[[], Network]] = {
        "ONNX Runtime fp32": lambda: onnx_runtime(dit, example, threads),
        "OpenVINO fp32": lambda: open_vino(dit, example, threads, "f32"),
        "OpenVINO bf16": lambda: open_vino(dit, example, threads, "bf16"),
    }
    out: dict[str, Network | str] = {}
    for name, make in ways.items():
        try:
            out[name] = make()
        except Exception as error:  # an exporter may fail in any way; its row names the error
            out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return out
