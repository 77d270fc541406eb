"""Many threads, one model: `python examples/threads.py [model] [clips]`

A loaded model may be called from any number of threads; what a thread gets depends on its own request alone. On a GPU
`Limits(lanes=2)` lets two requests run side by side, each on its stream.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import presto_rt
from presto_rt.runtime.cuda.graph import Limits

PROMPTS = ["calm piano, 84 bpm", "fast drums, 174 bpm", "solo violin in D minor", "bright brass band march"]


def main(model: str = "nano", clips: int = 8) -> list[presto_rt.Audio]:
    loaded = presto_rt.load(model, backend="graph", limits=Limits(lanes=2, graphs=16))

    def clip(number: int) -> presto_rt.Audio:
        prompt, seconds = PROMPTS[number % len(PROMPTS)], 1.0 + number % 3
        return loaded.generate(prompt, seconds=seconds, steps=2, seed=number)

    with ThreadPoolExecutor(max_workers=8) as pool:
        made = list(pool.map(clip, range(clips)))
    for audio in made:
        print(f"{audio.seconds:.1f} s, seed {audio.seed}: {audio.prompt}")
    return made


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
