"""Command `presto-rt info`: versions, processor, GPUs, backends, C++ operators and shipped weights."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .options import Commands

# Features that decide between kernels, by their names in /proc/cpuinfo.
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")

WEIGHTS = Path(__file__).parents[1] / "weights"


def add_parser(commands: Commands) -> None:
    """Add `info`."""
    parser = commands.add_parser("info", help="print versions, hardware, and the backends that are available")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    print(json.dumps(info(), indent=1) if options.json else info_text())


def info() -> dict[str, Any]:
    """Return all facts as plain dicts, lists, strings and numbers, ready for JSON."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "backends": _backends(),
        "native": _native(),
        "weights": _weights(),
    }


def info_text() -> str:
    """Return the same facts as text, one per line."""
    facts = info()
    cpu, gpus, native = facts["cpu"], facts["gpus"], facts["native"]
    lines = [f"{name:<12} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append(f"{'cpu':<12} {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} torch threads")
    lines.append(f"{'features':<12} {' '.join(cpu['features']) or 'none of those that decide between kernels'}")
    products = ", ".join(f"{name} {rate:.0f}" for name, rate in cpu["products"].items() if rate)
    lines.append(f"{'products':<12} G operations a second on one thread: {products}; dtype auto is {cpu['dtype']}")
    lines += [f"{'gpu':<12} {gpu['name']}, {gpu['memory_gib']} GiB, sm_{gpu['capability']}" for gpu in gpus["devices"]]
    if not gpus["devices"]:
        lines.append(f"{'gpu':<12} none: {gpus['why']}")
    for name, backend in facts["backends"].items():
        lines.append(f"{name:<12} {'usable' if backend['usable'] else 'not usable'}: {backend['why']}")
    lines.append(f"{'native':<12} {'C++ operators' if native['present'] else 'torch references: ' + native['why']}")
    for entry in facts["weights"]:
        lines.append(f"{'weights':<12} {entry['name']}: {entry['megabytes']} MB in {entry['shards']} files")
    if not facts["weights"]:
        lines.append(f"{'weights':<12} none shipped in {WEIGHTS}")
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    from .. import __version__

    versions: dict[str, str | None] = {"python": platform.python_version(), "presto-rt": __version__}
    for name in ("torch", "triton", "numpy", "soundfile"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cpu() -> dict[str, Any]:
    import torch

    from ..runtime.cpu import autodtype

    model, flags = _read_cpuinfo()
    return {
        "model": model,
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "features": [name for name in CPU_FEATURES if name in flags],
        "products": autodtype.matmul_rates(),
        "dtype": autodtype.preferred_dtype(),
    }


def _read_cpuinfo() -> tuple[str, set[str]]:
    """Return the processor's name and its flags; without /proc/cpuinfo the flags are empty."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.machine()), set(flags.split())


def _gpus() -> dict[str, Any]:
    """Return the CUDA devices; "why" explains an empty list."""
    import torch

    if torch.version.cuda is None:
        return {"devices": [], "why": "this torch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": [], "why": "torch finds no CUDA device; check the driver with nvidia-smi"}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"devices": devices, "why": None}


def _backends() -> dict[str, dict[str, Any]]:
    """Return for each backend if it is usable on this machine, and the reason."""
    from .. import native
    from ..runtime.cpu.ops import unsupported_reason

    gpus = _gpus()
    operators = "torch with C++ operators" if native.lib is not None else "torch alone"
    if gpus["why"] is not None:
        cuda = {"usable": False, "why": gpus["why"]}
    elif importlib.util.find_spec("triton") is None:
        cuda = {"usable": True, "why": "torch alone; pip install 'presto-rt[triton]' for the kernels"}
    else:
        cuda = {"usable": True, "why": "Triton kernels, a request in one CUDA graph"}
    reason = unsupported_reason()
    isa = native.lib.isa() if native.lib is not None else ""
    engine = {"usable": reason is None, "why": reason or f"C++ for {isa} and oneDNN"}
    return {"cpu": {"usable": True, "why": operators}, "engine": engine, "cuda": cuda}


def _native() -> dict[str, Any]:
    from .. import native

    return {"present": native.lib is not None, "why": native.why}


def _weights() -> list[dict[str, Any]]:
    """Return name, number of files and size of each weights folder that is installed with the package."""
    folders: dict[Path, list[int]] = {}
    for shard in sorted(WEIGHTS.rglob("*.safetensors")):
        folders.setdefault(shard.parent, []).append(shard.stat().st_size)
    return [
        {"name": str(folder.relative_to(WEIGHTS)), "shards": len(sizes), "megabytes": round(sum(sizes) / 1e6, 1)}
        for folder, sizes in folders.items()
    ]
