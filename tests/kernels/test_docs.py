"""docs/kernels.md: each operator's example runs unchanged, here on a CPU, and the tables list every operator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from presto_rt.kernels import OPERATORS

TEXT = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
FOUND = re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
SECTIONS = {title.split(",")[0]: body for title, body in FOUND}


def names() -> dict[str, object]:
    """Return the variables that the examples take from their surroundings: a small transformer and a decoder's layers."""
    torch.manual_seed(0)
    width, heads, tokens = 64, 4, 9
    q, k, v = torch.randn(3, 1, heads, tokens, 16)
    linear = torch.nn.Linear
    x = torch.randn(1, tokens, width)
    return {
        "torch": torch,
        "steps": 4,
        "step": 1,
        "blocks": 2,
        "block": 1,
        "width": width,
        "heads": heads,
        "head_dim": 16,
        "tokens": tokens,
        "x": x,
        "y": x,
        "branch": x + 1,
        "residual": x,
        "qkv_weight": torch.randn(3 * width, width),
        "q_norm": torch.ones(16),
        "k_norm": torch.ones(16),
        "k_norms": torch.ones(2, 16),
        "q": q,
        "k": k,
        "v": v,
        "lengths": torch.tensor([5], dtype=torch.int32),
        "states": torch.randn(1, 7, 24),
        "q_projection": x,
        "stacked_weights": torch.randn(2, 2 * width, 24),
        "up": linear(width, 128),
        "down": linear(128, width),
        "table": torch.randn(48, width),
        "base": torch.zeros(1, dtype=torch.int32),
        "s": torch.rand(128),
        "y8": x.to(torch.float8_e4m3fn),
        "up8": torch.randn(128, width).to(torch.float8_e4m3fn),
        "c_skip": 0.1,
        "c_out": 0.4,
        "c_in": 1.1,
        "sigma_next": 0.5,
        "conditional": torch.randn(1, 689, 64),
        "unconditional": torch.randn(1, 689, 64),
        "head": torch.randn(2, 5, 1026),
        "seeds": torch.tensor([7]),
        "layer": torch.nn.ConvTranspose1d(9, 9, 16, 8, 4),
        "conv": torch.nn.Conv1d(9, 9, 7),
        "a": torch.ones(9),
        "b": torch.ones(9),
    }


def test_docs_have_a_section_and_rows_for_every_operator():
    titles = " ".join(re.findall(r"^### (.+)", TEXT, re.MULTILINE)).replace(",", " ").split()
    assert sorted(titles) == sorted(OPERATORS)
    for operator in OPERATORS:
        assert len(re.findall(rf"^\| {operator} \|", TEXT, re.MULTILINE)) >= 2, operator  # floors, and resources
    for body in SECTIONS.values():
        assert re.search(r"bytes|MB", body)
        assert re.search(r"operations", body)


@pytest.mark.parametrize("section", SECTIONS)
def test_docs_example_runs_in_five_lines(section):
    code = next(block for block in re.split(r"\n\n", SECTIONS[section]) if block.startswith("    from presto_rt"))
    lines = [line[4:] for line in code.strip("\n").splitlines()]
    assert len(lines) <= 5
    program = "\n".join(lines).replace('"cuda"', '"cpu"').replace(".cuda()", ".cpu()")
    with torch.no_grad():
        exec(compile(program, section, "exec"), names())
