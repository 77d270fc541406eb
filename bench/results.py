"""Results as JSON files that name the machine, the versions and the command, and the tables made from them."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What a figure depends on: processor or GPU, threads, versions, command."""
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
        "command": " ".join(["python", *sys.argv]),
    }


def save(name: str, rows: Any) -> Path:
    """Write bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path


def spread(values: list[float]) -> dict[str, float]:
    """Median, 90th percentile, extremes and count of measurements."""
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return {"median": statistics.median(ordered), "p90": p90, "min": ordered[0], "max": ordered[-1], "n": len(ordered)}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers <!-- name --> and <!-- /name --> of a markdown file."""
    old = path.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    new, count = pattern.subn(lambda m: m.group(1) + text + "\n" + m.group(2), old)
    if count != 1:
        raise SystemExit(f"{path} has {count} sections {name}; it needs exactly one")
    path.write_text(new)
