"""The command `presto-rt lab distill`: fewer layers, fewer steps, or both, from a teacher."""

from __future__ import annotations

import argparse
from typing import Any

from ..training import settings

#: (help, methods) of each job
JOBS = {
    "layers": (
        "run with fewer blocks (Presto-L)",
        "presto-l, ase, no-shift, no-budget, no-self-teacher; generator for a few-step model",
    ),
    "steps": (
        "sample in a few steps (Presto-S)",
        "presto-s, dmd2, no-gan, consistency, or an ablation (docs/distillation.md)",
    ),
    "both": ("layers first, then steps (Presto-LS)", "a method of steps: presto-s, no-gan, ..."),
}


def add_parser(subparsers: Any) -> None:
    """Add `distill` to a command line's subcommands."""
    distill = subparsers.add_parser("distill", help="distill a model to fewer layers, fewer steps, or both")
    jobs = distill.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, (summary, methods) in JOBS.items():
        p = jobs.add_parser(name, help=summary)
        p.add_argument(
            "--teacher", default="nano-base", help="a shipped model, a weights folder, a run folder or checkpoint"
        )
        p.add_argument("--method", default="presto-l" if name == "layers" else "presto-s", help=methods)
        p.add_argument(
            "--minutes", type=float, required=True, help="time budget; a resumed run counts the minutes it has used"
        )
        p.add_argument(
            "--limit", type=float, metavar="MINUTES", help="stop this call earlier, to continue with --resume"
        )
        p.add_argument("--data", default="data", help="the folder of `presto-rt lab data build`, with encoded latents")
        p.add_argument("--run", dest="run_dir", default=f"runs/{name}", help="folder of checkpoints and logs")
        p.add_argument("--device", default="auto", help="auto, cpu or cuda")
        p.add_argument("--resume", action="store_true", help="continue from the run folder's checkpoint")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--tokens", type=int, help="latent frames in a batch")
        settings.add(p)
        if name != "layers":
            p.add_argument("--student", help="a layer-distilled model that the generator starts from")
            p.add_argument(
                "--budget", default="100%" if name == "steps" else "70%", help="layers that the generator runs"
            )
        p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    """Train and print the last held-out errors."""
    from .run import distill_both, distill_layers, distill_steps

    changes = settings.read(a.set) | {"seed": a.seed} | ({"tokens": a.tokens} if a.tokens else {})
    if a.job != "layers":
        changes |= {"student": a.student, "budget": a.budget}
    distill = {"layers": distill_layers, "steps": distill_steps, "both": distill_both}[a.job]
    errors = distill(
        a.data,
        a.run_dir,
        a.minutes,
        a.teacher,
        method=a.method,
        device=a.device,
        resume=a.resume,
        limit=a.limit,
        **changes,
    )
    print("held-out error / sigma_data^2: " + ", ".join(f"{k[4:]}: {v:.4f}" for k, v in errors.items()))
