"""The C++ module: built where there is a compiler; its absence costs one line of log and some speed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from presto_rt import native
from presto_rt.source_digest import source_digest
from tests.support.models import write_tiny_model


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_native_is_present_where_a_compiler_is() -> None:
    if os.environ.get("PRESTO_RT_NO_NATIVE"):
        pytest.skip("switched off by PRESTO_RT_NO_NATIVE")
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("no C++ compiler")
    assert native.lib is not None, native.why
    assert native.why is None


def test_native_switched_off_logs_one_line_and_gives_the_same_bits() -> None:
    code = (
        "from presto_rt import native\nfrom presto_rt.audio import pcm\nfrom presto_rt.diffusion import noise\n"
        "import hashlib\n"
        "z = noise.normal(7, (2, 5000))\n"
        "p = pcm.to_pcm(z * 0.3, seed=5)\n"
        "print(native.lib is None, hashlib.sha256(z.numpy().tobytes() + p.numpy().tobytes()).hexdigest())\n"
    )
    off = run_python(code, PRESTO_RT_NO_NATIVE="1")
    assert off.stdout.startswith("True ")
    assert off.stderr.splitlines() == ["C++ operators are not used: switched off by PRESTO_RT_NO_NATIVE"]
    on = run_python(code, PRESTO_RT_NO_NATIVE="0")
    assert on.stdout.split()[1] == off.stdout.split()[1]


def needs_native() -> None:
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")


def test_native_names_the_remedy_where_the_module_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRESTO_RT_NO_NATIVE", raising=False)
    monkeypatch.setitem(sys.modules, "presto_rt._C", None)  # as Python marks a module that cannot be imported
    lib, why = native.load()
    assert lib is None
    assert why


def test_native_refuses_a_module_built_from_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    monkeypatch.setattr(native, "ROOT", tmp_path)
    assert native.load() == (native.lib, None)  # an installed package has no sources beside it
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "noise.cpp").write_text("int answer = 42;\n")
    (tmp_path / "setup.py").touch()
    lib, why = native.load()
    assert lib is None
    assert why is not None
    assert "built from other sources" in why
    assert "\n" not in why


def test_source_digest_depends_on_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "simd").mkdir()
    source, flags = tmp_path / "simd" / "a.cpp", tmp_path / "flags.txt"
    source.write_text("int a;\n")
    flags.write_text("all -O3\n")
    (tmp_path / "notes.md").write_text("not compiled\n")
    before = source_digest(tmp_path)
    (tmp_path / "notes.md").unlink()
    assert source_digest(tmp_path) == before
    flags.write_text("all -O2\n")
    changed = source_digest(tmp_path)
    flags.write_text("all -O3\n")
    source.rename(tmp_path / "simd" / "b.cpp")
    assert len({before, changed, source_digest(tmp_path)}) == 3


def test_native_operators_release_the_interpreter_lock() -> None:
    """While C++ fills 40 million numbers, Python must go on counting in another thread."""
    needs_native()
    out = torch.empty(40_000_000)
    worker = threading.Thread(target=native.lib.normal, args=(out, 1, 0))
    worker.start()
    steps = 0
    while worker.is_alive():
        steps += 1
    worker.join()
    # With the lock held throughout, this thread would come to run once or twice.
    assert steps > 1000


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86")
def test_native_code_outside_the_instruction_sets_has_no_avx() -> None:
    """On a processor without AVX the module must import and run: what is compiled once, and the plain variant of each
    operator, use no vector register of AVX. Names tell which code may: a variant's namespace, or target_clones."""
    if native.lib is None or shutil.which("objdump") is None:
        pytest.skip(native.why or "no objdump")
    if native.lib.__file__ is None:
        pytest.skip("the module is not a file")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native.lib.__file__],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    allowed = ("avx2", "avx512", "amx")
    if "avx512" not in listing:
        pytest.skip("the module has no names left to go by")
    counts = {True: 0, False: 0}
    offenders, name, plain = set(), "", False
    for line in listing.splitlines():
        if line.endswith(">:"):
            name = line
            plain = not any(mark in name for mark in allowed)
        elif "%ymm" in line or "%zmm" in line or "%tmm" in line or re.search(r"\tv[a-z0-9]+ .*%xmm", line):
            counts[plain] += 1
            if plain:
                offenders.add(name)
    assert not offenders
    assert counts[False] > 1000  # the search does find such code where it may be


def test_native_base_instruction_set_generates_a_clip(tmp_path: Path) -> None:
    """Run everything from import to sound as a processor without AVX2 would, in a process of its own."""
    needs_native()
    folder = write_tiny_model(tmp_path / "tiny")
    code = (
        "import sys, presto_rt; from presto_rt import native\n"
        "native.lib.use_isa('base')\n"
        f"model = presto_rt.load({str(folder)!r}, device='cpu', dtype='float32', backend='cpu', threads=1)\n"
        "audio = model.generate('piano', seconds=1.0, seed=1)\n"
        "print(native.lib.isa(), audio.samples.shape, bool(abs(audio.samples).max() > 0))\n"
    )
    assert run_python(code).stdout.split("\n")[0] == "base (2, 44100) True"
