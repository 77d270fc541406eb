"""Each case of bench/micro once, untimed: the C++ operator gives torch's result at the benchmark's shapes."""

from __future__ import annotations

import importlib

import pytest
import torch

from presto_rt import native

if native.lib is None:
    pytest.skip(f"no C++ operators: {native.why}", allow_module_level=True)


@torch.inference_mode()
def test_benchmarked_operators_equal_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESTO_RT_BENCH_TOKENS", "24")
    torch.manual_seed(0)
    cases = importlib.import_module("bench.micro.test_operators").CASES
    for name, make in cases.items():
        case = make()
        got, want = case.ours().float(), case.plain().float()
        assert got.shape == want.shape, name
        if case.difference is not None:
            assert (got - want).abs().max() <= case.difference * want.abs().max(), name
