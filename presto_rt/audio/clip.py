"""Audio: what a generation returns. Samples with their rate, and saving, playing and loading them."""

from __future__ import annotations

import base64
import html
import logging
import os
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..diffusion.noise import check_seed
from ..errors import InvalidInputError, OutputError
from ..models.config import SAMPLE_RATE
from .pcm import to_pcm
from .resample import resample

# What each kind of file can hold, the default first. Ogg Vorbis is lossy and has no sample format.
SUBTYPES: dict[str, tuple[str | None, ...]] = {
    ".wav": ("pcm16", "pcm24", "float32"),
    ".flac": ("pcm16", "pcm24"),
    ".ogg": (None,),
}

_BITS = {"pcm16": 16, "pcm24": 24}
_WRITE_BLOCK = 1 << 15  # frames; libsndfile's Vorbis encoder overflows its stack on one huge write

log = logging.getLogger("presto_rt")


@dataclass(frozen=True, eq=False)
class Audio:
    """Samples float32 (channels, frames), 1 or 2 channels, nominally in [-1, 1], at sample_rate (Hz).

    seed and prompt are what it was generated from, if it was; timings are seconds by stage. Raises InvalidInputError for
    anything that is not such an array.
    """

    samples: np.ndarray
    sample_rate: int = SAMPLE_RATE
    seed: int | None = None
    prompt: str | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        samples = np.asarray(self.samples)
        if not np.issubdtype(samples.dtype, np.floating):
            raise InvalidInputError(f"samples must be floating point in [-1, 1], got {samples.dtype}")
        if samples.ndim != 2 or samples.shape[0] not in (1, 2) or samples.shape[1] < 1:
            raise InvalidInputError(f"samples must have the shape (1 or 2 channels, frames), got {samples.shape}")
        rate: object = self.sample_rate
        if isinstance(rate, bool) or not isinstance(rate, Integral) or not 1 <= int(rate) <= 384_000:
            raise InvalidInputError(f"sample_rate must be an integer from 1 to 384000 Hz, got {rate!r}")
        if self.seed is not None:
            check_seed(self.seed)
        object.__setattr__(self, "samples", np.require(samples, np.float32, ["C", "W"]))
        object.__setattr__(self, "sample_rate", int(rate))

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return float(self.samples.shape[1] / self.sample_rate)

    def to_int16(self, dither: bool = True) -> np.ndarray:
        """Interleaved 16-bit samples, int16 (frames, channels). The dither follows from the seed, so it is
        repeatable."""
        return self._integers(16, dither)

    def save(self, path: str | os.PathLike[str], subtype: str | None = None) -> Path:
        """Writes a .wav, .flac or .ogg file and returns its path.

        subtype: "pcm16" (dithered; the default of .wav and .flac), "pcm24", or "float32" (.wav only); .ogg is Vorbis.
        The file appears whole or not at all. NaN is written as silence. Prompt and seed go into the file's comment.
        The same audio gives the same bytes, except in .ogg, whose stream number is random. Raises OutputError where
        it cannot be written.
        """
        target, subtype = _resolve(path, subtype)
        if np.isnan(self.samples).any():
            log.warning("samples hold NaN, written as silence to %s", target)
        if target.suffix.lower() == ".wav":
            data = self._wav(subtype or "pcm16")
            _write_whole(target, lambda part: _write_bytes(part, data))
        else:
            _write_whole(target, lambda part: self._write_soundfile(part, target.suffix.lower(), subtype))
        return target

    def _integers(self, bits: int, dither: bool) -> np.ndarray:
        seed = self.seed if self.seed is not None else 0
        return to_pcm(torch.from_numpy(self.samples), bits, dither=dither, seed=seed).numpy()

    def _comment(self) -> str:
        # Arguments that are not UTF-8 come as lone surrogates, which no file can hold.
        parts = [self.prompt.encode("utf-8", "replace").decode()] if self.prompt else []
        return "; ".join(parts + ([f"seed {self.seed}"] if self.seed is not None else []))

    def _wav(self, subtype: str) -> bytes:
        """A whole RIFF file. Written here because libsndfile puts the time of day into float files."""
        channels = self.samples.shape[0]
        if subtype == "float32":
            code, width = 3, 4
            payload = np.nan_to_num(self.samples.T, nan=0.0, posinf=np.inf, neginf=-np.inf).astype("<f4").tobytes()
        else:
            code, width = 1, _BITS[subtype] // 8
            integers = self._integers(_BITS[subtype], dither=subtype == "pcm16")
            integers = integers.astype(f"<i{integers.itemsize}")
            payload = integers.view(np.uint8).reshape(*integers.shape, -1)[..., :width].tobytes()
        rate = self.sample_rate
        chunks = _chunk(
            b"fmt ", struct.pack("<HHIIHH", code, channels, rate, rate * channels * width, channels * width, 8 * width)
        )
        if code == 3:
            chunks += _chunk(b"fact", struct.pack("<I", self.samples.shape[1]))
        tags = _chunk(b"ISFT", b"Presto-RT\0")
        if self._comment():
            tags += _chunk(b"ICMT", self._comment().encode() + b"\0")
        chunks += _chunk(b"LIST", b"INFO" + tags)
        if len(payload) + len(chunks) > 0xFFFFFF00:
            raise OutputError("a .wav file holds at most 4 GiB; save as .flac or make a shorter clip")
        return _chunk(b"RIFF", b"WAVE" + chunks + _chunk(b"data", payload))

    def _write_soundfile(self, part: Path, suffix: str, subtype: str | None) -> None:
        import soundfile

        if subtype is None:
            data = np.nan_to_num(self.samples.T, nan=0.0, posinf=1.0, neginf=-1.0).clip(-1.0, 1.0)
            kind = {"format": "OGG", "subtype": "VORBIS"}
        else:
            data = self._integers(_BITS[subtype], dither=subtype == "pcm16")
            data = data << 8 if subtype == "pcm24" else data  # libsndfile takes the upper 24 bits of an int32
            kind = {"format": suffix[1:].upper(), "subtype": f"PCM_{_BITS[subtype]}"}
        with soundfile.SoundFile(part, "w", self.sample_rate, self.samples.shape[0], **kind) as file:
            file.software = "Presto-RT"
            if self._comment():
                file.comment = self._comment()
            for start in range(0, len(data), _WRITE_BLOCK):
                file.write(data[start : start + _WRITE_BLOCK])

    def _repr_html_(self) -> str:
        """A player for notebooks."""
        source = base64.b64encode(self._wav("pcm16")).decode()
        caption = html.escape(self._comment() or f"{self.seconds:.1f} s")
        player = f'<audio controls src="data:audio/wav;base64,{source}"></audio>'
        return f"<figure>{player}<figcaption>{caption}</figcaption></figure>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and dtype not in (None, np.float32, np.dtype(np.float32)):
            raise ValueError("samples are float32; another dtype needs a copy")
        samples = self.samples if dtype is None else self.samples.astype(dtype, copy=False)
        return samples.copy() if copy else samples

    def __repr__(self) -> str:
        channels = "mono" if self.samples.shape[0] == 1 else "stereo"
        return (
            f"Audio({self.seconds:.2f} s, {channels}, {self.sample_rate} Hz, seed={self.seed}, prompt={self.prompt!r})"
        )


