"""Compose pieces: solos, duos and bands of constant tempo, each a deterministic function of (seed, index)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from . import textures
from .gm import name_of
from .grooves import GROOVES, Groove, arrange
from .midi import DRUMS, Note, Score
from .textures import LeadSheet, Voice
from .theory import Chord, Key, blues, progression, random_key
from .tunes import Tune, load_tunes

TAIL_SECONDS = 1.5
KIND_SHARES = {"solo": 0.35, "duo": 0.25, "band": 0.40}
LONG_SHARE = 0.08


@dataclass(frozen=True)
class Instrument:
    """A playable instrument.

    Args:
        program: General MIDI program, 0..127.
        low: lowest MIDI key.
        high: highest MIDI key.
        textures: relative weight of each texture the instrument can play.
        weight: relative frequency among solo instruments.
    """

    program: int
    low: int
    high: int
    textures: Mapping[str, float]
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Common name of the instrument, such as "electric piano"."""
        return name_of(self.program) or "synth"


_KEYS = {"hands": 5, "arpeggio": 3, "chords": 1.5}
_TUNED = {"melody": 2, "arpeggio": 3, "hands": 1}
_PLUCKED = {"strum": 3, "arpeggio": 4, "melody": 1}
_VOICE = {"melody": 1}
_HELD = {"sustained": 3, "melody": 1, "hands": 0.5}
INSTRUMENTS = [
    Instrument(0, 36, 96, _KEYS, 3.2),
    Instrument(4, 40, 88, _KEYS, 1.0),
    Instrument(6, 41, 89, _KEYS, 0.8),
    Instrument(19, 36, 84, {"sustained": 3, "hands": 3, "chords": 1}, 1.0),
    Instrument(16, 40, 88, {"chords": 2, "hands": 3, "sustained": 1}, 0.8),
    Instrument(21, 48, 88, {"hands": 3, "melody": 2, "chords": 1}, 1.0),
    Instrument(10, 60, 96, _TUNED, 0.5),
    Instrument(11, 53, 89, _TUNED, 1.1),
    Instrument(12, 48, 91, _TUNED, 1.1),
    Instrument(24, 40, 79, _PLUCKED, 2.0),
    Instrument(25, 40, 79, _PLUCKED, 1.2),
    Instrument(27, 40, 81, {"strum": 3, "arpeggio": 2, "melody": 2}, 1.0),
    Instrument(30, 40, 81, {"melody": 3, "strum": 1}, 0.9),
    Instrument(33, 28, 52, {"bass": 1}, 1.3),
    Instrument(40, 56, 91, _VOICE, 1.5),
    Instrument(42, 38, 69, _VOICE, 1.4),
    Instrument(46, 36, 91, {"arpeggio": 4, "hands": 2, "melody": 0.5}, 1.4),
    Instrument(48, 43, 88, _HELD, 1.5),
    Instrument(52, 46, 79, _HELD, 1.3),
    Instrument(56, 55, 82, _VOICE, 1.3),
    Instrument(57, 43, 70, _VOICE, 0.7),
    Instrument(60, 45, 74, _VOICE, 0.7),
    Instrument(65, 50, 79, _VOICE, 1.4),
    Instrument(68, 58, 86, _VOICE, 0.8),
    Instrument(71, 52, 86, _VOICE, 1.3),
    Instrument(73, 60, 93, _VOICE, 1.6),
    Instrument(75, 60, 91, _VOICE, 0.5),
    Instrument(80, 48, 88, {"melody": 2, "arpeggio": 3}, 0.8),
    Instrument(81, 48, 88, {"melody": 2, "arpeggio": 2, "chords": 1}, 0.9),
    Instrument(89, 43, 84, {"sustained": 1}, 1.0),
    Instrument(104, 48, 79, _VOICE, 1.0),
    Instrument(105, 48, 81, {"strum": 1, "arpeggio": 4, "melody": 1}, 1.1),
    Instrument(22, 60, 86, _VOICE, 0.5),
    Instrument(114, 52, 84, {"melody": 2, "arpeggio": 1}, 0.4),
    Instrument(108, 52, 84, {"arpeggio": 3, "melody": 1}, 0.4),
]
_DRUMS_WEIGHT = 3.0
_LEAD_INSTRUMENTS = [i for i in INSTRUMENTS if "melody" in i.textures and i.program not in (19, 16, 52, 48)] + [
    INSTRUMENTS[0]
]
_BACKINGS = [i for i in INSTRUMENTS if i.program in (0, 4, 16, 19, 24, 25, 27, 46, 48, 52, 89, 21, 11, 6)]
_BACKING_TEXTURES = {"hands": "chords"}
_CHORDAL = {"chords": textures.block_chords, "arpeggio": textures.arpeggio, "sustained": textures.sustained}


