"""Musical keys: names, prompts, input features."""

from __future__ import annotations

import pytest

from presto_rt.conditioning.keys import KEY_CHANNELS, SCALES, check_key, key_features, parse_key, pitch_class
from presto_rt.errors import InvalidInputError


def test_pitch_class_reads_names_and_rejects_others() -> None:
    assert [pitch_class(n) for n in ("C", "F#", "Gb", "Bb", "B", "Cb", "b")] == [0, 6, 6, 10, 11, 11, 11]
    for bad in ("", "H", "C$", "sharp"):
        with pytest.raises(InvalidInputError, match="not a note"):
            pitch_class(bad)


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ("slow sad piano in D minor, 70 bpm", (2, "minor")),
        ("F# major", (6, "major")),
        ("an E-flat major waltz", (3, "major")),
        ("Bb maj jazz", (10, "major")),
        ("b flat minor", (10, "minor")),
        ("techno in a minor", (9, "minor")),
        ("A minor, strings", (9, "minor")),
        ("G Minor", (7, "minor")),
        ("A harmonic minor", (9, "minor")),
        ("Cb major", (11, "major")),
        ("C major, then D minor", (0, "major")),
        ("E Flat Major waltz", (3, "major")),
        ("F Sharp Harmonic Minor", (6, "minor")),
        ("a minor setback", None),
        ("a slow song in a minor key", None),
        ("in a major-key mood", None),
        ("guitar major hit", None),
        ("B movie soundtrack", None),
        ("", None),
    ],
)
def test_parse_key_finds_the_first_key(prompt: str, key: tuple[int, str] | None) -> None:
    assert parse_key(prompt) == key


def test_parse_key_reads_every_spelling_of_the_captions() -> None:
    from presto_rt.lab.data.theory import Key

    for tonic in range(12):
        for mode in SCALES:
            assert parse_key(f"calm piano in {Key(tonic, mode).name} {mode}, 90 bpm") == (tonic, mode)


def test_check_key_reads_names_and_rejects_others() -> None:
    assert check_key(" d minor ") == (2, "minor")
    assert check_key("a minor") == (9, "minor")
    for bad in ("H minor", "D", 3, "", "D minor-ish thing, perhaps"):
        with pytest.raises(InvalidInputError, match="key must be"):
            check_key(bad)


def test_key_features_encode_tonic_and_scale() -> None:
    a_minor, c_major = key_features((9, "minor")), key_features((0, "major"))
    assert len(a_minor) == KEY_CHANNELS
    assert a_minor[12:] == c_major[12:]
    assert a_minor[:12] != c_major[:12]
    assert a_minor[9] == 1
    assert sum(a_minor) == 8
    assert not any(key_features(None))
    seen = {tuple(key_features((tonic, mode))) for tonic in range(12) for mode in SCALES}
    assert len(seen) == 24
