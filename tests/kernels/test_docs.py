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


def variables() -> dict[str, object]:
    """Return what the examples take from their surroundings: a small transformer and layers of a decoder."""
    torch.manual_seed(0)
    width, heads, tokens = 64, 4, 9
    q, k, v = torch.randn(3, 1, heads, tokens, 16)
    x = torch.randn(1, tokens, width)
    latents = {name: torch.randn(1, 689, 64) for name in ("history", "f_c", "f_u", "network_input")}
    transformer = {
        "steps": 4,
        "step": 1,
        "blocks": 2,
        "width": width,
        "heads": heads,
        "x": x,
        "y": x,
        "branch": x + 1,
        "angles": torch.randn(tokens, 8),
        "qkv_weight": torch.randn(3 * width, width),
        "q_norm": torch.ones(16),
        "k_norm": torch.ones(16),
        "q": q,
        "k": k,
        "v": v,
        "lengths": torch.tensor([5], dtype=torch.int32),
        "q_projection": x,
        "keys": torch.randn(1, heads, 7, 16),
        "values": torch.randn(1, heads, 7, 16),
        "up": torch.nn.Linear(width, 128),
        "weight_scale": torch.rand(128),
        "y8": x.to(torch.float8_e4m3fn),
        "up8": torch.randn(128, width).to(torch.float8_e4m3fn),
        "coefficients": torch.randn(9),
    }
    decoder = {
        "samples": torch.randn(1, 2, 50),
        "seeds": torch.tensor([7]),
        "layer": torch.nn.ConvTranspose1d(9, 9, 16, 8, 4),
        "conv": torch.nn.Conv1d(9, 9, 7),
        "alpha": torch.ones(9),
        "beta": torch.ones(9),
    }
    return {"torch": torch, **latents, **transformer, **decoder}


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
        exec(compile(program, section, "exec"), variables())
