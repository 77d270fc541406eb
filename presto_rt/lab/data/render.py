"""Render scores with TinySoundFont and a General MIDI soundfont, add a light room, and normalize the loudness."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MissingDependencyError
from .manifest import SAMPLE_RATE
from .midi import DRUMS, Score

SOUNDFONTS = (
    "/usr/share/sounds/sf3/MuseScore_General_Lite.sf3",
    "/usr/share/sounds/sf3/MuseScore_General.sf3",
    "/usr/share/sounds/sf3/default-GM.sf3",
)
MAX_VOICES = 96
FADE_SECONDS = 0.35
ROOM_SECONDS = 0.8


def soundfont() -> str:
    """Return the path of the soundfont: PRESTO_RT_SOUNDFONT if set, else Debian's.

    Raises MissingDependencyError if the file does not exist.
    """
    override = os.environ.get("PRESTO_RT_SOUNDFONT")
    found = [p for p in ([override] if override else SOUNDFONTS) if Path(p).is_file()]
    if not found:
        reason = f"PRESTO_RT_SOUNDFONT={override} does not exist" if override else "no General MIDI soundfont found"
        raise MissingDependencyError(f"{reason}; run: apt-get install musescore-general-soundfont-small")
    return found[0]


@lru_cache(maxsize=1)
def _synth(path: str) -> tuple[Any, int]:
    """Return the process's synthesizer and the id of its soundfont; loading a compressed soundfont takes seconds."""
    try:
        import tinysoundfont
    except ImportError as error:
        raise MissingDependencyError(
            "rendering needs tinysoundfont; run: pip install --no-deps tinysoundfont"
        ) from error
    synth = tinysoundfont.Synth(samplerate=SAMPLE_RATE)
    return synth, synth.sfload(path, max_voices=MAX_VOICES)


def synthesize(score: Score, bpm: float, offset: float, seconds: float) -> np.ndarray:
    """Synthesize a score without room or loudness normalization.

    Args:
        score: notes in beats.
        bpm: tempo in quarter notes a minute.
        offset: time of beat 0 in seconds.
        seconds: length of the result.

    Returns:
        (2, frames) float32 at 44.1 kHz.

    Raises:
        MissingDependencyError: the soundfont or tinysoundfont is not installed.
    """
    synth, font = _synth(soundfont())
    for channel in range(16):
        synth.sounds_off(channel)
    synth.generate(SAMPLE_RATE // 4)  # let the voices of the previous piece decay
    used = {note.channel for note in score.notes}
    for channel in used:
        if channel == DRUMS:
            synth.program_select(channel, font, 128, 0, True)
        else:
            synth.program_select(channel, font, 0, score.programs.get(channel, 0))
        for controller, default in ((7, 100), (10, 64), (11, 127)):
            synth.control_change(channel, controller, score.controls.get((channel, controller), default))
    frames = round(seconds * SAMPLE_RATE)
    beat = 60 / bpm * SAMPLE_RATE
    events: list[tuple[int, int, int, int, int]] = []
    for note in score.notes:
        start = round(offset * SAMPLE_RATE + note.start * beat)
        stop = max(round(offset * SAMPLE_RATE + (note.start + note.duration) * beat), start + 64)
        events.append((start, 1, note.channel, note.key, note.velocity))
        events.append((stop, 0, note.channel, note.key, 0))
    events.sort()
    sound = bytearray(frames * 8)
    view, position = memoryview(sound), 0
    for time, on, channel, key, velocity in events:
        if time >= frames:
            break
        if time > position:
            synth.generate(time - position, view[position * 8 : time * 8])
            position = time
        if on:
            synth.noteon(channel, key, velocity)
        else:
            synth.noteoff(channel, key)
    if position < frames:
        synth.generate(frames - position, view[position * 8 :])
    return np.ascontiguousarray(np.frombuffer(sound, np.float32).reshape(-1, 2).T)


def room(dry: np.ndarray, seed: int) -> np.ndarray:
    """Add a small room to (2, frames) float32: independent decaying noise left and right, which widens mono sounds."""
    from scipy.fft import irfft, next_fast_len, rfft

    rng = np.random.default_rng(seed)
    length = int(ROOM_SECONDS * SAMPLE_RATE)
    decay = rng.uniform(0.25, 0.8)  # seconds to -60 dB
    predelay = int(rng.uniform(0.008, 0.025) * SAMPLE_RATE)
    wet = 10 ** (rng.uniform(-21, -11) / 20)
    time = np.arange(length) / SAMPLE_RATE
    noise = rng.standard_normal((2, length)) * 10 ** (-3 * time / decay)
    noise[:, 1:] = 0.5 * (noise[:, 1:] + noise[:, :-1])  # a low-pass: rooms absorb high frequencies
    response = np.zeros((2, length + predelay))
    response[:, predelay:] = wet * noise / np.sqrt((noise**2).sum(axis=1, keepdims=True))
    size = next_fast_len(dry.shape[1] + response.shape[1] - 1, real=True)
    source = rfft(dry.mean(axis=0), size)
    reverb: np.ndarray = irfft(source * rfft(response.astype(np.float32), size), size)[:, : dry.shape[1]]
    mixed: np.ndarray = dry + reverb.astype(np.float32)
    return mixed


def normalize_loudness(samples: np.ndarray, target_db: float) -> np.ndarray:
    """Scale (2, frames) float32 to an RMS of `target_db` dBFS in its louder half; peaks are soft-clipped below 0.98."""
    window = int(0.4 * SAMPLE_RATE)
    count = max(1, samples.shape[1] // window)
    power = (samples[:, : count * window] ** 2).reshape(2, count, -1).mean(axis=(0, 2))
    rms = float(np.sqrt(np.sort(power)[count // 2 :].mean()))
    if rms <= 0:
        return samples
    peak = float(np.abs(samples).max())
    gain = min(10 ** (target_db / 20) / rms, 1.35 / peak)
    scaled: np.ndarray = samples * np.float32(gain)
    knee, top = 0.75, 0.97
    over = np.abs(scaled) > knee
    loud = scaled[over]
    scaled[over] = np.sign(loud) * (knee + (top - knee) * np.tanh((np.abs(loud) - knee) / (top - knee)))
    return scaled


def render(score: Score, bpm: float, offset: float, seconds: float, seed: int) -> np.ndarray:
    """Render a piece with room, normalized loudness and a fade-out.

    Args:
        score: notes in beats.
        bpm: tempo in quarter notes a minute.
        offset: time of beat 0 in seconds.
        seconds: length of the result.
        seed: seed of the room and of the loudness, drawn between -18 and -15 dBFS.

    Returns:
        (2, frames) float32 in (-0.98, 0.98) at 44.1 kHz.

    Raises:
        MissingDependencyError: the soundfont or tinysoundfont is not installed.
    """
    dry = synthesize(score, bpm, offset, seconds)
    wet = room(dry, seed)
    finished = normalize_loudness(wet, float(np.random.default_rng(seed + 1).uniform(-18.0, -15.0)))
    fade = int(FADE_SECONDS * SAMPLE_RATE)
    finished[:, -fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return finished
