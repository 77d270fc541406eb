"""What this installation can do: versions, processor, GPUs, backends, C++ operators and shipped weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

# Features that decide which kernels run well here, by their names in /proc/cpuinfo.
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")

WEIGHTS = Path(__file__).parents[1] / "weights"


def info() -> dict[str, Any]:
    """Everything as plain dicts, lists, strings and numbers, ready for JSON."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "backends": _backends(),
        "native": _native(),
        "weights": _weights(),
    }


def info_text() -> str:
    """The same for people, one fact a line."""
    facts = info()
    cpu, gpus, native = facts["cpu"], facts["gpus"], facts["native"]
    lines = [f"{name:<12} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append(f"{'cpu':<12} {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} torch threads")
    lines.append(f"{'features':<12} {' '.join(cpu['features']) or 'none of those that matter here'}")
    products = ", ".join(f"{name} {rate:.0f}" for name, rate in cpu["products"].items() if rate)
    lines.append(f"{'products':<12} G operations a second on one thread: {products}; dtype auto is {cpu['dtype']}")
    lines += [f"{'gpu':<12} {gpu['name']}, {gpu['memory_gib']} GiB, sm_{gpu['capability']}" for gpu in gpus["devices"]]
    if not gpus["devices"]:
        lines.append(f"{'gpu':<12} none: {gpus['why']}")
    for name, backend in facts["backends"].items():
        lines.append(f"{name:<12} {'usable' if backend['usable'] else 'not usable'}: {backend['why']}")
    lines.append(f"{'native':<12} {'C++ operators' if native['present'] else 'torch twins: ' + native['why']}")
    for entry in facts["weights"]:
        lines.append(f"{'weights':<12} {entry['name']}: {entry['megabytes']} MB in {entry['shards']} files")
    if not facts["weights"]:
        lines.append(f"{'weights':<12} none shipped in {WEIGHTS}")
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("presto-rt", "torch", "triton", "numpy", "soundfile"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu() -> dict[str, Any]:
    import torch

    from ..runtime.cpu import autodtype as rates

    model, flags = _read_cpuinfo()
    return {
        "model": model,
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "features": [name for name in CPU_FEATURES if name in flags],
        "products": rates.product_rates(),
        "dtype": rates.chosen(),
    }


def _read_cpuinfo() -> tuple[str, set[str]]:
    """The processor's name and flags; only the name, if that, where there is no /proc/cpuinfo."""
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
    """The CUDA devices, or why there are none."""
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
    """For each backend whether it can run here, and the reason either way."""
    from .. import native
    from ..runtime.cpu.ops import unavailable

    gpus = _gpus()
    operators = "torch with C++ operators" if native.lib is not None else "torch alone"
    triton = importlib.util.find_spec("triton") is not None
    if gpus["why"] is not None:
        cuda = {"usable": False, "why": gpus["why"]}
    elif not triton:
        cuda = {"usable": True, "why": "torch alone; pip install 'presto-rt[triton]' for the kernels"}
    else:
        cuda = {"usable": True, "why": "Triton kernels, a request in one CUDA graph"}
    why = unavailable()
    isa = native.lib.isa() if native.lib is not None else ""
    engine = {"usable": why is None, "why": why or f"C++ for {isa} and oneDNN"}
    return {"cpu": {"usable": True, "why": operators}, "engine": engine, "cuda": cuda}


def _native() -> dict[str, Any]:
    from .. import native

    return {"present": native.lib is not None, "why": native.why}


def _weights() -> list[dict[str, Any]]:
    """The folders with weights that came with the package."""
    folders: dict[Path, list[int]] = {}
    for shard in sorted(WEIGHTS.rglob("*.safetensors")):
        folders.setdefault(shard.parent, []).append(shard.stat().st_size)
    return [
        {"name": str(folder.relative_to(WEIGHTS)), "shards": len(sizes), "megabytes": round(sum(sizes) / 1e6, 1)}
        for folder, sizes in folders.items()
    ]
