"""Presto-S on 1-D and 2-D Gaussian mixtures, whose scores have a closed form.

The bounds are relative to the teacher's samples by 40 Heun steps. The method without any one of its parts must violate
them.
"""

from __future__ import annotations

import pytest
import torch

from presto_rt.lab.distill.step_options import settings
from tests.support.toys import MIXTURES, Toy, distill, energy_distance, errors, few_step_samples, teacher_samples

#: generator updates
UPDATES = {1: 500, 2: 800}
WEIGHT_BOUND = 0.04  # error of a mode's weight
DISTANCE_BOUND = 0.007  # energy distance beyond the teacher's


@pytest.fixture(scope="module", params=[1, 2], ids=["1-D", "2-D"])
def presto_s(request: pytest.FixtureRequest) -> Toy:
    return distill(MIXTURES[request.param], settings("presto-s", 1.0), steps=UPDATES[request.param])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_presto_s_recovers_the_mixture(presto_s: Toy, steps: int) -> None:
    """All modes keep their weights, and the energy distance is near that of the teacher's samples."""
    mixture = presto_s.mixture
    _, teacher = errors(mixture, teacher_samples(mixture))
    weight, distance = errors(mixture, few_step_samples(presto_s, steps))
    assert weight < WEIGHT_BOUND
    assert distance < teacher + DISTANCE_BOUND


@pytest.mark.parametrize("ablation", ["no matching", "frozen fake score", "fake score not conditioned on s_g"])
def test_presto_s_without_a_part_misses_the_bounds(ablation: str) -> None:
    mixture = MIXTURES[1]
    changes = {
        "no matching": {"dmd_weight": 0.0},
        "fake score not conditioned on s_g": {"condition_on_origin": False},
    }
    options = settings("presto-s", 1.0, **changes.get(ablation, {}))
    toy = distill(mixture, options, steps=UPDATES[1], frozen_fake=ablation == "frozen fake score")
    _, teacher = errors(mixture, teacher_samples(mixture))
    weight, distance = errors(mixture, few_step_samples(toy, 1))
    assert weight > WEIGHT_BOUND or distance > teacher + DISTANCE_BOUND


def test_energy_distance_grows_with_a_shift() -> None:
    """0 for equal samples, near 0 for two draws of a distribution, at most 2 |shift|, its value for two points."""
    mixture = MIXTURES[2]
    a, b = (mixture.draw(4_000, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert energy_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert energy_distance(a, b) < 0.005
    shifted = [energy_distance(a, b + torch.tensor([0.0, shift])) for shift in (0.1, 0.3, 1.0)]
    assert sorted(shifted) == shifted
    assert shifted[0] > DISTANCE_BOUND
    assert shifted[-1] < 2
