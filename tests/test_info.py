"""Command `presto-rt info`: its facts match the machine and the process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import presto_rt
from presto_rt import native
from presto_rt.cli import info as info_module
from presto_rt.cli.info import info, info_text


def test_info_survives_json() -> None:
    facts = info()
    assert json.loads(json.dumps(facts)) == facts


def test_info_reports_versions_processor_and_native_module() -> None:
    facts = info()
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["presto-rt"] == presto_rt.__version__
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["native"] == {"present": native.lib is not None, "why": native.why}
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("avx2" in facts["cpu"]["features"]) == (capability in ("AVX2", "AVX512")) or platform.machine() != "x86_64"
    assert facts["backends"]["cpu"]["usable"] is True


def test_info_reports_the_gpus_of_torch() -> None:
    gpus = info()["gpus"]
    assert len(gpus["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert (gpus["why"] is None) == bool(gpus["devices"])
    assert info()["backends"]["cuda"]["usable"] == bool(gpus["devices"])


def test_info_distinguishes_missing_device_from_missing_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver" in info()["gpus"]["why"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in info()["gpus"]["why"]


def test_info_lists_weights_with_their_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(info_module, "WEIGHTS", tmp_path)
    assert info()["weights"] == []
    assert "none shipped" in info_text()
    (tmp_path / "nano").mkdir()
    for index in range(2):
        (tmp_path / "nano" / f"model-{index}.safetensors").write_bytes(b"\0" * 750_000)
    assert info()["weights"] == [{"name": "nano", "shards": 2, "megabytes": 1.5}]
    assert "nano: 1.5 MB in 2 files" in info_text()


def test_info_text_has_one_line_for_each_fact() -> None:
    lines = info_text().splitlines()
    starts = [line.split()[0] for line in lines]
    for name in ("python", "presto-rt", "torch", "triton", "cpu", "features", "gpu", "cuda", "native", "weights"):
        assert name in starts
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_info_text_explains_a_missing_native_module() -> None:
    code = "from presto_rt.cli.info import info_text; print(info_text())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PRESTO_RT_NO_NATIVE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "torch references: switched off by PRESTO_RT_NO_NATIVE" in done.stdout
    assert "cpu          usable: torch alone" in done.stdout
