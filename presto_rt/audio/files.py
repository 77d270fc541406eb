"""Audio files: check a path, write samples to it whole or not at all, read samples back.

WAV files are encoded here, byte for byte reproducible; libsndfile writes FLAC and Ogg Vorbis and reads every format.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..errors import InvalidInputError, OutputError
from .pcm import to_pcm

# Sample formats of each kind of file, the default first. Ogg Vorbis is lossy and has no sample format.
SUBTYPES: dict[str, tuple[str | None, ...]] = {
    ".wav": ("pcm16", "pcm24", "float32"),
    ".flac": ("pcm16", "pcm24"),
    ".ogg": (None,),
}

_BITS = {"pcm16": 16, "pcm24": 24}
_SOFTWARE = "Presto-RT"
_WAV_PCM, _WAV_FLOAT = 1, 3  # format codes of a RIFF file
_WAV_MAX_BYTES = 0xFFFFFF00  # sizes in a RIFF file are 32-bit
_WRITE_BLOCK = 1 << 15  # frames; libsndfile's Vorbis encoder overflows its stack on one huge write


def check_writable(path: str | os.PathLike[str], subtype: str | None = None) -> Path:
    """Return the absolute path, links followed, if `Audio.save(path, subtype)` can write there.

    Call it before any long work: nothing is left on disk and an existing file stays as it is.

    Raises:
        OutputError: The suffix is unknown, cannot hold the subtype, or the place is not writable.
    """
    return resolve_target(path, subtype)[0]


def resolve_target(path: str | os.PathLike[str], subtype: str | None) -> tuple[Path, str | None]:
    """Return the absolute target and the subtype with its default filled in. Raises OutputError as `check_writable`."""
    target = Path(os.path.realpath(Path(path).expanduser()))
    suffix = target.suffix.lower()
    known = SUBTYPES.get(suffix)
    if known is None:
        raise OutputError(
            f"cannot tell the kind of file from {Path(path).name!r}; end its name in {', '.join(SUBTYPES)}"
        )
    if subtype is not None and subtype not in known:
        choices = ", ".join(repr(name) for name in known if name) or "no subtype"
        raise OutputError(f"a {suffix} file cannot hold {subtype!r}; use {choices}")
    if target.is_dir():
        raise OutputError(f"{target} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise OutputError(f"the folder {target.parent} does not exist; create it first")
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputError(f"{target} exists and is read-only; choose another name or change its permissions")
    _write_whole(target, lambda part: part.touch(), keep=False)
    return target, subtype or known[0]


def write(
    target: Path, samples: np.ndarray, sample_rate: int, subtype: str | None, *, seed: int = 0, comment: str = ""
) -> None:
    """Write samples to a target that `resolve_target` returned. The file appears whole or not at all.

    Args:
        target: Absolute path that ends in .wav, .flac or .ogg.
        samples: (channels, frames): float32, nominally in [-1, 1], with NaN written as silence, or int16 for
            "pcm16".
        sample_rate: Hz.
        subtype: "pcm16" (float32 samples are dithered), "pcm24", "float32", or None for Vorbis.
        seed: Seed of the dither.
        comment: Text of the file's comment tag; empty for none.

    Raises:
        OutputError: The disk is full, the place is not writable, or a .wav file would exceed 4 GiB.
    """
    suffix = target.suffix.lower()
    if suffix == ".wav":
        data = encode_wav(samples, sample_rate, subtype or "pcm16", seed=seed, comment=comment)
        _write_whole(target, lambda part: _write_bytes(part, data))
        return

    def encode(part: Path) -> None:
        _encode_libsndfile(part, suffix, samples, sample_rate, subtype, seed, comment)

    _write_whole(target, encode)


def read(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """Return the samples of an audio file, float32 (channels, frames) with 1 or 2 channels, and their rate in Hz.

    Raises:
        InvalidInputError: The file is missing, empty, not audio, or has more than two channels.
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
        raise InvalidInputError(f"{source} holds no samples; give a file with at least one frame")
    if data.shape[1] > 2:
        raise InvalidInputError(f"{source} has {data.shape[1]} channels; mix it down to mono or stereo first")
    return np.ascontiguousarray(data.T), int(rate)


