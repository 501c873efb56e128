"""weight.bin of a Core ML package: tensors one after the other, read without trust, and written.

    header, 64 bytes: u32 number of blobs | u32 version, 2 | zeros
    blob: its metadata, 64 bytes, then its data, each at a multiple of 64
    metadata: u32 0xDEADBEEF | u32 type | u64 size in bytes | u64 offset of the data | u64 padding in bits | zeros

A blob is known by the offset of its metadata. 4-bit integers lie two in a byte, the earlier in the low nibble; an odd
last one leaves 4 bits of padding. Layout and type numbers are those of MILBlob (StorageFormat.hpp and BlobDataType.hpp
of coremltools), whose own reader and writer the tests compare with. Numbers are little-endian.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
VERSION = 2
HEADER, METADATA = struct.Struct("<II56x"), struct.Struct("<IIQQQ32x")
# type name as in MIL text -> its number here, bits a value
TYPES = {
    "fp16": (1, 16),
    "fp32": (2, 32),
    "uint8": (3, 8),
    "int8": (4, 8),
    "int16": (6, 16),
    "uint16": (7, 16),
    "int4": (8, 4),
    "uint4": (11, 4),
    "int32": (14, 32),
    "uint32": (15, 32),
}
NAMES = {number: name for name, (number, _) in TYPES.items()}
DTYPES = {
    "fp16": "<f2",
    "fp32": "<f4",
    "uint8": "u1",
    "int8": "i1",
    "int16": "<i2",
    "uint16": "<u2",
    "int32": "<i4",
    "uint32": "<u4",
}


class BlobError(ValueError):
    """The file is not what its records say; the message names the file and the offset."""


@dataclass(frozen=True)
class Blob:
    """Where a tensor lies: `at` is the offset of its metadata, `offset` that of its data."""

    type: str
    at: int
    offset: int
    size_bytes: int
    padding_bits: int

    @property
    def values(self) -> int:
        """How many values it holds."""
        return (self.size_bytes * 8 - self.padding_bits) // TYPES[self.type][1]


class BlobWriter:
    """Writes a weight.bin, blob by blob.

    Args:
        path: the file; made, and an existing one is an error.
        check: read an existing file instead, and compare what would be written with what is there.
    """

    def __init__(self, path: Path, *, check: bool = False) -> None:
        self.path, self._check, self._count, self._end = path, check, 0, HEADER.size
        self.different: list[str] = []  # with `check`: what is not what it should be
        self._file: BinaryIO = path.open("rb" if check else "xb")

    def write(self, type_name: str, data: Array, values: int, title: str) -> int:
        """Appends a blob; returns the offset that it is known by.

        Args:
            type_name: a key of TYPES.
            data: of its NumPy type; for 4 bits u8, packed, the low nibble first.
            values: how many there are.
            title: the name to give in `different`.
        """
        number, bits = TYPES[type_name]
        data = np.ascontiguousarray(data, dtype=np.uint8 if bits < 8 else DTYPES[type_name])
        padding = data.nbytes * 8 - values * bits
        if not 0 <= padding < 8:
            raise ValueError(f"{title}: {data.nbytes} bytes for {values} values of {bits} bits")
        at = _aligned(self._end)
        record = METADATA.pack(SENTINEL, number, data.nbytes, at + METADATA.size, padding)
        self._put(at, record, f"{title}: metadata")
        self._put(at + METADATA.size, data.reshape(-1).view(np.uint8).data, title)
        self._end = at + METADATA.size + data.nbytes
        self._count += 1
        return at

    def close(self) -> None:
        """Ends the file; only now does it say how many blobs it holds."""
        if not self._file.closed:
            self._put(0, HEADER.pack(self._count, VERSION), "header")
            if self._check and self.path.stat().st_size > self._end:
                self.different.append("bytes behind the last tensor")
            self._file.close()

    def _put(self, offset: int, content: bytes | memoryview, title: str) -> None:
        self._file.seek(offset)
        if not self._check:
            self._file.write(content)
        elif self._file.read(len(content)) != content:
            self.different.append(title)


def read_blobs(path: Path) -> dict[int, Blob]:
    """Every blob of a file by the offset of its metadata, nothing of the data read.

    Raises:
        BlobError: if the file is missing, truncated, or its records lie about it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return {blob.at: blob for blob in _walk(path, file, size)}
    except OSError as exc:
        raise BlobError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def _walk(path: Path, file: BinaryIO, size: int) -> Iterator[Blob]:
    head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise BlobError(f"{path}: is truncated: {size} bytes, its header alone has {HEADER.size}")
    count, version = HEADER.unpack(head)
    if version != VERSION:
        raise BlobError(f"{path}: has version {version}, want {VERSION}")
    end = HEADER.size
    for number in range(count):
        at = _aligned(end)
        file.seek(at)
        where = f"{path}: blob {number} at byte {at}"
        record = file.read(METADATA.size)
        if len(record) < METADATA.size:
            raise BlobError(f"{where}: is beyond the file's end: {size} bytes for {count} blobs, so truncated")
        sentinel, kind, length, offset, padding = METADATA.unpack(record)
        if sentinel != SENTINEL:
            raise BlobError(f"{where}: begins with {sentinel:#x}, want {SENTINEL:#x}")
        if kind not in NAMES:
            raise BlobError(f"{where}: has type {kind}, want one of {sorted(NAMES)}")
        if offset != at + METADATA.size:
            raise BlobError(f"{where}: has its data at byte {offset}, want {at + METADATA.size}")
        if offset + length > size:
            raise BlobError(f"{where}: ends at byte {offset + length}, but the file at {size}: truncated")
        bits = TYPES[NAMES[kind]][1]
        if padding >= 8 or (length * 8 - padding) % bits:
            raise BlobError(f"{where}: {length} bytes less {padding} bits, want whole values of {bits} bits")
        yield Blob(NAMES[kind], at, offset, length, padding)
        end = offset + length
    if size > end:
        raise BlobError(f"{path}: has {size - end} bytes behind its {count} blobs")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def read_blob(path: Path, blob: Blob, shape: tuple[int, ...]) -> Array:
    """A blob's values in their NumPy type, 4-bit ones as i8 or u8, in `shape`.

    Raises:
        BlobError: if the shape is not that of the values, or the file has become shorter.
    """
    if math.prod(shape) != blob.values:
        raise BlobError(f"{path}: blob at byte {blob.at} holds {blob.values} values, want {list(shape)}")
    try:
        with path.open("rb") as file:
            data = np.fromfile(file, dtype=np.uint8, count=blob.size_bytes, offset=blob.offset)
    except OSError as exc:
        raise BlobError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    if data.size < blob.size_bytes:
        raise BlobError(f"{path}: ends {blob.size_bytes - data.size} bytes before the end of the blob at {blob.at}")
    if blob.type in DTYPES:
        return data.view(DTYPES[blob.type]).reshape(shape)
    out = np.empty((data.size, 2), dtype=np.uint8)
    np.bitwise_and(data, 15, out=out[:, 0])
    np.right_shift(data, 4, out=out[:, 1])
    nibbles = out.reshape(-1)[: blob.values]
    if blob.type == "int4":
        return ((nibbles ^ 8).view(np.int8) - np.int8(8)).reshape(shape)
    return nibbles.reshape(shape)