class Arrangement(NamedTuple):
    """Score of a piece with its style (None without one) and its audible instruments, the lead first."""

    score: Score
    style: str | None
    instruments: list[str]


@dataclass(frozen=True)
class Piece:
    """A composed piece with its ground truth.

    `offset` is the time of the first downbeat in seconds, `bpm` the tempo in quarter notes a minute; `key` is None for
    drum solos, `density` None for bands and tunes.
    """

    id: str
    kind: str
    composition: str
    score: Score
    bpm: int
    beats_per_bar: int
    bars: int
    offset: float
    seconds: float
    key: Key | None
    style: str | None
    instruments: list[str]
    density: str | None


@dataclass(frozen=True)
class PiecePlan:
    """Parameters of a piece that are drawn before composing, so that its length is known without composing it."""

    index: int
    kind: str
    bpm: int
    beats: int
    bars: int
    offset: float
    composition: str
    groove: Groove | None
    tune: Tune | None
    instrument: Instrument | None  # None for bands and drum solos
    seconds: float


def plan_piece(seed: int, index: int) -> PiecePlan:
    """Draw kind, meter, tempo and length of a piece: 34 to 50 s, 8 % of them 96 to 110 s.

    Raises MissingDependencyError without music21, which ships the traditional tunes.
    """
    rng = random.Random(f"plan {seed} {index}")
    kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    target = rng.uniform(96, 110) if rng.random() < LONG_SHARE else rng.uniform(34, 50)
    groove = tune = instrument = None
    if kind == "band":
        styles = sorted({g.style for g in GROOVES})
        style = rng.choice(styles)
        groove = rng.choice([g for g in GROOVES if g.style == style])
        beats, bpm = groove.beats, rng.randint(groove.slowest, groove.fastest)
        tune_share = 0.15 if groove.harmony == "triads" else 0.0
    else:
        weights = [i.weight for i in INSTRUMENTS]
        instrument = (
            rng.choices([*INSTRUMENTS, None], [*weights, _DRUMS_WEIGHT])[0]
            if kind == "solo"
            else rng.choice(_LEAD_INSTRUMENTS)
        )
        beats, bpm = rng.choice((4, 4, 4, 3)), rng.randint(60, 180)
        plays_melody = instrument is not None and {"melody", "hands"} & set(instrument.textures)
        tune_share = 0.3 if plays_melody else 0.0
    if rng.random() < tune_share:
        candidates = [t for t in load_tunes() if kind != "band" or (t.beats_per_bar == beats and not t.compound)]
        tune = rng.choice(candidates)
        if kind != "band":
            beats, bpm = tune.beats_per_bar, rng.randint(60, 150)
    offset = round(rng.uniform(0.02, 0.25), 3)
    bar_seconds = beats * 60 / bpm
    bars = max(4, round((target - TAIL_SECONDS - offset) / bar_seconds))
    composition = f"tune:{tune.id}" if tune else f"chords:{seed}:{index}"
    return PiecePlan(
        index,
        kind,
        bpm,
        beats,
        bars,
        offset,
        composition,
        groove,
        tune,
        instrument,
        offset + bars * bar_seconds + TAIL_SECONDS,
    )


def compose(seed: int, index: int) -> Piece:
    """Compose a piece.

    Raises MissingDependencyError without music21, or for bands without MMA; PrestoError if MMA fails.
    """
    plan = plan_piece(seed, index)
    rng = random.Random(f"compose {seed} {index}")
    key = random_key(rng)
    density = _density(rng, plan.bpm)
    melody: list[Note] | None = None
    if plan.tune:
        key = Key(rng.randrange(12), plan.tune.key.mode)
        melody, chords = _fit_tune(rng, plan.tune, key, plan.bars)
    else:
        chords = _chords(rng, plan, key)
    swing = bool(plan.groove and plan.groove.harmony == "sevenths" and "swing" in plan.groove.style)
    sheet = LeadSheet(key, chords, plan.beats, density, swing)
    arranger = {"solo": _solo, "duo": _duo, "band": _band}[plan.kind]
    score, style, instruments = arranger(rng, plan, sheet, melody)
    score = _trim(score, plan)
    drums_only = instruments == ["drums"]
    return Piece(
        id=f"{plan.kind}-{seed}-{index:06d}",
        kind=plan.kind,
        composition=plan.composition,
        score=score,
        bpm=plan.bpm,
        beats_per_bar=plan.beats,
        bars=plan.bars,
        offset=plan.offset,
        seconds=plan.seconds,
        key=None if drums_only else key,
        style=style,
        instruments=instruments,
        density=None if plan.kind == "band" or plan.tune else density,
    )


