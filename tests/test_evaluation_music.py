"""Tests of tempo, notes, key and adherence to captions, on synthetic signals."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from presto_rt.lab.evaluation import adherence, fit_key, rhythm, tonality
from presto_rt.lab.evaluation.notes import NoteTracker

RATE = 44100


def clicks(bpm: float, seconds: float = 10.0, offset: float = 0.13) -> np.ndarray:
    """Make stereo noise bursts on each beat, stronger on each fourth: (2, n) float32."""
    rng = np.random.default_rng(0)
    out = np.zeros(int(seconds * RATE))
    for beat, time in enumerate(np.arange(offset, seconds - 0.05, 60 / bpm)):
        start = int(time * RATE)
        burst = rng.standard_normal(1500) * np.exp(-np.arange(1500) / 300)
        out[start : start + 1500] += burst[: len(out) - start] * (0.5 if beat % 4 == 0 else 0.3)
    return np.stack([out, 0.8 * out]).astype(np.float32)


def tones(pitches: list[list[int]], beat: float = 0.5) -> np.ndarray:
    """Make chords of decaying tones with eight harmonics, one chord a beat: (2, n) float32."""
    n = int(beat * RATE)
    t = np.arange(n) / RATE
    parts = []
    for chord in pitches:
        sound = np.zeros(n)
        for pitch in chord:
            f = 440 * 2 ** ((pitch - 69) / 12)
            sound += sum(np.sin(2 * np.pi * f * h * t) / h**1.5 for h in range(1, 9) if f * h < 18000)
        parts.append(sound * np.exp(-3 * t) * np.minimum(1, t * 200) * 0.1)
    x = np.concatenate(parts).astype(np.float32)
    return np.stack([x, x])


@pytest.mark.parametrize("bpm", [62, 84, 97.5, 120, 143, 176])
def test_tempo_of_clicks(bpm: float) -> None:
    estimate = rhythm.tempo(clicks(bpm))
    assert rhythm.tempo_agrees(estimate, bpm), estimate
    assert min(abs(estimate / bpm / o - 1) for o in rhythm.OCTAVES) < 0.01


@pytest.mark.parametrize("bpm", [80, 100, 120, 140])
def test_tempo_has_no_octave_errors_near_the_prior(bpm: float) -> None:
    assert rhythm.tempo_agrees(rhythm.tempo(clicks(bpm)), bpm, octaves=(1.0,))


def test_tempo_is_independent_of_level_and_nan_for_silence() -> None:
    loud = clicks(112)
    assert rhythm.tempo(loud) == pytest.approx(rhythm.tempo(0.01 * loud), rel=0.005)
    assert np.isnan(rhythm.tempo(np.zeros((2, RATE * 5), np.float32)))
    assert not rhythm.tempo_agrees(float("nan"), 100)


def test_tempo_agrees_within_4_percent_of_the_octaves() -> None:
    agrees = rhythm.tempo_agrees
    assert agrees(103.9, 100)
    assert agrees(96.1, 100)
    assert agrees(200, 100)
    assert agrees(33.4, 100)
    assert agrees(310, 100)
    assert not any(agrees(x, 100) for x in (104.2, 95.9, 150, 66.7, 75, 133, 400))
    assert not agrees(200, 100, octaves=(1.0,))


@pytest.fixture(scope="module")
def tracker() -> NoteTracker:
    return NoteTracker()


@pytest.mark.skipif(
    importlib.util.find_spec("basic_pitch") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="basic-pitch or onnxruntime is not installed",
)
class TestNoteTracker:
    def test_track_finds_the_notes_of_a_scale(self, tracker: NoteTracker) -> None:
        scale = [60, 62, 64, 65, 67, 69, 71, 72]
        notes = tracker.track(tones([[p] for p in scale]))
        onsets = notes.onsets()
        for n, pitch in enumerate(scale):
            near = onsets[abs(onsets[:, 0] / 86.13 - n * 0.5) < 0.06]
            assert pitch - 21 in near[:, 1], (pitch, near)
        assert len(scale) <= len(onsets) <= len(scale) + 1  # at most one overtone is mistaken for a note
        assert notes.density() == len(onsets) / 4
        assert set(np.argsort(notes.chroma())[-7:]) == {0, 2, 4, 5, 7, 9, 11}

    @pytest.mark.parametrize("tonic", [0, 3, 6, 10])
    @pytest.mark.parametrize("mode", ["major", "minor"])
    def test_key_scores_find_the_key_of_a_cadence(self, tracker: NoteTracker, tonic: int, mode: str) -> None:
        third = 4 if mode == "major" else 3
        one, four = [0, third, 7, 12], [5, 5 + third, 12, 17]
        five = [-5, -1, 2, 7]
        chords = [one, four, five, one, one, four, five, one]
        notes = tracker.track(tones([[60 + tonic + p for p in c] for c in chords]))
        assert tonality.best_key(tonality.key_scores(notes.key_chroma())) == (tonic, mode)

    def test_bass_chroma_is_that_of_the_lowest_note(self, tracker: NoteTracker) -> None:
        notes = tracker.track(tones([[45, 60, 64], [45, 62, 65], [45, 64, 67], [45, 60, 67]]))
        assert notes.bass_chroma().argmax() == 9
        silence = tracker.track(np.zeros((2, RATE), np.float32))
        assert silence.chroma().sum() == silence.bass_chroma().sum() == 0


def test_profile_scores_find_the_key_of_each_profile() -> None:
    for mode in (0, 1):
        for tonic in range(12):
            chroma = np.roll(tonality.PROFILES["temperley"][mode], tonic)
            scores = tonality.profile_scores(chroma)
            assert np.unravel_index(scores.argmax(), (2, 12)) == (mode, tonic)
            assert scores[mode, tonic] == pytest.approx(1.0)
    assert not tonality.profile_scores(np.zeros(12)).any()


def test_mirex_score_grades_related_keys() -> None:
    score = tonality.mirex_score
    assert score((0, "major"), (0, "major")) == 1
    assert score((7, "major"), (0, "major")) == 0.5
    assert score((5, "major"), (0, "major")) == 0
    assert score((9, "minor"), (0, "major")) == 0.3
    assert score((0, "major"), (9, "minor")) == 0.3
    assert score((0, "minor"), (0, "major")) == 0.2
    assert score((2, "minor"), (0, "major")) == 0


# ---- captions


def record(
    prompt: str,
    instruments: Sequence[str] = ("piano",),
    bpm: float = 96.0,
    key: str | None = "Bb",
    mode: str = "minor",
) -> dict[str, Any]:
    return {"prompt": prompt, "instruments": list(instruments), "bpm": bpm, "key": key, "mode": mode}


def test_requested_facts_are_those_named_in_the_prompt() -> None:
    r = record("slow piano and strings, 96 bpm, in Bb minor", ("piano", "strings", "drums"))
    assert adherence.requested_instruments(r) == {"piano", "strings"}
    assert adherence.requested_bpm(r) == 96
    assert adherence.requested_key(r) == (10, "minor")
    electric = record("an electric piano at 120 BPM, B minor", ("piano", "electric piano"))
    assert adherence.requested_instruments(electric) == {"electric piano"}
    assert adherence.requested_bpm(electric) is None
    assert adherence.requested_key(electric) is None
    assert adherence.requested_key(record("F sharp major", key="F#", mode="major")) == (6, "major")
    assert adherence.requested_key(record("B-flat minor waltz")) == (10, "minor")
    assert adherence.requested_key(record("a minor setback", key="A", mode="minor")) == (9, "minor")  # ambiguous
    assert adherence.requested_key(record("G minor", key=None)) is None
    assert adherence.is_named("two guitars", "guitar")
    assert not adherence.is_named("electric guitar", "guitar")
    assert not adherence.is_named("a harpsichord", "harp")


def test_auc_of_known_cases() -> None:
    a = np.array
    assert adherence.auc(a([0.9, 0.8]), a([0.1, 0.2, 0.3])) == 1.0
    assert adherence.auc(a([0.1]), a([0.5, 0.6])) == 0.0
    assert adherence.auc(a([0.5, 0.5]), a([0.5])) == 0.5
    assert adherence.auc(a([0.3, 0.6]), a([0.3, 0.5])) == pytest.approx((0.5 + 0 + 1 + 1) / 4)


def test_instrument_auc_averages_instruments_with_enough_clips() -> None:
    tags = ["guitar", "piano", "flute"]
    records = [record(f"{n} music", (n,)) for n in ["guitar"] * 10 + ["piano"] * 10 + ["flute"] * 4]
    scores = np.zeros((24, 3))
    scores[:10, 0] = 1.0  # guitar: perfect
    scores[10:15, 1] = 1.0  # piano: half are detected, the others tie with the rest
    result = adherence.instrument_auc(scores, tags, records)
    assert set(result["per_instrument"]) == {"guitar", "piano"}
    assert result["per_instrument"]["guitar"].value == 1.0
    assert result["per_instrument"]["piano"].value == pytest.approx(0.75)
    assert result["mean"].value == pytest.approx(0.875)
    assert result["mean"].low < 0.875 < result["mean"].high <= 1.0


def test_instrument_auc_ignores_unrequested_instruments() -> None:
    records = (
        [record("piano", ("piano",))] * 6
        + [record("music", ("piano", "flute"))] * 6
        + [record("flute", ("flute",))] * 6
    )
    scores = np.repeat([[0.6], [0.9], [0.1]], 6, axis=0)
    assert adherence.instrument_auc(scores, ["piano"], records)["per_instrument"]["piano"].value == 1.0


def test_probe_learns_instruments_and_nothing_from_shuffled_captions() -> None:
    rng = np.random.default_rng(0)

    def clips(n: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
        names = [("oboe", "tuba", "koto")[i] for i in rng.integers(0, 3, n)]
        means = {"oboe": 1.5, "tuba": -1.5, "koto": 0.0}
        x = rng.standard_normal((n, 20))
        x[:, 4] += [means[name] for name in names]
        return x, [record(f"{name} tune", (name,)) for name in names]

    probe = adherence.Probe(*clips(200))
    assert probe.names == ["koto", "oboe", "tuba"]
    x, records = clips(150)
    result = probe.auc(x, records)
    for name, sign in (("oboe", 1), ("tuba", -1)):  # close to the AUC of the informative direction
        present = np.array([m["instruments"] == [name] for m in records])
        best = adherence.auc(sign * x[present, 4], sign * x[~present, 4])
        assert best - 0.05 < result["per_instrument"][name].value < best + 0.02
    control = probe.auc(x, adherence.shuffled(records))["mean"]
    assert control.low < 0.5 < control.high
    rare = adherence.Probe(x, [record("x", ("oboe",))] * 3 + [record("x", ("tuba",))] * 147)
    assert rare.names == []


def test_fit_finds_cadences_and_recovers_a_profile() -> None:
    cadence = np.zeros(12)
    for chord in ([0, 4, 7], [5, 9, 0], [7, 11, 2], [0, 4, 7]):
        cadence[chord] += 1 / 12
    bass = np.zeros(12)
    bass[[0, 5, 7]] = 0.5, 0.25, 0.25
    for tonic in (0, 5, 11):
        scores = tonality.key_scores(np.stack([np.roll(cadence, tonic), np.roll(bass, tonic)]))
        assert tonality.best_key(scores) == (tonic, "major")
    assert tonality.best_key(tonality.key_scores(np.zeros((2, 12)))) is None

    rng = np.random.default_rng(1)
    keys = [(int(rng.integers(12)), tonality.MODES[int(rng.integers(2))]) for _ in range(120)]
    chromas = []
    for tonic, mode in keys:
        weights = np.roll(np.array(tonality.PROFILES["krumhansl"][mode == "minor"]), tonic) - 2
        part = np.stack([weights, np.eye(12)[tonic] + 0.2]) * rng.uniform(0.8, 1.2, (2, 12))
        chromas.append(part / part.sum(1, keepdims=True))
    weights = tonality.fit(chromas[:80], keys[:80])
    estimates = [tonality.best_key(tonality.key_scores(c, weights)) for c in chromas[80:]]
    assert np.mean([f == k for f, k in zip(estimates, keys[80:], strict=True)]) > 0.9


def test_cross_validate_finds_keys_of_held_out_compositions() -> None:
    rng = np.random.default_rng(2)
    keys = [(int(rng.integers(12)), tonality.MODES[int(rng.integers(2))]) for _ in range(100)]
    chromas = []
    for tonic, mode in keys:
        profile = np.roll(np.array(tonality.PROFILES["temperley"][mode == "minor"]), tonic)
        part = np.stack([profile, np.eye(12)[tonic] + 0.2]) * rng.uniform(0.9, 1.1, (2, 12))
        chromas.append(part / part.sum(1, keepdims=True))
    groups = [f"composition {i // 2}" for i in range(100)]
    assert fit_key.cross_validate(chromas, keys, groups, 1e-3) > 0.9
    assert fit_key.accuracy(lambda chroma: tonality.profile_scores(chroma[0]), chromas, keys) > 0.9
    shifted = [((tonic + 6) % 12, mode) for tonic, mode in keys]
    assert fit_key.accuracy(lambda chroma: tonality.profile_scores(chroma[0]), chromas, shifted) == 0


def test_tempo_and_key_accuracy_count_only_requested_facts() -> None:
    records = [record("96 bpm in Bb minor"), record("96 bpm"), record("Bb minor piano"), record("piano")]
    scores = np.zeros((4, 2, 12))
    scores[0, 1, 10] = 1.0
    scores[2, 0, 1] = 1.0  # Db major, the relative
    tempo = adherence.tempo_accuracy(np.array([48.0, 70.0, 96.0, 96.0]), records)
    assert (tempo.value, tempo.n) == (0.5, 2)
    key = adherence.key_accuracy(scores, records)
    assert (key["exact"].value, key["exact"].n) == (0.5, 2)
    assert key["mirex"].value == pytest.approx(0.65)
    silent = adherence.key_accuracy(np.zeros((1, 2, 12)), [record("C major", key="C", mode="major")])
    assert silent["exact"].value == silent["tonic"].value == silent["mirex"].value == 0


def test_shuffled_moves_each_caption() -> None:
    records = [record(str(i)) for i in range(50)]
    permuted = adherence.shuffled(records)
    assert sorted(m["prompt"] for m in permuted) == sorted(m["prompt"] for m in records)
    assert all(a is not b for a, b in zip(permuted, records, strict=True))
    assert adherence.shuffled(records, 0) == permuted != adherence.shuffled(records, 1)


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    x = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
    assert adherence.diversity(x).value == pytest.approx((5 + 4 + 3) / 3)
