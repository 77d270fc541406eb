"""Agreement with what a caption asks for: instruments, tempo, key. Every measure has a control with shuffled
captions.

A clip's record (`meta`) holds its `prompt` and what is true of the piece it was written for: `instruments`, `bpm`,
`key`, `mode`. Only what the prompt says counts as asked; an instrument that the piece has but the prompt does not
name is neither asked for nor absent, so the clip is left out of that instrument's comparison.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...conditioning.keys import MODES, pitch_class
from .rhythm import tempo_agrees
from .statistics import Estimate, bootstrap, mean
from .tonality import best_key, mirex_score

Meta = dict[str, Any]


@dataclass(frozen=True)
class Instrument:
    """Which tagger's tags speak for an instrument, which names ask for it, which are too alike to count as its
    absence.
    """

    tags: tuple[str, ...]
    names: tuple[str, ...]
    near: tuple[str, ...] = ()


INSTRUMENTS = {
    "guitar": Instrument(("guitar",), ("guitar", "electric guitar"), ("banjo", "bass")),
    "piano": Instrument(("piano",), ("piano",), ("electric piano",)),
    "harpsichord": Instrument(("harpsichord",), ("harpsichord",)),
    "harp": Instrument(("harp",), ("harp",)),
    "sitar": Instrument(("sitar",), ("sitar",)),
    "violin": Instrument(("violin",), ("violin",), ("viola", "cello", "strings")),
    "cello": Instrument(("cello",), ("cello",), ("viola", "violin", "strings")),
    "strings": Instrument(("strings",), ("strings",), ("viola", "violin", "cello")),
    "flute": Instrument(("flute",), ("flute",), ("recorder", "pan flute")),
    "choir": Instrument(("choir", "choral"), ("choir",)),
    "drums": Instrument(("drums", "beat", "beats"), ("drums",), ("steel drum", "timpani")),
    "synth": Instrument(("synth",), ("synth",)),
}
MIN_POSITIVES = 5


def named(prompt: str, name: str) -> bool:
    """Whether the prompt names the instrument as whole words, singular or plural; not as a part of a longer name."""
    text = prompt.lower()
    stem = name.removesuffix("s")
    longer = {"piano": "electric ", "guitar": "electric ", "drum": "steel ", "flute": "pan "}.get(stem)
    pattern = rf"\b{re.escape(stem)}s?\b"
    return any(not (longer and text[: m.start()].endswith(longer)) for m in re.finditer(pattern, text))


def asked_instruments(meta: Meta) -> set[str]:
    """The piece's instruments that its prompt names."""
    return {name for name in meta.get("instruments") or () if named(meta["prompt"], name)}


def asked_bpm(meta: Meta) -> float | None:
    """The tempo, when the prompt says it as a number."""
    bpm = meta.get("bpm")
    if bpm is None:
        return None
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", meta["prompt"])]
    return float(bpm) if any(abs(n - bpm) < 1.0 for n in numbers) else None


