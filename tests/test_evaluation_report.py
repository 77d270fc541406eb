"""Tests of the whole evaluation: on synthetic pieces with true captions, and of a random model on a small data set."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from presto_rt.errors import InvalidInputError, MissingDependencyError
from presto_rt.lab.data.manifest import Item, Manifest
from presto_rt.lab.evaluation import clip_sets, report, run
from presto_rt.lab.evaluation.tonality import NAMES
from tests.support.models import write_tiny_model

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("musicnn", "basic_pitch", "onnxruntime", "prdc")),
    reason="the packages of the metrics are not installed",
)
RATE, SECONDS = 44100, 4.0


def piece(index: int, seconds: float = SECONDS) -> tuple[np.ndarray, dict[str, Any]]:
    """Make a clip of a cadence, one chord on each beat, in a key and tempo of its own, and its record."""
    rng = np.random.default_rng(index)
    tonic, minor, bpm = int(rng.integers(12)), bool(index % 2), int(rng.integers(100, 160))
    third = 3 if minor else 4
    chords = [[0, third, 7], [5, 5 + third, 12], [-5, -1, 2], [0, third, 7]]
    beat = 60 / bpm
    out = np.zeros(int(seconds * RATE) + RATE)
    for n in range(int(seconds / beat) + 1):
        t = np.arange(int(beat * RATE)) / RATE
        for pitch in [*chords[n % 4], chords[n % 4][0] - 12]:
            f = 440 * 2 ** ((60 + tonic + pitch - 69) / 12)
            tone = sum(np.sin(2 * np.pi * f * h * t) / h**2 for h in range(1, 7))
            start = int(n * beat * RATE)
            out[start : start + len(t)] += 0.08 * tone * np.exp(-4 * t) * np.minimum(1, 300 * t)
    clip = np.stack([out, 0.7 * out])[:, : int(seconds * RATE)].astype(np.float32)
    key, mode = NAMES[tonic], "minor" if minor else "major"
    instrument = "piano" if index % 2 else "guitar"
    prompt = f"{instrument} in {key} {mode}, {bpm} bpm"
    return clip, {"prompt": prompt, "instruments": [instrument], "bpm": bpm, "key": key, "mode": mode, "kind": "solo"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    clips, records = zip(*(piece(i) for i in range(12)), strict=True)
    reference, reference_records = zip(*(piece(100 + i) for i in range(18)), strict=True)
    rng = np.random.default_rng(0)
    noise = [(0.05 * rng.standard_normal((2, int(SECONDS * RATE)))).astype(np.float32) for _ in range(6)]
    cache = tmp_path_factory.mktemp("features")
    finished: list[int] = []
    result = report.evaluate(
        {"real": clips, "noise": noise},
        records,
        reference,
        reference_records=reference_records,
        cache=cache,
        progress=finished.append,
    )
    assert finished == [1] * 36
    assert len(list(cache.iterdir())) == 36
    return result


def test_evaluate_separates_true_from_shuffled_captions(result: dict[str, Any]) -> None:
    real = result["sets"]["real"]
    assert real["tempo"]["value"] > 0.9
    assert real["key"]["exact"]["value"] >= 0.75
    assert real["shuffled"]["tempo"]["value"] < 0.5
    assert real["shuffled"]["key"]["exact"]["value"] < 0.4
    assert real["tempo"]["n"] == real["shuffled"]["tempo"]["n"] == 12
    assert set(real["by_kind"]) == {"solo"}
    assert real["by_kind"]["solo"]["tempo"]["value"] == real["tempo"]["value"]


def test_evaluate_separates_noise_from_music(result: dict[str, Any]) -> None:
    real, noise = result["sets"]["real"], result["sets"]["noise"]
    assert real["kid"]["high"] < noise["kid"]["low"]
    assert abs(real["kid"]["value"]) < 0.1 * noise["kid"]["value"]
    assert noise["levels"]["high_band_db"]["value"] > 10 > real["levels"]["high_band_db"]["value"]
    assert noise["prdc"] is None  # too few clips


def test_write_makes_json_and_markdown(result: dict[str, Any], tmp_path: Path) -> None:
    json_file, markdown_file = report.write(result, tmp_path / "new")
    stored = json.loads(json_file.read_text())
    assert stored == result
    assert stored["environment"]["cores"]
    assert stored["environment"]["torch"] == torch.__version__
    lines = markdown_file.read_text().splitlines()
    header = next(line for line in lines if line.startswith("| set | KID"))
    rows = [line for line in lines if line.startswith("| real |")]
    assert len(rows) == 2
    assert rows[1].count("|") == header.count("|")
    assert any(line.startswith("| noise, captions shuffled |") for line in lines)


def test_environment_omits_absolute_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    row = "A=/home/me/models/nano,steps=4"
    arguments = [
        "/usr/bin/presto-rt",
        "lab",
        "eval",
        "--row",
        row,
        "--data=/my data/set/",
        "/x",
        "out/a",
        "../b",
        "70%",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert report.environment()["command"] == "presto-rt lab eval --row A=nano,steps=4 --data=set/ x out/a ../b 70%"


def test_evaluate_model_names_missing_packages_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    missing = ("prdc", "basic_pitch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(MissingDependencyError, match="basic_pitch, prdc; run: pip install"):
        run.evaluate_model(None, tmp_path, 5, 2.0, tmp_path / "out")


def test_evaluate_needs_a_caption_for_each_clip() -> None:
    clip, record = piece(0)
    with pytest.raises(InvalidInputError, match="2 clips for 1 captions"):
        report.evaluate({"a": [clip, clip]}, [record], [clip])
    with pytest.raises(InvalidInputError, match="0 clips"):
        report.evaluate({"a": []}, [record], [clip])


# ---- the run


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, items = tmp_path_factory.mktemp("data"), []
    for i in range(14):
        clip, record = piece(i, 3.0)
        name = f"solo-{i:03d}"
        soundfile.write(root / f"{name}.wav", clip.T, RATE, subtype="PCM_16")
        captions = [f"some {record['instruments'][0]}", record["prompt"], f"{record['bpm']} bpm"]
        facts = {k: record[k] for k in ("instruments", "bpm", "key", "mode")}
        items.append(
            Item(
                name,
                "solo",
                "test" if i < 5 else "train",
                f"{name}.wav",
                3.0,
                f"c{i}",
                str(i),
                "synthetic",
                "CC0-1.0",
                captions=captions,
                **facts,
            )
        )
    Manifest(root, 0, items).save()
    return root


def test_choose_records_is_deterministic_and_prefers_informative_captions(data_set: Path) -> None:
    from presto_rt.lab.data.dataset import items, load_manifest

    held_out = items(load_manifest(data_set), "test", clip_sets.RENDERED)
    records = clip_sets.choose_records(held_out, 8, 2.0)
    assert records == clip_sets.choose_records(held_out[::-1], 8, 2.0)
    assert len({r["id"] for r in records[:5]}) == 5
    assert [r["id"] for r in records[5:]] == [r["id"] for r in records[:3]]
    assert records[5]["start_frame"] != records[0]["start_frame"]
    assert all(f"in {r['key']}" in r["prompt"] and str(r["bpm"]) in r["prompt"] for r in records)
    assert clip_sets.choose_records(held_out, 5, 2.0, seed=1) != records[:5]
    with pytest.raises(InvalidInputError, match="longer than 3 s"):
        clip_sets.choose_records(held_out, 5, 3.0)


def test_evaluate_model_covers_all_sets_and_resumes(data_set: Path, tmp_path: Path) -> None:
    from presto_rt.loading import load

    model = load(write_tiny_model(tmp_path / "tiny"), dtype="float32")
    settings: dict[str, Any] = {
        "reference_count": 9,
        "controls": 4,
        "batch": 3,
        "steps": 1,
        "guidance": 1.0,
        "workers": 2,
    }
    result = run.evaluate_model(model, data_set, 5, 2.0, tmp_path / "out", baselines={"again": model}, **settings)
    assert list(result["sets"]) == [
        "real, held out",
        "generated",
        "again",
        "codec reconstruction",
        "Gaussian latents",
        "shaped noise",
    ]
    assert [s["clips"] for s in result["sets"].values()] == [5, 5, 5, 5, 4, 4]
    assert result["sets"]["generated"]["kid"] == result["sets"]["again"]["kid"]  # the same seeds
    assert result["settings"]["steps"] == 1
    clips = sorted((tmp_path / "out" / "clips" / "generated").iterdir())
    assert len(clips) == 5
    stamps = [c.stat().st_mtime_ns for c in clips]
    removed = clips.pop()
    removed.unlink()
    repeated = run.evaluate_model(model, data_set, 5, 2.0, tmp_path / "out", baselines={"again": model}, **settings)
    assert removed.is_file()
    assert [c.stat().st_mtime_ns for c in clips][:3] == stamps[:3]  # files of complete batches are unchanged
    assert repeated["sets"] == result["sets"]


def test_shaped_noise_has_the_spectrum_and_level_of_the_clips() -> None:
    clips = [piece(i)[0] for i in range(4)]
    noise = clip_sets.shaped_noise(clips, 2, SECONDS)
    level = np.mean([(c**2).mean(1) for c in clips], axis=0)
    np.testing.assert_allclose((noise[0] ** 2).mean(1), level, rtol=0.3)
    assert abs(np.corrcoef(noise[0])[0, 1]) < 0.1
    low = np.abs(np.fft.rfft(noise[1][0]))[: int(100 * SECONDS)].mean()
    high = np.abs(np.fft.rfft(noise[1][0]))[int(8000 * SECONDS) : int(12000 * SECONDS)].mean()
    assert low > 30 * high
