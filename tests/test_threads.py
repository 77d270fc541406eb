"""Threads of the CPU runtime on a machine whose other processors are busy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from presto_rt import native
from presto_rt.runtime.cpu.threads import openmp

BUSY = "import os, time\nparent = os.getppid()\nwhile os.getppid() == parent: pass\n"
SHARED = """
import os, subprocess, sys, time
import torch
from presto_rt.runtime.cpu.ops import CpuOps
from presto_rt.runtime.cpu.threads import thread_limit

torch.manual_seed(0)
x, w = torch.randn(1, 64, 256), torch.randn(256, 256)

def spent(threads):
    ops = CpuOps(threads=threads)
    packed, out, scale = ops.pack(w, None), torch.empty(1, 64, 256), torch.ones(64)
    with torch.inference_mode(), thread_limit(threads):
        for turn in range(2):
            begin = time.process_time()
            for _ in range(300):
                ops.rescale(ops.linear(x, packed, out)[0], scale, None, "silu")
        return time.process_time() - begin

one = spent(1)
busy = [subprocess.Popen([sys.executable, "-c", sys.argv[1]]) for _ in range(os.cpu_count() - 1)]
time.sleep(0.3)
print(one, spent(os.cpu_count()))
for process in busy:
    process.kill()
"""


@pytest.mark.skipif(native.lib is None, reason=f"no C++ operators: {native.why}")
def test_thread_limit_does_not_spin_while_processors_are_busy() -> None:
    """All processors but one are busy. The processor time of 600 small operators on all threads stays near that on one
    thread; with OpenMP's default spinning it is a hundred times as much."""
    if openmp() is None or not 2 <= (os.cpu_count() or 1) <= 16:
        pytest.skip("needs GNU's OpenMP and 2 to 16 processors")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", SHARED, BUSY], env=clean, capture_output=True, text=True, check=True, timeout=100
    )
    one, several = map(float, done.stdout.split())
    assert several < 10 * one + 0.2
