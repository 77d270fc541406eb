"""Notes, and a reader and writer of standard MIDI files of constant tempo. Times are in beats (quarter notes)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from ...errors import InvalidInputError

TICKS = 480
DRUMS = 9
CONTROLLERS = (7, 10, 11)  # volume, pan, expression


@dataclass(frozen=True, order=True)
class Note:
    """A note: onset and duration in beats, MIDI key and velocity 1..127, channel 0..15 (9 is drums)."""

    start: float
    channel: int
    key: int
    duration: float
    velocity: int


@dataclass
class Score:
    """Notes with the program of each channel and constant controller values {(channel, controller): value}."""

    notes: list[Note] = field(default_factory=list)
    programs: dict[int, int] = field(default_factory=dict)
    controls: dict[tuple[int, int], int] = field(default_factory=dict)


def to_bytes(score: Score, bpm: float) -> bytes:
    """Encode a score as a format-0 MIDI file of one tempo, 480 ticks a beat."""
    events: list[tuple[int, int, bytes]] = [(0, 0, b"\xff\x51\x03" + round(60e6 / bpm).to_bytes(3, "big"))]
    for channel, program in sorted(score.programs.items()):
        events.append((0, 1, bytes([0xC0 | channel, program])))
    for (channel, controller), value in sorted(score.controls.items()):
        events.append((0, 2, bytes([0xB0 | channel, controller, value])))
    for note in sorted(score.notes):
        start, stop = round(note.start * TICKS), round((note.start + note.duration) * TICKS)
        events.append((start, 4, bytes([0x90 | note.channel, note.key, note.velocity])))
        events.append((max(stop, start + 1), 3, bytes([0x80 | note.channel, note.key, 0])))
    events.sort()
    track, last = bytearray(), 0
    for tick, _, message in events:
        track += _variable(tick - last) + message
        last = tick
    track += b"\x00\xff\x2f\x00"
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS) + b"MTrk" + struct.pack(">I", len(track)) + bytes(track)


def from_bytes(data: bytes) -> Score:
    """Read the notes of a MIDI file, with each channel's first program, volume, pan and expression.

    Tempo, pitch bends and system messages are ignored; times are in beats. Raises InvalidInputError without a MIDI
    header.
    """
    if data[:4] != b"MThd":
        raise InvalidInputError("not a MIDI file: it does not start with MThd")
    tracks, division = struct.unpack(">HH", data[10:14])
    position, score = 14, Score()
    for _ in range(tracks):
        length = struct.unpack(">I", data[position + 4 : position + 8])[0]
        _read_track(data[position + 8 : position + 8 + length], division, score)
        position += 8 + length
    score.notes.sort()
    return score


def _read_track(data: bytes, division: int, score: Score) -> None:
    open_notes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    position = tick = status = 0
    while position < len(data):
        step, position = _read_variable(data, position)
        tick += step
        if data[position] & 0x80:
            status = data[position]
            position += 1
        if status in (0xFF, 0xF0, 0xF7):
            position += status == 0xFF  # the meta type
            length, position = _read_variable(data, position)
            position += length
            continue
        kind, channel = status & 0xF0, status & 0x0F
        first = data[position]
        second = 0 if kind in (0xC0, 0xD0) else data[position + 1]
        position += 1 if kind in (0xC0, 0xD0) else 2
        if kind == 0x90 and second:
            open_notes.setdefault((channel, first), []).append((tick, second))
        elif kind in (0x80, 0x90):
            started = open_notes.get((channel, first))
            if started:
                start, velocity = started.pop(0)
                duration = max(tick - start, 1) / division
                score.notes.append(Note(start / division, channel, first, duration, velocity))
        elif kind == 0xC0:
            score.programs.setdefault(channel, first)
        elif kind == 0xB0 and first in CONTROLLERS:
            score.controls.setdefault((channel, first), second)


def _variable(value: int) -> bytes:
    out = [value & 0x7F]
    while value := value >> 7:
        out.append(0x80 | value & 0x7F)
    return bytes(reversed(out))


def _read_variable(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    while True:
        byte = data[position]
        position += 1
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            return value, position