def encode_wav(
    samples: np.ndarray, sample_rate: int, subtype: str = "pcm16", *, seed: int = 0, comment: str = ""
) -> bytes:
    """Return the bytes of a whole RIFF file. libsndfile would put the time of day into float files.

    Args:
        samples: float32 (channels, frames), nominally in [-1, 1]. NaN is written as silence.
        sample_rate: Hz.
        subtype: "pcm16" (dithered), "pcm24" or "float32".
        seed: Seed of the dither.
        comment: Text of the file's comment tag; empty for none.

    Raises:
        OutputError: The file would exceed 4 GiB.
    """
    channels, frames = samples.shape
    if subtype == "float32":
        code, width = _WAV_FLOAT, 4
        payload = np.nan_to_num(samples.T, nan=0.0, posinf=np.inf, neginf=-np.inf).astype("<f4").tobytes()
    else:
        code, width = _WAV_PCM, _BITS[subtype] // 8
        integers = _integers(samples, subtype, seed)
        integers = integers.astype(f"<i{integers.itemsize}")
        payload = integers.view(np.uint8).reshape(*integers.shape, -1)[..., :width].tobytes()
    align = channels * width
    header = struct.pack("<HHIIHH", code, channels, sample_rate, sample_rate * align, align, 8 * width)
    chunks = _chunk(b"fmt ", header)
    if subtype == "float32":
        chunks += _chunk(b"fact", struct.pack("<I", frames))
    tags = _chunk(b"ISFT", _SOFTWARE.encode() + b"\0")
    if comment:
        tags += _chunk(b"ICMT", comment.encode() + b"\0")
    chunks += _chunk(b"LIST", b"INFO" + tags)
    if len(payload) + len(chunks) > _WAV_MAX_BYTES:
        raise OutputError("a .wav file holds at most 4 GiB; save as .flac or make a shorter clip")
    return _chunk(b"RIFF", b"WAVE" + chunks + _chunk(b"data", payload))


def _encode_libsndfile(
    part: Path, suffix: str, samples: np.ndarray, sample_rate: int, subtype: str | None, seed: int, comment: str
) -> None:
    """Encode FLAC or, with no subtype, Ogg Vorbis."""
    import soundfile

    if subtype is None:
        data = np.nan_to_num(samples.T, nan=0.0, posinf=1.0, neginf=-1.0).clip(-1.0, 1.0)
        encoding = {"format": "OGG", "subtype": "VORBIS"}
    else:
        data = _integers(samples, subtype, seed)
        data = data << 8 if subtype == "pcm24" else data  # libsndfile takes the upper 24 bits of an int32
        encoding = {"format": suffix[1:].upper(), "subtype": f"PCM_{_BITS[subtype]}"}
    with soundfile.SoundFile(part, "w", sample_rate, samples.shape[0], **encoding) as file:
        file.software = _SOFTWARE
        if comment:
            file.comment = comment
        for start in range(0, len(data), _WRITE_BLOCK):
            file.write(data[start : start + _WRITE_BLOCK])


def _integers(samples: np.ndarray, subtype: str, seed: int) -> np.ndarray:
    """Interleaved integers of a PCM subtype; float32 samples are dithered to 16 bits, int16 ones are kept."""
    if samples.dtype == np.int16:
        return samples.T.copy()
    integers: np.ndarray = to_pcm(
        torch.from_numpy(samples), _BITS[subtype], dither=subtype == "pcm16", seed=seed
    ).numpy()
    return integers


def _write_whole(target: Path, write_part: Callable[[Path], object], keep: bool = True) -> None:
    """Write to a hidden file beside the target and rename it, so that no reader meets half a file."""
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        write_part(part)
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
