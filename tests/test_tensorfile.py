"""Files of named tensors: what is written comes back, and a file that lies is refused before it is read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

from runtimes import tensorfile
from runtimes.tensorfile import (
    TensorFileError,
    TensorInfo,
    read_header,
    read_tensor,
    stream_tensors,
    to_bf16,
    write_tensors,
)


def build(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header (an object or raw bytes), any data, and any length claimed for the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "half": np.arange(3, dtype=np.float16),
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "flags": np.array([[True, False, True]]),
    "ids": np.arange(5, dtype=np.int64),
    "bytes": np.arange(7, dtype=np.uint8),
    "small": np.arange(7, dtype=np.int8),
    "scalar": np.array(2.5, dtype=np.float64),
    "nothing": np.zeros((0, 3), dtype=np.float32),
    "strided": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
    "big endian": np.arange(4, dtype=">f4"),
}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, ARRAYS)
    header = read_header(path)
    assert set(header) == set(ARRAYS)
    for name, array in ARRAYS.items():
        found = read_tensor(path, header[name])
        assert found.shape == array.shape
        assert found.dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(found, array)


def test_hugging_faces_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, ARRAYS)
    found = load_file(path)
    assert set(found) == set(ARRAYS)
    assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_order_of_tensors_does_not_change_the_bytes_and_each_is_aligned(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", ARRAYS)
    write_tensors(tmp_path / "b", dict(reversed(ARRAYS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name, info in read_header(tmp_path / "a").items():
        assert info.offset % ARRAYS[name].itemsize == 0, name


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=4), dtype=st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL"]))
def test_hugging_faces_files_read_as_torch_reads_them(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: str
) -> None:
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(kinds[dtype])
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    save_file({"x": tensor, "y": torch.ones(3)}, path)
    info = read_header(path)["x"]
    assert (info.dtype, info.shape) == (dtype, tuple(shape))
    wanted = tensor.float().numpy() if dtype == "BF16" else tensor.numpy()
    found = read_tensor(path, info)
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)
    if shape:
        for start in range(shape[0] + 1):
            for stop in range(start, shape[0] + 1):
                assert np.array_equal(read_tensor(path, info, slice(start, stop)), wanted[start:stop])


def test_bf16_is_widened_exactly_over_more_than_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "CHUNK", 1000)
    bits = np.arange(1 << 16, dtype=np.uint16)
    path = tmp_path / "a.safetensors"
    stream_tensors(path, {"x": ("BF16", (256, 256))}, lambda _: [bits[:100], bits[100:]])
    found = read_tensor(path, read_header(path)["x"])
    assert np.array_equal(found.view(np.uint32).reshape(-1), bits.astype(np.uint32) << 16)


def test_float32_becomes_bf16_as_torch_rounds_it() -> None:
    edges = np.array([0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.3e38, 1e-40, -1.5], dtype=np.float32)
    values = np.concatenate([edges, np.random.default_rng(0).standard_normal(10000).astype(np.float32)])
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bf16(values), wanted)


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "no json": (b"{not json", b"", "not JSON"),
    "no utf-8": (b'{"\xff": 1}', b"", "not JSON"),
    "nested too deep": (b"[" * 100_000, b"", "not JSON"),
    "a list": ([], b"", "holds list"),
    "a name twice": (
        b'{"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "x": {"dtype": "U8", "shape": [1]}}',
        bytes(8),
        "names x twice",
    ),
    "an entry that is a number": ({"x": 3}, b"", "x is described by 3"),
    "an entry without a shape": ({"x": {"dtype": "F32", "data_offsets": [0, 0]}}, b"", "x is described by"),
    "an unknown dtype": ({"x": entry("F31")}, bytes(8), "x has dtype 'F31'"),
    "a dtype that is a list": ({"x": entry([])}, bytes(8), "x has dtype"),
    "a negative dimension": ({"x": entry(shape=[-2])}, bytes(8), "x has shape"),
    "a dimension that is true": ({"x": entry(shape=[True, 2])}, bytes(8), "x has shape"),
    "a dimension of 1e12 as a float": ({"x": entry(shape=[1e12])}, bytes(8), "x has shape"),
    "too many dimensions": ({"x": entry(shape=[1] * 9 + [2])}, bytes(8), "x has shape"),
    "dimensions whose product is huge": ({"x": entry(shape=[1 << 62] * 8)}, bytes(8), "want"),
    "offsets backwards": ({"x": entry(offsets=[8, 0])}, bytes(8), "data_offsets"),
    "one offset": ({"x": entry(offsets=[8])}, bytes(8), "data_offsets"),
    "a negative offset": ({"x": entry(offsets=[-8, 0])}, bytes(8), "data_offsets"),
    "a size that is not the shape's": ({"x": entry(shape=[3])}, bytes(8), "in 8 bytes, want 12"),
    "data beyond the file": ({"x": entry(offsets=[8, 16])}, bytes(8), "hole"),
    "fewer bytes than named": ({"x": entry()}, bytes(7), "is truncated"),
    "more bytes than named": ({"x": entry()}, bytes(9), "no tensor owns"),
    "a hole": ({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20), "y leaves a hole behind x"),
    "an overlap": ({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12), "y overlaps x"),
    "the same place twice": ({"x": entry(), "y": entry()}, bytes(8), "y overlaps x"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_lies_is_refused(fault: str, tmp_path: Path) -> None:
    header, data, message = HEADERS[fault]
    path = build(tmp_path / "a.safetensors", header, data)
    with pytest.raises(TensorFileError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20, 200, -1])
def test_a_truncated_file_is_refused_wherever_it_ends(size: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_tensors(whole, ARRAYS)
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(TensorFileError, match="truncated"):
        read_header(path)


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((tensorfile.HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(tensorfile.HEADER_BYTES + 100)  # sparse: no disk is used
    with pytest.raises(TensorFileError, match="header of 104,857,601 bytes"):
        read_header(path)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="truncated"):
        read_header(build(tmp_path / "a", {}, length=(1 << 64) - 1))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="nothing: is missing"):
        read_header(tmp_path / "nothing")
    with pytest.raises(TensorFileError, match="is not a file"):
        read_header(tmp_path)
    with pytest.raises(TensorFileError, match="cannot be read"):
        read_tensor(tmp_path / "nothing", TensorInfo("F32", (1,), 8, 4))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_file_that_became_shorter_is_noticed_when_read(dtype: str, tmp_path: Path) -> None:
    path = build(
        tmp_path / "a",
        {"x": entry(dtype, [4], [0, 16 if dtype == "F32" else 8])},
        bytes(16)[: 16 if dtype == "F32" else 8],
    )
    info = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TensorFileError, match="ends 3 bytes before"):
        read_tensor(path, info)


@pytest.mark.parametrize("rows", [slice(-1, 2), slice(0, 4), slice(2, 1), slice(0, 3, 2)])
def test_rows_outside_the_tensor_are_refused(rows: slice, tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", ARRAYS)
    header = read_header(tmp_path / "a")
    with pytest.raises(ValueError, match="rows"):
        read_tensor(tmp_path / "a", header["matrix"], rows)
    with pytest.raises(ValueError, match="without dimensions"):
        read_tensor(tmp_path / "a", header["scalar"], slice(0, 1))


def test_an_8_bit_float_is_listed_but_not_read(tmp_path: Path) -> None:
    path = build(tmp_path / "a", {"x": entry("F8_E4M3", [8])}, bytes(8))
    with pytest.raises(TensorFileError, match="F8_E4M3"):
        read_tensor(path, read_header(path)["x"])


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("mine")
    with pytest.raises(TensorFileError, match="exists"):
        write_tensors(path, ARRAYS)
    assert path.read_text() == "mine"


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(TensorFileError, match="x got 4 bytes, want 8"):
        stream_tensors(path, {"x": ("F32", (2,))}, lambda _: [np.zeros(1, np.float32)])
    with pytest.raises(TensorFileError, match="complex"):
        write_tensors(path, {"x": np.zeros(1, complex)})
    assert not path.exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="cannot be written"):
        write_tensors(tmp_path / "no" / "a", ARRAYS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda _, mode: real(Path("/dev/full"), mode.replace("x", "w")))
    with pytest.raises(TensorFileError, match="No space left"):
        write_tensors(tmp_path / "a", {"x": np.zeros(1 << 20, np.float32)})
