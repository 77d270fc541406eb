"""Presto-S where the truth is known: 1-D and 2-D Gaussian mixtures with closed-form scores.

The bounds are stated against the teacher's own sampling with 40 Heun steps. The same bounds must be missed by the
method without one of its parts.
"""

from __future__ import annotations

import pytest
import torch

from presto_rt.lab.distill.steps import settings
from tests.support.toys import MIXTURES, Toy, distil, energy_distance, errors, few_step_samples, teacher_samples

#: generator updates
UPDATES = {1: 500, 2: 800}
LOST = 0.04  # error of a mode's weight
FAR = 0.007  # energy distance beyond the teacher's


@pytest.fixture(scope="module", params=[1, 2], ids=["1-D", "2-D"])
def presto_s(request: pytest.FixtureRequest) -> Toy:
    return distil(MIXTURES[request.param], settings("presto-s", 1.0), steps=UPDATES[request.param])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_presto_s_recovers_the_mixture(presto_s: Toy, steps: int) -> None:
    """No lost mode, and a density near the teacher's own samples."""
    mixture = presto_s.mixture
    _, teacher = errors(mixture, teacher_samples(mixture))
    weight, distance = errors(mixture, few_step_samples(presto_s, steps))
    assert weight < LOST
    assert distance < teacher + FAR


@pytest.mark.parametrize("broken", ["no matching", "frozen fake score", "fake score not told s_g"])
def test_without_a_part_the_same_bounds_are_missed(broken: str) -> None:
    mixture = MIXTURES[1]
    changes = {"no matching": {"dmd_weight": 0.0}, "fake score not told s_g": {"fake_told": False}}
    toy = distil(mixture, settings("presto-s", 1.0, **changes.get(broken, {})), steps=UPDATES[1],
                 frozen_fake=broken == "frozen fake score")  # fmt: skip
    _, teacher = errors(mixture, teacher_samples(mixture))
    weight, distance = errors(mixture, few_step_samples(toy, 1))
    assert weight > LOST or distance > teacher + FAR


def test_energy_distance_tells_samples_apart() -> None:
    """It is 0 for equal samples, near 0 for two draws, and grows with a shift as for two points, 2 |shift| at most."""
    mixture = MIXTURES[2]
    a, b = (mixture.draw(4_000, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert energy_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert energy_distance(a, b) < 0.005
    shifted = [energy_distance(a, b + torch.tensor([0.0, shift])) for shift in (0.1, 0.3, 1.0)]
    assert sorted(shifted) == shifted
    assert shifted[0] > FAR
    assert shifted[-1] < 2
