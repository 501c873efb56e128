"""Named tensors in a file: the safetensors format, read without trust and without mapping, and written.

    u64 length of the header | header: JSON, {name: {dtype, shape, data_offsets}} | data

Data is read with plain reads, the rows asked for and no more: what is read counts as memory once.
Not covered: dtypes below a byte, and files of which only a part is there.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 100 << 20  # a header above this is refused unread
CHUNK = 1 << 17  # BF16 values widened at a time: both sides stay in the second-level cache
ALIGNMENT = 8

# dtype name -> what NumPy reads it as; BF16 and the 8-bit floats have no NumPy dtype.
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
NAMES = {np.dtype(code): name for name, code in DTYPES.items() if name not in ("BF16", "F8_E4M3", "F8_E5M2")}

Array = npt.NDArray[Any]


class TensorFileError(ValueError):
    """The file is not what its header says; the message names the file and the tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is in a file: `offset` in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file in the order of their data, nothing of it read but the header.

    Every byte behind the header belongs to exactly one tensor, as the format asks.

    Raises:
        TensorFileError: if the file is missing, truncated, or its header lies about it.
    """
    if not path.is_file():
        raise TensorFileError(f"{path}: {'is not a file' if path.exists() else 'is missing'}")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise TensorFileError(
                    f"{path}: is truncated or no safetensors file: {size:,} bytes, header of {length:,}"
                )
            if length > HEADER_BYTES:
                raise TensorFileError(f"{path}: has a header of {length:,} bytes, want at most {HEADER_BYTES:,}")
            text = file.read(length)
    except OSError as exc:
        raise TensorFileError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    entries = _parse_header(path, text)
    infos = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].offset, item[1].size_bytes)))
    end, previous = 8 + length, "the header"
    for name, info in infos.items():
        if info.offset != end:
            what = "overlaps" if info.offset < end else "leaves a hole behind"
            raise TensorFileError(f"{path}: {_short(name)} {what} {previous}: starts at byte {info.offset}, want {end}")
        end, previous = info.offset + info.size_bytes, _short(name)
    if end != size:
        what = "is truncated" if end > size else "has bytes that no tensor owns"
        raise TensorFileError(f"{path}: {what}: {size:,} bytes, its tensors end at {end:,}")
    return infos


def read_tensor(path: Path, info: TensorInfo, rows: slice | None = None) -> Array:
    """A tensor, or the rows [start, stop) of its first dimension, as a new array; BF16 becomes float32.

    Raises:
        TensorFileError: if the file has become shorter, or the dtype has no array.
        ValueError: if `rows` is outside the tensor or has a step.
    """
    shape, offset = info.shape, info.offset
    if rows is not None:
        if not shape:
            raise ValueError(f"rows {rows} of a tensor without dimensions")
        start = 0 if rows.start is None else rows.start
        stop = shape[0] if rows.stop is None else rows.stop
        if rows.step not in (None, 1) or not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"rows {start} to {stop}, step {rows.step}, of a tensor of {list(shape)}")
        offset += start * (info.size_bytes // shape[0] if shape[0] else 0)
        shape = (stop - start, *shape[1:])
    if info.dtype.startswith("F8"):
        raise TensorFileError(f"{path}: a tensor of dtype {info.dtype}, which cannot be read")
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            if info.dtype == "BF16":
                return _read_bf16(path, file, shape)
            out = np.empty(shape, dtype=DTYPES[info.dtype])
            _read_into(path, file, out)
            return out
    except OSError as exc:
        raise TensorFileError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Writes arrays to a new file; the same arrays make the same bytes, whatever their order.

    Raises:
        TensorFileError: if the file exists, cannot be written, or a dtype has no place in the format.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    entries = {}
    for name, array in arrays.items():
        little = array.dtype.newbyteorder("<")
        if little not in NAMES:
            raise TensorFileError(f"{path}: {_short(name)} is of dtype {array.dtype}, which cannot be written")
        arrays[name] = array.astype(little, copy=False)
        entries[name] = (NAMES[little], array.shape)
    stream_tensors(path, entries, lambda name: [arrays[name]])


def stream_tensors(
    path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], Iterable[Array]]
) -> None:
    """Writes tensors that are never all in memory.

    Args:
        path: a new file; removed again if anything fails.
        entries: name -> (dtype, shape).
        read: the data of a tensor in pieces, in order; called once a tensor, in the order of the file.

    Raises:
        TensorFileError: as `write_tensors`, or if the pieces do not make up the size.
    """
    # Wide dtypes go first: each tensor then starts at a multiple of its item's size.
    names = sorted(entries, key=lambda name: (-np.dtype(DTYPES[entries[name][0]]).itemsize, name))
    header, sizes, end = {}, {}, 0
    for name in names:
        dtype, shape = entries[name]
        sizes[name] = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    try:
        with path.open("xb") as file:
            try:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    written = 0
                    for piece in read(name):
                        written += file.write(np.ascontiguousarray(piece).data.cast("B") if piece.size else b"")
                    if written != sizes[name]:
                        raise TensorFileError(f"{path}: {_short(name)} got {written} bytes, want {sizes[name]}")
                file.flush()
            except BaseException:
                with suppress(OSError):
                    path.unlink()
                raise
    except FileExistsError as exc:
        raise TensorFileError(f"{path}: exists, and is never overwritten") from exc
    except OSError as exc:
        raise TensorFileError(f"{path}: cannot be written: {exc.strerror or exc}") from exc


def to_bf16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite float32 -> the bits of BF16, rounded to nearest even."""
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    rounded: npt.NDArray[np.uint16] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return rounded


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise TensorFileError(f"{path}: its header names {_short(twice)} twice")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except TensorFileError:
        raise
    except (ValueError, RecursionError) as exc:
        raise TensorFileError(f"{path}: its header is not JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise TensorFileError(f"{path}: its header holds {type(header).__name__}, want an object")
    header.pop("__metadata__", None)
    return header


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: {_short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"{where} is described by {entry!r:.80}, want dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise TensorFileError(f"{where} has dtype {dtype!r:.40}, want one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 8:
        raise TensorFileError(f"{where} has shape {shape!r:.80}, want at most 8 whole numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TensorFileError(f"{where} has data_offsets {offsets!r:.80}, want [start, end]")
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if size != offsets[1] - offsets[0]:
        found = offsets[1] - offsets[0]
        raise TensorFileError(f"{where} is {dtype} {shape} in {found} bytes, want {size!r:.40}")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], size)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _short(name: str) -> str:
    return name if len(name) <= 120 and name.isprintable() else f"{name!r:.120}"


def _read_bf16(path: Path, file: FileIO, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """BF16 is the upper half of a float32."""
    out = np.empty(shape, dtype="<u4")
    flat = out.reshape(-1)
    buffer = np.empty(min(CHUNK, flat.size), dtype="<u2")
    for start in range(0, flat.size, CHUNK):
        piece = buffer[: flat.size - start]
        _read_into(path, file, piece)
        np.left_shift(piece, 16, out=flat[start : start + CHUNK], dtype=np.uint32)
    return out.view("<f4")


def _read_into(path: Path, file: FileIO, out: Array) -> None:
    """Fills a contiguous array; a read may return less than asked for."""
    if not out.size:
        return
    view = out.reshape(-1).view("u1").data
    while view:
        count = file.readinto(view)
        if not count:
            raise TensorFileError(f"{path}: ends {len(view):,} bytes before the end of a tensor")
        view = view[count:]
