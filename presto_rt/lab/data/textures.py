"""Idiomatic parts over a chord progression: melodies, chords, arpeggios, strums, bass lines and drum patterns.

Each part is a list of notes with times in beats from the first downbeat. The functions draw from `rng`, follow the lead
sheet, and write for the channel and the range of `voice`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from .midi import DRUMS, Note
from .theory import Chord, Key

# Rhythms of one beat by density: durations in beats.
_CELLS = {
    "sparse": [((2.0,), 4), ((1.0,), 3), ((1.5, 0.5), 1), ((3.0,), 1)],
    "medium": [((1.0,), 4), ((0.5, 0.5), 4), ((1.5, 0.5), 2), ((2.0,), 1), ((0.75, 0.25), 1)],
    "busy": [((0.5, 0.5), 5), ((0.25,) * 4, 2), ((0.5, 0.25, 0.25), 2), ((0.25, 0.25, 0.5), 2), ((1.0,), 1)],
}


@dataclass(frozen=True)
class LeadSheet:
    """Musical frame that all parts of a piece share: key, one chord a bar, beats per bar, density and feel."""

    key: Key
    chords: list[Chord]
    beats: int
    density: str  # "sparse", "medium", "busy"
    swing: bool = False

    def bars(self) -> list[tuple[float, Chord]]:
        """Return (start in beats, chord) of each bar."""
        return [(i * self.beats, c) for i, c in enumerate(self.chords)]


class Voice(NamedTuple):
    """MIDI channel of a part, and its range in MIDI keys."""

    channel: int
    low: int
    high: int


def nearest(pitch: int, classes: tuple[int, ...], low: int, high: int) -> int:
    """Return the MIDI key in [low, high], of one of the pitch classes, that is nearest to `pitch`."""
    candidates = [p for p in range(low, high + 1) if p % 12 in classes]
    return min(candidates, key=lambda p: (abs(p - pitch), p))


def melody(rng: random.Random, sheet: LeadSheet, voice: Voice) -> list[Note]:
    """Compose a melody of recurring two-bar motifs, with chord tones on strong beats and a close on the tonic."""
    channel, low, high = voice
    motifs = {name: _motif(rng, sheet) for name in "ABC"}
    order = rng.choice(("AABA", "ABAC", "AABB", "ABCB"))
    notes: list[Note] = []
    pitch = (low + high) // 2
    last_bar = len(sheet.chords) - 1
    for number, (start, chord) in enumerate(sheet.bars()):
        if number == last_bar:
            final = nearest(pitch, (sheet.key.tonic,), low, high)
            notes.append(Note(start, channel, final, sheet.beats * 0.95, _velocity(rng, 92)))
            break
        name = order[(number // 2) % len(order)]
        time = 0.0
        if number % 2 == 0:
            pitch = nearest((low + high) // 2 + motifs[name][1], chord.tones, low, high)
        for duration, step in motifs[name][0][number % 2]:
            strong = time == int(time) and int(time) % 2 == 0
            classes = chord.tones if strong else sheet.key.scale_over(chord)
            if step is not None:
                target = pitch + round(step * 1.8)
                if not low + 2 <= target <= high - 2:
                    target = pitch - round(step * 1.8)
                pitch = nearest(target, classes, low, high)
                length = duration * rng.uniform(0.85, 0.98)
                velocity = _velocity(rng, 96 if strong else 84)
                notes.append(Note(start + _swung(time, sheet.swing), channel, pitch, length, velocity))
            time += duration
    return notes


def tune(notes: tuple[tuple[float, float, int], ...], rng: random.Random, channel: int, shift: int) -> list[Note]:
    """Convert a melody of (start, duration, MIDI key) to notes, transposed by `shift` semitones."""
    return [Note(s, channel, p + shift, d * 0.93, _velocity(rng, 94 if s == int(s) else 84)) for s, d, p in notes]


def block_chords(rng: random.Random, sheet: LeadSheet, voice: Voice) -> list[Note]:
    """Play close-position chords in a steady rhythm."""
    channel, low, high = voice
    patterns = {
        "sparse": [(0.0,), (0.0, sheet.beats / 2)],
        "medium": [tuple(float(b) for b in range(sheet.beats)), (0.0, 1.5, 3.0)[: sheet.beats - 1], (0.0, 2.0)],
        "busy": [
            tuple(b / 2 for b in range(2 * sheet.beats)),
            tuple(b + o for b in range(sheet.beats) for o in (0, 0.5)),
        ],
    }
    pattern = tuple(time for time in rng.choice(patterns[sheet.density]) if time < sheet.beats)
    notes: list[Note] = []
    voices: list[int] = []
    for number, (start, chord) in enumerate(sheet.bars()):
        voices = voicing(chord, (low + high) // 2, low, high)
        times = (0.0,) if number == len(sheet.chords) - 1 else pattern
        for index, time in enumerate(times):
            stop = times[index + 1] if index + 1 < len(times) else sheet.beats
            for key in voices:
                length = (stop - time) * rng.choice((0.9, 0.9, 0.6) if sheet.density != "sparse" else (0.97,))
                notes.append(Note(start + _swung(time, sheet.swing), channel, key, length, _velocity(rng, 78)))
    return notes


def sustained(rng: random.Random, sheet: LeadSheet, voice: Voice) -> list[Note]:
    """Hold one chord a bar over its root, with a moving top voice unless the density is sparse."""
    channel, low, high = voice
    notes = []
    for start, chord in sheet.bars():
        keys = voicing(chord, (low + high) // 2, low, high)
        root = nearest(low + 5, (chord.root,), low - 12, low + 11)
        notes += [Note(start, channel, key, sheet.beats * 0.99, _velocity(rng, 80)) for key in {root, *keys}]
        if sheet.density != "sparse":
            top = keys[-1]
            for half in range(1, sheet.beats):
                if rng.random() < (0.4 if sheet.density == "medium" else 0.8):
                    top = nearest(top + rng.choice((-3, 2, 3, 5)), sheet.key.scale_over(chord), keys[-1] - 2, high + 5)
                    notes.append(Note(start + half, channel, top, 0.95, _velocity(rng, 76)))
    return notes


def arpeggio(rng: random.Random, sheet: LeadSheet, voice: Voice) -> list[Note]:
    """Play broken chords in one figure, from a low root upwards."""
    channel, low, high = voice
    step = {"sparse": 1.0, "medium": 0.5, "busy": 0.25}[sheet.density]
    count = round(sheet.beats / step)
    shape = rng.choice(("up", "updown", "alberti", "wide"))
    notes = []
    for number, (start, chord) in enumerate(sheet.bars()):
        ladder = [p for p in range(low, high + 1) if p % 12 in chord.tones]
        base = ladder.index(nearest(low + 6, (chord.root,), low, high))
        ladder = ladder[base:] if len(ladder) - base >= 4 else ladder[-5:]
        figure = {
            "up": list(range(len(ladder)))[:8],
            "updown": [0, 1, 2, 3, 4, 3, 2, 1],
            "alberti": [0, 2, 1, 2],
            "wide": [0, 2, 4, 2, 5, 4, 3, 2],
        }[shape]
        if number == len(sheet.chords) - 1:
            notes += [Note(start, channel, p, sheet.beats * 0.97, _velocity(rng, 84)) for p in ladder[:4]]
            break
        for index in range(count):
            key = ladder[min(figure[index % len(figure)], len(ladder) - 1)]
            ring = step * (2.0 if shape != "alberti" else 1.0)
            accent = 88 if index == 0 else 74
            notes.append(
                Note(start + _swung(index * step, sheet.swing), channel, key, ring * 0.95, _velocity(rng, accent))
            )
    return notes


def strum(rng: random.Random, sheet: LeadSheet, voice: Voice) -> list[Note]:
    """Strum guitar chords over two octaves: down on the beats, up between them, 0.02 beats from string to string."""
    channel, low, _ = voice
    patterns = {
        "sparse": [((0.0, 1), (2.0, 1)), ((0.0, 1),)],
        "medium": [((0.0, 1), (1.0, 1), (1.5, -1), (2.5, -1), (3.0, 1)), ((0.0, 1), (1.0, 1), (2.0, 1), (3.0, 1))],
        "busy": [
            tuple((b / 2, 1 if b % 2 == 0 else -1) for b in range(8)),
            tuple((b / 4, 1 - 2 * (b % 2)) for b in range(16)),
        ],
    }
    pattern = [hit for hit in rng.choice(patterns[sheet.density]) if hit[0] < sheet.beats]
    notes = []
    for number, (start, chord) in enumerate(sheet.bars()):
        strings = [p for p in range(low, low + 25) if p % 12 in chord.tones][:6]
        strings = strings[next((i for i, p in enumerate(strings[:3]) if p % 12 == chord.root), 0) :]
        hits = [(0.0, 1)] if number == len(sheet.chords) - 1 else pattern
        for index, (time, direction) in enumerate(hits):
            stop = hits[index + 1][0] if index + 1 < len(hits) else sheet.beats
            played = strings if direction > 0 else list(reversed(strings[-4:]))
            for order, key in enumerate(played):
                onset = start + _swung(time, sheet.swing) + order * 0.02
                notes.append(
                    Note(onset, channel, key, max(stop - time - 0.05, 0.1), _velocity(rng, 84 if direction > 0 else 70))
                )
    return notes


def bass_line(rng: random.Random, sheet: LeadSheet, voice: Voice) -> list[Note]:
    """Play a bass line: long roots, roots and fifths, walking quarters, eighths, or syncopated sixteenths."""
    channel, low, high = voice
    kind = {"sparse": ("long", "rootfifth"), "medium": ("rootfifth", "walk"), "busy": ("eighths", "funk", "walk")}
    style = rng.choice(kind[sheet.density])
    notes: list[Note] = []
    bars = sheet.bars()
    for number, (start, chord) in enumerate(bars):
        root = nearest(low + 8, (chord.root,), low, high)
        fifth = nearest(root + 7, (chord.tones[2],), low, high)
        following = bars[(number + 1) % len(bars)][1]
        if number == len(bars) - 1 or style == "long":
            pattern = [(0.0, root, sheet.beats * 0.95)]
        elif style == "rootfifth":
            pattern = [(0.0, root, 1.4), (sheet.beats / 2 if sheet.beats != 3 else 2.0, fifth, 0.9)]
        elif style == "walk":
            target = nearest(root, (following.root,), low, high)
            middle = [
                nearest(root + rng.choice((3, 4, 5, 7)), sheet.key.scale_over(chord), low, high)
                for _ in range(sheet.beats - 2)
            ]
            line = [root, *middle, target + rng.choice((-2, -1, 1, 2))]
            pattern = [(float(b), k, 0.92) for b, k in enumerate(line[: sheet.beats])]
        elif style == "eighths":
            pattern = [(b / 2, root, 0.42) for b in range(2 * sheet.beats)]
        else:
            slots = [0.0] + [b / 4 for b in range(2, 4 * sheet.beats) if rng.random() < 0.4]
            pattern = [
                (s, rng.choice((root, root, fifth, nearest(root + 12, (chord.root,), low, high + 5))), 0.23)
                for s in slots
            ]
        for time, key, length in pattern:
            notes.append(
                Note(
                    start + _swung(time, sheet.swing),
                    channel,
                    max(key, 24),
                    length,
                    _velocity(rng, 96 if time == 0 else 86),
                )
            )
    return notes


# Drum patterns: General MIDI keys and the sixteenths of a 4/4 bar on which they fall.
KITS: dict[str, dict[int, tuple[int, ...]]] = {
    "rock": {36: (0, 8, 10), 38: (4, 12), 42: (0, 2, 4, 6, 8, 10, 12, 14)},
    "hard rock": {36: (0, 2, 8, 10), 38: (4, 12), 49: (0,), 46: (0, 4, 8, 12)},
    "disco": {36: (0, 4, 8, 12), 38: (4, 12), 46: (2, 6, 10, 14), 42: (0, 4, 8, 12)},
    "house": {36: (0, 4, 8, 12), 39: (4, 12), 46: (2, 6, 10, 14), 70: (0, 3, 6, 8, 11, 14)},
    "funk": {36: (0, 3, 10), 38: (4, 7, 9, 12, 15), 42: tuple(range(16))},
    "hip-hop": {36: (0, 7, 10), 38: (4, 12), 42: (0, 2, 4, 6, 8, 10, 12, 14)},
    "bossa nova": {36: (0, 6, 8, 14), 37: (0, 6, 12), 42: tuple(range(0, 16, 2))},
    "samba": {36: (0, 3, 4, 7, 8, 11, 12, 15), 42: tuple(range(16)), 37: (0, 3, 6, 10, 13)},
    "latin": {36: (0, 6, 8, 14), 56: (0, 4, 8, 12), 63: (2, 3, 10, 11), 64: (6, 14), 75: (0, 3, 6, 10, 12)},
    "march": {36: (0, 8), 38: (0, 3, 4, 6, 7, 8, 11, 12, 14, 15)},
    "drum and bass": {36: (0, 10), 38: (4, 7, 9, 12), 42: tuple(range(0, 16, 2))},
    "tribal": {41: (0, 3, 6, 8), 45: (4, 10, 11), 48: (12, 14, 15), 36: (0, 8)},
}


def drums(rng: random.Random, sheet: LeadSheet, style: str) -> list[Note]:
    """Play a drum pattern of KITS with small variations and a fill in each fourth bar.

    A bar of `beats` beats takes the first 4 * `beats` sixteenths of the pattern.
    """
    notes = []
    total = 4 * sheet.beats
    for number, (start, _) in enumerate(sheet.bars()):
        last = number == len(sheet.chords) - 1
        fill = number % 4 == 3 and not last
        if last:
            notes += [Note(start, DRUMS, k, 0.5, 110) for k in (36, 49)]
            break
        for key, slots in KITS[style].items():
            for slot in slots:
                if slot >= total or (fill and slot >= total - 4) or rng.random() < 0.03:
                    continue
                accent = 104 if slot % 8 == 0 or (key == 38 and slot % 8 == 4) else 80
                notes.append(Note(start + slot / 4, DRUMS, key, 0.2, _velocity(rng, accent)))
        if fill:
            for slot in range(total - 4, total):
                if slot % 2 == 0 or rng.random() < 0.75:
                    notes.append(
                        Note(start + slot / 4, DRUMS, rng.choice((38, 45, 47, 48, 50)), 0.2, _velocity(rng, 98))
                    )
        elif number % 4 == 0 and number:
            notes.append(Note(start, DRUMS, 49, 0.5, _velocity(rng, 96)))
    return notes


def voicing(chord: Chord, center: int, low: int, high: int) -> list[int]:
    """Return a close voicing of a chord around the MIDI key `center`, in ascending order."""
    return sorted({nearest(center - 6 + 4 * i, (tone,), low, high) for i, tone in enumerate(chord.tones)})


Steps = list[tuple[float, int | None]]


def _motif(rng: random.Random, sheet: LeadSheet) -> tuple[list[Steps], int]:
    """Draw two bars of (duration, step or None for a rest), and the pitch offset of the first note."""
    cells = _CELLS[sheet.density]
    bars = []
    for _ in range(2):
        time, bar = 0.0, Steps()
        while time < sheet.beats - 1e-9:
            options = [(c, w) for c, w in cells if time + sum(c) <= sheet.beats + 1e-9]
            if not options:
                options = [((sheet.beats - time,), 1)]
            cell = rng.choices([o[0] for o in options], [o[1] for o in options])[0]
            for duration in cell:
                rest = time > 0 and rng.random() < 0.07
                bar.append((duration, None if rest else rng.choice((-3, -2, -1, -1, 1, 1, 2, 3, 0))))
                time += duration
        bars.append(bar)
    return bars, rng.randint(-4, 5)


def _swung(time: float, swing: bool) -> float:
    """Move an off-beat eighth to two thirds of its beat."""
    part = time % 1
    return time - part + 2 / 3 if swing and abs(part - 0.5) < 1e-6 else time


def _velocity(rng: random.Random, around: int) -> int:
    return max(30, min(120, around + rng.randint(-9, 9)))
