"""Kernel tests run on a GPU where there is one (`pytest -m gpu`), else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Iterator

import pytest
import torch

# before anything imports Triton: its decorators read this once
if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise pytest.UsageError("Triton was imported before tests/kernels/conftest.py; set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

from presto_rt.kernels import runtime

# Plain torch in fp32 is the yardstick, and cuDNN's convolutions would round to TF32.
torch.backends.cudnn.allow_tf32 = False

if runtime.triton is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device whose tensors run as Triton kernels."""
    if request.param == "interpreter":
        if not runtime.interpreting:
            pytest.skip("Triton compiles in this process; set TRITON_INTERPRET=1 for the interpreter")
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    if runtime.interpreting:
        pytest.skip("TRITON_INTERPRET is set; unset it to run on the GPU")
    return "cuda"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed torch by the test's name, or at random with PRESTO_RT_FRESH_SEEDS=1, and print the seed for repetition."""
    fresh = os.environ.get("PRESTO_RT_FRESH_SEEDS") == "1"
    seed = random.SystemRandom().randrange(2**31) if fresh else zlib.crc32(request.node.nodeid.encode())
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def no_low_precision_dots() -> Iterator[None]:
    """Fails any test in which an interpreted kernel gives bf16 or fp8 to a matrix product, which the interpreter
    gets wrong.
    """
    if not runtime.interpreting:
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def checked(self, a, b, *rest):  # type: ignore[no-untyped-def]
        names = {str(operand.dtype.scalar) for operand in (a, b)}
        assert names <= {"fp32", "fp16"}, f"interpreted matrix product of {names}: lift the operands with runtime.dot"
        return original(self, a, b, *rest)

    builder.create_dot = checked
    yield
    builder.create_dot = original
