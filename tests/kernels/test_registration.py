"""torch.ops.presto_rt.*: every operator traces, compiles and exports."""

from __future__ import annotations

import importlib

import pytest
import torch

from presto_rt.kernels import OPERATORS, conv_transpose1d, snake_conv1d
from presto_rt.kernels.registration import REGISTERED
from presto_rt.kernels.sampler_step import seeds_tensor
from tests.support.kernels import rotary_table

for operator in OPERATORS:
    importlib.import_module(f"presto_rt.kernels.{operator}")  # importing a module registers its operators


def calls(device):
    """Arguments for every operator: small, with the optional ones in use."""

    def randn(*shape):
        return torch.randn(*shape, device=device)

    def index(*numbers):
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    cos, sin = rotary_table(6, 16, device=device)
    seeds = seeds_tensor([3, 2**63], device)
    x, table, base = randn(2, 6, 32), randn(12, 32), index(0, 6)
    return {
        "adaln": (
            (x, x + 1, table),
            {"base": base, "gate": 2, "shift": 0, "scale": 1, "norm": "rms", "out_dtype": torch.float16},
        ),
        "qk_norm_rope": ((randn(2, 6, 96), 2, cos, sin), {"q_weight": randn(16), "k_weight": randn(16)}),
        "attention": (
            (randn(2, 2, 6, 16), randn(2, 2, 6, 16), randn(2, 2, 6, 16)),
            {"key_lengths": index(6, 3), "window": 4},
        ),
        "cross_attention": (
            (x, randn(2, 2, 5, 16), randn(2, 2, 5, 16)),
            {"q_weight": randn(16), "key_lengths": index(5, 2)},
        ),
        "linear": ((x, randn(48, 32), randn(48)), {"activation": "gelu_tanh", "x_scale": 0.5}),
        "normal": ((seeds, [3, 5]), {"stream": 2}),
        "sampler_step": (
            (x, randn(2, 6, 32), randn(2, 6, 32).half(), randn(9)),
            {"unconditional": randn(2, 6, 32).half(), "seeds": seeds, "stream": 1},
        ),
        "pcm": ((randn(2, 2, 9), seeds), {}),
        "spsi": ((randn(2, 3, 9).abs(), 4, 16), {}),
        "snake_conv1d": (
            (randn(2, 4, 20), snake_conv1d.pack(randn(6, 4, 3)), randn(6)),
            {"alpha": randn(4).abs(), "dilation": 2},
        ),
        "conv_transpose1d": (
            (randn(2, 4, 9), conv_transpose1d.pack(randn(4, 3, 10), 5)),
            {"stride": 5, "kernel_size": 10, "padding": 2, "alpha": randn(4).abs()},
        ),
    }


def test_registered_operators_are_all_called_here():
    assert sorted(calls("cpu")) == sorted(REGISTERED)


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_registered_operator_passes_opcheck(device, name):
    """Schema, no aliasing, fake against real outputs, and tracing with symbolic shapes."""
    arguments, options = calls(device)[name]
    result = torch.library.opcheck(getattr(torch.ops.presto_rt, name).default, arguments, options)
    assert set(result.values()) == {"SUCCESS"}


def test_registered_operators_return_contiguous_results():
    """As the fake implementations promise, also for (T, B, D) memory seen as (B, T, D)."""
    x = torch.randn(6, 2, 32).transpose(0, 1)
    results = [
        *torch.ops.presto_rt.adaln(x, x, torch.randn(3, 32), gate=0),
        torch.ops.presto_rt.linear(x, torch.randn(32, 32)),
    ]
    assert all(result.is_contiguous() for result in results)


def test_registered_operators_compile_without_a_graph_break():
    x, table, weight = torch.randn(1, 6, 32), torch.randn(3, 32), torch.randn(32, 32)

    def block(x):
        _, y = torch.ops.presto_rt.adaln(x, x, table, gate=2, shift=0, scale=1)
        return torch.ops.presto_rt.linear(y, weight)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), block(x))


def test_registered_operators_stay_in_exported_programs():
    class Step(torch.nn.Module):
        def forward(self, x, history, f, coefficients):
            return torch.ops.presto_rt.sampler_step(x, history, f, coefficients)[0]

    arguments = (*(torch.randn(1, 5, 4) for _ in range(3)), torch.randn(9))
    program = torch.export.export(Step(), arguments)
    assert "presto_rt.sampler_step" in str(program.graph)
    assert torch.equal(program.module()(*arguments), Step()(*arguments))
