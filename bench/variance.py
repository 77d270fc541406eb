"""Measure the variance of hidden states when blocks are skipped: `python -m bench.variance [--budget 50%]`.

Variance after each block of the base model at full depth, of ASE and of Presto-L, on the same held-out latents. Writes
bench/results/hidden-variance.json and docs/hidden-variance.png, and prints each student's variance at the output
layer relative to the base model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.results import ROOT, save, table


def main() -> None:
    from presto_rt.diffusion.schedule import LayerSchedule, parse_layers
    from presto_rt.lab.distill.run import saved_schedules
    from presto_rt.lab.evaluation.variance import SIGMAS, curves
    from presto_rt.lab.training.conditions import LatentSet
    from presto_rt.lab.training.networks import load_network

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="runs/base", help="run or weights folder of the base model")
    parser.add_argument("--ase", default="runs/ase")
    parser.add_argument("--presto-l", default="runs/presto-l")
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--data", default="data")
    parser.add_argument("--plot", default=str(ROOT / "docs" / "hidden-variance.png"))
    parser.add_argument("--name", default="hidden-variance", help="bench/results/NAME.json")
    a = parser.parse_args()
    base = load_network(a.base)
    models: dict[str, Any] = {"full depth": (base, LayerSchedule.full(base.config.blocks))}
    for name, where in (("ASE", a.ase), ("Presto-L", a.presto_l)):
        saved = saved_schedules(where)
        models[name] = (load_network(where), parse_layers(a.budget, base.config.blocks, saved=saved))
    records = curves(models, LatentSet(a.data, "val"), SIGMAS)
    path = save(a.name, {"budget": a.budget, "curves": records})
    draw(records, Path(a.plot))
    print(render(records))
    print(path)


def render(records: list[dict[str, Any]]) -> str:
    """Return a table of the variance of the output layer's input, relative to the base model's."""
    last = {(r["model"], r["sigma"]): r["variance"][-1] for r in records}
    sigmas = sorted({sigma for _, sigma in last})
    names = list(dict.fromkeys(r["model"] for r in records))
    rows = [[n, *(f"{last[n, s] / last[names[0], s]:.2f}" for s in sigmas)] for n in names]
    return table(["last hidden variance / full depth's", *(f"sigma {s:g}" for s in sigmas)], rows)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw one panel for each noise level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sigmas = sorted({r["sigma"] for r in records})
    figure, axes = plt.subplots(1, len(sigmas), figsize=(4 * len(sigmas), 3.2), sharey=True, squeeze=False)
    for axis, sigma in zip(axes[0], sigmas, strict=True):
        for r in (r for r in records if r["sigma"] == sigma):
            axis.plot([b + 1 for b in r["blocks"]], r["variance"], marker="o", label=r["model"])
        axis.set(title=f"sigma {sigma:g}", xlabel="block", yscale="log")
    axes[0][0].set_ylabel("hidden-state variance")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
