"""Baselines of bench/cpu.py by other runtimes: one network call, exported to ONNX Runtime and to OpenVINO.

Both are optional (`pip install "presto-rt[bench]"`); if one is not installed or cannot take the network, its row says
why. The export is one network call at one clip length with all blocks; sampler and preconditioning around it remain
torch's, as in the compiled rows. ONNX Runtime's CPU kernels have no bf16, so its row is fp32.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from presto_rt.conditioning.ports import Conditioning
from presto_rt.models.dit import DiT

#: network input, time input, and the four ports of the conditioning
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class NetworkCall(torch.nn.Module):
    """The raw network with all blocks, and with the ports of the conditioning as arguments."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, time: Tensor, *ports: Tensor) -> Tensor:
        """Return the raw output (N, T, C)."""
        return self.dit.raw(x, time, Conditioning(*ports), range(self.dit.config.blocks), 1.0)


class ExportedNetwork:
    """A network in another runtime, called as `presto_rt.runtime.backend.Network`.

    Args:
        run: maps the inputs of `NetworkCall` as numpy arrays to the output.
    """

    def __init__(self, run: Callable[[list[Any]], Any]) -> None:
        self.run = run

    def raw(self, x: Tensor, time: Tensor, conditioning: Conditioning, blocks: Sequence[int], budget: float) -> Tensor:
        """Return the raw output (N, T, C). The export has all blocks, so `blocks` and `budget` are not read."""
        ports = (conditioning.cross, conditioning.cross_lengths, conditioning.vector, conditioning.local)
        return torch.from_numpy(self.run([tensor.contiguous().numpy() for tensor in (x, time, *ports)]))


def checked(network: ExportedNetwork, dit: DiT, example: Inputs, tolerance: float) -> ExportedNetwork:
    """Return the network, or raise RuntimeError if its result differs from torch's: a wrong result has no speed."""
    with torch.inference_mode():
        expected = NetworkCall(dit)(*example)
        x, time, *ports = example
        actual = network.raw(x, time, Conditioning(*ports), (), 1.0)
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"it differs from torch by {error:.2g}")
    return network


def onnx_runtime(dit: DiT, example: Inputs, threads: int) -> ExportedNetwork:
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
    run = ExportedNetwork(lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0])
    return checked(run, dit, example, 1e-3)


def open_vino(dit: DiT, example: Inputs, threads: int, precision: str) -> ExportedNetwork:
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
    run = ExportedNetwork(lambda arrays: request.infer(arrays)[0])
    return checked(run, dit, example, 1e-3 if precision == "f32" else 0.1)


def others(dit: DiT, example: Inputs, threads: int) -> dict[str, ExportedNetwork | str]:
    """Return the network, from fp32 weights, in each runtime, or the reason that a runtime does not have it."""
    ways: dict[str, Callable[[], ExportedNetwork]] = {
        "ONNX Runtime fp32": lambda: onnx_runtime(dit, example, threads),
        "OpenVINO fp32": lambda: open_vino(dit, example, threads, "f32"),
        "OpenVINO bf16": lambda: open_vino(dit, example, threads, "bf16"),
    }
    out: dict[str, ExportedNetwork | str] = {}
    for name, make in ways.items():
        try:
            out[name] = make()
        except Exception as error:  # an exporter may fail in any way; its row names the error
            out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return out
