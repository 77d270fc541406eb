"""The command line: what it writes, what it prints, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from presto_rt.cli.main import main
from presto_rt.lab.training.synthetic import write_latents
from tests.support.models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny"))


def test_generate_writes_and_reports(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.wav"
    assert main(["generate", "piano, 90 bpm", "-o", str(out), "--seconds", "0.7", "--seed", "3", "--model", model]) == 0
    samples, rate = soundfile.read(out)
    assert (samples.shape, rate) == ((round(0.7 * 44_100), 2), 44_100)
    text = capsys.readouterr().out
    assert all(word in text for word in (str(out), "x real time", "seed 3", "denoise", "decode"))


def test_generate_json_and_count(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "piano", "drums", "--count", "2", "-o", str(tmp_path / "b.flac"), "--seconds", "0.3",
                 "--seed", "9", "--model", model, "--json"]  # fmt: skip
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
        (["--seconds", "0"], "seconds"), (["--seconds", "nan"], "seconds"), (["--seconds", "500"], "120"),
        (["--steps", "0"], "steps"), (["--sampler", "magic"], "dpmpp_2m"), (["--layers", "900%"], "blocks"),
        (["--guidance", "-1"], "guidance"), (["--bpm", "1"], "bpm"), (["--seed", "-4"], "seed"),
        (["--count", "0"], "count"), (["--device", "tpu"], "cpu"), (["--backend", "abacus"], "torch"),
        (["--model", "nothing"], "shipped models are"), (["-o", "/no/such/folder/x.wav"], "folder"),
        (["-o", "x.mp3"], ".flac"),
    ],
)  # fmt: skip
def test_mistakes(
    model: str, tmp_path: Path, arguments: list[str], words: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    full = ["generate", "piano", "--seconds", "0.3", "--model", model, "--quiet", *arguments]
    assert main(full) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("presto-rt: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not list(tmp_path.iterdir())


def test_interrupt(model: str, tmp_path: Path) -> None:
    """Ctrl-C during sampling: one line, status 130, no file."""
    command = [sys.executable, "-m", "presto_rt.cli", "generate", "piano", "--seconds", "100", "--steps", "1000",
               "--model", model, "-o", str(tmp_path / "x.wav")]  # fmt: skip
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


def test_roundtrip(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "in.wav", np.sin(np.arange(30_000) / 20)[:, None].repeat(2, 1) * 0.3, 44_100)
    assert main(["codec", "roundtrip", str(tmp_path / "in.wav"), str(tmp_path / "out.wav"), "--model", model]) == 0
    assert soundfile.info(tmp_path / "out.wav").frames == 30_000
    assert "latents" in capsys.readouterr().out
    assert main(["codec", "roundtrip", str(tmp_path / "none.wav"), str(tmp_path / "o.wav"), "--model", model]) == 1


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"]
    assert main(["info"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "auto, cpu and cuda"), (["--set", "clips=1"], "there are learning_rate, tokens"),
        (["--set", "clip=loud"], "1.0"), (["--tokens", "0"], "tokens"), (["--set", "minutes=3"], "'minutes'"),
        (["--start-from", "nothing"], "no model 'nothing'"), (["--run", "data/manifest.json"], "data/manifest.json"),
    ],
)  # fmt: skip
def test_mistakes_in_training(
    arguments: list[str], words: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_latents("data")
    assert main(["train", "base", "--minutes", "0.001", "--model", "tiny", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("presto-rt: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "--batch"), (["--count", "3"], "--count"), (["--workers", "-1"], "--workers"),
        (["--seconds", "nan"], "--seconds"), (["--seed", "-1"], "--seed"), (["--reference", "0"], "--reference"),
        (["--compare", "a/nano", "b/nano"], "'nano'"), (["--compare", "out/generated"], "'generated'"),
    ],
)  # fmt: skip
def test_mistakes_in_judging(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Said at once: a data set and a model are not asked for."""
    assert main(["eval", "--data", "/no/such/data", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_package_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'scipy'")

    monkeypatch.setattr("presto_rt.cli.info.info_text", run)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == (
        "presto-rt: error: No module named 'scipy'; pip install 'presto-rt[data,train,eval]'\n"
    )


def test_training_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["train", "base", "--minutes", "1", "--data", str(tmp_path), "--run", str(tmp_path / "run")])
    assert status == 1
    assert "presto-rt train encode" in capsys.readouterr().err
