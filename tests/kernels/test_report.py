"""Every shipped configuration compiles for sm_80 and sm_90 without a GPU, and fits the chip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from presto_rt.errors import InvalidInputError
from presto_rt.kernels import OPERATORS, report, runtime


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: this one may be interpreting, which leaves nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def table() -> list[dict]:
    commands = [("-m", "presto_rt.kernels.report", "--json", "--arch", arch) for arch in ("sm_80", "sm_90")]
    with ThreadPoolExecutor() as pool:  # a process for each chip
        both = list(pool.map(lambda command: run(*command), commands))
    for done in both:
        assert done.returncode == 0, done.stderr[-3000:] or done.stdout[-3000:]
    return [row for done in both for row in json.loads(done.stdout)["rows"]]


def test_report_has_no_spills_and_fitting_shared_memory(table):
    for row in table:
        assert row["spills"] == 0, row
        assert row["stack"] == 0, row
        assert 0 <= row["shared"] <= {80: 163 * 1024, 90: 227 * 1024}[row["arch"]], row
        assert 0 < row["registers"] <= 255, row
        assert row["registers"] * row["warps"] * 32 <= 65536, row


def test_report_lists_every_operator_for_both_architectures(table):
    for arch in (80, 90):
        assert {row["operator"] for row in table if row["arch"] == arch} == set(OPERATORS)
    assert any("fp8" in row["configuration"] for row in table if row["arch"] == 90)


def test_report_shows_matrix_units_for_matrix_products(table):
    for row in table:
        if row["operator"] in ("gemm", "attention"):
            assert row["matrix"] == ("wgmma" if row["arch"] == 90 else "mma"), row
        if row["operator"] in ("cross_attention", "snake_conv1d", "conv_transpose1d"):
            assert row["matrix"] in ("wgmma", "mma"), row


def test_compiled_noise_has_no_fused_operation_and_exact_roots():
    """One fused multiply-add would change the noise's bits, as would an approximate square root or division."""
    done = run(
        "-c",
        """
import re
from presto_rt.kernels import report
for arch in (80, 90):
    for operator, name, item in report.configurations(arch, ["sampler_step", "pcm"]):
        compiled = report.compile_launch(item, arch)
        ptx = compiled.asm["ptx"]
        assert not re.search(r"fma\\.", ptx), name
        assert compiled.metadata.enable_fp_fusion is False, name  # ptxas gets --fmad=false
        if "fresh noise" in name or name == "normal":
            kinds = set(re.findall(r"\\b((?:sqrt|div)\\.\\w+\\.f32)", ptx))
            assert kinds == {"sqrt.rn.f32", "div.rn.f32"}, kinds
            print(arch, name)
""",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 8


def test_compile_launch_accepts_integers_of_one():
    """Triton makes a constant of an argument that equals 1: a length, stride or row of 1 takes another path in the
    compiler.
    """
    done = run(
        "-c",
        """
import dataclasses
from presto_rt.kernels import report
seen = set()
for operator, name, item in report.configurations(90):
    kernel = item.kernel.__name__
    if kernel in seen:
        continue
    seen.add(kernel)
    ones = tuple(1 if isinstance(value, int) else value for value in item.arguments)
    report.compile_launch(dataclasses.replace(item, arguments=ones), 90)
    print(kernel)
""",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) >= 10


def test_specialize_shares_one_binary_for_all_rows_and_streams():
    """Rows of the modulation table and noise streams differ from call to call: none is a reason to compile again."""
    done = run(
        "-c",
        """
import torch
from presto_rt.kernels import adaln, report, runtime, sampler_step
x, table, coefficients = (torch.empty(*s, device="meta") for s in ((1, 32, 64), (40, 64), (9,)))
seeds, found = torch.empty(1, dtype=torch.int64, device="meta"), []
for row in (0, 1, 7, 16):
    with runtime.recording(90) as launches:
        adaln.adaln(x, x, adaln.Modulation(table, gate=row, shift=row + 1, scale=row + 2))
        noise = sampler_step.NoiseStream(seeds, row)
        sampler_step.sampler_step(x, x, x, coefficients, network_input=x, noise=noise)
    found.append([repr(report.specialize(item)) for item in launches])
assert len(found[0]) == 2 and all(one == found[0] for one in found), found
""",
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_report_fails_if_a_kernel_does_not_fit(monkeypatch, capsys):
    row = report.Row("adaln", "made up", "kernel", 90, 4, 1, 255, 300 * 1024, 8, 16, "-", False)
    monkeypatch.setattr(report, "rows", lambda arch, operators: iter([row]))
    monkeypatch.setattr(runtime, "interpreting", False)
    assert report.main(["--arch", "sm_90"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_report_rejects_unknown_operators_and_the_interpreter(monkeypatch):
    with pytest.raises(InvalidInputError, match="operator 'softmax' is unknown"):
        next(iter(report.configurations(90, ["softmax"])))
    monkeypatch.setattr(runtime, "interpreting", True)
    with pytest.raises(InvalidInputError, match="unset it"):
        report.main([])
