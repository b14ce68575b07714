"""Read what a GGUF file says of itself: its fields, and where its tensors lie. Nothing of the weights is copied.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The
package gguf reads it too, with several arrays for each word of a vocabulary: a file with 49,152 words takes it five
seconds, and this a seventh of one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
"""Of a field's numbers, as NumPy names them."""
STRING, ARRAY = 8, 9
PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
"""Tensors that are stored as they are, not in blocks."""
MOST_DIMENSIONS = 4
ALIGNMENT = 32


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file.

    Attributes:
        shape: rows first (the file counts from the other end).
        kind: ``gguf.GGMLQuantizationType``, how it is stored.
        data: its numbers, mapped; of a quantised one its bytes, one row a line.
    """

    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The file's fields as Python values, and its tensors.

    Raises:
        ValueError: it is not GGUF, of another version or byte order, cut short, says something twice, or names a
            type that nobody knows.
    """
    data = np.memmap(path, np.uint8, "r")
    cursor = _Cursor(data)
    if bytes(cursor.take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<u4")
    if version not in (2, 3):
        byte_order = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise ValueError(f"it is {byte_order}; versions 2 and 3, little-endian, are read")
    tensors, count = cursor.number("<u8"), cursor.number("<u8")
    fields: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"it has the field {name} twice")
        fields[name] = _value(cursor, cursor.number("<u4"))
    places: dict[str, _Place] = {}
    for _ in range(tensors):
        name = cursor.text()
        if name in places:
            raise ValueError(f"it has the tensor {name} twice")
        places[name] = _Place.read(name, cursor)
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    start = -cursor.place % alignment + cursor.place
    return fields, {name: place.of(data, start) for name, place in places.items()}


class _Cursor:
    """Goes through the file's bytes, and never past their end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data.data
        self.place = 0

    def take(self, count: int) -> memoryview:
        end = self.place + count
        if end > len(self.data):
            raise ValueError(f"it ends in the middle of its header, at byte {len(self.data)} of {end} or more")
        taken = self.data[self.place : end]
        self.place = end
        return taken

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: str, count: int) -> list[Any]:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize * count), dtype).tolist()

    def text(self) -> str:
        # faster than `number`, for there are as many as the vocabulary has words
        return str(self.take(struct.unpack("<Q", self.take(8))[0]), "utf-8")


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == STRING:
        return cursor.text()
    if kind != ARRAY:
        return cursor.number(_dtype(kind))
    kind, count = cursor.number("<u4"), cursor.number("<u8")
    if kind == STRING:
        return [cursor.text() for _ in range(count)]
    return cursor.numbers(_dtype(kind), count)


def _dtype(kind: int) -> str:
    if kind not in TYPES:
        raise ValueError(f"it has a field of the type {kind}, which is none of numbers or text")
    return TYPES[kind]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, as the header says."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @staticmethod
    def read(name: str, cursor: _Cursor) -> _Place:
        dimensions = cursor.number("<u4")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"its tensor {name} has {dimensions} dimensions; expected 1 to {MOST_DIMENSIONS}")
        shape = tuple(reversed(cursor.numbers("<u8", dimensions)))
        return _Place(name, shape, cursor.number("<u4"), cursor.number("<u8"))

    def of(self, data: np.ndarray, start: int) -> StoredTensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        kind = GGMLQuantizationType(self.kind)
        dtype = np.dtype(PLAIN.get(kind.name, np.uint8))
        shape = self.shape if kind.name in PLAIN else quant_shape_to_byte_shape(self.shape, kind)
        size = dtype.itemsize
        for length in shape:
            size *= length  # Python's integers: a product that NumPy takes could wrap around
        begin = start + self.offset
        if begin + size > len(data):
            raise ValueError(f"its tensor {self.name} ends at byte {begin + size} of {len(data)}")
        return StoredTensor(self.shape, kind, data[begin : begin + size].view(dtype).reshape(shape))
