"""Results as JSON files that name the machine, the versions and the command, and the tables written from them."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def machine() -> dict[str, Any]:
    """Return the conditions of a measurement: processor or GPU, threads, versions, command."""
    import torch

    from presto_rt.cli.info import info

    facts = info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{facts['cpu']['model']}, {os.cpu_count()} cores",
        "cpu_features": facts["cpu"]["features"],
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": {k: v for k, v in facts["versions"].items() if v},
        "command": command(),
    }


def command() -> str:
    """Return the command line of this process as it is typed in the repository root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return " ".join(["python", *program, *sys.argv[1:]])


def load(name: str) -> dict[str, Any] | None:
    """Return the contents of bench/results/NAME.json, or None if nothing was measured yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def save(name: str, rows: Any) -> Path:
    """Write rows, with the conditions of their measurement, to bench/results/NAME.json; return its path."""
    return write(name, {"machine": machine(), "rows": rows})


def write(name: str, contents: dict[str, Any]) -> Path:
    """Write bench/results/NAME.json and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(contents, indent=1) + "\n")
    return path


def spread(values: list[float]) -> dict[str, float]:
    """Return median, 90th percentile, extremes and number of measurements."""
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return {"median": statistics.median(ordered), "p90": p90, "min": ordered[0], "max": ordered[-1], "n": len(ordered)}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def replace_section(path: Path, name: str, text: str) -> None:
    """Replace the text between the markers <!-- name --> and <!-- /name --> of a markdown file.

    Raises:
        SystemExit: the file does not have these markers exactly once.
    """
    old = path.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    new, count = pattern.subn(lambda m: m.group(1) + text + "\n" + m.group(2), old)
    if count != 1:
        raise SystemExit(f"{path} has {count} sections {name}; it needs exactly one")
    path.write_text(new)