def check_writable(path: str | os.PathLike[str], subtype: str | None = None) -> Path:
    """The absolute path, links followed, if `Audio.save(path, subtype)` can write there; call it before any long work.

    Raises OutputError for an unknown suffix, a subtype that the suffix cannot hold, and a place that cannot be
    written to.
    """
    return _resolve(path, subtype)[0]


def load(path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE) -> Audio:
    """Reads an audio file (mono or stereo, any rate) and resamples it to sample_rate (Hz).

    Raises InvalidInputError for a file that is missing, empty, not audio, or of more than two channels.
    """
    import soundfile

    source = Path(path).expanduser()
    if not source.is_file():
        raise InvalidInputError(f"no such file: {source}")
    try:
        data, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InvalidInputError(
            f"cannot read {source} as audio ({_one_line(error)}); give a WAV, FLAC, Ogg or MP3 file"
        ) from None
    if data.shape[0] < 1:
        raise InvalidInputError(f"{source} holds no samples")
    if data.shape[1] > 2:
        raise InvalidInputError(f"{source} has {data.shape[1]} channels; mix it down to mono or stereo first")
    samples = resample(torch.from_numpy(np.ascontiguousarray(data.T)), rate, sample_rate)
    return Audio(samples.numpy(), sample_rate)


def _resolve(path: str | os.PathLike[str], subtype: str | None) -> tuple[Path, str | None]:
    """The absolute target and the subtype with its default filled in."""
    target = Path(os.path.realpath(Path(path).expanduser()))
    known = SUBTYPES.get(target.suffix.lower())
    if known is None:
        raise OutputError(
            f"cannot tell the kind of file from {Path(path).name!r}; end its name in {', '.join(SUBTYPES)}"
        )
    if subtype is not None and subtype not in known:
        choices = ", ".join(repr(name) for name in known if name) or "no subtype"
        raise OutputError(f"a {target.suffix.lower()} file cannot hold {subtype!r}; use {choices}")
    if target.is_dir():
        raise OutputError(f"{target} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise OutputError(f"the folder {target.parent} does not exist; create it first")
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputError(
            f"{target} is there and may not be overwritten; choose another name or change its permissions"
        )
    _write_whole(target, lambda part: part.touch(), keep=False)
    return target, subtype or known[0]


def _write_whole(target: Path, write: Callable[[Path], object], keep: bool = True) -> None:
    """Writes to a hidden file beside the target and renames it, so that nobody sees half a file."""
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        write(part)
        if keep:
            os.replace(part, target)
    except (OSError, RuntimeError) as error:  # soundfile's errors are RuntimeErrors
        raise OutputError(f"cannot write {target} ({_one_line(error)}); choose another place") from None
    finally:
        part.unlink(missing_ok=True)


def _write_bytes(part: Path, data: bytes) -> None:
    with part.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _chunk(name: bytes, body: bytes) -> bytes:
    """A RIFF chunk, padded to an even size."""
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _one_line(error: BaseException) -> str:
    strerror = getattr(error, "strerror", None)
    return " ".join(str(strerror or error).split())
