"""Speed of the C++ operators against their references in torch or numpy, for 32 s of stereo: `python bench/native.py`.

Both must first give the same result; an operator that does not is an error, not a row. Times are medians over the
repeats, with the two versions interleaved; GB/s counts each input and output byte once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.results import save, spread, table
from presto_rt import native
from presto_rt.audio.pcm import to_pcm, to_pcm_reference
from presto_rt.diffusion.noise import normal, normal_torch
from presto_rt.models.spectral import FRAME_HOP, N_FFT, spsi, spsi_numpy

SAMPLES = 32 * 44_100
LATENTS = 689 * 64
FRAMES = SAMPLES // FRAME_HOP

Case = tuple[str, Callable[[], Any], Callable[[], Any], int, float]


def cases() -> list[Case]:
    """Return name, C++ version, reference, bytes moved and the largest allowed difference of each operator."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(2, SAMPLES, generator=generator) - 0.5
    magnitude = torch.rand(2, FRAMES, N_FFT // 2 + 1, generator=generator)
    return [
        (
            "noise, one clip's latents",
            lambda: normal(1, (LATENTS,)),
            lambda: normal_torch(1, LATENTS),
            4 * LATENTS,
            0.0,
        ),
        ("noise, a million", lambda: normal(1, (10**6,)), lambda: normal_torch(1, 10**6), 4 * 10**6, 0.0),
        (
            "to_pcm, 16 bits",
            lambda: to_pcm(samples, dither=False),
            lambda: to_pcm_reference(samples, 16, dither=False, seed=0),
            6 * samples.numel(),
            0.0,
        ),
        (
            "to_pcm, 16 bits, dither",
            lambda: to_pcm(samples),
            lambda: to_pcm_reference(samples, 16, dither=True, seed=0),
            6 * samples.numel(),
            0.0,
        ),
        (
            "spsi",
            lambda: spsi(magnitude),
            lambda: torch.from_numpy(spsi_numpy(magnitude.numpy())),
            12 * magnitude.numel(),
            1e-5,
        ),
    ]


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Time both versions, interleaved, after one warm-up that compares their results."""
    name, fast, reference, moved, tolerance = case
    difference = float((fast() - reference()).abs().max())
    if not difference <= tolerance:
        raise SystemExit(f"{name}: C++ and reference differ by {difference:g}; no speeds for a wrong result")
    times: dict[str, list[float]] = {"cpp": [], "reference": []}
    for _ in range(repeats):
        for key, function in (("cpp", fast), ("reference", reference)):
            start = time.perf_counter()
            function()
            times[key].append(time.perf_counter() - start)
    seconds = {key: spread(values) for key, values in times.items()}
    return {
        "operator": name,
        "seconds": seconds,
        "gb_per_s": moved / seconds["cpp"]["median"] / 1e9,
        "speed_up": seconds["reference"]["median"] / seconds["cpp"]["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    a = parser.parse_args()
    if native.lib is None:
        raise SystemExit(f"there are no C++ operators to measure: {native.why}")
    rows = [measure(case, a.repeats) for case in cases()]
    header = ["operator, 32 s of stereo", "C++", "reference", "speed-up", "C++ GB/s"]
    cells = [
        [
            r["operator"],
            *(f"{r['seconds'][key]['median'] * 1e3:.2f} ms" for key in ("cpp", "reference")),
            f"{r['speed_up']:.1f}",
            f"{r['gb_per_s']:.1f}",
        ]
        for r in rows
    ]
    print(table(header, cells))
    print(save("native", rows))


if __name__ == "__main__":
    main()
