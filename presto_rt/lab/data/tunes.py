"""Parse traditional tunes from the ABC collections that ship with music21.

The collections are O'Neill's Music of Ireland (1903), Ryan's Mammoth Collection (1883) and Aird's Airs (1778), all in
the public domain. The Essen and Palestrina sets of the same corpus have non-commercial terms and are not used.
The parser reads notes, rests, accidentals, lengths, broken rhythm, triplets, ties, the first notes of chords, bars and
repeats (played once); it skips grace notes, slurs, ornaments and lyrics.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from ...conditioning.keys import LETTERS
from ...errors import MissingDependencyError
from .theory import Key

COLLECTIONS = ("oneills1850", "ryansMammoth", "airdsAirs")
_SHARPS = "FCGDAEB"
_FIFTHS = {"C": 0, "G": 1, "D": 2, "A": 3, "E": 4, "B": 5, "F#": 6, "C#": 7, "F": -1, "Bb": -2, "Eb": -3, "Ab": -4}
_METERS = {"C": (4, 4), "C|": (4, 4), "4/4": (4, 4), "2/4": (2, 4), "3/4": (3, 4), "6/8": (6, 8)}
_TOKEN = re.compile(r"([_=^]*)([A-Ga-gzx])([,']*)(\d*)(/*)(\d*)|(\(\d)|([<>]+)|(\|[\]|:]?|:\||\[\||::)|(-)")
_SKIPPED = re.compile(r'"[^"]*"|\{[^}]*\}|![^!]*!|\[[A-Za-z]:[^\]]*\]|%.*')

Bar = list[tuple[Fraction, int | None]]  # (length in whole notes, MIDI key or None for a rest)


@dataclass(frozen=True)
class Tune:
    """A melody of complete bars, with notes (start, duration, MIDI key).

    Times are in felt beats from the first downbeat; compound meters (6/8) have two felt beats a bar.
    """

    id: str
    key: Key
    beats_per_bar: int
    compound: bool
    notes: tuple[tuple[float, float, int], ...]
    bars: int


@lru_cache(maxsize=1)
def load_tunes() -> tuple[Tune, ...]:
    """Load all usable tunes, ordered by id.

    Raises MissingDependencyError without music21, whose corpus is read without importing it.
    """
    spec = importlib.util.find_spec("music21")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("the traditional tunes ship with music21; run: pip install music21")
    corpus = Path(spec.origin).parent / "corpus"
    found = []
    for collection in COLLECTIONS:
        for path in sorted((corpus / collection).glob("*.abc")):
            text = path.read_text(encoding="utf-8", errors="replace")
            for number, block in enumerate(re.split(r"(?m)^(?=X:)", text)):
                tune = parse(block, f"{collection}/{path.stem}/{number}")
                if tune is not None:
                    found.append(tune)
    if not found:
        raise MissingDependencyError(
            "music21 is installed without its corpus; run: pip install --force-reinstall music21"
        )
    return tuple(sorted(found, key=lambda t: t.id))


def parse(block: str, name: str) -> Tune | None:
    """Parse one ABC tune.

    Returns None for modes other than major and minor, unsupported meters, changes of key or meter, irregular bars, and
    tunes of fewer than 8 bars or 20 notes.
    """
    fields: dict[str, str] = {}
    body = []
    for line in block.splitlines():
        match = re.match(r"([A-Za-z]):(.*)", line)
        if match and "K" in fields and match[1] in "KML":
            return None  # changes key or meter
        if match:
            fields.setdefault(match[1], match[2].split("%")[0].strip())
        elif "K" in fields:
            body.append(_SKIPPED.sub("", line))
    key_text = re.match(r"([A-G][#b]?)\s*(\w*)", fields.get("K", ""))
    meter = _METERS.get(fields.get("M", "").replace(" ", ""))
    if key_text is None or meter is None or key_text[1] not in _FIFTHS:
        return None
    mode = {"": "major", "maj": "major", "m": "minor", "min": "minor"}.get(key_text[2].lower()[:3])
    if mode is None:
        return None
    fifths = _FIFTHS[key_text[1]] - (3 if mode == "minor" else 0)
    letters = _SHARPS[:fifths] if fifths >= 0 else _SHARPS[fifths:]
    signature = dict.fromkeys(letters, 1 if fifths > 0 else -1)
    tonic = (LETTERS[key_text[1][0]] + {"#": 1, "b": -1}.get(key_text[1][1:], 0)) % 12
    default = Fraction(1, 8) if Fraction(*meter) >= Fraction(3, 4) else Fraction(1, 16)
    unit = Fraction(fields["L"]) if re.fullmatch(r"1/\d+", fields.get("L", "")) else default
    bars = list(_bars("\n".join(body), unit, signature))
    return _assemble(bars, Key(tonic, mode), meter, name)


def _bars(text: str, unit: Fraction, signature: dict[str, int]) -> Iterator[Bar]:
    """Yield bars as lists of (length in whole notes, MIDI key or None for a rest); ties are joined within a bar."""
    text = re.sub(r"\[([_=^]*[A-Ga-g][,']*\d*/*\d*)[^\]|]*\]", r"\1", text)  # keep the first note of a chord
    bar: Bar = []
    accidentals: dict[str, int] = {}
    broken, triplet, tied = Fraction(1), 0, False
    for token in _TOKEN.finditer(text):
        if token[9]:
            if bar:
                yield bar
            bar, accidentals = [], {}
        elif token[7]:
            triplet = 3 if token[7] == "(3" else 0
        elif token[8] and bar:
            longer = 2 - Fraction(1, 2 ** len(token[8]))
            first, second = (longer, 2 - longer) if token[8][0] == ">" else (2 - longer, longer)
            bar[-1] = (bar[-1][0] * first, bar[-1][1])
            broken = second
        elif token[10]:
            tied = True
        elif token[2]:
            length = unit * int(token[4] or 1)
            if token[5]:
                length /= int(token[6]) if token[6] else 2 ** len(token[5])
            length *= broken * (Fraction(2, 3) if triplet else 1)
            broken, triplet = Fraction(1), max(0, triplet - 1)
            pitch = _pitch(token[1], token[2], token[3], accidentals, signature)
            if tied and bar and bar[-1][1] == pitch:
                bar[-1] = (bar[-1][0] + length, pitch)
            else:
                bar.append((length, pitch))
            tied = False
    if bar:
        yield bar


def _pitch(mark: str, letter: str, octave: str, accidentals: dict[str, int], signature: dict[str, int]) -> int | None:
    if letter in "zx":
        return None
    name = letter.upper()
    if mark:
        accidentals[name] = mark.count("^") - mark.count("_")
    shift = accidentals.get(name, signature.get(name, 0))
    return 60 + LETTERS[name] + shift + 12 * (letter.islower() + octave.count("'") - octave.count(","))


def _assemble(bars: list[Bar], key: Key, meter: tuple[int, int], name: str) -> Tune | None:
    """Assemble complete bars into a tune; partial bars at repeats are joined to their second half or dropped."""
    full = Fraction(*meter)
    complete: list[Bar] = []
    partial: Bar = []
    for bar in bars:
        length = sum((n[0] for n in bar), Fraction(0))
        if length == full:
            complete.append(bar)
            partial = []
        elif length < full:
            partial = partial + bar
            joined = sum((n[0] for n in partial), Fraction(0))
            if joined == full and complete:
                complete.append(partial)
                partial = []
            elif joined >= full or not complete:
                partial = []
        else:
            return None
    compound = meter[1] == 8
    beats = 2 if compound else meter[0]
    per_whole = Fraction(8, 3) if compound else Fraction(4)
    notes, time = [], Fraction(0)
    for bar in complete:
        for length, pitch in bar:
            if pitch is not None:
                notes.append((float(time * per_whole), float(length * per_whole), pitch))
            time += length
    if len(complete) < 8 or len(notes) < 20 or notes[-1][2] % 12 not in (key.tonic, (key.tonic + 7) % 12):
        return None  # a close on another degree means that the key field is wrong
    if notes[-1][2] % 12 != key.tonic and not _supports_tonic(notes, key):
        return None
    return Tune(name, key, beats, compound, tuple(notes), len(complete))


def _supports_tonic(notes: list[tuple[float, float, int]], key: Key) -> bool:
    """Return True if the tonic sounds for at least a tenth of the melody's time; else its key label is doubtful."""
    tonic = sum(d for _, d, p in notes if p % 12 == key.tonic)
    return tonic >= 0.1 * sum(d for _, d, _ in notes)
