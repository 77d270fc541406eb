"""Threads of the CPU engine: those of the OpenMP library that torch brings along, as many as a model asks for.

Torch's matrix products leave their OpenMP threads spinning for a moment. Threads of our own would wait for a processor
meanwhile, so the C++ operators run on the same ones: GOMP_parallel takes the number of threads with each call, and
omp_set_num_threads sets it for the calling thread alone. Where no such library is found (nothing to spin, then), the
operators start threads for each call and torch keeps its own number.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from functools import cache

import torch

from .. import native


@cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP library in this process that knows GOMP_parallel, or None. The C++ operators use it from then on."""
    torch.get_num_threads()
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "omp" in os.path.basename(line.split()[-1])}
    except OSError:
        return None
    for path in sorted(p for p in paths if ".so" in p):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_set_num_threads"):
            if native.lib is not None:
                native.lib.use_openmp(ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value)
            return library
    return None


@contextlib.contextmanager
def limited(count: int) -> Iterator[None]:
    """Torch's operators use `count` threads inside, when called from this thread; others are not touched."""
    library = openmp()
    if library is None or count == library.omp_get_max_threads():
        yield
        return
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(count)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)
