"""Read a TensorFlow "tensor bundle" checkpoint without TensorFlow.

A checkpoint `P` consists of two files. `P.index` is a string table in the LevelDB format (sorted keys, prefix
compressed, in blocks), whose values are protocol buffers with the dtype, shape, offset and size of each tensor.
`P.data-00000-of-00001` holds the raw tensors. Supported are one shard, uncompressed blocks and float32.
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
class TensorLocation:
    """Location of a tensor in the data file: TensorFlow dtype, shape, and offset and size in bytes."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Read the little-endian base-128 integer at `position`: (value, position after it)."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protocol buffer message: int for varints and fixed32/64, bytes for messages."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
        elif kind == 2:
            length, position = _varint(message, position)
            yield tag >> 3, message[position : position + length]
            position += length
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            yield tag >> 3, int.from_bytes(message[position : position + width], "little")
            position += width
        else:
            raise WeightsError(f"checkpoint index: protocol buffer wire type {kind} is not supported")


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) pairs of a table block; a key repeats the first `shared` bytes of the previous key."""
    if table[offset + size] != 0:
        raise WeightsError("checkpoint index: compressed blocks are not supported")
    data = table[offset : offset + size]
    restarts = int.from_bytes(data[-4:], "little")
    end, position, key = len(data) - 4 * (restarts + 1), 0, b""
    while position < end:
        shared, position = _varint(data, position)
        unshared, position = _varint(data, position)
        length, position = _varint(data, position)
        key = key[:shared] + data[position : position + unshared]
        position += unshared
        yield key, data[position : position + length]
        position += length


def _handle(data: bytes, position: int = 0) -> tuple[int, int, int]:
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return offset, size, position


def _entry(message: bytes) -> TensorLocation:
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
    return TensorLocation(dtype, tuple(shape), offset, size)


def read_index(path: Path) -> dict[str, TensorLocation]:
    """Read the location of each tensor from an `.index` file, by name. Raises WeightsError for other files."""
    table = Path(path).read_bytes()
    if len(table) < _FOOTER or int.from_bytes(table[-8:], "little") != _MAGIC:
        raise WeightsError(f"{path} is not a TensorFlow checkpoint index; reinstall the package that holds it")
    footer = table[-_FOOTER:]
    _, _, position = _handle(footer)  # the meta-index block: empty in checkpoints
    offset, size, _ = _handle(footer, position)
    entries: dict[str, TensorLocation] = {}
    for _, value in _block(table, offset, size):
        start, length, _ = _handle(value)
        for key, message in _block(table, start, length):
            if key:  # the empty key holds the bundle's header
                entries[key.decode()] = _entry(message)
    return entries


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Read the float32 tensors of the checkpoint in `folder`, by TensorFlow name, without the optimizer's.

    Raises WeightsError if a file is missing, truncated, or not a supported checkpoint.
    """
    index, data = Path(folder) / ".index", Path(folder) / ".data-00000-of-00001"
    for file in (index, data):
        if not file.is_file():
            raise WeightsError(f"{file} is missing; reinstall the package that holds it")
    raw = np.memmap(data, dtype=np.uint8, mode="r")
    tensors = {}
    for name, location in read_index(index).items():
        if location.dtype != _DT_FLOAT or "/Adam" in name:
            continue
        if location.size != 4 * int(np.prod(location.shape)) or location.offset + location.size > raw.size:
            raise WeightsError(f"{data}: tensor {name} does not fit the file; reinstall the package that holds it")
        values = np.frombuffer(raw[location.offset : location.offset + location.size].tobytes(), dtype="<f4")
        tensors[name] = values.reshape(location.shape).copy()
    return tensors
