"""The header's reader says what the package gguf says, and refuses what is cut or changed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from iapt_export.contract.errors import IaptError
from tests.trainers.decoder.gguf_files import TinyFile, write
from trainers.decoder.gguf_file import GgufFile
from trainers.decoder.gguf_header import read_header

Kind = gguf.GGUFValueType
NUMBERS = {
    Kind.UINT8: 255,
    Kind.INT8: -128,
    Kind.UINT16: 65535,
    Kind.INT16: -32768,
    Kind.UINT32: 2**32 - 1,
    Kind.INT32: -(2**31),
    Kind.FLOAT32: 0.5,
    Kind.BOOL: True,
    Kind.UINT64: 2**64 - 1,
    Kind.INT64: -(2**63),
    Kind.FLOAT64: -1e300,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a field of each type, an array of each, texts, and tensors of several types."""
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    for kind, value in NUMBERS.items():
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value] * 3, Kind.ARRAY, sub_type=kind)
    writer.add_string("text", "Grüße")
    writer.add_array("texts", ["", "Ġa", "日本"])
    draw = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64):
        writer.add_tensor(f"plain.{np.dtype(dtype).name}", draw.integers(-9, 9, (3, 5)).astype(dtype))
    for quantised in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.BF16):
        packed = gguf.quants.quantize(draw.standard_normal((2, 3, 64), np.float32), quantised)
        writer.add_tensor(f"packed.{quantised.name}", packed, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "all.gguf"


def test_reads_what_the_package_reads(path: Path) -> None:
    theirs = gguf.GGUFReader(path)
    fields, tensors = read_header(path)
    assert fields == {name: f.contents() for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert fields["one.UINT64"] == 2**64 - 1
    assert fields["texts"] == ["", "Ġa", "日本"]
    assert list(tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        ours = tensors[tensor.name]
        assert ours.kind == tensor.tensor_type
        assert list(ours.shape) == list(reversed(tensor.shape.tolist()))
        assert ours.data.dtype == tensor.data.dtype
        np.testing.assert_array_equal(ours.data, tensor.data)


def test_an_alignment_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", TinyFile("llama", {"general.alignment": 256}))
    aligned, usual = GgufFile(path), GgufFile(write(tmp_path / "usual.gguf", TinyFile("llama")))
    assert aligned.fields["general.alignment"] == 256
    for name in usual.tensors:
        np.testing.assert_array_equal(aligned.tensor(name), usual.tensor(name))


def test_a_cut_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    header = len(whole) - sum(tensor.data.nbytes for tensor in read_header(path)[1].values())
    for length in [*range(0, header, 7), *range(header, len(whole), 97)]:
        path.write_bytes(whole[:length])
        with pytest.raises(IaptError, match=r"all.gguf is not a whole GGUF file \(.*\); download or convert it again"):
            GgufFile(path)


@pytest.mark.parametrize(
    ("place", "bytes_", "text"),
    [
        (0, b"GGML", "it does not begin with GGUF"),
        (4, b"\0\0\0\3", "it is big-endian; versions 2 and 3, little-endian"),
        (4, b"\1\0\0\0", "it is of version 1"),
        (8, b"\xff" * 8, "has 0 dimensions; expected 1 to 4"),
        (16, b"\xff" * 8, "ends in the middle of its header|of the type|dimensions"),
        (24, b"\xff" * 8, "ends in the middle of its header"),
    ],
)
def test_what_is_said_of_a_changed_header(path: Path, place: int, bytes_: bytes, text: str) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes_ + whole[place + len(bytes_) :])
    with pytest.raises(IaptError, match=text):
        GgufFile(path)


def _renamed(path: Path, old: bytes, new: bytes) -> None:
    whole = path.read_bytes()
    assert whole.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(whole.replace(old, new))


def test_what_is_there_twice_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    _renamed(path, b"one.INT16", b"one.INT32")
    with pytest.raises(IaptError, match=r"it has the field one\.INT32 twice"):
        GgufFile(path)
    path.write_bytes(whole)
    _renamed(path, b"plain.int16", b"plain.int32")
    with pytest.raises(IaptError, match=r"it has the tensor plain\.int32 twice"):
        GgufFile(path)


def test_an_array_of_arrays_is_refused(path: Path) -> None:
    """Like llama.cpp: the format allows it, and nobody writes it."""
    whole = path.read_bytes()
    name = b"many.UINT8" + (9).to_bytes(4, "little")
    assert whole.count(name) == 1
    path.write_bytes(whole.replace(name + b"\0\0\0\0", name + b"\x09\0\0\0"))
    with pytest.raises(IaptError, match="a field of the type 9, which is none of numbers or text"):
        GgufFile(path)
