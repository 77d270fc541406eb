"""Noise levels and layer schedules."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from presto_rt.diffusion.schedule import (
    LayerSchedule,
    budget_schedule,
    few_step_sigmas,
    inference_sigmas,
    karras_sigmas,
    keep_last,
    parse_layers,
    training_sigmas,
)
from presto_rt.errors import InvalidInputError


@given(steps=st.integers(1, 200), rho=st.floats(1, 10))
def test_karras_sigmas_fall_to_zero(steps: int, rho: float) -> None:
    sigmas = karras_sigmas(steps, 0.002, 80.0, rho)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == pytest.approx(80.0)
    assert sigmas[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    if steps > 1:
        assert sigmas[-2] == pytest.approx(0.002, rel=1e-6)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "4", None])
def test_sigmas_reject_bad_steps(steps: object) -> None:
    for ladder in (karras_sigmas, few_step_sigmas):
        with pytest.raises(InvalidInputError, match="steps"):
            ladder(steps)


def test_few_step_sigmas_leave_out_sigma_min() -> None:
    assert few_step_sigmas(1) == [80.0, 0.0]
    four = few_step_sigmas(4, 0.002, 80.0, 7.0)
    assert four[:-1] == karras_sigmas(5, 0.002, 80.0, 7.0)[:4]
    assert four[-2:] == [pytest.approx(0.167, abs=0.01), 0.0]


def test_training_sigmas_are_log_normal() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    log = training_sigmas(u, -0.4, 1.0).log()
    assert float(log.mean()) == pytest.approx(-0.4, abs=1e-3)
    assert float(log.std()) == pytest.approx(1.0, abs=1e-3)


def test_inference_sigmas_reach_both_ends() -> None:
    ends = inference_sigmas(torch.tensor([0.0, 1.0], dtype=torch.float64), 0.002, 80.0, 7.0)
    assert ends.tolist() == pytest.approx([80.0, 0.002])


@given(depth=st.integers(1, 30), data=st.data())
def test_layer_schedule_survives_json(depth: int, data: st.DataObject) -> None:
    bounds = sorted(data.draw(st.lists(st.floats(0.01, 90), max_size=5, unique=True)))
    rows = tuple((b, keep_last(depth, data.draw(st.integers(1, depth)))) for b in [*bounds, math.inf])
    schedule = LayerSchedule(depth, rows, data.draw(st.booleans()))
    assert LayerSchedule.from_json(schedule.to_json()) == schedule
    for sigma in (0.001, 0.5, 5.0, 100.0):
        blocks = schedule.blocks(sigma)
        assert blocks[-1] == depth - 1
        assert blocks == next(b for upper, b in rows if sigma <= upper)


def test_layer_schedule_keeps_its_names_on_disk() -> None:
    """Files written before the budget input had its present name are read; without it, it is an input."""
    data = {"depth": 3, "rows": [[1.0, [0, 1, 2]], [None, [0, 2]]], "told": False}
    schedule = LayerSchedule(3, ((1.0, (0, 1, 2)), (math.inf, (0, 2))), budget_input=False)
    assert schedule.to_json() == data
    assert LayerSchedule.from_json(data) == schedule
    assert LayerSchedule.from_json({"depth": 3, "rows": data["rows"]}) == replace(schedule, budget_input=True)
    for bad in ({}, {"depth": 3}, {"depth": 3, "rows": [[1.0]]}, {"depth": "x", "rows": data["rows"]}, []):
        with pytest.raises(InvalidInputError):
            LayerSchedule.from_json(bad)  # type: ignore[arg-type]


@given(depth=st.integers(4, 32), share=st.floats(0.3, 1.0), shifted=st.booleans())
def test_budget_schedule_runs_its_share_of_the_blocks(depth: int, share: float, shifted: bool) -> None:
    """The average is the budget, counts fall with noise, and a shifted drop always keeps the last block."""
    schedule = budget_schedule(depth, share, shifted=shifted)
    counts = [len(blocks) for _, blocks in schedule.rows]
    assert abs(sum(counts) / len(counts) / depth - share) < 0.06
    assert counts == sorted(counts, reverse=True)
    for _, blocks in schedule.rows:
        assert blocks[-1] == (depth - 1 if shifted else len(blocks) - 1)
    assert LayerSchedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    "rows",
    [
        (),
        ((1.0, (0, 1)),),
        ((math.inf, (1, 0)),),
        ((math.inf, (0, 4)),),
        ((math.inf, ()),),
        ((2.0, (0,)), (1.0, (0,)), (math.inf, (0,))),
    ],
)
def test_layer_schedule_rejects_rows_out_of_order(rows: tuple) -> None:
    with pytest.raises(InvalidInputError):
        LayerSchedule(4, rows)


def test_parse_layers_reads_counts_shares_and_saved_schedules() -> None:
    assert parse_layers(None, 8) == LayerSchedule.full(8)
    assert parse_layers("5", 8).blocks(1.0) == (0, 1, 2, 3, 7)
    assert parse_layers(1, 8).blocks(1.0) == (7,)
    assert parse_layers("50%", 8) == replace(budget_schedule(8, 0.5), budget_input=False)
    assert parse_layers(" 62.5 %", 8, saved={"50%": budget_schedule(8, 0.5)}) == budget_schedule(8, 0.625)
    assert parse_layers("50%", 8).budget(80.0) == 1.0
    assert {blocks for _, blocks in parse_layers("100%", 8).rows} == {tuple(range(8))}
    saved = {"50%": LayerSchedule(8, ((math.inf, (0, 7)),), budget_input=False)}
    assert parse_layers("50%", 8, saved=saved) is saved["50%"]
    assert not parse_layers(6, 8, saved=saved).budget_input
    assert parse_layers(6, 8, saved={"50%": budget_schedule(8, 0.5)}).budget_input


def test_parse_layers_rejects_everything_else() -> None:
    bad = (0, 9, "0%", "200%", "20%", "x", True, 2.5, "", "nan%", "-5", LayerSchedule.full(5), [8, 8], {}, "8,8")
    for each in bad:
        with pytest.raises(InvalidInputError):
            parse_layers(each, 8, sigmas=karras_sigmas(3))


@given(depth=st.integers(1, 24), steps=st.integers(1, 12), data=st.data())
def test_parse_layers_reads_entries_for_each_step(depth: int, steps: int, data: st.DataObject) -> None:
    """Step i runs its own count at its own level; as text it is the same; the last block always runs."""
    counts = data.draw(st.lists(st.integers(1, depth), min_size=steps, max_size=steps))
    sigmas = karras_sigmas(steps)
    schedule = parse_layers(counts, depth, sigmas=sigmas)
    assert [len(schedule.blocks(s)) for s in sigmas[:-1]] == counts
    assert all(schedule.blocks(s)[-1] == depth - 1 for s in sigmas[:-1])
    if steps > 1:
        assert parse_layers(",".join(map(str, counts)), depth, sigmas=sigmas) == schedule
    shares = parse_layers(["100%"] * steps, depth, sigmas=sigmas)
    assert all(shares.blocks(s) == tuple(range(depth)) for s in sigmas[:-1])


@given(
    depth=st.integers(1, 40),
    share=st.floats(0.25, 1.0),
    shifted=st.booleans(),
    parts=st.integers(2, 20),
    sigma=st.floats(1e-4, 200.0),
)
def test_budget_schedule_runs_nested_blocks_at_every_sigma(
    depth: int, share: float, shifted: bool, parts: int, sigma: float
) -> None:
    """At least one block runs at any level, never more at more noise, and a shifted drop keeps the last block."""
    schedule = budget_schedule(depth, share, shifted=shifted, parts=parts)
    blocks, noisier = schedule.blocks(sigma), schedule.blocks(2 * sigma)
    assert 1 <= len(noisier) <= len(blocks) <= depth
    assert set(noisier) <= set(blocks)
    assert 0 in blocks or blocks == (depth - 1,)
    assert not shifted or blocks[-1] == depth - 1
    assert schedule.budget(sigma) == len(blocks) / depth
    assert LayerSchedule.from_json(schedule.to_json()) == schedule
