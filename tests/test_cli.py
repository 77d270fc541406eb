"""Command line: files, reports, extensions, and one clear line for every mistake."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from presto_rt.cli.main import EXTENSIONS_GROUP, main
from presto_rt.diffusion.trajectory import SAMPLERS
from presto_rt.lab.training.synthetic import write_latents
from tests.support.models import write_tiny_model

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny"))


def test_generate_writes_a_file_and_reports(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.wav"
    assert main(["generate", "piano, 90 bpm", "-o", str(out), "--seconds", "0.7", "--seed", "3", "--model", model]) == 0
    samples, rate = soundfile.read(out)
    assert (samples.shape, rate) == ((round(0.7 * 44_100), 2), 44_100)
    text = capsys.readouterr().out
    assert all(word in text for word in (str(out), "x real time", "seed 3", "denoise", "decode"))


def test_generate_json_lists_every_clip(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        "piano",
        "drums",
        "--count",
        "2",
        "-o",
        str(tmp_path / "b.flac"),
        "--seconds",
        "0.3",
        "--seed",
        "9",
        "--model",
        model,
        "--json",
    ]
    assert main(arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert [m["seed"] for m in made] == [9, 10, 11, 12]
    assert [m["prompt"] for m in made] == ["piano", "piano", "drums", "drums"]
    clips = [soundfile.read(m["file"])[0] for m in made]
    assert all(np.abs(clips[0] - c).max() > 1e-3 for c in clips[1:])
    assert {Path(m["file"]).name for m in made} == {f"b-{i}.flac" for i in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", "0"], "seconds"),
        (["--seconds", "nan"], "seconds"),
        (["--seconds", "500"], "120"),
        (["--steps", "0"], "steps"),
        (["--sampler", "magic"], "dpmpp_2m"),
        (["--layers", "900%"], "blocks"),
        (["--guidance", "-1"], "guidance"),
        (["--bpm", "1"], "bpm"),
        (["--seed", "-4"], "seed"),
        (["--count", "0"], "count"),
        (["--device", "tpu"], "cpu"),
        (["--backend", "abacus"], "auto, eager, cpu, graph"),
        (["--model", "nothing"], "shipped models are"),
        (["-o", "/no/such/folder/x.wav"], "folder"),
        (["-o", "x.mp3"], ".flac"),
    ],
)
def test_generate_explains_mistakes_in_one_line(
    model: str,
    tmp_path: Path,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    full = ["generate", "piano", "--seconds", "0.3", "--model", model, "--quiet", *arguments]
    assert main(full) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("presto-rt: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_generate_runs_on_a_backend_by_name(model: str, tmp_path: Path, backend: str) -> None:
    """The same seed gives the same latents on each, so the level of the clip is the same."""
    level = {}
    for name in ("auto", backend):
        out = tmp_path / f"{name}.wav"
        arguments = ["--backend", name, "--device", "cpu", "--dtype", "float32", "--model", model, "--quiet"]
        assert main(["generate", "piano", "-o", str(out), "--seconds", "0.5", "--seed", "3", *arguments]) == 0
        level[name] = float(np.square(soundfile.read(out)[0]).mean())
    assert level[backend] == pytest.approx(level["auto"], rel=0.05)


def test_generate_with_a_deadline_and_no_timings_names_the_remedy(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "x.wav"
    full = ["generate", "piano", "--seconds", "0.3", "--model", model, "--deadline-ms", "60000", "-o", str(out)]
    assert main(full) == 1
    error = capsys.readouterr().err
    assert error.startswith("presto-rt: error: no timings for clips of 0.3 s")
    assert "presto-rt tune --seconds 0.3" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_generate_interrupted_writes_nothing(model: str, tmp_path: Path) -> None:
    """Ctrl-C during sampling: one line, status 130, no file."""
    command = [
        sys.executable,
        "-m",
        "presto_rt.cli",
        "generate",
        "piano",
        "--seconds",
        "100",
        "--steps",
        "1000",
        "--model",
        model,
        "-o",
        str(tmp_path / "x.wav"),
    ]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # a shell that runs the tests in the background leaves SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    deadline, seen = time.time() + 120, ""
    while "/1000" not in seen and time.time() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert rest.strip().endswith("presto-rt: interrupted")
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())


def test_codec_roundtrip_keeps_the_length(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "in.wav", np.sin(np.arange(30_000) / 20)[:, None].repeat(2, 1) * 0.3, 44_100)
    assert main(["codec", "roundtrip", str(tmp_path / "in.wav"), str(tmp_path / "out.wav"), "--model", model]) == 0
    assert soundfile.info(tmp_path / "out.wav").frames == 30_000
    assert "latents" in capsys.readouterr().out
    assert main(["codec", "roundtrip", str(tmp_path / "none.wav"), str(tmp_path / "o.wav"), "--model", model]) == 1


def test_info_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"]
    assert main(["info"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "unknown device 'tpu'; choose from: auto, cpu, cuda"),
        (["--set", "clips=1"], "unknown option 'clips'; choose from: "),
        (["--set", "clip=loud"], "1.0"),
        (["--tokens", "0"], "tokens"),
        (["--set", "minutes=3"], "'minutes'"),
        (["--start-from", "nothing"], "no model 'nothing'"),
        (["--run", "data/manifest.json"], "data/manifest.json"),
    ],
)
@pytest.mark.usefixtures("entry_points")
def test_lab_train_explains_mistakes_in_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_latents("data")
    assert main(["lab", "train", "base", "--minutes", "0.001", "--model", "tiny", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("presto-rt: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "--batch"),
        (["--count", "3"], "--count"),
        (["--workers", "-1"], "--workers"),
        (["--seconds", "nan"], "--seconds"),
        (["--seed", "-1"], "--seed"),
        (["--reference", "0"], "--reference"),
        (["--compare", "a/nano", "b/nano"], "'nano'"),
        (["--compare", "out/generated"], "'generated'"),
    ],
)
@pytest.mark.usefixtures("entry_points")
def test_lab_eval_explains_mistakes_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are checked before the data set and the model, which do not exist."""
    assert main(["lab", "eval", "--data", "/no/such/data", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_main_names_a_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'scipy'")

    monkeypatch.setattr("presto_rt.cli.info.info_text", run)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == (
        "presto-rt: error: No module named 'scipy'; pip install 'presto-rt[data,train,eval]'\n"
    )


@pytest.mark.usefixtures("entry_points")
def test_lab_train_without_data_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["lab", "train", "base", "--minutes", "1", "--data", str(tmp_path), "--run", str(tmp_path / "run")])
    assert status == 1
    assert "presto-rt lab train encode" in capsys.readouterr().err


def test_help_names_the_samplers_of_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SAMPLERS, "one_more", SAMPLERS["euler"])
    for command in ("generate", "describe"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert "euler, heun, dpmpp_2m, dpmpp_2s, few_step, one_more" in " ".join(capsys.readouterr().out.split())


def test_extensions_of_pyproject_exist() -> None:
    groups = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
    assert groups.keys() == {EXTENSIONS_GROUP}
    for target in groups[EXTENSIONS_GROUP].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.usefixtures("entry_points")
def test_help_lists_all_commands_without_torch() -> None:
    code = "import sys; from presto_rt.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ") and line.split()]
    assert [name for name in listed if name != "COMMAND"] == ["generate", "tune", "codec", "info", "describe", "lab"]
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.usefixtures("entry_points")
def test_lab_help_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lab", "--help"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")] == [
        "data",
        "train",
        "distill",
        "eval",
    ]


def test_lab_without_its_entry_point_is_explained_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: importlib.metadata.EntryPoints())
    assert main(["lab", "data", "info"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("presto-rt: error: unknown command 'lab'; choose from: generate, tune, codec, info, ")
    assert "pip install -e ." in error
    assert error.count("\n") == 1


def test_builtin_commands_look_up_no_entry_points(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def entry_points(group: str) -> importlib.metadata.EntryPoints:
        raise AssertionError(f"looked up {group}")

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert main(["describe", "tiny", "--seconds", "1"]) == 0
    assert "one block" in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"looked up presto_rt\.commands"):
        main(["lab"])
