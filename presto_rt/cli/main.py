"""The command `presto-rt`: one sub-command per job. Errors are one line on stderr and a non-zero exit status."""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError, PrestoError

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="presto-rt: %(message)s", level=logging.WARNING)
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed) or 0)
    except PrestoError as error:
        print(f"presto-rt: error: {error}", file=sys.stderr)
        return 1
    except (OSError, ModuleNotFoundError) as error:  # a disk, a permission, a package that only some jobs need
        hint = "; pip install 'presto-rt[data,train,eval]'" if isinstance(error, ImportError) else ""
        print(f"presto-rt: error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("presto-rt: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from .. import __version__
    from ..lab.data.cli import add_parser as add_data
    from ..lab.distill.cli import add_parser as add_distill
    from ..lab.evaluation.cli import add_parser as add_eval

    parser = argparse.ArgumentParser(prog="presto-rt", description="Text to 44.1 kHz stereo music, in moments.")
    parser.add_argument("--version", action="version", version=f"presto-rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_info(commands)
    _add_tune(commands)
    _add_codec(commands)
    _add_train(commands)
    add_distill(commands)
    add_data(commands)
    add_eval(commands)
    return parser


def _add_generate(commands: Any) -> None:
    p = commands.add_parser("generate", help="make music from prompts")
    p.add_argument("prompt", nargs="+", help="what to play; each prompt makes a clip")
    p.add_argument("-o", "--output", default="out.wav", metavar="FILE",
                   help=".wav, .flac or .ogg; several clips are numbered: out-1.wav, out-2.wav")  # fmt: skip
    p.add_argument("--seconds", type=float, default=32.0)
    p.add_argument("--bpm", type=float, help="tempo; else the prompt's own, if it names one")
    p.add_argument("--key", help='like "D minor"; else the prompt\'s own, if it names one')
    p.add_argument("--steps", type=int)
    p.add_argument("--sampler", help="euler, heun, dpmpp_2m, dpmpp_2s or few_step")
    p.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 is none")
    p.add_argument("--cfg-pp", action="store_true", help="CFG++, with --guidance from 0 to 1")
    p.add_argument("--negative-prompt")
    p.add_argument("--layers", help='how many blocks run: 6, a share such as "75%%", or one per step: 8,6,6,4')
    p.add_argument("--deadline-ms", type=float, help="the best steps and layers that end in time (see `tune`)")
    p.add_argument("--seed", type=int)
    p.add_argument("--count", type=int, default=1, help="clips per prompt, with consecutive seeds")
    p.add_argument("--subtype", choices=("pcm16", "pcm24", "float32"), help="sample format of the file")
    p.add_argument("--model", default="nano", help="a shipped model's name, or a weights folder")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--backend", default="auto")
    p.add_argument("--json", action="store_true", help="print what was made as JSON")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.set_defaults(run=_generate)


def _generate(a: argparse.Namespace) -> None:
    from ..audio.clip import check_writable

    if not 1 <= a.count <= 1_000:
        raise InvalidInputError(f"--count must be from 1 to 1000, not {a.count}")
    prompts = [p for p in a.prompt for _ in range(a.count)]
    paths = _numbered(Path(a.output), len(prompts))
    for path in paths:
        check_writable(path, a.subtype)
    started = time.perf_counter()
    from ..diffusion.noise import check_seed
    from ..pipeline import load

    first = secrets.randbits(63) if a.seed is None else check_seed(a.seed)
    model = load(a.model, device=a.device, dtype=a.dtype, backend=a.backend)
    loaded = time.perf_counter() - started
    options = {"negative_prompt": a.negative_prompt, "seconds": a.seconds, "bpm": a.bpm, "key": a.key, "steps": a.steps,
               "sampler": a.sampler, "guidance": a.guidance, "cfg_pp": a.cfg_pp, "layers": a.layers,
               "deadline_ms": a.deadline_ms}  # fmt: skip
    # bad settings and impossible deadlines before any work
    model.plan(a.seconds, a.steps, a.sampler, a.guidance, None, a.cfg_pp, a.layers, a.deadline_ms)
    made = []
    for i, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        with _Bar(f"clip {i + 1}/{len(prompts)}", silent=a.quiet or a.json) as bar:
            audio = model.generate(prompt, seed=(first + i) % 2**64, callback=bar, **options)
        begin = time.perf_counter()
        audio.save(path, a.subtype)
        timings = {"load": loaded, **audio.timings, "save": time.perf_counter() - begin}
        made.append({"file": str(path), "prompt": prompt, "seed": audio.seed, "seconds": audio.seconds,
                     "frames": audio.samples.shape[1], "timings": {k: round(v, 4) for k, v in timings.items()},
                     "real_time_factor": round(audio.seconds / audio.timings["total"], 2)})  # fmt: skip
    if a.json:
        print(json.dumps(made, indent=1))
        return
    for clip in made:
        stages = ", ".join(f"{k} {v:.2f} s" for k, v in clip["timings"].items() if k != "total")
        print(f"{clip['file']}: {clip['seconds']:.1f} s of music in {clip['timings']['total']:.2f} s, "
              f"{clip['real_time_factor']:.1f} x real time (seed {clip['seed']}; {stages})")  # fmt: skip


def _numbered(path: Path, count: int) -> list[Path]:
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]


class _Bar:
    """A progress bar over sampling steps that appears with the first step."""

    def __init__(self, label: str, silent: bool) -> None:
        self.label, self.silent, self.bar = label, silent, None

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self.bar = tqdm(desc=self.label, unit="step", leave=False, disable=self.silent)
        return self

    def __call__(self, step: int, steps: int) -> None:
        self.bar.total = steps
        self.bar.update(step - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _add_info(commands: Any) -> None:
    p = commands.add_parser("info", help="versions, hardware, and which backends can be used")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_info)


def _info(a: argparse.Namespace) -> None:
    from .info import info, info_text

    print(json.dumps(info(), indent=1) if a.json else info_text())


def _add_tune(commands: Any) -> None:
    p = commands.add_parser("tune", help="measure this machine, so that --deadline-ms can choose")
    p.add_argument("--model", default="nano", help="a shipped model's name, or a weights folder")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--backend", default="auto")
    p.add_argument("--seconds", type=float, nargs="+", default=[2.0, 8.0, 32.0], help="lengths; between them it fits")
    p.add_argument("--repeats", type=int, default=3, help="the slowest of so many counts")
    p.set_defaults(run=_tune)


def _tune(a: argparse.Namespace) -> None:
    from ..deadline import table_path, tune
    from ..pipeline import load

    if a.repeats < 1:
        raise InvalidInputError(f"--repeats must be at least 1, not {a.repeats}")
    model = load(a.model, device=a.device, dtype=a.dtype, backend=a.backend)
    for seconds in a.seconds:
        model.plan(seconds)  # a bad length before any work
    print("clip        text     per step   per block   guided   decode   (ms)")
    for row in tune(model, a.seconds, a.repeats):
        print(f"{row.seconds:6.1f} s {1e3 * row.text:8.2f} {1e3 * row.evaluation:12.2f} {1e3 * row.block:11.3f} "
              f"{row.guided:7.2f}x {1e3 * row.decode:8.2f}")  # fmt: skip
    print(f"kept in {table_path(model)}")


def _add_codec(commands: Any) -> None:
    codec = commands.add_parser("codec", help="the audio codec alone")
    jobs = codec.add_subparsers(dest="job", required=True, metavar="JOB")
    p = jobs.add_parser("roundtrip", help="encode a file to latents and decode it again")
    p.add_argument("input")
    p.add_argument("output")
    p.add_argument("--model", default="nano")
    p.set_defaults(run=_roundtrip)


def _roundtrip(a: argparse.Namespace) -> None:
    import torch

    from ..audio.clip import Audio, check_writable
    from ..audio.clip import load as load_audio
    from ..pipeline import load

    check_writable(a.output)
    source = load_audio(a.input)
    codec = load(a.model).codec
    device = next(codec.parameters()).device
    with torch.inference_mode():
        samples = torch.from_numpy(source.samples).to(device)
        start = time.perf_counter()
        latents = codec.encode(samples[None])
        middle = time.perf_counter()
        out = codec.decode(latents, frames=samples.shape[-1])[0].cpu()
        end = time.perf_counter()
    mono = source.samples.shape[0] == 1
    Audio((out.mean(0, keepdim=True) if mono else out).numpy(), source.sample_rate).save(a.output)
    print(f"{a.output}: {source.seconds:.1f} s through {latents.shape[1]} x {latents.shape[2]} latents; "
          f"encode {middle - start:.2f} s, decode {end - middle:.2f} s")  # fmt: skip


def _add_train(commands: Any) -> None:
    from ..lab.training import settings

    train = commands.add_parser("train", help="train the codec or the base model, or pack weights")
    jobs = train.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, what in (("codec", "the audio codec"), ("base", "the diffusion model on the codec's latents")):
        p = jobs.add_parser(name, help=f"train {what}")
        p.add_argument(
            "--minutes", type=float, required=True, help="time budget; a resumed run counts what it has used"
        )
        p.add_argument("--data", default="data", help="the folder of `presto-rt data build`")
        p.add_argument("--run", dest="run_dir", default=f"runs/{name}", help="checkpoints and logs go here")
        p.add_argument("--device", default="auto")
        p.add_argument("--resume", action="store_true")
        p.add_argument("--seed", type=int, default=0)
        if name == "codec":
            p.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone: latents stay valid")
            p.add_argument("--start-from", metavar="FOLDER", help="begin with a trained codec (a run's final/)")
        else:
            p.add_argument("--model", default="nano", help="a preset: nano, small or medium")
            p.add_argument("--start-from", metavar="MODEL", help="begin with the weights of a run or a shipped model")
            p.add_argument("--learning-rate", type=float, default=1e-3)
            p.add_argument("--tokens", type=int, help="latent frames in a batch")
            settings.add(p)
        p.set_defaults(run=_train_codec if name == "codec" else _train_base)
    p = jobs.add_parser("encode", help="latents of the data set, with a trained codec")
    p.add_argument("--data", default="data")
    p.add_argument("--codec", default="runs/codec", help="the codec's run folder, or a model whose codec is taken")
    p.set_defaults(run=_encode)
    p = jobs.add_parser("pack", help="put a trained codec and base model into one weights folder")
    p.add_argument("output", help="the weights folder to write")
    p.add_argument("--codec", default="runs/codec", help="the codec's run folder, or a model whose codec is taken")
    p.add_argument("--share-codec", action="store_true", help="leave the codec's files in --codec's weights folder")
    p.add_argument("--base", default="runs/base", help="the run folder of the base or a distilled model")
    p.add_argument("--quality", metavar="FILE", help="JSON list of plans' figures: steps, layers, kid")
    p.add_argument("--defaults", default="{}", help="sampling defaults as JSON: steps, sampler, guidance, ...")
    p.set_defaults(run=_pack)


def _train_codec(a: argparse.Namespace) -> None:
    from ..lab.training.codec import CodecTraining, train_codec

    train_codec(a.data, a.run_dir, a.minutes, a.device, a.resume, settings=CodecTraining(seed=a.seed),
                freeze_encoder=a.freeze_encoder, start_from=a.start_from)  # fmt: skip


def _train_base(a: argparse.Namespace) -> None:
    from ..lab.training import settings
    from ..lab.training.base import BaseTraining, train_base

    known = {name: default for name, default in vars(BaseTraining(a.minutes)).items() if name != "minutes"}
    options = {"seed": a.seed, "learning_rate": a.learning_rate} | settings.read(a.set, known)
    options |= {} if a.tokens is None else {"tokens": a.tokens}
    figures = train_base(a.data, a.run_dir, a.minutes, device=a.device, resume=a.resume, model=a.model,
                         start_from=a.start_from, **options)  # fmt: skip
    print("held-out error / sigma_data^2: " + ", ".join(f"{k[4:]}: {v:.4f}" for k, v in figures.items()))


def _encode(a: argparse.Namespace) -> None:
    from ..lab.training.latents import encode_dataset
    from ..models.codec import load_codec

    encode_dataset(a.data, load_codec(a.codec), Path(a.data) / "latents")


def _pack(a: argparse.Namespace) -> None:
    from ..lab.training.pack import pack

    try:
        defaults = json.loads(a.defaults)
        quality = json.loads(Path(a.quality).read_text()) if a.quality else []
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"--defaults or --quality cannot be read as JSON: {error}") from error
    pack(a.output, codec_run=a.codec, base_run=a.base, defaults=defaults, quality=quality, share_codec=a.share_codec)
    print(f"wrote {a.output}")