def asked_key(meta: Meta) -> tuple[int, str] | None:
    """The key (pitch class, mode), when the prompt names it."""
    key, mode = meta.get("key"), meta.get("mode")
    if not key or mode not in MODES:
        return None
    spelled = key.replace("b", " flat") if len(key) > 1 else key
    spellings = {key, key.replace("#", "-sharp"), key.replace("#", " sharp"), spelled, spelled.replace(" ", "-")}
    for spelling in spellings:
        if re.search(rf"(?<!\w){re.escape(spelling.lower())}[ -](?:natural )?{mode}\b", meta["prompt"].lower()):
            return pitch_class(key), mode
    return None


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann-Whitney)."""
    both = np.concatenate([positive, negative])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2.0
    ranks = rank[inverse][: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def instrument_auc(
    scores: np.ndarray,
    columns: Sequence[str],
    meta: Sequence[Meta],
    instruments: Mapping[str, Instrument] = INSTRUMENTS,
    rounds: int = 500,
) -> dict[str, Any]:
    """Mean over instruments of the AUC of the instrument's score: clips whose prompt asks for it against clips
    without it.

    scores: (clips, columns), a clip's score of each tag; meta: one record per clip. Instruments with fewer than 5
    clips on either side are left out. Returns {"mean": Estimate, "per_instrument": {name: Estimate}}; the intervals
    bootstrap clips within each side.
    """
    groups: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    asked = [asked_instruments(m) for m in meta]
    for label, instrument in instruments.items():
        own = [columns.index(t) for t in instrument.tags if t in columns]
        if not own:
            continue
        score = scores[:, own].max(1)
        forbidden = set(instrument.names) | set(instrument.near)
        yes = np.array([bool(a & set(instrument.names)) for a in asked])
        no = np.array([not forbidden & set(m.get("instruments") or ()) and bool(m.get("instruments")) for m in meta])
        if min(yes.sum(), no.sum()) >= MIN_POSITIVES:
            groups[label] = (score[yes], score[no])
    if not groups:
        return {"mean": mean(np.array([])), "per_instrument": {}}
    rng = np.random.default_rng(0)
    draws = {
        label: np.array([auc(rng.choice(p, len(p)), rng.choice(n, len(n))) for _ in range(rounds)])
        for label, (p, n) in groups.items()
    }
    per = {label: _with_draws(auc(p, n), draws[label], len(p)) for label, (p, n) in groups.items()}
    average = float(np.mean([e.value for e in per.values()]))
    total = _with_draws(average, np.mean(list(draws.values()), axis=0), int(sum(e.n for e in per.values())))
    return {"mean": total, "per_instrument": per}


def _with_draws(value: float, draws: np.ndarray, n: int) -> Estimate:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)


class Probe:
    """What the tagger's embedding tells about every instrument of the data, not only those that it has a tag for.

    One ridge-penalised logistic regression per instrument on the clip's embedding, fitted on real clips of known
    instruments.
    """

    def __init__(self, embeddings: np.ndarray, meta: Sequence[Meta], least: int = 8, ridge: float = 0.01) -> None:
        """embeddings: (clips, d) of real clips; meta: their records. Instruments in fewer than `least` clips are
        left out.
        """
        from scipy.optimize import minimize

        counts = Counter(name for m in meta for name in set(m.get("instruments") or ()))
        self.names = sorted(name for name, n in counts.items() if least <= n <= len(meta) - least)
        self.centre, self.scale = embeddings.mean(0), embeddings.std(0).clip(min=1e-6)
        x = self._inputs(embeddings)
        self.weights = np.zeros((x.shape[1], len(self.names)))
        for column, name in enumerate(self.names):
            sign = np.array([1.0 if name in (m.get("instruments") or ()) else -1.0 for m in meta])

            def loss(w: np.ndarray, sign: np.ndarray = sign) -> tuple[float, np.ndarray]:
                margin = sign * (x @ w)
                pull = -sign / (1.0 + np.exp(margin.clip(max=500.0)))
                penalty = np.append(w[:-1], 0.0)
                value = np.logaddexp(0.0, -margin).mean() + ridge * (penalty @ penalty)
                return float(value), x.T @ pull / len(x) + 2 * ridge * penalty

            self.weights[:, column] = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x

    def _inputs(self, embeddings: np.ndarray) -> np.ndarray:
        scaled = (np.asarray(embeddings, dtype=np.float64) - self.centre) / self.scale
        return np.concatenate([scaled, np.ones((len(scaled), 1))], 1)

    def auc(self, embeddings: np.ndarray, meta: Sequence[Meta]) -> dict[str, Any]:
        """As `instrument_auc`, with the probe's scores of the clips' embeddings (clips, d)."""
        table = {name: Instrument((name,), (name,)) for name in self.names}
        return instrument_auc(self._inputs(embeddings) @ self.weights, self.names, meta, table)


def tempo_accuracy(
    tempi: np.ndarray, meta: Sequence[Meta], agrees: Callable[[float, float], bool] = tempo_agrees
) -> Estimate:
    """Share of clips whose measured tempo (clips,) agrees with the one that their prompt names."""
    return mean(
        np.array([float(agrees(t, b)) for t, m in zip(tempi, meta, strict=True) if (b := asked_bpm(m)) is not None])
    )


def key_accuracy(scores: np.ndarray, meta: Sequence[Meta]) -> dict[str, Estimate]:
    """Agreement of the best-scoring key (scores: (clips, 2, 12), mode then tonic) with the one that the prompt names.

    "exact": tonic and mode; "tonic"; "mirex": graded, see `tonality.mirex_score`. A clip without any scores (silence)
    is wrong.
    """
    exact, tonics, graded = [], [], []
    for score, m in zip(scores, meta, strict=True):
        want = asked_key(m)
        if want is None:
            continue
        heard = best_key(score)
        exact.append(float(heard == want))
        tonics.append(float(heard is not None and heard[0] == want[0]))
        graded.append(mirex_score(heard, want) if heard else 0.0)
    return {"exact": mean(np.array(exact)), "tonic": mean(np.array(tonics)), "mirex": mean(np.array(graded))}


def shuffled(meta: Sequence[Meta], seed: int = 0) -> list[Meta]:
    """The records in an order in which no clip keeps its own: the control for every agreement above."""
    rng = np.random.default_rng(seed)
    n = len(meta)
    order = rng.permutation(n)
    moved = np.empty(n, dtype=int)
    moved[order] = np.roll(order, 1)  # one long cycle: nobody keeps their place
    return [meta[i] for i in moved]


def diversity(embeddings: np.ndarray, rounds: int = 500) -> Estimate:
    """Mean distance between two clips' embeddings (clips, d), with its bootstrap interval over clips."""
    x = np.asarray(embeddings, dtype=np.float64)
    squares = (x**2).sum(1)
    distances = np.sqrt((squares[:, None] + squares[None] - 2 * x @ x.T).clip(min=0))

    def average(i: np.ndarray) -> float:
        part = distances[np.ix_(i, i)]
        apart = i[:, None] != i[None]  # a clip drawn twice is no pair
        return float(part[apart].mean()) if apart.any() else float("nan")

    return bootstrap(average, len(x), rounds)
