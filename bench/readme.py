"""Write the measured tables of the README and the model card from bench/results: `python bench/readme.py`.

Draws docs/demo.png too, where `make demo` has left a demo.wav.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import clips
import cpu
import e2e
import fidelity
import operators
import quality
from results import RESULTS, replace_section

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from bench.e2e_gpu import write_readme as write_gpu_table  # noqa: E402

README = ROOT / "README.md"
CPU = ROOT / "docs" / "cpu.md"
WEIGHTS = ROOT / "presto_rt" / "weights"


def main() -> None:
    write_gpu_table()
    if (data := _read("e2e-cpu")) is not None:
        rows = data["rows"]
        note = (f"Medians of {rows[0]['stages']['total']['n']} on {data['machine']['device']} ({rows[0]['dtype']}, "
                f"{rows[0]['steps']} steps of {rows[0]['sampler']}, guidance {rows[0]['guidance']:g}).")  # fmt: skip
        replace_section(README, "e2e", f"{note}\n\n{e2e.render(rows)}")
    if (data := _read("cpu")) is not None:
        row, machine = data["rows"], data["machine"]
        note = (f"{row['seconds']:g} s of stereo, {row['model']}, {row['evaluations']} evaluations, guidance "
                f"{row['guidance']:g}, layers {row.get('layers', '100%')}, on "
                f"{machine['device']} (`{machine['command']}`).")  # fmt: skip
        replace_section(CPU, "cpu", f"{note}\n\n{cpu.render(row).strip()}")
    if (data := _read("cpu-default")) is not None:
        row = data["rows"]
        ways = row["networks"][str(row["threads"])]["whole clip"]
        note = f"The same with the shipped model's own layers, {row['layers']} (`{data['machine']['command']}`)."
        replace_section(CPU, "cpu-default", f"{note}\n\n{cpu.compare('whole clip', row['auto'], ways)}")
    for name, render in (
        ("cpu-clips", clips.render),
        ("cpu-operators", operators.render),
        ("fidelity", fidelity.render),
    ):
        if (data := _read(name)) is not None:
            note = f"On {data['machine']['device']} (`{data['machine']['command']}`)."
            replace_section(CPU, name, f"{note}\n\n{render(data['rows']).strip()}")
    both = [data for name in ("quality-nano-bfloat16", "quality-nano") if (data := _read(name)) is not None]
    if len(both) == 2:
        count = both[0]["sets"]["generated"]["clips"]
        replace_section(CPU, "precision", f"{count} held-out captions, 95 % intervals:\n\n{quality.by_precision(both)}")
    for name in ("nano", "nano-base"):
        if (data := _read(f"quality-{name}")) is not None:
            card = WEIGHTS / name / "README.md"
            replace_section(card, "quality", quality.render(data))
            replace_section(card, "denoising", quality.denoising(data))
            if name == "nano":
                replace_section(README, "quality", quality.render(data))
    if (data := _read("codec")) is not None:
        replace_section(README, "codec", codec_table(data))
        replace_section(ROOT / "docs" / "codec.md", "codec", codec_table(data))

    if (demo := ROOT / "demo.wav").is_file():
        import soundfile

        from presto_rt.lab.evaluation.codec import picture

        picture(ROOT / "docs" / "demo.png", {"demo.wav": soundfile.read(demo, dtype="float32")[0].T})


def codec_table(report: dict[str, Any]) -> str:
    """The codec's rows beside Opus, as `presto_rt.lab.evaluation.codec` prints them."""
    from presto_rt.lab.evaluation.codec import markdown

    return markdown(report).strip()


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


if __name__ == "__main__":
    main()
