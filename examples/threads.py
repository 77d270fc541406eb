"""Call one model from many threads: `python examples/threads.py [model] [clips]`.

Any number of threads may call a loaded model, and the clip of a thread depends on its own request alone. On a GPU,
`Limits(streams=2)` lets two requests run concurrently, each on its own stream.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import presto_rt
from presto_rt.runtime.cuda.backend import Limits

PROMPTS = ["calm piano, 84 bpm", "fast drums, 174 bpm", "solo violin in D minor", "bright brass band march"]


def main(model: str = "nano", clips: int = 8) -> list[presto_rt.Audio]:
    """Generate `clips` clips in eight threads; print and return them in order."""
    loaded = presto_rt.load(model, backend="graph", limits=Limits(streams=2, graphs=16))

    def clip(number: int) -> presto_rt.Audio:
        prompt, seconds = PROMPTS[number % len(PROMPTS)], 1.0 + number % 3
        return loaded.generate(prompt, seconds=seconds, steps=2, seed=number)

    with ThreadPoolExecutor(max_workers=8) as pool:
        generated = list(pool.map(clip, range(clips)))
    for audio in generated:
        print(f"{audio.seconds:.1f} s, seed {audio.seed}: {audio.prompt}")
    return generated


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
