"""Deadlines of a loaded pipeline: tables of its own, plans in time, tuning and the command line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from presto_rt.cli.main import main
from presto_rt.deadline import (
    CostRow,
    LatencyTable,
    predict,
)
from presto_rt.diffusion.schedule import LayerSchedule
from presto_rt.errors import InvalidInputError
from presto_rt.loading import load
from presto_rt.pipeline import Pipeline
from tests.support.models import change_config, count_runs, write_tiny_model

#: 1 ms of text, 2 ms to start, 3 ms an evaluation and 4 ms a block, 5 ms to decode; guidance doubles a call
ROW = CostRow(1.0, 0.001, 0.002, 0.003, 0.004, 2.0, 0.005)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model's folder, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture
def model(folder: Path) -> Pipeline:
    return load(folder, dtype="float32")


def keep(model: Pipeline, *rows: CostRow) -> None:
    assert model.timings.save(LatencyTable().merged(rows))


# ---- predicted costs


def test_tables_belong_to_one_model_backend_and_precision(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other")
    change_config(other, defaults={"steps": 5})
    models = [
        load(folder, dtype="float32", device="cpu"),
        load(other, dtype="float32", device="cpu"),
        load(folder, dtype="bfloat16", device="cpu"),
        load(folder, dtype="bfloat16", device="cpu", backend="graph"),
        load(folder, dtype="fp8", device="cpu", backend="graph"),
    ]
    if models[0].backend.name == "cpu":  # threads are the CPU backend's
        models += [
            load(folder, dtype="float32", device="cpu", threads=7),
            load(folder, dtype="float32", device="cpu", backend="eager"),
        ]
    assert len({one.timings.path for one in models}) == len(models)
    assert load(folder, dtype="float32", device="cpu").timings.path == models[0].timings.path


# ---- the pipeline


def test_plan_takes_the_best_plan_in_time(model: Pipeline) -> None:
    keep(model, ROW)
    schedule = LayerSchedule(3, ((math.inf, (0, 2)),))
    model.model.schedules = {"70%": schedule}
    call: dict[str, Any] = {"sampler": "euler", "guidance": 1.0}
    for limit_ms, steps in ((250, 8), (1.05 * (8 + 4 * 11) + 0.1, 4), (1.05 * (8 + 4 * 11) - 0.1, 3), (21, 1)):
        plan = model.plan(1.0, deadline_ms=limit_ms, **call)
        assert 1.05 * predict(ROW, plan) * 1000 <= limit_ms
        assert plan.steps == steps
        assert plan.layers == schedule
    assert model.plan(1.0, 2, deadline_ms=250, **call).steps == 2  # given values stay
    full = model.plan(1.0, layers=3, deadline_ms=250, **call)
    assert full.layers.blocks(1.0) == (0, 1, 2)
    with pytest.raises(InvalidInputError, match=r"nothing fits 10 ms.*1 steps, takes about 20 ms"):
        model.plan(1.0, deadline_ms=10, **call)


def test_plan_divides_the_deadline_among_clips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one on a CPU; as batches where the backend runs them."""
    model = load(folder, dtype="float32", device="cpu")
    keep(model, ROW, replace(ROW, clips=4, evaluation=0.006, block=0.008, decode=0.010))
    call: dict[str, Any] = {"sampler": "euler", "guidance": 1.0, "deadline_ms": 200}
    assert model.backend.max_batch(22) == 1
    assert [model.plan(1.0, clips=clips, **call).steps for clips in (1, 2, 4)] == [8, 4, 2]
    monkeypatch.setattr(model.backend, "max_batch", lambda frames: 4)
    assert [model.plan(1.0, clips=clips, **call).steps for clips in (1, 4, 8)] == [8, 4, 2]


def test_plan_follows_measured_figures_of_the_weights(model: Pipeline) -> None:
    keep(model, ROW)
    model.model.quality = [
        {"steps": 8, "layers": "100%", "kid": 0.5},
        {"steps": 2, "layers": "100%", "kid": 0.2},
        {"steps": 1, "layers": "50%", "kid": 0.9},
    ]
    assert model.plan(1.0, deadline_ms=1e6).steps == 2
    assert model.plan(1.0, layers="50%", deadline_ms=1e6).steps == 1


@pytest.mark.parametrize("auto_tune", [False, True])
def test_plan_without_a_table_names_the_remedy_and_does_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, auto_tune: bool
) -> None:
    """Planning neither generates nor writes; also not where `generate` would measure."""
    model = load(folder, dtype="float32", auto_tune=auto_tune)
    jobs = count_runs(model, monkeypatch)
    calls = [lambda: model.plan(0.5, deadline_ms=60_000)]
    if not auto_tune:
        calls.append(lambda: model.generate("piano", seconds=0.5, deadline_ms=60_000))
    for call in calls:
        with pytest.raises(InvalidInputError, match=r"`presto-rt tune --seconds 0.5`.*auto_tune=True") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert jobs == []
    assert not model.timings.path.parent.exists()
    assert not caplog.records


