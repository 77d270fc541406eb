"""Tests of theory, tunes, MIDI, textures and captions, which need neither MMA nor a soundfont."""

from __future__ import annotations

import random
import re

import pytest

from presto_rt.lab.data import textures
from presto_rt.lab.data.captions import captions, tempo_class
from presto_rt.lab.data.compose import INSTRUMENTS, Piece, audible
from presto_rt.lab.data.midi import DRUMS, Note, Score, from_bytes, to_bytes
from presto_rt.lab.data.textures import KITS, LeadSheet, Voice
from presto_rt.lab.data.theory import Key, blues, progression
from presto_rt.lab.data.tunes import parse
from tests.support.pitches import PITCH_CLASSES

KEYS = [Key(tonic, mode) for tonic in range(12) for mode in ("major", "minor")]

TUNE = """X:1
T:Test
M:4/4
L:1/8
K:D
A|d2 f>e d2 A2|B/c/d (3efg f4|=f2 _e2 f2 e2|d4-d4|
d,2 D2 d'2 z2|{g}f2 "Em"e2 [df]2 d2|!trill!f8|d6 d2|d8|"""


def piece(
    kind: str = "band",
    key: Key | None = KEYS[5],
    bpm: int = 128,
    instruments: tuple[str, ...] = ("flute", "guitar", "drums"),
) -> Piece:
    """Make a piece without notes; captions depend on its description alone."""
    density = None if kind == "band" else "busy"
    style = "bossa nova" if kind == "band" else None
    return Piece(f"{kind}-t", kind, "c", Score(), bpm, 4, 16, 0.1, 30.0, key, style, list(instruments), density)


@pytest.mark.parametrize("key", KEYS, ids=lambda k: f"{k.name}-{k.mode}")
def test_progression_stays_in_its_key(key: Key) -> None:
    """Progressions start and end on the tonic, close from dominant or subdominant, and use the key's degrees."""
    assert PITCH_CLASSES[key.name] == key.tonic
    for seed in range(20):
        chords = progression(random.Random(seed), key, 16, sevenths=bool(seed % 2))
        assert len(chords) == 16
        assert chords[0].root == chords[-1].root == key.tonic
        assert all(c.root in key.scale for c in chords)
        assert chords[-2].degree in (3, 4)
        foreign = {p for c in chords for p in c.tones} - set(key.scale)
        assert foreign <= {(key.tonic + 11) % 12}  # the leading tone in minor
    assert blues(key, 12)[-1].root == key.tonic
    assert blues(key, 24)[16].degree == 3


def test_chord_name_follows_the_key_signature() -> None:
    assert Key(10, "major").chord(3).name(Key(10, "major").flats) == "Eb"
    assert Key(4, "major").chord(2).name(Key(4, "major").flats) == "G#m"
    assert Key(2, "minor").chord(5).name(Key(2, "minor").flats) == "Bb"
    assert Key(9, "minor").chord(4).name(False) == "E"


def test_parse_reads_abc_exactly() -> None:
    """Key signature, accidentals that last a bar, lengths, broken rhythm, triplets, ties, octaves, chords, upbeat."""
    tune = parse(TUNE, "t")
    assert tune is not None
    assert (tune.key, tune.beats_per_bar, tune.bars) == (Key(2, "major"), 4, 9)
    bars = [[(s - 4 * b, d, p) for s, d, p in tune.notes if 4 * b <= s < 4 * b + 4] for b in range(9)]
    assert bars[0] == [(0, 1, 74), (1, 0.75, 78), (1.75, 0.25, 76), (2, 1, 74), (3, 1, 69)]
    assert [p for _, _, p in bars[1]] == [71, 73, 74, 76, 78, 79, 78]
    assert [round(d, 4) for _, d, _ in bars[1]] == [0.25, 0.25, 0.5, 0.3333, 0.3333, 0.3333, 2]
    assert [p for _, _, p in bars[2]] == [77, 75, 77, 75]
    assert bars[3] == [(0, 4, 74)]
    assert bars[4] == [(0, 1, 62), (1, 1, 62), (2, 1, 86)]
    assert [p for _, _, p in bars[5]] == [78, 76, 74, 74]


@pytest.mark.parametrize("change", [("K:D", "K:Ddor"), ("M:4/4", "M:5/4"), ("K:D", "K:D\nM:3/4"), ("|d8|", "|e8|")])
def test_parse_rejects_unsupported_tunes(change: tuple[str, str]) -> None:
    assert parse(TUNE.replace(*change), "t") is None


