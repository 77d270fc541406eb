"""Adherence of clips to their captions: instruments, tempo and key.

The record of a clip holds its `prompt` and the ground truth of the piece that the prompt describes: `instruments`,
`bpm`, `key`, `mode`. Only facts named in the prompt count as requested. A clip whose piece has an instrument that its
prompt does not name is neither a positive nor a negative of that instrument. The control of each metric is its value
with shuffled captions (`shuffled`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...conditioning.keys import MODES, pitch_class
from .rhythm import tempo_agrees
from .statistics import Estimate, bootstrap, mean
from .tonality import best_key, mirex_score

ClipRecord = dict[str, Any]


@dataclass(frozen=True)
class Instrument:
    """An instrument that is scored.

    Args:
        tags: the tagger's tags of the instrument; the highest probability is its score.
        names: names in prompts that request it.
        similar: names too similar to count as its absence.
    """

    tags: tuple[str, ...]
    names: tuple[str, ...]
    similar: tuple[str, ...] = ()


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


def is_named(prompt: str, name: str) -> bool:
    """Return True if the prompt names an instrument as a whole word, singular or plural.

    Longer names do not count: "electric piano" does not name a piano.
    """
    text = prompt.lower()
    stem = name.removesuffix("s")
    prefix = {"piano": "electric ", "guitar": "electric ", "drum": "steel ", "flute": "pan "}.get(stem)
    pattern = rf"\b{re.escape(stem)}s?\b"
    return any(not (prefix and text[: m.start()].endswith(prefix)) for m in re.finditer(pattern, text))


def requested_instruments(record: ClipRecord) -> set[str]:
    """Return the instruments of the piece that its prompt names."""
    return {name for name in record.get("instruments") or () if is_named(record["prompt"], name)}


def requested_bpm(record: ClipRecord) -> float | None:
    """Return the tempo if the prompt names it as a number, else None."""
    bpm = record.get("bpm")
    if bpm is None:
        return None
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", record["prompt"])]
    return float(bpm) if any(abs(n - bpm) < 1.0 for n in numbers) else None


def requested_key(record: ClipRecord) -> tuple[int, str] | None:
    """Return the key (pitch class, mode) if the prompt names it, else None."""
    key, mode = record.get("key"), record.get("mode")
    if not key or mode not in MODES:
        return None
    spelled = key.replace("b", " flat") if len(key) > 1 else key
    spellings = {key, key.replace("#", "-sharp"), key.replace("#", " sharp"), spelled, spelled.replace(" ", "-")}
    for spelling in spellings:
        if re.search(rf"(?<!\w){re.escape(spelling.lower())}[ -](?:natural )?{mode}\b", record["prompt"].lower()):
            return pitch_class(key), mode
    return None


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve of scores (P,) and (N,): the probability that a positive scores above a negative.

    Ties count half (Mann and Whitney 1947).
    """
    scores = np.concatenate([positive, negative])
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2.0
    ranks = rank[inverse][: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def instrument_auc(
    scores: np.ndarray,
    columns: Sequence[str],
    records: Sequence[ClipRecord],
    instruments: Mapping[str, Instrument] = INSTRUMENTS,
    rounds: int = 500,
) -> dict[str, Any]:
    """AUC of each instrument's score: clips whose prompt names the instrument against clips without it.

    Args:
        scores: (clips, tags) score of each tag.
        columns: tag of each column of `scores`.
        records: one record per clip.
        instruments: instruments by name; those with fewer than 5 positives or negatives are left out.
        rounds: bootstrap rounds of the intervals, over clips within positives and negatives.

    Returns:
        {"mean": Estimate over instruments, "per_instrument": {name: Estimate}}.
    """
    groups: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    requested = [requested_instruments(record) for record in records]
    present = [set(record.get("instruments") or ()) for record in records]
    for label, instrument in instruments.items():
        tag_columns = [columns.index(t) for t in instrument.tags if t in columns]
        if not tag_columns:
            continue
        score = scores[:, tag_columns].max(1)
        names = set(instrument.names)
        positive = np.array([bool(r & names) for r in requested])
        negative = np.array([bool(p) and not p & (names | set(instrument.similar)) for p in present])
        if min(positive.sum(), negative.sum()) >= MIN_POSITIVES:
            groups[label] = (score[positive], score[negative])
    if not groups:
        return {"mean": mean(np.array([])), "per_instrument": {}}
    rng = np.random.default_rng(0)
    draws = {
        label: np.array([auc(rng.choice(p, len(p)), rng.choice(n, len(n))) for _ in range(rounds)])
        for label, (p, n) in groups.items()
    }
    per_instrument = {label: _estimate(auc(p, n), draws[label], len(p)) for label, (p, n) in groups.items()}
    average = float(np.mean([e.value for e in per_instrument.values()]))
    positives = int(sum(e.n for e in per_instrument.values()))
    total = _estimate(average, np.mean(list(draws.values()), axis=0), positives)
    return {"mean": total, "per_instrument": per_instrument}


def _estimate(value: float, draws: np.ndarray, n: int) -> Estimate:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)


