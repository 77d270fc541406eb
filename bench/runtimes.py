"""Other runtimes for bench/cpu.py: one evaluation of the network exported to ONNX Runtime and to OpenVINO.

Both are optional (`pip install "presto-rt[bench]"`): where one is missing or refuses the network, the row says why. The
export is one evaluation at one clip length with all blocks; sampler and preconditioning around it stay torch's, as for
the compiled rows. ONNX Runtime's CPU kernels have no bf16, so its row is fp32.
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


class OneEvaluation(torch.nn.Module):
    """The raw network with a condition's fields as plain arguments; all blocks run."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, c_noise: Tensor, *condition: Tensor) -> Tensor:
        return self.dit(x, c_noise, Condition(*condition))


def _network(run: Callable[[list[Any]], Any]) -> Network:
    """`run`, which takes and gives numpy arrays, with the signature of `DiT.forward`."""

    def forward(
        x: Tensor, c_noise: Tensor, condition: Condition, blocks: object = None, budget: object = None
    ) -> Tensor:
        given = (x, c_noise, *(getattr(condition, name) for name in FIELDS))
        return torch.from_numpy(run([t.contiguous().numpy() for t in given]))

    return forward


def _checked(network: Network, dit: DiT, example: tuple[Tensor, ...], tolerance: float) -> Network:
    """The network, if it gives what torch gives; RuntimeError otherwise: no speeds for a wrong result."""
    with torch.inference_mode():
        want = OneEvaluation(dit)(*example)
        got = network(*example[:2], Condition(*example[2:]))
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"it differs from torch by {error:.2g}")
    return network


def onnx_runtime(dit: DiT, example: tuple[Tensor, ...], threads: int) -> Network:
    """fp32. Raises ImportError without onnxruntime, onnx and onnxscript, RuntimeError for a wrong result."""
    import onnxruntime

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        torch.onnx.export(OneEvaluation(dit).eval(), example, dynamo=True, verbose=False).save(str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    if len(names) != len(example):
        raise RuntimeError(f"the export kept {len(names)} of {len(example)} inputs")
    run = _network(lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0])
    return _checked(run, dit, example, 1e-3)


def open_vino(dit: DiT, example: tuple[Tensor, ...], threads: int, precision: str) -> Network:
    """precision "f32" or "bf16". Raises ImportError without openvino, RuntimeError for a wrong result."""
    import openvino

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(OneEvaluation(dit).eval(), example_input=example)
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    run = _network(lambda arrays: request.infer(arrays)[0])
    return _checked(run, dit, example, 1e-3 if precision == "f32" else 0.1)


def others(dit: DiT, example: tuple[Tensor, ...], threads: int) -> dict[str, Network | str]:
    """The network (fp32 weights) by each runtime, or why there is none."""
    ways: dict[str, Callable[[], Network]] = {
        "ONNX Runtime fp32": lambda: onnx_runtime(dit, example, threads),
        "OpenVINO fp32": lambda: open_vino(dit, example, threads, "f32"),
        "OpenVINO bf16": lambda: open_vino(dit, example, threads, "bf16"),
    }
    out: dict[str, Network | str] = {}
    for name, make in ways.items():
        try:
            out[name] = make()
        except Exception as error:  # an exporter may fail in any way; the row says how
            out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return out
