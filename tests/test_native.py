"""The C++ module: it is built where there is a compiler, and its absence is one line and no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from presto_rt import native


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_the_module_is_there_wherever_a_compiler_is() -> None:
    if os.environ.get("PRESTO_RT_NO_NATIVE"):
        pytest.skip("switched off by PRESTO_RT_NO_NATIVE")
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("no C++ compiler")
    assert native.lib is not None, native.why
    assert native.why is None


def test_switching_it_off_is_said_in_one_line_and_gives_the_same_bits() -> None:
    code = (
        "from presto_rt import native, noise, pcm\n"
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


def test_a_module_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    lib, why = native._load()
    assert lib is None
    assert why is not None
    assert "another version" in why


def test_a_module_that_was_not_built_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRESTO_RT_NO_NATIVE", raising=False)
    monkeypatch.setitem(
        sys.modules, "presto_rt._C", None
    )  # what Python itself does for a module that cannot be imported
    lib, why = native._load()
    assert lib is None
    assert why


def test_operators_release_the_interpreter_lock() -> None:
    """While C++ fills 40 million numbers, Python must go on counting in another thread."""
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")
    out = np.empty(40_000_000, np.float32)
    worker = threading.Thread(target=native.lib.normal, args=(out, 1, 0))
    worker.start()
    steps = 0
    while worker.is_alive():
        steps += 1
    worker.join()
    # With the lock held throughout, this thread would come to run once or twice.
    assert steps > 1000