def test_midi_round_trips() -> None:
    rng = random.Random(3)
    notes = sorted(
        Note(rng.randrange(64) / 4, rng.randrange(16), key, 0.25, rng.randint(1, 127)) for key in range(20, 100)
    )
    score = Score(notes, {c: c * 3 for c in range(16)}, {(2, 7): 90, (5, 10): 30})
    back = from_bytes(to_bytes(score, 97))
    assert back.notes == notes
    assert back.programs == score.programs
    assert back.controls == score.controls


@pytest.mark.parametrize("density", ["sparse", "medium", "busy"])
@pytest.mark.parametrize("beats", [2, 3, 4])
def test_textures_stay_inside_bars_and_scale(density: str, beats: int) -> None:
    """Each part starts on the first downbeat, ends on a tonic chord, and uses notes of the key or the chord."""
    for seed in range(12):
        rng = random.Random(seed)
        key = KEYS[seed * 2 % 24 + seed % 2]
        sheet = LeadSheet(key, progression(rng, key, 8), beats, density)
        parts = {
            "melody": textures.melody(rng, sheet, Voice(0, 55, 80)),
            "chords": textures.block_chords(rng, sheet, Voice(0, 48, 72)),
            "sustained": textures.sustained(rng, sheet, Voice(0, 48, 72)),
            "arpeggio": textures.arpeggio(rng, sheet, Voice(0, 44, 74)),
            "strum": textures.strum(rng, sheet, Voice(0, 40, 79)),
        }
        allowed = set(key.scale) | {(key.tonic + 11) % 12}
        for name, notes in parts.items():
            assert min(n.start for n in notes) == 0, name
            assert max(n.start for n in notes) < 8 * beats, name
            assert {n.key % 12 for n in notes} <= allowed, name
            closing = [n for n in notes if n.start == 7 * beats]
            assert key.tonic in {n.key % 12 for n in closing}, name
            assert all(0 < n.velocity < 128 and n.duration > 0 for n in notes), name
        style = rng.choice(list(KITS))
        assert all(n.channel == DRUMS and 0 <= n.start < 8 * beats for n in textures.drums(rng, sheet, style))
        assert min(n.start for n in textures.bass_line(rng, sheet, Voice(0, 28, 50))) == 0


@pytest.mark.parametrize("kind", ["solo", "duo", "band"])
@pytest.mark.parametrize("bpm", [62, 100, 171])
@pytest.mark.parametrize("key", [KEYS[5], KEYS[20], None])
def test_captions_are_varied_and_true(kind: str, bpm: int, key: Key | None) -> None:
    """Captions have at least six wordings, half name the tempo, and no number, key, mode or tempo term is wrong."""
    names = {"solo": ("piano",), "duo": ("violin", "piano"), "band": ("flute", "guitar", "drums", "bass")}[kind]
    for seed in range(30):
        texts = captions(piece(kind, key, bpm, names), seed)
        assert len(texts) >= 6
        assert len(set(texts)) == len(texts)
        numbers = [int(m) for t in texts for m in re.findall(r"(\d+) bpm", t, re.IGNORECASE)]
        assert numbers.count(bpm) == len(numbers) >= len(texts) / 2
        joined = " ".join(texts)
        keys = set(re.findall(r"\b([A-G][b#]?) (major|minor)", joined))
        assert keys <= ({(key.name, key.mode)} if key else set())
        assert any(n in joined for n in names)
        wrong = {
            "slow": ("fast", "upbeat", "quick"),
            "fast": ("slow", "relaxed"),
            "moderate": ("slow", "fast", "quick"),
        }
        tokens = set(re.findall(r"[a-z-]+", joined))
        assert not tokens & set(wrong[tempo_class(bpm)])
        assert "  " not in joined
        assert not any(t.startswith((" ", ",")) or t.endswith((" ", ",")) for t in texts)


def test_captions_are_deterministic() -> None:
    assert captions(piece(), 1) == captions(piece(), 1)
    assert captions(piece(), 1) != captions(piece(), 2)


def test_audible_omits_negligible_instruments() -> None:
    notes = [Note(b, 0, 60, 1.0, 90) for b in range(32)] + [Note(b, 1, 40, 1.0, 90) for b in range(32)]
    notes += [Note(b, DRUMS, 36, 0.1, 90) for b in range(32)] + [Note(0, 2, 60, 0.1, 30)]
    score = Score(notes, {0: 73, 1: 33, 2: 56})
    names = audible(score)
    assert names[0] == "flute"
    assert set(names) == {"flute", "bass", "drums"}
    assert audible(score, "violin")[0] == "violin"
    assert "trumpet" not in audible(score)


def test_instruments_have_many_names() -> None:
    assert len({i.name for i in INSTRUMENTS}) >= 25
