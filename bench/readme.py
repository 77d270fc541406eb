"""Write the measured tables of README.md, docs/ and the model cards from bench/results: `python -m bench.readme`.

A table is written between the markers <!-- name --> and <!-- /name --> of its document. A number in a document comes
from a JSON file that names machine, versions and command; nothing is typed by hand. If `make demo` wrote demo.wav,
its spectrogram is drawn too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import clips, cpu, e2e, e2e_gpu, fidelity, operators, precision, quality
from bench.results import ROOT, load, replace_section, table

README = ROOT / "README.md"
DOCS = ROOT / "docs"
WEIGHTS = ROOT / "presto_rt" / "weights"
#: rows of the README's table: key in bench/results/cpu.json and what it stands for
WAYS = {
    "eager fp32": "PyTorch, eager, fp32",
    "compiled fp32": "PyTorch, `torch.compile` with freezing, fp32",
    "ours fp32": "Presto-RT, fp32",
    "ours int8": "Presto-RT, int8",
}


def main() -> None:
    """Write every table whose measurements are in bench/results."""
    write_speed()
    write_cpu()
    write_quality()
    e2e_gpu.write_document()
    if (data := load("precision")) is not None:
        replace_section(DOCS / "gpu.md", "precision", precision.render(data["rows"]["rows"]))
    if (report := load("codec")) is not None:
        replace_section(DOCS / "codec.md", "codec", codec_table(report))
    if (demo := ROOT / "demo.wav").is_file():
        draw_demo(demo)


def write_speed() -> None:
    """Write the README's table of a whole clip, and the stages of three lengths into docs/cpu.md."""
    if (data := load("cpu")) is not None:
        replace_section(README, "speed", speed(data))
    if (data := load("e2e-cpu")) is not None:
        first = data["rows"][0]
        note = (
            f"Medians of {first['stages']['total']['n']} on {data['machine']['device']} ({first['dtype']}, "
            f"{first['steps']} steps of {first['sampler']}, guidance {first['guidance']:g}; "
            f"`{data['machine']['command']}`)."
        )
        replace_section(DOCS / "cpu.md", "e2e", f"{note}\n\n{e2e.render(data['rows'])}")


def speed(data: dict[str, Any]) -> str:
    """Return the README's table: one clip by each way, its condition as the caption."""
    rows, machine = data["rows"], data["machine"]
    ways = rows["networks"][str(rows["threads"])]["whole clip"]
    slowest = ways["eager fp32"]["median"]
    cells = [
        [
            title,
            f"{ways[way]['median']:.2f} s",
            f"{rows['seconds'] / ways[way]['median']:.0f} x",
            f"{slowest / ways[way]['median']:.1f} x",
        ]
        for way, title in WAYS.items()
        if way in ways
    ]
    header = [f"{rows['seconds']:g} s of stereo", "time", "faster than it plays", "faster than eager"]
    note = (
        f"Prompt to samples, {rows['seconds']:g} s of stereo, {rows['model']}, {rows['evaluations']} steps, "
        f"{rows['layers']} of the layers, {machine['device']}; medians of {ways['eager fp32']['n']} "
        f"(`{machine['command']}`)."
    )
    return f"{note}\n\n{table(header, cells)}"


def write_cpu() -> None:
    """Write the tables of docs/cpu.md: ways, clips, operators, fidelity and quality by precision."""
    document = DOCS / "cpu.md"
    if (data := load("cpu")) is not None:
        row, machine = data["rows"], data["machine"]
        note = (
            f"{row['seconds']:g} s of stereo, {row['model']}, {row['evaluations']} network calls, guidance "
            f"{row['guidance']:g}, layers {row['layers']}, on {machine['device']} (`{machine['command']}`)."
        )
        replace_section(document, "cpu", f"{note}\n\n{cpu.render(row).strip()}")
    if (data := load("cpu-default")) is not None:
        row = data["rows"]
        ways = row["networks"][str(row["threads"])]["whole clip"]
        note = f"The same with the shipped model's own layers, {row['layers']} (`{data['machine']['command']}`)."
        replace_section(document, "cpu-default", f"{note}\n\n{cpu.compare('whole clip', row['auto'], ways)}")
    renderers = {"cpu-clips": clips.render, "cpu-operators": operators.render, "fidelity": fidelity.render}
    for name, render in renderers.items():
        if (data := load(name)) is not None:
            note = f"On {data['machine']['device']} (`{data['machine']['command']}`)."
            replace_section(document, name, f"{note}\n\n{render(data['rows']).strip()}")
    judged = [data for name in ("quality-nano-bfloat16", "quality-nano") if (data := load(name)) is not None]
    if len(judged) == 2:
        count = judged[0]["sets"]["generated"]["clips"]
        note = f"{count} held-out captions, 95 % intervals:"
        replace_section(document, "precision", f"{note}\n\n{quality.by_precision(judged)}")


def write_quality() -> None:
    """Write quality and denoising error into the model cards, quality into docs/evaluation.md too."""
    for name in ("nano", "nano-base"):
        if (data := load(f"quality-{name}")) is None:
            continue
        card = WEIGHTS / name / "README.md"
        replace_section(card, "quality", quality.render(data))
        replace_section(card, "denoising", quality.denoising(data))
        if name == "nano":
            replace_section(DOCS / "evaluation.md", "quality", quality.render(data))


def draw_demo(path: Path) -> None:
    """Draw the spectrogram of the clip that `make demo` generates, docs/demo.png."""
    from presto_rt.audio import load as load_audio
    from presto_rt.lab.evaluation.codec import picture

    picture(DOCS / "demo.png", {path.name: load_audio(path).samples})


def codec_table(report: dict[str, Any]) -> str:
    """Return the codec's rows with those of Opus, as `presto_rt.lab.evaluation.codec` prints them."""
    from presto_rt.lab.evaluation.codec import markdown

    return markdown(report).strip()


if __name__ == "__main__":
    main()
