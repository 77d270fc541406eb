"""Train, judge and tabulate the distillations: `python -m bench.distillation [JOB]`.

Jobs:
    row NAME: train the model of a row, if it is not trained yet, and judge it.
    latency: time the plans of all measured rows, interleaved.
    plans: write the quality of the shipped model's plans, by which `deadline_ms` chooses, into its config.json.
    commands: write every row's command into docs/distillation.md.
    report (the default): write docs/results.md and its plots from bench/results/distillation.json.

A row that was not measured says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.results import RESULTS, ROOT, replace_section

FILE = RESULTS / "distillation.json"
BUDGETS = ("50%", "60%", "70%", "80%")
STEPS = (1, 2, 4, 8)
FEW: dict[str, Any] = {"sampler": "few_step", "guidance": 1.0}
SAMPLING = {"steps": 32, "sampler": "dpmpp_2m", "guidance": 2.0, "guidance_interval": [0.0, 3.0]}
TEACHER = "teacher, 40 steps of Heun"


@dataclass(frozen=True)
class Entry:
    """A row of a table.

    Attributes:
        name: title of the row, unique over all tables.
        training: recipe of `presto_rt.lab.distill.recipe` that trains its model.
        options: sampling settings of the row.
    """

    name: str
    training: str
    options: dict[str, Any] = field(default_factory=dict)


def few(label: str, training: str, steps: int = 4, **more: Any) -> Entry:
    """Return the entry of a few-step model sampled in `steps` steps."""
    return Entry(f"{label}, {steps} step{'s' * (steps > 1)}", training, {**FEW, "steps": steps, **more})


SHIPPED = "nano"  # the shipped model, without a training
REFERENCE = Entry(TEACHER, "base", {"steps": 40, "sampler": "heun", "guidance": 2.0})
METHODS = (("Presto-S", "presto-s"), ("no GAN", "no-gan"), ("DMD2-style", "dmd2"), ("consistency", "consistency"))
TABLES: dict[str, tuple[str, list[Entry]]] = {
    "layers": (
        "Fewer layers, all at 16 steps of the base model's own sampler",
        [Entry("full depth", "base", {"steps": 16})]
        + [
            Entry(f"{label}, {budget}", training, {"steps": 16, "layers": budget})
            for budget in BUDGETS
            for label, training in (("ASE", "ase"), ("Presto-L", "presto-l"))
        ],
    ),
    "ingredients": (
        "Presto-L without one ingredient each, half of the layers",
        [
            Entry(f"{label}, 50%", training, {"steps": 16, "layers": "50%"})
            for label, training in (
                ("Presto-L", "presto-l"),
                ("no shifted drop", "no-shift"),
                ("no budget input", "no-budget"),
                ("no self-teacher", "no-self-teacher"),
                ("ASE", "ase"),
            )
        ],
    ),
    "steps": (
        "Fewer steps",
        [REFERENCE]
        + [Entry(f"teacher, {n} step{'s' * (n > 1)}", "base", {"steps": n}) for n in STEPS]
        + [few(label, training, n) for label, training in METHODS for n in STEPS]
        + [few("Presto-S, 42 minutes", "presto-s-long")]
        + [few("shipped nano, all layers", SHIPPED, n, layers="100%") for n in STEPS],
    ),
    "plans": (
        "Plans of the shipped model, which `deadline_ms` chooses from",
        [few("shipped nano, all layers", SHIPPED, n, layers="100%") for n in STEPS]
        + [few(f"shipped nano, {share}", SHIPPED, n, layers=share) for share in ("70%", "50%") for n in STEPS],
    ),
    "noise": (
        "Sigma distribution of each loss, and inputs of the fake score: Presto-S with one change, 4 steps",
        [few("Presto-S", "presto-s")]
        + [few(name, name) for name in ("gen-train", "dmd-inference", "dsm-inference", "gan-inference")]
        + [few("fake score not conditioned on s_g", "fake-unconditioned")]
        + [few("gradient weighted by sample", "sample-weight")],
    ),
    "both": (
        "Both",
        [
            REFERENCE,
            few("Presto-S", "presto-s"),
            few("Presto-S, 42 minutes", "presto-s-long"),
            few("shipped nano, all layers", SHIPPED, layers="100%"),
            few("Presto-LS 70%", "presto-ls", layers="70%"),
            few("Presto-LS 70%", "presto-ls", 1, layers="70%"),
            few("Presto-S, then layers 70%", "presto-sl", layers="70%"),
            few("Presto-S, then layers 70%", "presto-sl", 1, layers="70%"),
            few("Presto-LS 70%, fake score drops layers", "presto-ls-fake-layers", layers="70%"),
        ],
    ),
}
ENTRIES = {entry.name: entry for _, entries in TABLES.values() for entry in entries}
LINES = (
    {"teacher": [e.name for e in ENTRIES.values() if e.training == "base" and "teacher" in e.name]}
    | {label: [few(label, training, n).name for n in STEPS] for label, training in METHODS}
    | {
        "shipped nano": [few("shipped nano, all layers", SHIPPED, n).name for n in STEPS],
        "Presto-LS": [few("Presto-LS 70%", "presto-ls", n).name for n in (1, 4)],
    }
)


def measure(name: str, a: argparse.Namespace) -> None:
    """Train the model of a row, continuing an interrupted training, then pack and judge it."""
    from presto_rt.lab.distill.recipe import run_folder, train
    from presto_rt.lab.evaluation.compare import ComparisonRow
    from presto_rt.lab.training import settings
    from presto_rt.lab.training.pack import pack

    if name not in ENTRIES:
        raise SystemExit(f"unknown row {name!r}; choose from: " + "; ".join(ENTRIES))
    entry = ENTRIES[name]
    if entry.training == SHIPPED:
        return judge(ComparisonRow(name, SHIPPED, entry.options), a)
    chain = ["base"] if a.teacher is None else []
    chain += ["presto-l"] if entry.training.startswith("presto-ls") else []
    chain += ["presto-s"] if entry.training == "presto-sl" and not a.teacher else []
    chain += [entry.training] if entry.training != "base" else []
    for training in chain:
        own = training == entry.training
        minutes, changes = (a.minutes, settings.read(a.set)) if own else (None, {})
        if not train(
            training,
            a.data,
            a.runs,
            teacher=a.teacher,
            minutes=minutes,
            device=a.device,
            seed=0 if training == "base" else a.seed,
            **changes,
        ):
            raise SystemExit(f"{training} was stopped before its budget ended; run the same command to continue")
    base = entry.training == "base"
    run = Path(a.teacher or run_folder(a.runs, "base")) if base else run_folder(a.runs, entry.training, a.seed)
    packed = Path(a.packed) / run.name
    few_step = entry.options.get("sampler") == FEW["sampler"]  # a few-step model has defaults of its own
    pack(packed, codec_run=a.codec, base_run=run, defaults={} if few_step else SAMPLING)
    label = name if not a.seed else f"{name} (training seed {a.seed})"
    judge(ComparisonRow(label, str(packed), entry.options), a)


def judge(row: Any, a: argparse.Namespace) -> None:
    """Judge a row, add it to the results and print it."""
    from presto_rt.lab.evaluation.compare import compare, markdown

    table = compare(
        [row],
        a.data,
        a.out,
        results=a.results,
        count=a.count,
        seconds=a.seconds,
        reference_count=a.reference,
        latency_seconds=a.latency_seconds,
        repeats=a.repeats,
        device=a.device,
    )
    print(markdown(table, [row.name]))


def time_rows(a: argparse.Namespace) -> None:
    """Time every measured row in one run.

    The time of a plan does not depend on the values of the weights. Two models stand in for all (`--timed`): the first
    for rows with the base model's sampler, the second for few-step rows.
    """
    import json

    from presto_rt.lab.evaluation.compare import latencies, read, write
    from presto_rt.loading import load

    table = read(a.results)
    models = [load(name, device=a.device) for name in a.timed]
    plans: dict[str, tuple[Any, dict[str, Any]]] = {}
    rows: dict[str, str] = {}
    for name in table["rows"]:
        options = {"layers": "100%", **ENTRIES[name.partition(" (training seed ")[0]].options}
        is_few = options.get("sampler") == FEW["sampler"]
        rows[name] = json.dumps([is_few, options], sort_keys=True)
        plans[rows[name]] = (models[is_few], options)
    found = dict(zip(plans, latencies(list(plans.values()), a.latency_seconds, a.repeats), strict=True))
    table = read(a.results)  # another process may have added rows
    for name, key in rows.items():
        table["rows"][name]["latency"] = found[key]
        print(f"{name}: {found[key]['total']:.3f} s")
    write(table, a.results)


def write_plans(results: Path, model: Path) -> None:
    """Write the measured plans of the shipped model into its config.json, best first."""
    import json

    from presto_rt.lab.evaluation.compare import read

    rows = read(results)["rows"]
    plans = [
        {
            **{k: entry.options[k] for k in ("steps", "layers")},
            "kid": round(rows[entry.name]["measures"]["kid"]["value"], 4),
        }
        for entry in TABLES["plans"][1]
        if entry.name in rows
    ]
    file = model / "config.json"
    config = json.loads(file.read_text())
    config["quality"] = sorted(plans, key=lambda plan: plan["kid"])
    file.write_text(json.dumps(config, indent=1) + "\n")


def aims(rows: dict[str, Any]) -> dict[str, list[str]]:
    """Return, for each table, one line for each aim of the project: the value, and if the aim was reached or missed."""

    def kid(name: str, which: str = "value") -> float:
        return float(rows[name]["measures"]["kid"][which])

    def line(statement: str, reached: bool) -> str:
        return f"- {statement}: {'reached' if reached else '**missed**'}."

    teacher, presto_s = TEACHER, few("Presto-S", "presto-s").name
    before, after = few("Presto-S, 42 minutes", "").name, few("Presto-S, then layers 70%", "").name
    pairs = [(f"Presto-L, {budget}", f"ASE, {budget}") for budget in BUDGETS]
    found: dict[str, list[str]] = {}
    if all(name in rows for pair in pairs for name in pair):
        ahead = sum(kid(ours, "high") < kid(theirs, "low") for ours, theirs in pairs)
        statement = (
            f"Presto-L's KID below ASE's, outside the intervals, at three budgets or more: at {ahead} of {len(pairs)}"
        )
        found["layers"] = [line(statement, ahead >= 3)]
    if teacher in rows and presto_s in rows:
        times, cover = (
            kid(presto_s) / kid(teacher),
            [rows[n]["measures"]["prdc"]["coverage"] for n in (presto_s, teacher)],
        )
        found["steps"] = [
            line(
                f"Presto-S at four steps, KID at most 1.1 times the teacher's at 80 evaluations: {times:.2f}",
                times <= 1.1,
            ),
            line(f"coverage no lower than the teacher's: {cover[0]:.2f} against {cover[1]:.2f}", cover[0] >= cover[1]),
        ]
    if all(name in rows and "latency" in rows[name] for name in (teacher, before, after)):
        faster = rows[teacher]["latency"]["total"] / rows[after]["latency"]["total"]
        times = kid(after) / kid(before)
        found["both"] = [
            line(
                f"steps and layers together, ten times as fast as the base at 80 evaluations: {faster:.0f}",
                faster >= 10,
            ),
            line(f"KID at most 1.1 times that of the same generator with all layers: {times:.2f}", times <= 1.1),
        ]
    return found


def report(results: Path, output: Path) -> None:
    """Write docs/results.md with every table, and the two plots in the same folder."""
    from presto_rt.lab.evaluation.compare import markdown, plot, read

    table = read(results)
    parts = [
        "# Results",
        "",
        "Written by `python -m bench.distillation` from the JSON files in bench/results; each "
        "row's command is in [distillation.md](distillation.md).",
        "",
        note(table),
        "",
    ]
    judged = aims(table["rows"])
    for key, (title, entries) in TABLES.items():
        parts += [f"## {title}", "", markdown(table, with_seeds(entries, table)), ""]
        if key in judged:
            parts += ["Aims:", "", *judged[key], ""]
    for by, title in (("nfe", "Quality against NFE"), ("latency", "Quality against latency")):
        image = output.with_name(f"quality-{by}.png")
        drawn = plot(table, LINES, by, image)
        parts += [f"## {title}", "", f"![{title}]({image.name})" if drawn else "not measured", ""]
    output.write_text("\n".join(parts))


def with_seeds(entries: Sequence[Entry], table: dict[str, Any]) -> list[str]:
    """Return row names, each followed by the measured rows of other training seeds."""
    names: list[str] = []
    for entry in entries:
        others = sorted(n for n in table["rows"] if n.startswith(f"{entry.name} (training seed "))
        names += [entry.name, *others]
    return names


def note(table: dict[str, Any]) -> str:
    """Return the conditions of the measurements as one sentence."""
    if not table["rows"]:
        return "Nothing was measured yet."
    s = table["settings"]
    where = {
        (e["gpu"] or f"{e['cpu']}, {e['cores']} cores") for e in (r["environment"] for r in table["rows"].values())
    }
    return (
        f"{s['count']} held-out captions, {s['seconds']:g} s each, {s['reference']} reference clips, seed "
        f"{s['seed']}; 95 % intervals in parentheses. Measured on {'; '.join(sorted(where))}."
    )


def commands() -> str:
    """Return the list of rows with the command of each, as markdown."""
    lines = []
    for title, entries in TABLES.values():
        lines += [f"{title}:", "", "```sh"]
        lines += [f'python -m bench.distillation row "{entry.name}"' for entry in entries]
        lines += ["```", ""]
    return "\n".join(lines).strip()


def main(arguments: list[str] | None = None) -> None:
    from presto_rt.lab.training import settings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", default="report", choices=("report", "row", "latency", "plans", "commands"))
    parser.add_argument("name", nargs="?", default="", help="the row's name")
    parser.add_argument("--minutes", type=float, help="training budget (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="training seed")
    parser.add_argument("--teacher", help="base model: weights or run folder (default: RUNS/base, trained if missing)")
    settings.add(parser)
    parser.add_argument("--codec", default="runs/codec", help="run folder of a codec, or a model that has the codec")
    parser.add_argument("--data", default="data")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--packed", default="out/distillation", help="folder of the packed weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--reference", type=int, default=400)
    parser.add_argument("--latency-seconds", type=float, default=32.0)
    parser.add_argument("--repeats", type=int, default=5, help="timed clips of a row; 0 leaves timing to `latency`")
    parser.add_argument(
        "--timed", nargs=2, default=["nano-base", "nano"], metavar=("BASE", "FEW"), help="models that `latency` times"
    )
    parser.add_argument("--out", default="runs/distillation", help="folder of the generated clips")
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results.md")
    a = parser.parse_args(arguments)
    if a.job == "row":
        measure(a.name, a)
    elif a.job == "latency":
        time_rows(a)
    elif a.job == "plans":
        write_plans(a.results, ROOT / "presto_rt" / "weights" / SHIPPED)
    elif a.job == "commands":
        replace_section(ROOT / "docs" / "distillation.md", "commands", commands())
    else:
        report(a.results, a.report)


if __name__ == "__main__":
    main()
