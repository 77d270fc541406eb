"""Ahead-of-time compilation of every shipped configuration: registers, shared memory, spills, matrix units.

    python -m presto_rt.kernels.report [--arch sm_90] [--json] [operator ...]

Needs Triton but no GPU. Each operator lists its configurations in `shipped(arch)`. They are called on meta tensors
inside `runtime.recording`, so exactly the launched kernels are compiled. Registers and spills come from `ptxas -v` of
Triton's wheel. The matrix column is the instruction found in the PTX: wgmma (Hopper) or mma (Ampere).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from presto_rt.errors import BackendUnavailableError, InvalidInputError, MissingDependencyError

from . import OPERATORS, runtime

#: Shared memory per block in bytes (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
_SCALARS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float64: "fp64",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Resources of one compiled kernel.

    registers: per thread. shared, stack, spills: bytes. matrix: "wgmma", "mma" or "-". fits: no spills, and the shared
    memory is within the architecture's limit.
    """

    operator: str
    configuration: str
    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int
    shared: int
    stack: int
    spills: int
    matrix: str
    fits: bool


def configurations(arch: int, operators: Sequence[str] = OPERATORS) -> Iterator[tuple[str, str, runtime.Launch]]:
    """Yield (operator, configuration, launch) of every kernel that ships for `arch`.

    Raises InvalidInputError for an unknown operator.
    """
    for operator in operators:
        if operator not in OPERATORS:
            raise InvalidInputError(f"operator {operator!r} is unknown; use one of {', '.join(OPERATORS)}")
        module = importlib.import_module(f".{operator}", __package__)
        for name, call in module.shipped(arch):
            with runtime.recording(arch) as launches:
                call()
            for item in launches:
                yield operator, name, item


def specialize(item: runtime.Launch) -> tuple[dict[str, str], dict[Any, Any], dict[tuple[int], list[list[Any]]]]:
    """Return signature, constants and attributes of a recorded launch, specialized as Triton does at launch.

    Integers equal to 1 become constants and multiples of 16 are marked as such. Launches that agree in these and in
    their options run the same binary.
    """
    names = item.kernel.arg_names
    varying = {parameter.name for parameter in item.kernel.params if parameter.do_not_specialize}
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    values = dict(zip(names, item.arguments, strict=False)) | item.constants
    for index, name in enumerate(names):
        value = values[name]
        kind = "constexpr" if name in item.constants else _kind(value, name in varying)
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif kind.startswith("*") or (isinstance(value, int) and value % 16 == 0 and name not in varying):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(item: runtime.Launch, arch: int) -> Any:
    """Compile a recorded launch for compute capability `arch`."""
    triton = runtime.triton
    assert triton is not None
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", arch, 32)
    source = compiler.ASTSource(item.kernel, *specialize(item))
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages, **item.options}
    return triton.compile(source, target=target, options=options)


def _kind(value: Any, varies: bool = False) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _SCALARS[value.dtype]
    if value is None or (isinstance(value, int) and value == 1 and not varies):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def resources(compiled: Any, arch: int) -> dict[str, Any]:
    """Return registers, shared, stack, spills and matrix of a compiled kernel, as in `Row`."""
    ptx = compiled.asm["ptx"]
    log = _ptxas(ptx, arch, [] if compiled.metadata.enable_fp_fusion else ["--fmad=false"])
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    stack = sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", log))
    registers = int(_search(r"Used (\d+) registers", log))
    matrix = "wgmma" if "wgmma.mma_async" in ptx else "mma" if re.search(r"\bmma\.sync", ptx) else "-"
    return {
        "registers": registers,
        "shared": compiled.metadata.shared,
        "stack": stack,
        "spills": spills,
        "matrix": matrix,
    }


def _search(pattern: str, text: str) -> str:
    """Return the first group of the first match, which exists in every output of ptxas and Triton."""
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern!r} in: {text[-300:]}"
    return match[1]


def _ptxas(ptx: str, arch: int, flags: list[str]) -> str:
    """Return the log of `ptxas -v`.

    Newer Triton writes PTX that only the newer ptxas of its wheel accepts, so each of the wheel's ptxas is tried.
    Raises BackendUnavailableError if none assembles it.
    """
    target = _search(r"\.target (sm_\w+)", ptx)
    tools = Path(str(runtime.triton.__file__)).parent / "backends" / "nvidia" / "bin" if runtime.triton else Path()
    reason = "no ptxas in Triton's wheel"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for tool in (tools / "ptxas", tools / "ptxas-blackwell"):
            if not tool.exists():
                continue
            command = [
                str(tool),
                "-v",
                *flags,
                f"--gpu-name={target}",
                str(source),
                "-o",
                str(Path(folder) / "kernel.cubin"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout + done.stderr
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    raise BackendUnavailableError(f"ptxas could not assemble for sm_{arch}: {reason}")


def rows(arch: int, operators: Sequence[str] = OPERATORS) -> Iterator[Row]:
    """Yield one Row per shipped kernel; a kernel that several configurations share is compiled once."""
    seen: dict[Any, dict[str, Any]] = {}
    for operator, name, item in configurations(arch, operators):
        key = repr((item.kernel.__name__, *specialize(item), item.num_warps, item.num_stages, item.options))
        if key not in seen:
            seen[key] = resources(compile_launch(item, arch), arch)
        found = seen[key]
        fits = found["spills"] == 0 and found["shared"] <= SHARED_LIMIT[arch]
        yield Row(operator, name, item.kernel.__name__, arch, item.num_warps, item.num_stages, fits=fits, **found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a kernel spills or exceeds the shared memory, else 0.

    Raises MissingDependencyError without Triton, InvalidInputError if kernels are interpreted in this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m presto_rt.kernels.report", description="Resources of every shipped kernel."
    )
    parser.add_argument(
        "operators", nargs="*", default=list(OPERATORS), metavar="operator", help="default: all of them"
    )
    parser.add_argument("--arch", choices=["sm_80", "sm_90"], action="append", help="default: both")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if runtime.triton is None:
        raise MissingDependencyError(
            "the report compiles Triton kernels and Triton is not installed: pip install triton"
        )
    if runtime.interpreting:
        raise InvalidInputError("TRITON_INTERPRET is set, so nothing can be compiled; unset it")
    table = [
        row
        for arch in options.arch or ["sm_80", "sm_90"]
        for row in rows(int(arch.removeprefix("sm_")), options.operators)
    ]
    if options.json:
        document = {
            "triton": runtime.triton.__version__,
            "torch": torch.__version__,
            "rows": [dataclasses.asdict(r) for r in table],
        }
        print(json.dumps(document, indent=1))
    else:
        print(
            f"triton {runtime.triton.__version__}, torch {torch.__version__}; shared memory, stack and spills in bytes"
        )
        columns = ("arch", 5), ("warps", 6), ("stages", 7), ("regs", 5), ("shared", 7), ("stack", 6), ("spills", 7)
        print(f"{'configuration':56}" + "".join(f"{name:>{width}}" for name, width in columns) + " matrix")
        for r in table:
            numbers = (f"sm_{r.arch}", r.warps, r.stages, r.registers, r.shared, r.stack, r.spills)
            cells = "".join(f"{number:>{width}}" for number, (_, width) in zip(numbers, columns, strict=True))
            print(f"{r.operator + ': ' + r.configuration:56}{cells} {r.matrix}{'' if r.fits else '   DOES NOT FIT'}")
    return 0 if all(r.fits for r in table) else 1


if __name__ == "__main__":
    sys.exit(main())
