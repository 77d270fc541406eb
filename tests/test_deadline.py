"""Deadlines: predicted costs, the choice of a plan, measurement with a fake run, tables in files, and the pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from presto_rt.checkpoints.house import network_spec
from presto_rt.deadline import (
    MARGIN,
    CostRow,
    LatencyTable,
    Probe,
    candidates,
    choose,
    measure,
    plan_within,
    predict,
    predict_clips,
)
from presto_rt.diffusion.schedule import LayerSchedule
from presto_rt.errors import InvalidInputError
from presto_rt.latency_store import LatencyStore
from presto_rt.loading import load
from presto_rt.models.config import preset
from presto_rt.pipeline import Pipeline
from presto_rt.request import Defaults, SamplingPlan, SamplingSettings, sampling_plan
from tests.support.models import write_tiny_model

SPEC = network_spec(preset("tiny"))
DEFAULTS = Defaults(steps=4, sampler="heun", guidance=2.0)
#: 1 ms of text, 2 ms to start, 3 ms an evaluation and 4 ms a block, 5 ms to decode; guidance doubles a call
ROW = CostRow(1.0, 0.001, 0.002, 0.003, 0.004, 2.0, 0.005)


def plan_of(settings: SamplingSettings) -> SamplingPlan:
    return sampling_plan(settings, SPEC, DEFAULTS, {})


def euler(steps: int = 2, layers: Any = None, **options: Any) -> SamplingPlan:
    return plan_of(SamplingSettings(1.0, steps, "euler", 1.0, layers=layers, **options))


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


def test_predict_adds_up_the_stages() -> None:
    assert predict(ROW, euler(layers=2)) == pytest.approx(0.001 + 0.002 + 2 * (0.003 + 2 * 0.004) + 0.005)
    # 80; 0.002 guided twice: by Heun, and its own
    guided = plan_of(SamplingSettings(1.0, 2, "heun", 3.0, (0.0, 10.0), layers=3))
    assert predict(ROW, guided) == pytest.approx(0.008 + 5 * 0.015)


def test_table_interpolates_between_lengths() -> None:
    longer = CostRow(3.0, 0.001, 0.002, 0.009, 0.012, 4.0, 0.015)
    table = LatencyTable().merged([longer, ROW])
    assert table.rows == (ROW, longer)
    middle = table.at(2.0)
    assert middle.seconds == 2.0
    assert middle.evaluation == pytest.approx(0.006)
    assert middle.guided == pytest.approx(3.0)
    assert middle.decode == pytest.approx(0.010)
    assert table.at(1.0) == ROW
    assert table.at(3.0) == longer


def test_table_interpolates_between_batches() -> None:
    four = CostRow(1.0, 0.002, 0.002, 0.006, 0.010, 2.0, 0.014, clips=4)
    table = LatencyTable().merged([ROW, four])
    two = table.at(1.0, 2)
    assert two.clips == 2
    assert (two.text, two.evaluation, two.block, two.decode) == pytest.approx((0.004 / 3, 0.004, 0.006, 0.008))
    assert table.at(1.0, 1) == ROW
    assert table.at(1.0, 4) == four
    # beyond the largest batch everything that computes grows in proportion; text and the guided factor do not
    assert table.at(1.0, 8) == CostRow(1.0, 0.002, 0.004, 0.012, 0.020, 2.0, 0.028, clips=8)
    # a smaller batch than any measured one is not cheaper than that
    assert LatencyTable((four,)).at(1.0, 1) == replace(four, clips=1)


def test_table_interpolates_between_lengths_and_batches() -> None:
    rows = [CostRow(s, 0.0, 0.0, 0.0, 0.001 * s * n, 2.0, 0.0, clips=n) for s in (1.0, 3.0) for n in (1, 4)]
    table = LatencyTable().merged(rows)
    assert table.at(2.0, 3).block == pytest.approx(0.006)
    assert table.at(2.0, 3).clips == 3


def test_table_replaces_rows_of_the_same_shape() -> None:
    table = LatencyTable().merged([ROW, replace(ROW, clips=4)])
    again = table.merged([replace(ROW, block=0.1)])
    assert [row.block for row in again.rows] == [0.1, 0.004]
    assert [row.block for row in table.rows] == [0.004, 0.004]


@pytest.mark.parametrize("seconds", [0.5, 3.5])
def test_table_names_the_remedy_for_lengths_that_it_does_not_cover(seconds: float) -> None:
    for table in (LatencyTable(), LatencyTable().merged([ROW, replace(ROW, seconds=3.0)])):
        assert not table.covers(seconds)
        with pytest.raises(InvalidInputError, match=rf"presto-rt tune --seconds {seconds:g}.*auto_tune=True"):
            table.at(seconds)
    assert LatencyTable((ROW,)).covers(1.0)


def test_predict_clips_prices_batches_and_the_rest() -> None:
    four = CostRow(1.0, 0.002, 0.002, 0.006, 0.010, 2.0, 0.014, clips=4)
    table, plan = LatencyTable().merged([ROW, four]), euler()
    whole, rest = predict(four, plan), predict(table.at(1.0, 2), plan)
    assert predict_clips(table, plan, 1.0, 10, 4) == pytest.approx(2 * whole + rest)
    assert predict_clips(table, plan, 1.0, 8, 4) == pytest.approx(2 * whole)
    assert predict_clips(table, plan, 1.0, 3, 1) == pytest.approx(3 * predict(ROW, plan))
    assert predict_clips(table, plan, 1.0, 4, 4) < predict_clips(table, plan, 1.0, 4, 1)


# ---- the choice of a plan


def test_choose_takes_the_first_plan_in_time() -> None:
    plans = [euler(n) for n in (3, 2, 1)]
    costs = [0.3, 0.2, 0.1]
    assert choose(plans, costs, MARGIN * 0.3 + 1e-9) is plans[0]
    assert choose(plans, costs, MARGIN * 0.3 - 1e-9) is plans[1]
    assert choose(plans, costs, 0.12) is plans[2]
    with pytest.raises(InvalidInputError, match="nothing fits 100 ms here: the fastest plan, 1 steps, takes about 105"):
        choose(plans, costs, 0.1)


def all_candidates(steps: int | None = None, layers: Any = None, **given: Any) -> list[tuple[int, Any]]:
    values: dict[str, Any] = {"quality": (), "schedules": {}, "defaults": DEFAULTS} | given
    return candidates(steps, layers, blocks_run=lambda n, budget: n * (3 if budget == "100%" else 2), **values)


def test_candidates_run_the_most_blocks_first() -> None:
    assert all_candidates() == [(n, "100%") for n in (8, 6, 4, 3, 2, 1)]  # up to twice the default steps
    assert all_candidates(schedules={"70%": LayerSchedule.full(3)}) == [(n, "70%") for n in (8, 6, 4, 3, 2, 1)]
    both = all_candidates(2, schedules={"70%": LayerSchedule.full(3), "100%": LayerSchedule.full(3)})
    assert both == [(2, "100%"), (2, "70%")]
    assert all_candidates(5, "50%") == [(5, "50%")]  # given values stay


def test_candidates_follow_measured_figures() -> None:
    quality = [
        {"steps": 8, "layers": "100%", "kid": 0.5},
        {"steps": 2, "layers": "100%", "kid": 0.2},
        {"steps": 1, "layers": "50%", "kid": 0.9},
    ]
    assert all_candidates(quality=quality) == [(2, "100%"), (8, "100%"), (1, "50%")]
    assert all_candidates(quality=quality, layers="50%") == [(1, "50%")]
    assert all_candidates(quality=quality, steps=8) == [(8, "100%")]
    assert all_candidates(quality=quality, steps=5) == [(5, "100%")]  # no figure of it: the general order


@pytest.mark.parametrize("layers", [[3, 2], "3,2"])
def test_candidates_refuse_layers_for_each_step(model: Pipeline, layers: Any) -> None:
    with pytest.raises(InvalidInputError, match="no entry per step"):
        all_candidates(layers=layers)
    keep(model, ROW)
    with pytest.raises(InvalidInputError, match="no entry per step"):
        model.plan(1.0, layers=layers, deadline_ms=250)


def test_plan_within_prices_batches_of_the_backend() -> None:
    """Four clips as one batch that costs twice a clip leave room for more steps than four clips one by one."""
    four = replace(ROW, clips=4, evaluation=0.006, block=0.008, decode=0.010)
    table = LatencyTable().merged([ROW, four])
    asked: list[int] = []

    def plan_for(limit: float, batch: int) -> SamplingPlan:
        def max_batch(frames: int) -> int:
            asked.append(frames)
            return batch

        return plan_within(
            limit,
            SamplingSettings(1.0, None, "euler", 1.0),
            4,
            plan=plan_of,
            table=table,
            max_batch=max_batch,
            quality=(),
            schedules={},
            defaults=DEFAULTS,
        )

    together, singly = plan_for(0.2, 4), plan_for(0.2, 1)
    assert (together.steps, singly.steps) == (4, 2)  # 0.013 + 4 * 0.030 s, and 4 * (0.008 + 2 * 0.015) s
    assert asked == [together.frames] * 2


# ---- measurement


def fake_run(row: CostRow, runs: list[Probe], slow: int = -1) -> Callable[[Probe], dict[str, float]]:
    """A run that costs just as the row says; the run of index `slow` takes 1 s longer in every stage."""

    def run(probe: Probe) -> dict[str, float]:
        runs.append(probe)
        call = (row.evaluation + row.block * probe.blocks) * (row.guided if probe.guidance != 1.0 else 1.0)
        extra = 1.0 if len(runs) - 1 == slow else 0.0
        denoise = row.start + probe.steps * call
        stages = {"text": row.text, "denoise": denoise, "decode": row.decode}
        return {name: seconds + extra for name, seconds in stages.items()}

    return run


@pytest.mark.parametrize("clips", [1, 4])
def test_measure_finds_the_costs_of_a_run(clips: int) -> None:
    runs: list[Probe] = []
    row = measure(fake_run(ROW, runs), 1.0, 8, clips=clips, repeats=2)
    names = ("text", "start", "evaluation", "block", "guided", "decode")
    assert [getattr(row, name) for name in names] == pytest.approx([getattr(ROW, name) for name in names])
    assert (row.seconds, row.clips) == (1.0, clips)
    assert runs == [Probe(1.0, clips, 1, 8, 1.0)] + [
        Probe(1.0, clips, *setting)
        for setting in [(1, 8, 1.0), (3, 8, 1.0), (3, 8, 2.0), (3, 2, 1.0)]
        for _ in range(2)
    ]


def test_measure_leaves_out_the_first_run_and_counts_the_slowest() -> None:
    assert measure(fake_run(ROW, [], slow=0), 1.0, 8).decode == pytest.approx(ROW.decode)
    for slow in (1, 2, 3):  # one of the three runs of one step
        row = measure(fake_run(ROW, [], slow=slow), 1.0, 8)
        assert (row.text, row.decode) == pytest.approx((1.001, 1.005))


def test_measure_of_one_block_has_no_cost_per_block() -> None:
    runs: list[Probe] = []
    row = measure(fake_run(ROW, runs), 1.0, 1, repeats=1)
    assert row.block == 0.0
    assert row.evaluation == pytest.approx(ROW.evaluation + ROW.block)
    assert len(runs) == 4


def test_measure_of_noisy_timings_has_no_negative_cost() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        row = measure(lambda _: dict(zip(("text", "denoise", "decode"), draw.random(3), strict=True)), 1.0, 8)
        assert min(row.start, row.evaluation, row.block) >= 0
        assert row.guided >= 1


# ---- tables in files


def test_store_keeps_a_table(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = LatencyStore({"weights": "a", "threads": 2})
    assert store.load() == LatencyTable()
    table = LatencyTable().merged([ROW, replace(ROW, clips=4)])
    assert store.save(table)
    assert store.load() == LatencyStore({"threads": 2, "weights": "a"}).load() == table
    assert LatencyStore({"weights": "b", "threads": 2}).load() == LatencyTable()
    assert list(store.path.parent.iterdir()) == [store.path]
    for damaged in ("{", "[]", '{"rows": [{"seconds": 1}]}', '{"rows": 3}'):
        store.path.write_text(damaged)
        assert store.load() == LatencyTable()
    assert not caplog.records


def test_store_warns_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    store = LatencyStore({"weights": "a"})
    with caplog.at_level(logging.WARNING, "presto_rt"):
        assert not store.save(LatencyTable((ROW,)))
    assert [record.message.count("cannot be kept") for record in caplog.records] == [1]
    assert store.load() == LatencyTable()
