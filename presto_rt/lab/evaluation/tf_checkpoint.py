"""Reads a TensorFlow "tensor bundle" checkpoint without TensorFlow.

A checkpoint `P` is two files. `P.index` is a string table in the LevelDB format (sorted keys, prefix compressed, in
blocks); each value is a small protocol buffer that says where a tensor lies. `P.data-00000-of-00001` holds the
tensors, raw. Only what such checkpoints need is read: one shard, no block compression, float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import WeightsError

_MAGIC = 0xDB4775248B80FB57  # last 8 bytes of a LevelDB table
_FOOTER = 48
_DT_FLOAT = 1  # tensorflow.DataType.DT_FLOAT


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the data file."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Little-endian base-128 integer at `at`: (value, position after it)."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message: int for varints and fixed32/64, bytes for nested
    messages.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
        elif kind == 2:
            length, at = _varint(message, at)
            yield tag >> 3, message[at : at + length]
            at += length
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            yield tag >> 3, int.from_bytes(message[at : at + width], "little")
            at += width
        else:
            raise WeightsError(f"checkpoint index: protocol buffer wire type {kind} is not known")


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) pairs of one table block; a key repeats the first `shared` bytes of the one before it."""
    if table[offset + size] != 0:
        raise WeightsError("checkpoint index: compressed blocks are not supported")
    data = table[offset : offset + size]
    restarts = int.from_bytes(data[-4:], "little")
    end, at, key = len(data) - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(data, at)
        fresh, at = _varint(data, at)
        length, at = _varint(data, at)
        key = key[:shared] + data[at : at + fresh]
        at += fresh
        yield key, data[at : at + length]
        at += length


def _handle(data: bytes, at: int = 0) -> tuple[int, int, int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return offset, size, at


def _entry(message: bytes) -> Entry:
    dtype = offset = size = shard = 0
    shape: list[int] = []
    for number, value in _fields(message):
        if number == 1:
            dtype = int(value)
        elif number == 2:
            for _, dim in _fields(bytes(value)):
                shape.append(sum(int(v) for n, v in _fields(bytes(dim)) if n == 1))
        elif number == 3:
            shard = int(value)
        elif number == 4:
            offset = int(value)
        elif number == 5:
            size = int(value)
    if shard:
        raise WeightsError("checkpoint index: more than one data shard is not supported")
    return Entry(dtype, tuple(shape), offset, size)


def read_index(path: Path) -> dict[str, Entry]:
    """Names and places of every tensor in `path` (a `.index` file). Raises WeightsError if it is not one."""
    table = Path(path).read_bytes()
    if len(table) < _FOOTER or int.from_bytes(table[-8:], "little") != _MAGIC:
        raise WeightsError(f"{path} is not a TensorFlow checkpoint index; reinstall the package that holds it")
    footer = table[-_FOOTER:]
    _, _, at = _handle(footer)  # the meta-index block: empty in checkpoints
    offset, size, _ = _handle(footer, at)
    entries: dict[str, Entry] = {}
    for _, value in _block(table, offset, size):
        start, length, _ = _handle(value)
        for key, message in _block(table, start, length):
            if key:  # the empty key holds the bundle's header
                entries[key.decode()] = _entry(message)
    return entries


def read_checkpoint(folder: Path, prefix: str = "", skip: tuple[str, ...] = ("/Adam",)) -> dict[str, np.ndarray]:
    """Float32 tensors of the checkpoint `folder/prefix`, by TensorFlow name; names that contain one of `skip` are
    left out.

    Raises WeightsError when a file is missing, truncated, or not such a checkpoint.
    """
    index, data = Path(folder) / f"{prefix}.index", Path(folder) / f"{prefix}.data-00000-of-00001"
    for file in (index, data):
        if not file.is_file():
            raise WeightsError(f"{file} is missing; reinstall the package that holds it")
    raw = np.memmap(data, dtype=np.uint8, mode="r")
    tensors = {}
    for name, entry in read_index(index).items():
        if entry.dtype != _DT_FLOAT or any(part in name for part in skip):
            continue
        if entry.size != 4 * int(np.prod(entry.shape)) or entry.offset + entry.size > raw.size:
            raise WeightsError(f"{data}: tensor {name} does not fit the file; reinstall the package that holds it")
        values = np.frombuffer(raw[entry.offset : entry.offset + entry.size].tobytes(), dtype="<f4")
        tensors[name] = values.reshape(entry.shape).copy()
    return tensors
