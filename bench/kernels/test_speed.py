"""The same cases under pytest-benchmark: `pytest bench/kernels --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

from bench.kernels.harness import cases, presets
from presto_rt.kernels import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("way", ["eager", "presto"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_speed(benchmark, operator, way):
    benchmark.group = operator
    found = [case for preset in presets(DEVICE) for case in cases(operator, DEVICE, preset)]
    inputs = [case.make() for case in found]

    def run() -> None:
        for case, tensors in zip(found, inputs, strict=True):
            case.ways[way](*tensors)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        benchmark(run)
