"""weight.bin: the same bytes as Apple's own writer, read by Apple's own reader; and files that lie."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.blobfile import BlobError, BlobWriter, read_blob, read_blobs

R = np.random.default_rng(0)
SAMPLES: list[tuple[str, Any]] = [
    ("uint4", R.integers(0, 16, 250).astype(np.uint8)),
    ("fp16", R.standard_normal(17).astype(np.float16)),
    ("int8", R.integers(-128, 128, 33).astype(np.int8)),
    ("int4", R.integers(-8, 8, 64).astype(np.int8)),
    ("uint8", R.integers(0, 256, 64).astype(np.uint8)),
    ("fp32", R.standard_normal(5).astype(np.float32)),
]


def packed(name: str, values: Any) -> Any:
    """The values as BlobWriter takes them."""
    if not name.endswith("int4"):
        return values
    low = np.append(values, [0])[: values.size + values.size % 2].astype(np.uint8) & 15
    return (low[0::2] | (low[1::2] << 4)).astype(np.uint8)


def write(path: Path, samples: list[tuple[str, Any]], *, check: bool = False) -> tuple[list[int], list[str]]:
    writer = BlobWriter(path, check=check)
    offsets = [writer.write(name, packed(name, v), v.size, f"{name} {i}") for i, (name, v) in enumerate(samples)]
    writer.close()
    return offsets, writer.different


def test_the_bytes_are_those_of_apples_writer(tmp_path: Path) -> None:
    storage = pytest.importorskip("coremltools.libmilstoragepython")
    theirs = storage._BlobStorageWriter(str(tmp_path / "theirs.bin"))  # noqa: SLF001  # the only one there is
    methods = {"fp32": "write_float_data"}
    wanted = [
        getattr(theirs, methods.get(name, f"write_{name}_data"))(values.view(np.uint16) if name == "fp16" else values)
        for name, values in SAMPLES
    ]
    del theirs  # now the file is written out
    offsets, _ = write(tmp_path / "ours.bin", SAMPLES)
    assert offsets == wanted
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()


def test_apples_reader_reads_it(tmp_path: Path) -> None:
    storage = pytest.importorskip("coremltools.libmilstoragepython")
    odd = [("uint4", R.integers(0, 16, 251).astype(np.uint8)), *SAMPLES]
    offsets, _ = write(tmp_path / "ours.bin", odd)
    reader = storage._BlobStorageReader(str(tmp_path / "ours.bin"))  # noqa: SLF001
    for (name, values), at in zip(odd, offsets, strict=True):
        found = np.asarray(getattr(reader, f"read_{'float' if name == 'fp32' else name}_data")(at))
        assert np.array_equal(found.view(np.float16) if name == "fp16" else found, values)


@given(st.lists(st.tuples(st.sampled_from(["uint4", "int4", "int8", "fp16"]), st.integers(1, 200)), max_size=8))
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, int]]) -> None:
    path = tmp_path_factory.mktemp("blobs") / "weight.bin"
    low = {
        "uint4": (0, 16, np.uint8),
        "int4": (-8, 8, np.int8),
        "int8": (-128, 128, np.int8),
        "fp16": (-9, 9, np.float16),
    }
    samples = [(name, R.integers(*low[name][:2], size).astype(low[name][2])) for name, size in plan]
    offsets, _ = write(path, samples)
    blobs = read_blobs(path)
    assert list(blobs) == offsets
    for (name, values), at in zip(samples, offsets, strict=True):
        assert blobs[at].type == name
        assert np.array_equal(read_blob(path, blobs[at], (values.size,)), values)


def test_a_check_names_what_is_different(tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    offsets, _ = write(path, SAMPLES)
    assert write(path, SAMPLES, check=True)[1] == []
    content = bytearray(path.read_bytes())
    content[offsets[2] + 64 + 5] ^= 1
    path.write_bytes(content)
    assert write(path, SAMPLES, check=True)[1] == ["int8 2"]
    path.write_bytes(content + b"\0")
    assert write(path, SAMPLES, check=True)[1] == ["int8 2", "bytes behind the last tensor"]
    assert "header" in write(path, SAMPLES[:-1], check=True)[1]


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "weight.bin").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        BlobWriter(tmp_path / "weight.bin")
    assert (tmp_path / "weight.bin").read_bytes() == b"mine"


def test_bytes_that_do_not_make_up_the_values_are_refused(tmp_path: Path) -> None:
    writer = BlobWriter(tmp_path / "weight.bin")
    with pytest.raises(ValueError, match="2 bytes for 5 values of 4 bits"):
        writer.write("uint4", np.zeros(2, np.uint8), 5, "q")
    writer.close()


def damaged(content: bytes, at: int, form: str, *values: int) -> bytes:
    out = bytearray(content)
    struct.pack_into(form, out, at, *values)
    return bytes(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:30], "truncated"),
        (lambda c: c[:-4], "truncated"),
        (lambda c: c[:130], "truncated"),
        (lambda c: damaged(c, 4, "<I", 3), "version 3"),
        (lambda c: damaged(c, 0, "<I", 9), "truncated"),
        (lambda c: damaged(c, 0, "<I", 2), "bytes behind its 2 blobs"),
        (lambda c: damaged(c, 64, "<I", 7), "begins with 0x7"),
        (lambda c: damaged(c, 68, "<I", 99), "type 99"),
        (lambda c: damaged(c, 72, "<Q", 1 << 40), "truncated"),
        (lambda c: damaged(c, 80, "<Q", 0), "data at byte 0"),
        (lambda c: damaged(c, 88, "<Q", 3), "whole values of 4 bits"),
    ],
)
def test_a_file_that_lies_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    write(path, SAMPLES)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BlobError, match=message) as refused:
        read_blobs(path)
    assert str(path) in str(refused.value)


def test_a_missing_file_and_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BlobError, match="cannot be read"):
        read_blobs(tmp_path / "none.bin")
    path = tmp_path / "weight.bin"
    offsets, _ = write(path, SAMPLES)
    with pytest.raises(BlobError, match="250 values"):
        read_blob(path, read_blobs(path)[offsets[0]], (251,))
