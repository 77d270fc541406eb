"""Keys, scales, chords, and a seeded grammar of chord progressions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle

from ...conditioning.keys import SCALES

SHARP = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]
FLAT = ["C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B"]
# Usual spelling of each tonic: the one with fewer accidentals in its key signature.
MAJOR_NAMES = ["C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
MINOR_NAMES = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"]
QUALITIES: dict[str, tuple[int, ...]] = {
    "": (0, 4, 7),
    "m": (0, 3, 7),
    "dim": (0, 3, 6),
    "7": (0, 4, 7, 10),
    "M7": (0, 4, 7, 11),
    "m7": (0, 3, 7, 10),
    "m7b5": (0, 3, 6, 10),
}
_TRIADS = {"major": ("", "m", "m", "", "", "m", "dim"), "minor": ("m", "dim", "", "m", "", "", "")}
_SEVENTHS = {"major": ("M7", "m7", "m7", "M7", "7", "m7", "m7b5"), "minor": ("m7", "m7b5", "M7", "m7", "7", "M7", "7")}

# Relative frequencies of the degrees that follow each degree (0 = tonic): tonic, subdominant, dominant, tonic, with
# detours.
_MOVES: dict[str, dict[int, dict[int, float]]] = {
    "major": {
        0: {3: 4, 4: 3, 5: 4, 1: 2, 2: 1},
        1: {4: 6, 3: 1, 6: 0.5},
        2: {5: 4, 3: 3},
        3: {4: 5, 0: 3, 1: 2},
        4: {0: 6, 5: 3, 3: 1},
        5: {3: 4, 1: 4, 4: 2, 2: 1},
        6: {0: 3, 2: 1},
    },
    "minor": {
        0: {3: 4, 5: 4, 6: 3, 4: 2, 2: 2},
        1: {4: 6},
        2: {5: 3, 6: 3, 3: 2},
        3: {4: 4, 0: 3, 6: 2},
        4: {0: 6, 5: 2},
        5: {6: 4, 3: 2, 2: 3, 4: 2, 1: 1},
        6: {0: 4, 2: 3, 5: 2},
    },
}
_LOOPS = {
    "major": [(0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 4, 3), (5, 3, 0, 4), (0, 3, 0, 4), (0, 2, 3, 4), (0, 5, 1, 4)],
    "minor": [(0, 5, 2, 6), (0, 6, 5, 4), (0, 3, 4, 0), (0, 5, 6, 0), (0, 6, 5, 6), (0, 3, 6, 2), (0, 2, 6, 3)],
}


@dataclass(frozen=True)
class Chord:
    """A chord: root pitch class, quality (a key of QUALITIES) and scale degree 0..6."""

    root: int
    quality: str
    degree: int

    @property
    def tones(self) -> tuple[int, ...]:
        """Pitch classes, root first."""
        return tuple((self.root + i) % 12 for i in QUALITIES[self.quality])

    def name(self, flats: bool) -> str:
        """Return the chord symbol in MMA's notation."""
        return (FLAT if flats else SHARP)[self.root] + self.quality


@dataclass(frozen=True)
class Key:
    """A tonic pitch class and a mode ("major" or "minor")."""

    tonic: int
    mode: str

    @property
    def name(self) -> str:
        """Usual name of the tonic, such as "Eb"."""
        return (MAJOR_NAMES if self.mode == "major" else MINOR_NAMES)[self.tonic]

    @property
    def flats(self) -> bool:
        """True if chords of this key are spelled with flats."""
        return "b" in self.name or self.name == "F" or (self.mode == "minor" and self.name in "CDG")

    @property
    def scale(self) -> tuple[int, ...]:
        """Pitch classes of the scale (natural minor), tonic first."""
        return tuple((self.tonic + i) % 12 for i in SCALES[self.mode])

    def chord(self, degree: int, sevenths: bool = False) -> Chord:
        """Return the chord on a degree 0..6; the dominant is major in both modes."""
        quality = (_SEVENTHS if sevenths else _TRIADS)[self.mode][degree]
        return Chord(self.scale[degree], quality, degree)

    def scale_over(self, chord: Chord) -> tuple[int, ...]:
        """Pitch classes to play over a chord: its tones, and scale tones not a semitone from its altered tones."""
        tones = set(chord.tones)
        return tuple(
            sorted(tones | {p for p in self.scale if not {(p + 1) % 12, (p - 1) % 12} & (tones - set(self.scale))})
        )


def random_key(rng: random.Random, minor_share: float = 0.45) -> Key:
    """Draw a key with a uniform tonic and the mode minor with probability `minor_share`."""
    mode = "minor" if rng.random() < minor_share else "major"
    return Key(rng.randrange(12), mode)


def progression(rng: random.Random, key: Key, bars: int, *, sevenths: bool = False) -> list[Chord]:
    """Draw one chord a bar: phrases A A B A of chord-grammar walks or common loops, from tonic to tonic."""
    phrases = {name: _phrase(rng, key.mode) for name in "AB"}
    degrees: list[int] = []
    for name in cycle("AABA"):
        degrees += phrases[name]
        if len(degrees) >= bars:
            break
    degrees = degrees[:bars]
    degrees[0] = 0
    degrees[-1] = 0
    if bars > 3 and degrees[-2] not in (3, 4):
        degrees[-2] = 4
    return [key.chord(d, sevenths) for d in degrees]


def blues(key: Key, bars: int) -> list[Chord]:
    """Repeat the twelve-bar blues over `bars` bars, ending on the tonic; in minor, I and IV are minor sevenths."""
    form = [0, 3, 0, 0, 3, 3, 0, 0, 4, 3, 0, 4]
    quality = {0: "7", 3: "7", 4: "7"} if key.mode == "major" else {0: "m7", 3: "m7", 4: "7"}
    degrees = [form[i % 12] for i in range(bars)]
    degrees[-1] = 0
    return [Chord(key.scale[d], quality[d], d) for d in degrees]


def _phrase(rng: random.Random, mode: str) -> list[int]:
    if rng.random() < 0.4:
        return list(rng.choice(_LOOPS[mode])) * rng.choice((1, 2))
    degrees = [0]
    length = rng.choice((4, 4, 8))
    while len(degrees) < length:
        moves = _MOVES[mode][degrees[-1]]
        degrees.append(rng.choices(list(moves), list(moves.values()))[0])
    return degrees
