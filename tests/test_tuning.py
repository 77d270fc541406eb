"""Deadlines: which plan is chosen, from which table, and what is said when nothing fits."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from presto_rt import deadline as tuning
from presto_rt.cli.main import main
from presto_rt.diffusion.schedule import LayerSchedule
from presto_rt.errors import InvalidInputError, WeightsError
from presto_rt.pipeline import Pipeline, load
from presto_rt.runtime.cuda.fp8 import Fp8
from tests.support.models import write_tiny_model

#: 1 ms of text, 2 ms to start, 3 ms an evaluation and 4 ms a block, 5 ms to decode; guidance doubles
ROW = tuning.Row(1.0, 0.001, 0.002, 0.003, 0.004, 2.0, 0.005)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load(write_tiny_model(tmp_path / "tiny"), dtype="float32")


def keep(model: Pipeline, *rows: tuning.Row) -> None:
    path = tuning.table_path(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": [row.__dict__ for row in rows]}))


def test_prediction_adds_up(model: Pipeline) -> None:
    plan = model.plan(1.0, 2, "euler", 1.0, layers=2)
    assert tuning.predict(ROW, plan) == pytest.approx(0.001 + 0.002 + 2 * (0.003 + 2 * 0.004) + 0.005)
    guided = model.plan(1.0, 2, "heun", 3.0, (0.0, 10.0), layers=3)  # 80; 0.002 guided twice: by Heun, and its own
    assert tuning.predict(ROW, guided) == pytest.approx(0.008 + 5 * 0.015)


def test_a_model_in_fp8_has_a_table_of_its_own(model: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuning.table_path(model)
    monkeypatch.setattr(model, "graph", SimpleNamespace(fp8=None))
    assert tuning.table_path(model) == before
    monkeypatch.setattr(model, "graph", SimpleNamespace(fp8=Fp8()))
    assert tuning.table_path(model) != before


def test_best_plan_in_time(model: Pipeline) -> None:
    keep(model, ROW)
    model.schedules = {"70%": LayerSchedule(3, ((math.inf, (0, 2)),))}
    call = {"sampler": "euler", "guidance": 1.0}
    for limit_ms, steps in ((250, 8), (1.05 * (8 + 4 * 11) + 0.1, 4), (1.05 * (8 + 4 * 11) - 0.1, 3), (21, 1)):
        plan = model.plan(1.0, deadline_ms=limit_ms, **call)
        assert 1.05 * tuning.predict(ROW, plan) * 1000 <= limit_ms
        assert len(plan.levels) - 1 == steps
        assert plan.layers == model.schedules["70%"]
    assert len(model.plan(1.0, 2, deadline_ms=250, **call).levels) == 3  # what is given stays
    full = model.plan(1.0, layers=3, deadline_ms=250, **call)
    assert full.layers.blocks(1.0) == (0, 1, 2)
    two = model.plan(1.0, deadline_ms=2 * 60, clips=2, **call)
    assert len(two.levels) <= len(model.plan(1.0, deadline_ms=120, **call).levels) - 1
    with pytest.raises(InvalidInputError, match=r"nothing fits 10 ms.*1 steps, takes about 20 ms"):
        model.plan(1.0, deadline_ms=10, **call)


def test_figures_of_the_weights_decide(model: Pipeline) -> None:
    keep(model, ROW)
    model.quality = [{"steps": 8, "layers": "100%", "kid": 0.5}, {"steps": 2, "layers": "100%", "kid": 0.2},
                     {"steps": 1, "layers": "50%", "kid": 0.9}]  # fmt: skip
    assert len(model.plan(1.0, deadline_ms=1e6).levels) == 3
    assert len(model.plan(1.0, layers="50%", deadline_ms=1e6).levels) == 2


def test_lengths_between_rows(model: Pipeline) -> None:
    longer = tuning.Row(3.0, 0.001, 0.002, 0.009, 0.012, 4.0, 0.015)
    keep(model, ROW, longer)
    middle = tuning.row_for(model, 2.0)
    assert middle.evaluation == pytest.approx(0.006)
    assert middle.decode == pytest.approx(0.010)
    assert tuning.row_for(model, 3.0) == longer


def test_without_a_table_it_measures(model: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "presto_rt"):
        audio = model.generate("piano", seconds=0.5, seed=1, deadline_ms=60_000)
    assert sum("presto-rt tune" in record.message for record in caplog.records) == 1
    rows = tuning.load_table(model)
    assert [row.seconds for row in rows] == [0.5]
    assert min(rows[0].decode, rows[0].evaluation + rows[0].block, rows[0].text) > 0
    assert rows[0].guided >= 1
    again = model.generate("piano", seconds=0.5, seed=1, steps=8, layers="100%")
    assert np.array_equal(audio.samples, again.samples)  # the most steps, all blocks
    assert tuning.row_for(model, 0.5) == rows[0]
    tuning.table_path(model).write_text("{")
    assert tuning.load_table(model) == []


def test_tables_are_of_one_model_and_dtype(model: Pipeline, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["defaults"]["steps"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    other = load(folder, dtype="float32")
    half = load(tmp_path / "tiny", dtype="bfloat16")
    wide = load(tmp_path / "tiny", dtype="float32", threads=7)
    of_its_own = 4 if wide.backend == "cpu" else 3  # threads are the CPU engine's
    assert len({tuning.table_path(m) for m in (model, other, half, wide)}) == of_its_own
    assert tuning.table_path(load(tmp_path / "tiny", dtype="float32")) == tuning.table_path(model)


def test_tune_on_the_command_line(model: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "tiny")
    assert main(["tune", "--model", folder, "--dtype", "float32", "--seconds", "0.3", "0.6", "--repeats", "1"]) == 0
    assert str(tuning.table_path(model)) in capsys.readouterr().out
    assert [row.seconds for row in tuning.load_table(model)] == [0.3, 0.6]
    call = ["generate", "x", "-o", str(tmp_path / "x.wav"), "--seconds", "0.5", "--model", folder, "--dtype", "float32"]
    assert main([*call, "--deadline-ms", "0.001", "--quiet"]) == 1
    assert "the fastest plan" in capsys.readouterr().err
    assert main([*call, "--deadline-ms", "100000", "--quiet"]) == 0


def test_layers_for_each_step_leave_nothing_to_choose(model: Pipeline) -> None:
    for layers in ([3, 2], "3,2"):
        with pytest.raises(InvalidInputError, match="no entry per step"):
            model.plan(1.0, layers=layers, deadline_ms=250)


@pytest.mark.parametrize("bad", [-1, math.nan, "fast", True])
def test_bad_deadlines(model: Pipeline, bad: object) -> None:
    with pytest.raises(InvalidInputError, match="deadline_ms"):
        model.generate("x", seconds=0.3, deadline_ms=bad)


def test_schedules_come_with_the_weights(model: Pipeline, tmp_path: Path) -> None:
    """Saved schedules are checked when loaded, used by name, and a default budget is taken."""
    folder = tmp_path / "tiny"
    own = LayerSchedule(3, ((1.0, (0, 1, 2)), (math.inf, (0, 2))))
    config = json.loads((folder / "config.json").read_text())

    def save(schedule: LayerSchedule) -> None:
        config["layers"], config["defaults"]["layers"] = {"70%": schedule.to_json()}, "70%"
        (folder / "config.json").write_text(json.dumps(config))

    save(own)
    loaded = load(folder)
    assert loaded.schedules == {"70%": own}
    assert loaded.plan(1.0).layers == loaded.plan(1.0, layers="70%").layers == own
    assert loaded.plan(1.0, layers="100%").layers.blocks(80.0) == (0, 1, 2)
    assert [len(loaded.plan(1.0, 3, layers="1,2,3").layers.blocks(s)) for s in (80.0, 2.5, 0.002)] == [1, 2, 3]
    save(replace(own, depth=4))
    with pytest.raises(WeightsError, match="4 blocks"):
        load(folder)
