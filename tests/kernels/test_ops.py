from __future__ import annotations

import pytest
import torch
from presto_rt.kernels import conv_transpose1d, ops, qk_norm_rope, snake_conv1d
from presto_rt.kernels.edm_step import coefficients, seeds_tensor


def calls(device):
    """Arguments for every operator: small, with the optional ones in use."""

    def randn(*shape):
        return torch.randn(*shape, device=device)

    def index(*numbers):
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    cos, sin = qk_norm_rope.rotary_table(6, 16, device=device)
    seeds = seeds_tensor([3, 2**63], device)
    five = coefficients(0.5, 0.4, 0.0, guidance=2.0, noise=0.3, c_in_next=0.7).to(device)
    x, table, base = randn(2, 6, 32), randn(12, 32), index(0, 6)
    return {
        "norm_modulate": ((x, table), {"shift": 0, "scale": 1, "base": base, "out_dtype": torch.float16}),
        "gate_residual_norm_modulate": ((x, x + 1, table), {"gate": 2, "shift": 0, "scale": 1, "norm": "rms"}),
        "qk_norm_rope": ((randn(2, 6, 96), 2, cos, sin), {"q_weight": randn(16), "k_weight": randn(16)}),
        "attention": ((randn(2, 2, 6, 16), randn(2, 2, 6, 16), randn(2, 2, 6, 16)), {"key_lengths": index(6, 3),
        "window": 4}),
        "cross_attention": ((x, randn(2, 2, 5, 16), randn(2, 2, 5, 16)), {"q_weight": randn(16), "key_lengths":
        index(5, 2)}),
        "linear": ((x, randn(48, 32), randn(48)), {"activation": "swiglu"}),
        "linear_gate_residual": ((x, randn(32, 32), randn(32), randn(2, 6, 32), table), {"gate": 3, "base": base}),
        "normal": ((seeds, [3, 5]), {"stream": 2, "scale": 80.0}),
        "edm_step": ((x, randn(2, 6, 32), five), {"unconditional": randn(2, 6, 32), "seeds": seeds, "stream": 1}),
        "pcm": ((randn(2, 2, 9), seeds), {}),
        "spsi": ((randn(2, 3, 9).abs(), 4, 16), {}),
        "spectrum": ((randn(2, 3, 18),), {"limit": 10.0}),
        "overlap_add": ((randn(2, 5, 16), torch.hann_window(16, device=device) + 0.1, 4), {"padding": "same"}),
        "snake_conv1d": ((randn(2, 4, 20), snake_conv1d.pack(randn(6, 4, 3)), randn(6)), {"alpha": randn(4).abs(),
        "dilation": 2}),
        "conv_transpose1d": (
            (randn(2, 4, 9), conv_transpose1d.pack(randn(4, 3, 10), 5)),
            {"stride": 5, "kernel_size": 10, "padding": 2, "alpha": randn(4).abs()},
        ),
    }  # fmt: skip


def test_every_operator_is_called_here():
    assert sorted(calls("cpu")) == sorted(ops.NAMES)


@pytest.mark.parametrize("name", ops.NAMES)
def test_opcheck(device, name):
    """Schema, no aliasing, fake against real outputs, and tracing with symbolic shapes."""
    arguments, options = calls(device)[name]
    result = torch.library.opcheck(getattr(torch.ops.presto_rt, name).default, arguments, options)
    assert set(result.values()) == {"SUCCESS"}


def test_the_layout_of_an_input_is_not_that_of_the_result():
    """What fake implementations promise: contiguous results, also of (T, B, D) memory seen as (B, T, D)."""
    x = torch.randn(6, 2, 32).transpose(0, 1)
    weight, table = torch.randn(32, 32), torch.randn(3, 32)
    results = [
        torch.ops.presto_rt.norm_modulate(x),
        *torch.ops.presto_rt.gate_residual_norm_modulate(x, x, table, gate=0),
        torch.ops.presto_rt.linear(x, weight),
        torch.ops.presto_rt.linear_gate_residual(x, weight, None, x, table),
    ]
    assert all(result.is_contiguous() for result in results)


def test_a_compiled_graph_holds_the_operators():
    """torch.compile traces through fake implementations without a graph break and gives the eager numbers."""
    x, table, weight = torch.randn(1, 6, 32), torch.randn(3, 32), torch.randn(32, 32)

    def block(x):
        y = torch.ops.presto_rt.norm_modulate(x, table, shift=0, scale=1)
        return torch.ops.presto_rt.linear_gate_residual(y, weight, None, x, table, gate=2)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), block(x))


def test_exported_programs_keep_the_operators():
    class Step(torch.nn.Module):
        def forward(self, x, f, five):
            return torch.ops.presto_rt.edm_step(x, f, five)[0]

    arguments = (torch.randn(1, 5, 4), torch.randn(1, 5, 4), torch.randn(5))
    program = torch.export.export(Step(), arguments)
    assert "presto_rt.edm_step" in str(program.graph)
    assert torch.equal(program.module()(*arguments), Step()(*arguments))
