"""The header of a safetensors file, checked before anything is read: standard library only.

``engines/cpp/src/safetensors.cc`` takes and refuses the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import BundleError
from iapt_export.contract.schema import parse_json, read_fields

METADATA = "__metadata__"
LONGEST_HEADER = 100_000_000
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "BOOL": 1}
"""Types that a bundle's tensors may have, by the name in the header."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise BundleError(f"type {self.dtype!r} is none of {', '.join(ITEM_BYTES)}")
        if any(number < 0 for number in (*self.shape, *self.data_offsets)) or len(self.data_offsets) != 2:
            raise BundleError("a size or an offset is negative or missing")
        begin, end = self.data_offsets
        size = ITEM_BYTES[self.dtype]
        for number in self.shape:
            size *= number
            if size >= 2**63:
                raise BundleError("its shape is too large")
        if end - begin != size:
            raise BundleError(f"its offsets hold {end - begin} bytes, its shape {size}")


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """A file's metadata, and its tensors by name, of which every byte of the file belongs to one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no whole safetensors file, with the reason.
    """
    return parse_header(*raw_header(path))


def raw_header(path: Path) -> tuple[bytes, int]:
    """A file's header, unread, and how many bytes of data follow it.

    Raises:
        OSError: it cannot be read.
        ValueError: the header is longer than the file.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = path.stat().st_size - 8
        if size < 0 or length > min(size, LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        return stream.read(length), size - length


def parse_header(header: bytes, data_bytes: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """`read_header` of a header alone, before ``data_bytes`` of data.

    Raises:
        ValueError: see `read_header`.
    """
    fields = parse_json(header) if header.startswith(b"{") else None
    if not isinstance(fields, dict):
        raise ValueError("its header is no JSON object")
    problems: list[str] = []
    metadata: dict[str, str] = read_fields(dict[str, str], fields.pop(METADATA, {}), METADATA, problems)
    entries: dict[str, Any] = {name: read_fields(Entry, item, name, problems) for name, item in fields.items()}
    if problems:
        raise ValueError(problems[0])
    at = 0
    for begin, end in sorted(tuple(entry.data_offsets) for entry in entries.values()):
        if begin != at:
            raise ValueError("its tensors leave a hole or overlap")
        at = end
    if at != data_bytes:
        raise ValueError(f"it has {data_bytes} bytes of data, its tensors {at}")
    return metadata, entries
