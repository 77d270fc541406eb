"""What goes into a distribution: all that the C++ operators are built from, every module, the weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_a_source_distribution_has_all_that_it_is_built_from(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    call = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(call, cwd=ROOT, check=True, capture_output=True, timeout=120)
    listed = set((tmp_path / "presto_rt.egg-info" / "SOURCES.txt").read_text().split())
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "presto_rt/py.typed"}
    for folder, suffixes in {"csrc": (".cpp", ".h"), "kernels": (".py",), "presto_rt": (".py", ".safetensors")}.items():
        wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes}
    assert not wanted - listed
