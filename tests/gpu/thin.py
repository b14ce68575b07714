"""Leave a library the machine code of one GPU generation: ``python -m tests.gpu.thin LIBRARY.so 90``.

A CUDA library carries the same kernels once for each generation, in containers that name it. What is for others is
overwritten with zeros, in place, so that every address stays and compression takes it out. The driver loads the code
of its own generation and never looks at the rest; on a GPU of another one the kernels are gone.
"""

from __future__ import annotations

import argparse
import mmap
import struct
from collections import Counter
from pathlib import Path

MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)
"""Of a container: its magic number, version, and size of its header; the size of what follows comes next, 8 bytes."""
ENTRY = struct.Struct("<HHIQ")
"""Begin of an entry: kind, version, size of its header, size of the code after it."""
ARCH_OFFSET = 28
"""Where an entry's header has the generation, such as 90, in 4 bytes."""


def thin(path: Path, arch: int) -> dict[int, int]:
    """Overwrite the code of other generations.

    Returns:
        Generation to bytes of code that were there.

    Raises:
        ValueError: a container is not laid out as expected, or none has code for ``arch``; nothing is changed then.
    """
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        found: Counter[int] = Counter()
        others = []
        for begin, end, generation in codes(data):
            found[generation] += end - begin
            if generation != arch:
                others.append((begin, end))
        if arch not in found:
            raise ValueError(f"{path} has code for {sorted(found) or 'no GPU'}, none for {arch}; nothing was changed")
        for begin, end in others:
            data[begin:end] = bytes(end - begin)
    return dict(found)


def codes(data: mmap.mmap) -> list[tuple[int, int, int]]:
    """Begin, end and generation of each piece of code in a library.

    Raises:
        ValueError: a container's entries do not fill it.
    """
    pieces = []
    place = data.find(MAGIC)
    while place >= 0:
        (size,) = struct.unpack_from("<Q", data, place + len(MAGIC))
        entry, end = place + len(MAGIC) + 8, place + len(MAGIC) + 8 + size
        while entry + ARCH_OFFSET + 4 <= end <= len(data):
            _, _, header, length = ENTRY.unpack_from(data, entry)
            (generation,) = struct.unpack_from("<I", data, entry + ARCH_OFFSET)
            if header <= ARCH_OFFSET:
                break
            pieces.append((entry + header, entry + header + length, generation))
            entry += header + length
        if entry != end:
            raise ValueError(f"the container at byte {place} is not laid out as expected: nothing was changed")
        place = data.find(MAGIC, end)
    return pieces


def main(words: list[str] | None = None) -> None:
    """Thin the library that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("arch", type=int, help="GPU generation to keep, such as 90")
    given = parser.parse_args(words)
    found = thin(given.library, given.arch)
    print(", ".join(f"sm_{arch}: {size / 1e6:.1f} MB" for arch, size in sorted(found.items())), f"; kept {given.arch}")


if __name__ == "__main__":
    main()
