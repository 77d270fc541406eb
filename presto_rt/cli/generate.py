"""Command `presto-rt generate`: clips from prompts."""

from __future__ import annotations

import argparse
import json
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from .options import SAMPLERS, add_model_options

if TYPE_CHECKING:
    from tqdm import tqdm

    from .options import Commands

MAX_COUNT = 1_000  # clips per prompt


def add_parser(commands: Commands) -> None:
    """Add `generate`."""
    parser = commands.add_parser("generate", help="generate music from prompts")
    parser.add_argument("prompt", nargs="+", help="text of a clip; each prompt gives one clip")
    parser.add_argument(
        "-o",
        "--output",
        default="out.wav",
        metavar="FILE",
        help=".wav, .flac or .ogg; several clips are numbered: out-1.wav, out-2.wav",
    )
    parser.add_argument("--seconds", type=float, default=32.0, help="length of each clip (default: 32)")
    parser.add_argument("--bpm", type=float, help="tempo (default: the prompt's own, if it names one)")
    parser.add_argument("--key", help='key such as "D minor" (default: the prompt\'s own, if it names one)')
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--sampler", help=f"{SAMPLERS} (default: the model's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 is none")
    parser.add_argument("--cfg-pp", action="store_true", help="CFG++, with --guidance from 0 to 1")
    parser.add_argument("--negative-prompt", help="text that guidance leads away from")
    parser.add_argument(
        "--layers", help='blocks that run: a number, a share such as "75%%", or one entry per step: 8,6,6,4'
    )
    parser.add_argument(
        "--deadline-ms", type=float, help="choose the best steps and layers that end in time (see `presto-rt tune`)"
    )
    parser.add_argument("--seed", type=int, help="seed of the first clip (default: random)")
    parser.add_argument("--count", type=int, default=1, help="clips per prompt, with consecutive seeds")
    parser.add_argument("--subtype", choices=("pcm16", "pcm24", "float32"), help="sample format of the file")
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print the clips' files, seeds and timings as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from ..audio import check_writable

    if not 1 <= options.count <= MAX_COUNT:
        raise InvalidInputError(f"--count must be from 1 to {MAX_COUNT}, not {options.count}")
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    paths = _numbered(Path(options.output), len(prompts))
    for path in paths:
        check_writable(path, options.subtype)
    clips = _generate(options, prompts, paths)
    if options.json:
        print(json.dumps(clips, indent=1))
        return
    for clip in clips:
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in clip["timings"].items() if name != "total")
        print(
            f"{clip['file']}: {clip['seconds']:.1f} s of music in {clip['timings']['total']:.2f} s, "
            f"{clip['real_time_factor']:.1f} x real time (seed {clip['seed']}; {stages})"
        )


def _generate(options: argparse.Namespace, prompts: list[str], paths: list[Path]) -> list[dict[str, Any]]:
    """Generate and save one clip per prompt; return a JSON record of each."""
    started = time.perf_counter()
    from .. import load
    from ..diffusion.noise import check_seed

    first_seed = secrets.randbits(63) if options.seed is None else check_seed(options.seed)
    model = load(options.model, device=options.device, dtype=options.dtype, backend=options.backend)
    load_seconds = time.perf_counter() - started
    request = {
        "negative_prompt": options.negative_prompt,
        "seconds": options.seconds,
        "bpm": options.bpm,
        "key": options.key,
        "steps": options.steps,
        "sampler": options.sampler,
        "guidance": options.guidance,
        "cfg_pp": options.cfg_pp,
        "layers": options.layers,
        "deadline_ms": options.deadline_ms,
    }
    # Reject bad settings and impossible deadlines before any work.
    planned = ("seconds", "steps", "sampler", "guidance", "cfg_pp", "layers", "deadline_ms")
    model.plan(**{name: request[name] for name in planned})
    clips = []
    for i, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        with ProgressBar(f"clip {i + 1}/{len(prompts)}", silent=options.quiet or options.json) as bar:
            audio = model.generate(prompt, seed=(first_seed + i) % 2**64, callback=bar, **request)
        started = time.perf_counter()
        audio.save(path, options.subtype)
        timings = {"load": load_seconds, **audio.timings, "save": time.perf_counter() - started}
        clips.append(
            {
                "file": str(path),
                "prompt": prompt,
                "seed": audio.seed,
                "seconds": audio.seconds,
                "frames": audio.samples.shape[1],
                "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
                "real_time_factor": round(audio.seconds / audio.timings["total"], 2),
            }
        )
    return clips


def _numbered(path: Path, count: int) -> list[Path]:
    """Return the path itself, or `count` numbered paths: out-1.wav, out-2.wav, ..."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]


class ProgressBar:
    """A progress bar over sampling steps; call it with (step, steps) after each step."""

    def __init__(self, label: str, silent: bool) -> None:
        self.label, self.silent = label, silent
        self.bar: tqdm[None] | None = None

    def __enter__(self) -> ProgressBar:
        from tqdm import tqdm

        self.bar = tqdm(desc=self.label, unit="step", leave=False, disable=self.silent)
        return self

    def __call__(self, step: int, steps: int) -> None:
        assert self.bar is not None
        self.bar.total = steps
        self.bar.update(step - self.bar.n)

    def __exit__(self, *_: object) -> None:
        assert self.bar is not None
        self.bar.close()