def test_generate_measures_with_auto_tune(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: on the first call with a deadline, not on calls without one, nor on lengths that the table covers."""
    model = load(folder, dtype="float32", auto_tune=True)
    jobs = count_runs(model, monkeypatch)
    model.generate("piano", seconds=0.5, seed=1, steps=1)
    assert len(jobs) == 1
    assert not model.timings.path.exists()
    audio = model.generate("piano", seconds=0.5, seed=1, deadline_ms=60_000)
    rows = model.timings.load().rows
    assert {row.seconds for row in rows} == {0.5}
    assert rows[0].clips == 1
    assert min(rows[0].decode, rows[0].evaluation + rows[0].block, rows[0].text) > 0
    assert rows[0].guided >= 1
    again = model.generate("piano", seconds=0.5, seed=1, steps=8, layers="100%")
    assert np.array_equal(audio.samples, again.samples)  # the most steps, all blocks
    measured = len(jobs)
    assert measured > 3
    model.generate("piano", seconds=0.5, seed=1, deadline_ms=60_000)
    assert len(jobs) == measured + 1
    assert model.timings.load().rows == rows
    model.timings.path.write_text("{")
    model.generate("piano", seconds=0.5, seed=1, deadline_ms=60_000)
    assert len(jobs) > measured + 2
    assert {row.seconds for row in model.timings.load().rows} == {0.5}


def test_tune_measures_the_batches_of_the_backend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder, dtype="float32", device="cpu", backend="eager")
    monkeypatch.setattr(model.backend, "max_batch", lambda frames: 6)
    jobs = count_runs(model, monkeypatch)
    table = model.tune([0.3], repeats=1)
    assert [(row.seconds, row.clips) for row in table.rows] == [(0.3, 1), (0.3, 4), (0.3, 6)]
    assert {len(job.seeds) for job in jobs} == {1, 4, 6}
    assert {job.frames for job in jobs} == {model.plan(0.3).frames}
    assert table == model.timings.load()
    longer = model.tune([0.6], repeats=1)
    assert [row.seconds for row in longer.rows] == [0.3] * 3 + [0.6] * 3
    assert longer.rows[:3] == table.rows


@pytest.mark.parametrize("auto_tune", [False, True])
@pytest.mark.parametrize("rows", [(), (ROW,)])
@pytest.mark.parametrize("bad", [-1, math.nan, "fast", True])
def test_generate_rejects_bad_deadlines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bad: Any, rows: tuple[CostRow, ...], auto_tune: bool
) -> None:
    """Before anything runs."""
    model = load(folder, dtype="float32", auto_tune=auto_tune)
    keep(model, *rows)
    jobs = count_runs(model, monkeypatch)
    with pytest.raises(InvalidInputError, match="deadline_ms"):
        model.generate("x", seconds=0.3, deadline_ms=bad)
    assert jobs == []


@pytest.mark.parametrize("auto_tune", [False, True])
@pytest.mark.parametrize("rows", [(), (ROW,)])
@pytest.mark.parametrize("bad", [0, -1, math.nan, "8", True, None, 121])
def test_generate_rejects_bad_lengths_with_a_deadline(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bad: Any, rows: tuple[CostRow, ...], auto_tune: bool
) -> None:
    model = load(folder, dtype="float32", auto_tune=auto_tune)
    keep(model, *rows)
    jobs = count_runs(model, monkeypatch)
    with pytest.raises(InvalidInputError, match="seconds"):
        model.generate("x", seconds=bad, deadline_ms=250)
    assert jobs == []


# ---- the command line


def test_tune_on_the_command_line(model: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "tiny")
    call = ["generate", "x", "-o", str(tmp_path / "x.wav"), "--seconds", "0.5", "--model", folder, "--dtype", "float32"]
    assert main([*call, "--deadline-ms", "100000", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "presto-rt tune --seconds 0.5" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.wav").exists()
    assert main(["tune", "--model", folder, "--dtype", "float32", "--seconds", "0.3", "0.6", "--repeats", "1"]) == 0
    assert str(model.timings.path) in capsys.readouterr().out
    assert sorted({row.seconds for row in model.timings.load().rows}) == [0.3, 0.6]
    assert main([*call, "--deadline-ms", "0.001", "--quiet"]) == 1
    assert "the fastest plan" in capsys.readouterr().err
    assert main([*call, "--deadline-ms", "100000", "--quiet"]) == 0
    assert (tmp_path / "x.wav").exists()
