"""Captions in the words people type, from the parameters a piece was made with: nothing is said that is not so."""

from __future__ import annotations

import random

from .compose import Piece

_TEMPO_WORDS = {
    "slow": ("slow", "slow", "slow tempo", "relaxed", "unhurried"),
    "moderate": ("moderate", "mid-tempo", "medium tempo", "moderate tempo", "steady"),
    "fast": ("fast", "upbeat", "up-tempo", "fast", "quick", "energetic"),
}
_MOODS = {
    ("minor", "slow"): ("sad", "melancholic", "somber", "mournful", "dark", "pensive"),
    ("minor", "moderate"): ("moody", "wistful", "dark", "serious", "melancholic", "mysterious"),
    ("minor", "fast"): ("tense", "dramatic", "dark", "driving", "intense", "restless"),
    ("major", "slow"): ("calm", "peaceful", "gentle", "warm", "tender", "relaxing"),
    ("major", "moderate"): ("bright", "pleasant", "warm", "hopeful", "easygoing", "friendly"),
    ("major", "fast"): ("happy", "cheerful", "upbeat", "joyful", "lively", "bright"),
}
_NO_MODE = {"slow": ("laid-back",), "moderate": ("steady", "groovy"), "fast": ("driving", "energetic")}
_DENSITY = {"sparse": ("sparse", "simple", "minimal"), "medium": ("flowing",), "busy": ("busy", "dense", "intricate")}


def tempo_class(bpm: float) -> str:
    """ "slow" below 85 bpm, "fast" above 120, else "moderate"."""
    return "slow" if bpm < 85 else "fast" if bpm > 120 else "moderate"


def captions(piece: Piece, seed: int, count: int = 8) -> list[str]:
    """`count` different captions; at least half give the tempo as "NN bpm".

    Deterministic for (piece.id, seed). Each takes its own subset of instruments, style, tempo, key, mood and density.
    """
    rng = random.Random(f"captions {seed} {piece.id}")
    forms = [_short, _classic, _sentence, _tags, _with_key, _for_style]
    made: list[str] = []
    attempt = 0
    while len(made) < count and attempt < 200:
        form = forms[attempt % len(forms)]
        # Six of the first eight say the number, so that at least half do whatever repeats are dropped.
        text = " ".join(form(rng, _Words(rng, piece), len(made) % 4 != 3).split()).replace(" ,", ",")
        if text not in made:
            made.append(text)
        attempt += 1
    return made


class _Words:
    """Words for one caption, drawn once so that it does not contradict itself."""

    def __init__(self, rng: random.Random, piece: Piece) -> None:
        tempo = tempo_class(piece.bpm)
        self.bpm = f"{piece.bpm} bpm" if rng.random() < 0.8 else f"{piece.bpm} BPM"
        self.tempo = rng.choice(_TEMPO_WORDS[tempo])
        self.mood = rng.choice(_MOODS[(piece.key.mode, tempo)] if piece.key else _NO_MODE[tempo])
        self.key = f"{piece.key.name} {piece.key.mode}" if piece.key else ""
        self.style = piece.style or ""
        self.density = rng.choice(_DENSITY[piece.density]) if piece.density else ""
        self.kind = piece.kind
        self.waltz = piece.beats_per_bar == 3
        if self.style.startswith(("slow", "fast")):
            self.style = "" if rng.random() < 0.2 else self.style
            self.tempo = self.tempo if not self.style else self.mood
        names = piece.instruments
        if piece.kind == "band":
            lead, rest = names[:1], names[1:]
            rng.shuffle(rest)
            names = lead + rest[: rng.choice((1, 1, 2, 3))]
        self.instruments = names

    def listing(self) -> str:
        """ "flute", "flute and guitar", "flute, guitar and drums"."""
        names = self.instruments
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def _short(rng: random.Random, w: _Words, number: bool) -> str:
    """ "slow piano, 70 bpm"."""
    subject = w.style + " " + w.instruments[0] if w.kind != "band" and rng.random() < 0.5 else w.style or w.listing()
    lead = rng.choice((w.tempo, w.mood, "")) if number else rng.choice((w.tempo, w.mood))
    subject = subject if w.kind == "band" or w.instruments[0] in subject else f"{subject} {w.listing()}"
    return f"{lead} {subject}" + (f", {w.bpm}" if number else "")


def _classic(rng: random.Random, w: _Words, number: bool) -> str:
    """ "slow sad piano in D minor, 70 bpm"."""
    first = "" if w.mood == w.tempo else w.tempo
    key = f" in {w.key}" if w.key and rng.random() < 0.7 else ""
    if w.kind == "band":
        body = f"{w.style} with {w.listing()}"
    else:
        body = f"{w.listing()} {rng.choice(('', w.style, 'music', w.kind))}"
    return f"{first} {w.mood} {body}{key}" + (f", {w.bpm}" if number else "")


def _sentence(rng: random.Random, w: _Words, number: bool) -> str:
    """ "an upbeat bossa nova with flute and guitar, 128 bpm"."""
    noun = w.style if w.style and w.style not in ("jazz", "folk", "funk", "rock", "metal") else f"{w.style} piece"
    if w.kind != "band" and rng.random() < 0.5:
        noun = f"{w.style} {w.kind}"
    elif w.kind == "band" and not w.style:
        noun = "band piece"
    key = f" in {w.key}" if w.key and rng.random() < 0.35 else ""
    at = rng.choice((f", {w.bpm}", f" at {w.bpm}")) if number else ""
    head = _article(f"{rng.choice((w.mood, w.tempo))} {noun.strip()}")
    joint = "for" if w.kind != "band" and rng.random() < 0.5 else "with"
    return f"{head} {joint} {w.listing()}{key}{at}"


def _tags(rng: random.Random, w: _Words, number: bool) -> str:
    """ "flute, guitar, bossa nova, 128 bpm, D major, cheerful"."""
    tags = [t for t in (w.style, w.key, w.mood, w.tempo, w.density) if t]
    rng.shuffle(tags)
    tags = [*w.instruments, *tags[: rng.randint(1, 3)]]
    if number:
        tags.insert(rng.randint(1, len(tags)), w.bpm)
    return ", ".join(dict.fromkeys(tags))


def _with_key(rng: random.Random, w: _Words, number: bool) -> str:
    """ "D minor, 70 bpm, solo piano"."""
    subject = {"solo": f"solo {w.instruments[0]}", "duo": f"{w.listing()} duo", "band": f"{w.style} band"}[w.kind]
    if w.kind == "solo" and rng.random() < 0.5:
        subject = f"{w.density} {w.instruments[0]} solo"
    parts = [p for p in (w.key, w.bpm if number else w.tempo, subject) if p]
    rng.shuffle(parts)
    return ", ".join(parts)


def _for_style(rng: random.Random, w: _Words, number: bool) -> str:
    """ "cheerful bossa nova music, flute melody, fast"."""
    music = f"{w.mood} {w.style} music" if w.style else f"{w.mood} music"
    played = f"played on {w.listing()}" if w.kind == "solo" else f"with {w.listing()}"
    return f"{music} {played}, " + (
        f"{w.tempo}, {w.bpm}" if number and rng.random() < 0.5 else w.bpm if number else w.tempo
    )