def _density(rng: random.Random, bpm: int) -> str:
    weights = (1, 3, 3) if bpm < 95 else (2, 4, 2) if bpm < 130 else (4, 4, 0.3)
    return rng.choices(("sparse", "medium", "busy"), weights)[0]


def _chords(rng: random.Random, plan: PiecePlan, key: Key) -> list[Chord]:
    harmony = plan.groove.harmony if plan.groove else rng.choices(("triads", "sevenths", "blues"), (8, 1.5, 0.5))[0]
    if harmony == "blues":
        return blues(key, plan.bars)
    return progression(rng, key, plan.bars, sevenths=harmony == "sevenths")


def _fit_tune(rng: random.Random, tune: Tune, key: Key, bars: int) -> tuple[list[Note], list[Chord]]:
    """Repeat a tune over `bars` bars in a new key, closing on the tonic, and fit a triad to each bar."""
    shift = (key.tonic - tune.key.tonic) % 12
    length = tune.bars * tune.beats_per_bar
    end = (bars - 1) * tune.beats_per_bar
    notes = []
    for repeat in range(-(-bars // tune.bars)):
        for start, duration, pitch in tune.notes:
            onset = start + repeat * length
            if onset < end:
                notes.append((onset, min(duration, end - onset), pitch + shift))
    closing = textures.nearest(notes[-1][2], (key.tonic,), 30, 100)
    notes.append((end, tune.beats_per_bar * 0.95, closing))
    chords = []
    for bar in range(bars):
        low, high = bar * tune.beats_per_bar, (bar + 1) * tune.beats_per_bar
        weighted = [(p % 12, d * (1.5 if s == low else 1)) for s, d, p in notes if low <= s < high]
        options = [key.chord(d) for d in (0, 4, 3, 5)]
        bias = (0.4, 0.2, 0.1, 0.0)
        fits = [b + sum(d for p, d in weighted if p in c.tones) for c, b in zip(options, bias, strict=True)]
        chords.append(options[fits.index(max(fits))])
    chords[-1] = key.chord(0)
    return textures.tune(tuple(notes), rng, 0, 0), chords


def _fit_range(notes: list[Note], channel: int, low: int, high: int) -> list[Note]:
    """Move a melody by octaves into a range; notes still outside are folded back one by one."""
    middle = sum(n.key for n in notes) / len(notes)
    shift = 12 * round(((low + high) / 2 - middle) / 12)
    moved = []
    for note in notes:
        pitch = note.key + shift
        while pitch > high:
            pitch -= 12
        while pitch < low:
            pitch += 12
        moved.append(replace(note, key=pitch, channel=channel))
    return moved


def _part(
    rng: random.Random, sheet: LeadSheet, instrument: Instrument, texture: str, channel: int, melody: list[Note] | None
) -> list[Note]:
    low, high = instrument.low, instrument.high
    if texture == "melody":
        middle = min(low + 12 + rng.randint(0, 6), high - 7)
        if melody is not None:
            return _fit_range(melody, channel, low, high)
        return textures.melody(rng, sheet, Voice(channel, max(low, middle - 9), min(high, middle + 11)))
    if texture == "hands":
        split = max(low + 12, 58)
        upper = _part(rng, sheet, replace(instrument, low=split, high=min(split + 24, high)), "melody", channel, melody)
        left = rng.choice((textures.arpeggio, textures.block_chords, textures.bass_line))
        calm = replace(sheet, density="sparse" if sheet.density == "sparse" else "medium")
        bottom = max(low, 36)
        lower = left(rng, calm, Voice(channel, bottom, split - 1))
        return upper + [replace(n, velocity=max(30, n.velocity - 14)) for n in lower]
    if texture == "bass":
        return textures.bass_line(rng, sheet, Voice(channel, low, high))
    if texture == "strum":
        return textures.strum(rng, sheet, Voice(channel, low, high))
    function = _CHORDAL[texture]
    base = low + rng.randint(2, 8) if texture == "arpeggio" else max(low, 46)
    top = min(high, base + (30 if texture == "arpeggio" else 24))
    return function(rng, sheet, Voice(channel, base, top))


def _solo(rng: random.Random, plan: PiecePlan, sheet: LeadSheet, melody: list[Note] | None) -> Arrangement:
    instrument = plan.instrument
    if instrument is None:
        style = rng.choice(list(textures.KITS))
        notes = textures.drums(rng, sheet, style)
        return Arrangement(Score(notes, {DRUMS: 0}), "waltz" if sheet.beats == 3 else style, ["drums"])
    usable = {t: w for t, w in instrument.textures.items() if melody is None or t in ("melody", "hands")}
    texture = rng.choices(list(usable), list(usable.values()))[0]
    notes = _part(rng, sheet, instrument, texture, 0, melody)
    return Arrangement(Score(notes, {0: instrument.program}), _default_style(plan, sheet), [instrument.name])


def _duo(rng: random.Random, plan: PiecePlan, sheet: LeadSheet, melody: list[Note] | None) -> Arrangement:
    soloist = plan.instrument
    assert soloist is not None
    lead = _part(rng, sheet, soloist, "melody", 0, melody)
    score = Score(lead, {0: soloist.program}, {(0, 10): 52, (1, 10): 76, (0, 7): 112, (1, 7): 88})
    if rng.random() < 0.12:
        style = rng.choice(list(textures.KITS))
        score.notes = lead + textures.drums(rng, sheet, style)
        score.programs[DRUMS] = 0
        return Arrangement(score, "waltz" if sheet.beats == 3 else style, [soloist.name, "drums"])
    backing = rng.choice([b for b in _BACKINGS if b.name != soloist.name])
    options = [t for t in backing.textures if t != "melody"]
    texture = rng.choice(options)
    texture = _BACKING_TEXTURES.get(texture, texture)
    lower = replace(backing, high=min(backing.high, 74))
    score.notes = lead + _part(rng, sheet, lower, texture, 1, None)
    score.programs[1] = backing.program
    return Arrangement(score, _default_style(plan, sheet), [soloist.name, backing.name])


def _band(rng: random.Random, plan: PiecePlan, sheet: LeadSheet, melody: list[Note] | None) -> Arrangement:
    groove = plan.groove
    assert groove is not None
    flats = sheet.key.flats
    score = arrange(groove.name, sheet.chords, flats=flats, bpm=plan.bpm, seed=rng.randrange(2**31))
    silent = {c for c in {n.channel for n in score.notes} if c != DRUMS and name_of(score.programs.get(c, 0)) is None}
    score.notes = [n for n in score.notes if n.channel not in silent]
    score.controls = {k: v for k, v in score.controls.items() if k[1] != 7 or v >= 40}
    for channel in sorted({n.channel for n in score.notes} - {DRUMS}):
        score.controls.setdefault((channel, 10), rng.randint(36, 92))
    lead_name = None
    if melody is not None or rng.random() < 0.75:
        soloist = rng.choice(_LEAD_INSTRUMENTS)
        free = next(c for c in range(16) if c != DRUMS and all(n.channel != c for n in score.notes))
        lead = _part(rng, sheet, soloist, "melody", free, melody)
        score.notes = score.notes + [replace(n, velocity=min(n.velocity + 8, 124)) for n in lead]
        score.programs[free] = soloist.program
        score.controls[(free, 7)] = 118
        score.controls[(free, 10)] = rng.randint(56, 72)
        lead_name = soloist.name
    return Arrangement(score, groove.style, audible(score, lead_name))


def audible(score: Score, lead: str | None = None) -> list[str]:
    """Names of the instruments with more than 3 % of the loudness-weighted note time, the lead first, then by weight.

    Bass and drums come last. `lead` is always included.
    """
    weight: dict[str, float] = {}
    for note in score.notes:
        name = "drums" if note.channel == DRUMS else name_of(score.programs.get(note.channel, 0))
        if name:
            loudness = (note.velocity / 100) ** 2 * score.controls.get((note.channel, 7), 100) / 100
            weight[name] = weight.get(name, 0.0) + loudness * (
                0.5 if name == "drums" else min(note.duration, 2.0) + 0.2
            )
    total = sum(weight.values())
    names = [n for n, w in sorted(weight.items(), key=lambda pair: -pair[1]) if w > 0.03 * total]
    names.sort(key=lambda n: (n != lead, n in ("drums", "bass")))  # a stable sort: the rhythm section comes last
    return names if lead is None or lead in names else [lead, *names]


def _default_style(plan: PiecePlan, sheet: LeadSheet) -> str | None:
    if plan.tune:
        return "folk"
    if sheet.beats == 3:
        return "waltz"
    qualities = [c.quality for c in sheet.chords]
    if all(q in ("7", "m7") for q in qualities):
        return "blues"
    return "jazz" if all("7" in q for q in qualities) else None


def _trim(score: Score, plan: PiecePlan) -> Score:
    """Drop notes that start after the last bar, shorten notes that outlast the tail, move early notes to beat 0."""
    end = plan.bars * plan.beats
    ring = end + 0.7 * TAIL_SECONDS * plan.bpm / 60
    kept = []
    for note in score.notes:
        if note.start < end - 0.01:
            start = max(note.start, 0.0)
            kept.append(replace(note, start=start, duration=max(min(note.duration, ring - start), 0.02)))
    channels = {n.channel for n in kept}
    programs = {c: p for c, p in score.programs.items() if c in channels}
    controls = {k: v for k, v in score.controls.items() if k[0] in channels}
    return Score(sorted(kept), programs, controls)
