"""Write captions as people type them, from the known parameters of a composed piece."""

from __future__ import annotations

import random

from .compose import Piece

_TEMPO_TERMS = {
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
    """Return "slow" below 85 bpm, "fast" above 120 bpm, else "moderate"."""
    return "slow" if bpm < 85 else "fast" if bpm > 120 else "moderate"


def captions(piece: Piece, seed: int, count: int = 8) -> list[str]:
    """Write up to `count` different captions of a piece, deterministic for (piece.id, seed).

    Each caption uses its own subset of instruments, style, tempo, key, mood and density. At least half name the tempo
    as "NN bpm".
    """
    rng = random.Random(f"captions {seed} {piece.id}")
    templates = [_short, _classic, _sentence, _tags, _with_key, _for_style]
    texts: list[str] = []
    attempt = 0
    while len(texts) < count and attempt < 200:
        template = templates[attempt % len(templates)]
        # Six of eight captions name the tempo, so at least half still do after duplicates are dropped.
        text = " ".join(template(rng, _Vocabulary(rng, piece), len(texts) % 4 != 3).split()).replace(" ,", ",")
        if text not in texts:
            texts.append(text)
        attempt += 1
    return texts


class _Vocabulary:
    """Vocabulary of one caption, drawn once so that the caption does not contradict itself."""

    def __init__(self, rng: random.Random, piece: Piece) -> None:
        tempo = tempo_class(piece.bpm)
        self.bpm = f"{piece.bpm} bpm" if rng.random() < 0.8 else f"{piece.bpm} BPM"
        self.tempo = rng.choice(_TEMPO_TERMS[tempo])
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
        """Join the instruments: "flute", "flute and guitar", "flute, guitar and drums"."""
        names = self.instruments
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def _short(rng: random.Random, vocab: _Vocabulary, name_tempo: bool) -> str:
    """Caption such as "slow piano, 70 bpm"."""
    subject = (
        vocab.style + " " + vocab.instruments[0]
        if vocab.kind != "band" and rng.random() < 0.5
        else vocab.style or vocab.listing()
    )
    lead = rng.choice((vocab.tempo, vocab.mood, "")) if name_tempo else rng.choice((vocab.tempo, vocab.mood))
    subject = subject if vocab.kind == "band" or vocab.instruments[0] in subject else f"{subject} {vocab.listing()}"
    return f"{lead} {subject}" + (f", {vocab.bpm}" if name_tempo else "")


def _classic(rng: random.Random, vocab: _Vocabulary, name_tempo: bool) -> str:
    """Caption such as "slow sad piano in D minor, 70 bpm"."""
    first = "" if vocab.mood == vocab.tempo else vocab.tempo
    key = f" in {vocab.key}" if vocab.key and rng.random() < 0.7 else ""
    if vocab.kind == "band":
        body = f"{vocab.style} with {vocab.listing()}"
    else:
        body = f"{vocab.listing()} {rng.choice(('', vocab.style, 'music', vocab.kind))}"
    return f"{first} {vocab.mood} {body}{key}" + (f", {vocab.bpm}" if name_tempo else "")


def _sentence(rng: random.Random, vocab: _Vocabulary, name_tempo: bool) -> str:
    """Caption such as "an upbeat bossa nova with flute and guitar, 128 bpm"."""
    noun = (
        vocab.style
        if vocab.style and vocab.style not in ("jazz", "folk", "funk", "rock", "metal")
        else f"{vocab.style} piece"
    )
    if vocab.kind != "band" and rng.random() < 0.5:
        noun = f"{vocab.style} {vocab.kind}"
    elif vocab.kind == "band" and not vocab.style:
        noun = "band piece"
    key = f" in {vocab.key}" if vocab.key and rng.random() < 0.35 else ""
    tempo = rng.choice((f", {vocab.bpm}", f" at {vocab.bpm}")) if name_tempo else ""
    head = _article(f"{rng.choice((vocab.mood, vocab.tempo))} {noun.strip()}")
    joint = "for" if vocab.kind != "band" and rng.random() < 0.5 else "with"
    return f"{head} {joint} {vocab.listing()}{key}{tempo}"


def _tags(rng: random.Random, vocab: _Vocabulary, name_tempo: bool) -> str:
    """Caption such as "flute, guitar, bossa nova, 128 bpm, D major, cheerful"."""
    tags = [t for t in (vocab.style, vocab.key, vocab.mood, vocab.tempo, vocab.density) if t]
    rng.shuffle(tags)
    tags = [*vocab.instruments, *tags[: rng.randint(1, 3)]]
    if name_tempo:
        tags.insert(rng.randint(1, len(tags)), vocab.bpm)
    return ", ".join(dict.fromkeys(tags))


def _with_key(rng: random.Random, vocab: _Vocabulary, name_tempo: bool) -> str:
    """Caption such as "D minor, 70 bpm, solo piano"."""
    subject = {"solo": f"solo {vocab.instruments[0]}", "duo": f"{vocab.listing()} duo", "band": f"{vocab.style} band"}[
        vocab.kind
    ]
    if vocab.kind == "solo" and rng.random() < 0.5:
        subject = f"{vocab.density} {vocab.instruments[0]} solo"
    parts = [p for p in (vocab.key, vocab.bpm if name_tempo else vocab.tempo, subject) if p]
    rng.shuffle(parts)
    return ", ".join(parts)


def _for_style(rng: random.Random, vocab: _Vocabulary, name_tempo: bool) -> str:
    """Caption such as "cheerful bossa nova music with flute, fast"."""
    subject = f"{vocab.mood} {vocab.style} music" if vocab.style else f"{vocab.mood} music"
    ensemble = f"played on {vocab.listing()}" if vocab.kind == "solo" else f"with {vocab.listing()}"
    return f"{subject} {ensemble}, " + (
        f"{vocab.tempo}, {vocab.bpm}" if name_tempo and rng.random() < 0.5 else vocab.bpm if name_tempo else vocab.tempo
    )
