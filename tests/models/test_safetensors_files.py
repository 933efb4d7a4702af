"""Directories of .safetensors files: read by ranges, in the layouts the hub has, and never believed on their word."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mmrlhf_jax.models import safetensors_files
from mmrlhf_jax.models.safetensors_files import INDEX, Outgoing, SafetensorsDirectory, write_safetensors

A = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.arange(5, dtype=np.float16)


def same(name: str) -> str:
    return name


def sharded(directory, **changes: str) -> None:
    """Two shards and their index, its weight_map with `changes`."""
    save_file({"a": A}, directory / "model-00001-of-00002.safetensors")
    save_file({"b": B}, directory / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", **changes}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(file, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_tensor_is_read_as_the_safetensors_package_reads_it(tmp_path, dtype):
    tensors = {"a": A.astype(dtype), "scalar": np.asarray(3, dtype), "none": np.zeros((0, 3), dtype)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with SafetensorsDirectory(tmp_path, same) as source:
        assert source.where.keys() == tensors.keys()
        for name, wanted in load_file(tmp_path / "model.safetensors").items():
            have = source.read(name)
            assert have.dtype == dtype
            assert have.shape == source.shape(name) == wanted.shape
            np.testing.assert_array_equal(have, wanted)


def test_rows_alone_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_BLOCK_BYTES", 8)
    save_file({"before": B, "a": A}, tmp_path / "model.safetensors")
    with SafetensorsDirectory(tmp_path, same) as source:
        np.testing.assert_array_equal(source.read("a", slice(1, 3))[1:3], A[1:3])
        assert source.read("a", slice(1, 3)).shape == A.shape


def test_the_package_reads_what_is_written(tmp_path):
    outgoing = [Outgoing("a", (4, 3), "float32", lambda: A), Outgoing("b", (5,), "float16", lambda: B)]
    write_safetensors(outgoing, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    written = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(written["a"], A)
    np.testing.assert_array_equal(written["b"], B)


def test_shards_are_read_by_their_index(tmp_path):
    sharded(tmp_path)
    with SafetensorsDirectory(tmp_path, same) as source:
        np.testing.assert_array_equal(source.read("a"), A)
        np.testing.assert_array_equal(source.read("b"), B)


def test_a_file_the_index_names_must_be_there(tmp_path):
    sharded(tmp_path, c="model-00003-of-00003.safetensors")
    with pytest.raises(FileNotFoundError, match=r"names files that are not there: model-00003-of-00003\.safetensors"):
        SafetensorsDirectory(tmp_path, same)


def test_a_file_the_index_does_not_name_is_refused(tmp_path):
    sharded(tmp_path)
    save_file({"old": A}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors stands beside .* does not name it"):
        SafetensorsDirectory(tmp_path, same)


def test_a_tensor_must_lie_where_the_index_says(tmp_path):
    sharded(tmp_path, a="model-00002-of-00002.safetensors", b="model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"promises what is not there: a in model-00002-of-00002\.safetensors, b in"):
        SafetensorsDirectory(tmp_path, same)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", 7, "x.bin"])
def test_an_index_names_only_files_beside_it(tmp_path, file):
    sharded(tmp_path, a=file)
    with pytest.raises(ValueError, match=r"is not the name of a \.safetensors file beside it"):
        SafetensorsDirectory(tmp_path, same)


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": []}', "[" * 100_000])
def test_a_broken_index_is_a_message(tmp_path, text):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: (not|no) "):
        SafetensorsDirectory(tmp_path, same)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"{name}: pickle runs code and is refused"):
        SafetensorsDirectory(tmp_path, same)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"1234", "describes .* bytes, the file has .*; was it cut short"),
        ({"a": entry()}, b"123456789", "describes .* bytes, the file has"),
        ({"a": entry(shape=(3,))}, b"12345678", r"a is F32 \(3,\) but has 8 bytes"),
        ({"a": entry(shape=(2**40, 2**40))}, b"12345678", "but has 8 bytes"),
        ({"a": entry(shape=(2**62,))}, b"12345678", "the header's entry for a is malformed"),
        ({"a": entry(shape=(1,) * 9)}, b"12345678", "the header's entry for a is malformed"),
        ({"x" * 2000: entry()}, b"12345678", "the header's entry for x+\\.\\.\\. is malformed"),
        ({"a": entry(offsets=(4, 12))}, b"1" * 12, r"do not lie end to end \(at a\)"),
        ({"a": entry(), "b": entry()}, b"12345678", r"do not lie end to end \(at b\)"),
        ({"a": entry(offsets=(8, 0))}, b"12345678", "the header's entry for a is malformed"),
        ({"a": entry(offsets=(-8, 0))}, b"12345678", "the header's entry for a is malformed"),
        ({"a": entry(shape=(True, 2))}, b"12345678", "the header's entry for a is malformed"),
        ({"a": entry(shape=(2.0,))}, b"12345678", "the header's entry for a is malformed"),
        ({"a": entry(dtype=["F32"])}, b"12345678", "the header's entry for a is malformed"),
        ({"a": {"dtype": "F32"}}, b"", "the header's entry for a is malformed"),
        ({"a": None}, b"", "the header's entry for a is malformed"),
        ([], b"", "not a JSON object"),
        (b"{", b"", "not readable as JSON"),
        (b"\xff\xfe", b"", "not readable as JSON"),
        (b"[" * 100_000, b"", "not readable as JSON"),
        (b'{"a":{}, "a":{}}', b"", "a name stands twice"),
    ],
)
def test_a_header_that_lies_is_a_message_with_the_file_s_name(tmp_path, header, data, message):
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsDirectory(tmp_path, same)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("length", [2**63, 10**9, 3])
def test_a_header_s_length_is_not_believed(tmp_path, length):
    write_raw(tmp_path / "model.safetensors", {}, length=length)
    with pytest.raises(ValueError, match=r"model\.safetensors: not"):
        SafetensorsDirectory(tmp_path, same)


@pytest.mark.parametrize("content", [b"", b"1234567", b"<html>not found</html>"])
def test_a_file_that_is_none_is_a_message(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file, or cut short"):
        SafetensorsDirectory(tmp_path, same)


def test_a_tensor_in_another_dtype_is_refused_when_asked_for(tmp_path):
    save_file({"a": A, "count": np.arange(3)}, tmp_path / "model.safetensors")
    source = SafetensorsDirectory(tmp_path, same)
    assert source.dtype("a") == "float32"
    with pytest.raises(ValueError, match="count is stored as I64; supported: F32, F16, BF16"):
        source.read("count")
