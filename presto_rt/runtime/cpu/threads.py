"""Threads of the CPU engine: those of the OpenMP library that torch brings along, as many as a model asks for.

Torch's matrix products leave their OpenMP threads spinning for a moment. Threads of our own would wait for a processor
meanwhile, so the C++ operators run on the same ones: GOMP_parallel takes the number of threads with each call, and
omp_set_num_threads sets it for the calling thread alone. Where no such library is found (nothing to spin, then), the
operators start threads for each call and torch keeps its own number.

They must not spin for long, though. By default a thread of GNU's library waits 300,000 pauses, about 16 ms, before it
sleeps; when another process has one of two processors, the thread that is waited for may stand in line behind the one
that spins, at every product: clips then take 30 times as long. `reduce_openmp_spinning` ends that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from functools import cache

import torch

from ... import native


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


_parking = threading.Lock()
_parked = False


def reduce_openmp_spinning(threads: int) -> None:
    """Makes OpenMP's threads wait for about 50 microseconds before they sleep, for good, in the whole process.

    The library does so by itself once it has more threads than there are processors, so a thread of ours opens a team
    that makes up the number, and sleeps. Does nothing where `threads` leave half of the processors free, where the
    user has set a policy, and without GNU's library.
    """
    global _parked
    library = openmp()
    if library is None or any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        return
    processors = library.omp_get_num_procs()
    with _parking:
        if _parked or 2 * threads < processors:
            return
        _parked = True
    ready = threading.Event()

    def park() -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)
        library.GOMP_parallel(nothing, None, ctypes.c_uint(max(2, processors - threads + 2)), ctypes.c_uint(0))
        ready.set()
        threading.Event().wait()  # the team lives as long as the thread that opened it

    threading.Thread(target=park, name="presto-rt-parked", daemon=True).start()
    ready.wait()


@contextlib.contextmanager
def thread_limit(count: int) -> Iterator[None]:
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