class Probe:
    """Linear probe that detects the instruments of the data set from the tagger's embedding.

    One ridge-penalized logistic regression per instrument, fitted on real clips. It also covers instruments for which
    the tagger has no tag.

    Args:
        embeddings: (clips, d) embeddings of real clips.
        records: their records.
        min_clips: instruments in fewer clips, or missing in fewer, are left out.
        ridge: weight of the penalty.
    """

    def __init__(
        self, embeddings: np.ndarray, records: Sequence[ClipRecord], min_clips: int = 8, ridge: float = 0.01
    ) -> None:
        from scipy.optimize import minimize

        present = [set(record.get("instruments") or ()) for record in records]
        counts = Counter(name for names in present for name in names)
        self.names = sorted(name for name, n in counts.items() if min_clips <= n <= len(records) - min_clips)
        self.center, self.scale = embeddings.mean(0), embeddings.std(0).clip(min=1e-6)
        x = self._inputs(embeddings)
        self.weights = np.zeros((x.shape[1], len(self.names)))
        for column, name in enumerate(self.names):
            sign = np.array([1.0 if name in names else -1.0 for names in present])

            def loss(w: np.ndarray, sign: np.ndarray = sign) -> tuple[float, np.ndarray]:
                margin = sign * (x @ w)
                pull = -sign / (1.0 + np.exp(margin.clip(max=500.0)))
                penalty = np.append(w[:-1], 0.0)
                value = np.logaddexp(0.0, -margin).mean() + ridge * (penalty @ penalty)
                return float(value), x.T @ pull / len(x) + 2 * ridge * penalty

            self.weights[:, column] = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x

    def _inputs(self, embeddings: np.ndarray) -> np.ndarray:
        scaled = (np.asarray(embeddings, dtype=np.float64) - self.center) / self.scale
        return np.concatenate([scaled, np.ones((len(scaled), 1))], 1)

    def auc(self, embeddings: np.ndarray, records: Sequence[ClipRecord]) -> dict[str, Any]:
        """Return `instrument_auc` of the probe's scores of embeddings (clips, d)."""
        table = {name: Instrument((name,), (name,)) for name in self.names}
        return instrument_auc(self._inputs(embeddings) @ self.weights, self.names, records, table)


def tempo_accuracy(tempi: np.ndarray, records: Sequence[ClipRecord]) -> Estimate:
    """Fraction of clips whose measured tempo, (clips,) in bpm, agrees with the tempo in the prompt."""
    pairs = [(tempo, requested_bpm(record)) for tempo, record in zip(tempi, records, strict=True)]
    return mean(np.array([float(tempo_agrees(tempo, bpm)) for tempo, bpm in pairs if bpm is not None]))


def key_accuracy(scores: np.ndarray, records: Sequence[ClipRecord]) -> dict[str, Estimate]:
    """Agreement of the best-scoring key with the key in the prompt.

    Silent clips count as wrong.

    Args:
        scores: (clips, 2, 12) score of each key, mode then tonic.
        records: one record per clip.

    Returns:
        "exact": fraction with the right tonic and mode; "tonic": fraction with the right tonic; "mirex": mean graded
        score, see `tonality.mirex_score`.
    """
    exact, tonics, graded = [], [], []
    for score, record in zip(scores, records, strict=True):
        target = requested_key(record)
        if target is None:
            continue
        estimate = best_key(score)
        exact.append(float(estimate == target))
        tonics.append(float(estimate is not None and estimate[0] == target[0]))
        graded.append(mirex_score(estimate, target) if estimate else 0.0)
    return {"exact": mean(np.array(exact)), "tonic": mean(np.array(tonics)), "mirex": mean(np.array(graded))}


def shuffled(records: Sequence[ClipRecord], seed: int = 0) -> list[ClipRecord]:
    """Permute the records so that no clip keeps its caption: the control of the metrics in this module."""
    rng = np.random.default_rng(seed)
    n = len(records)
    order = rng.permutation(n)
    permutation = np.empty(n, dtype=int)
    permutation[order] = np.roll(order, 1)  # a single cycle, without fixed points
    return [records[i] for i in permutation]


def diversity(embeddings: np.ndarray, rounds: int = 500) -> Estimate:
    """Mean distance between the embeddings (clips, d) of two clips, with its bootstrap interval over clips."""
    x = np.asarray(embeddings, dtype=np.float64)
    squares = (x**2).sum(1)
    distances = np.sqrt((squares[:, None] + squares[None] - 2 * x @ x.T).clip(min=0))

    def average(i: np.ndarray) -> float:
        part = distances[np.ix_(i, i)]
        distinct = i[:, None] != i[None]  # a clip drawn twice is not a pair
        return float(part[distinct].mean()) if distinct.any() else float("nan")

    return bootstrap(average, len(x), rounds)
