"""The same bytes for the Python and the C++ readers of manifests and safetensors files: what each makes of them.

python -m tests.native.differential BUNDLE --count 10000 --seed 0
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors

from iapt_export.contract.errors import BundleError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.weights_header import parse_header
from tests.native.built import FUZZER, JUDGE

CORPUS = Path(__file__).parent / "corpus"
"""Inputs on which the readers once differed, or that are known to be hard: ``KIND/NAME``."""
TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "I64": "int64", "I32": "int32", "BOOL": "bool"}
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        1.0,
        0.5,
        1e300,
        2**31,
        2**31 + 1,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**30,
    ),
    *("", "x", "chat", "../x", "/x", "a\\b", "a\0b", "ü", "batch", "fp32", "F32", "pass", [], {}, [1], ["x"], {"x": 1}),
)
WORDS = (
    *(
        b"null",
        b"-1",
        b"1e999",
        b"-0",
        b"1.",
        b"01",
        b"18446744073709551615",
        b"[]",
        b"{}",
        b'"\\u0000"',
        b'"',
        b"[[[[[[[[",
    ),
    *(b"NaN", b"Infinity", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"//", b",", b":", b" ", b"\t", b"9" * 400),
    *(b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"[" * 70 + b"]" * 70),
)


def manifest_of_python(data: bytes) -> dict[str, Any]:
    """What the C++ program tells of a manifest, as Python reads it."""
    manifest = BundleManifest.parse(data, "fuzz")
    backbone, ranges = manifest.backbone, manifest.ranges
    lengths = {method.name: method.prompt_length for method in manifest.methods}
    return {
        "backbone": [
            *(backbone.hidden_size, backbone.num_layers, backbone.num_kv_heads, backbone.head_dim, backbone.value_dim),
            *(backbone.vocab_size, backbone.max_positions, backbone.pad_token_id, backbone.eos_token_ids),
            backbone.fingerprint,
        ],
        "methods": [[item.name, item.form, item.prompt_length] for item in manifest.methods],
        "tenants": [
            [t.name, t.method, t.path, t.prompt_format, t.system_prompt, t.labels, lengths.get(t.method or "", 0)]
            for t in manifest.tenants
        ],
        "targets": [[target.name, target.dtype, len(target.graphs)] for target in manifest.targets],
        "files": {name: spec.size_bytes for name, spec in manifest.files.items()},
        "ranges": [
            [item.min, item.opt, item.max] for item in (ranges.batch, ranges.sequence, ranges.past, ranges.tenants)
        ],
        "slots": manifest.num_slots,
        "verdict": manifest.parity.verdict,
    }


def safetensors_of_python(data: bytes) -> dict[str, Any]:
    """What the C++ program tells of a safetensors file, as Python reads it: our check, then the library."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, 100_000_000):
        raise ValueError("its header is longer than the file")
    metadata, entries = parse_header(data[8 : 8 + length], len(data) - 8 - length)
    read = dict(safetensors.deserialize(data))
    tensors = {name: [TYPES[entry.dtype], entry.shape] for name, entry in entries.items()}
    assert {name: [TYPES[item["dtype"]], list(item["shape"])] for name, item in read.items()} == tensors
    return {"tensors": tensors, "metadata": metadata}


READERS = {"manifest": manifest_of_python, "safetensors": safetensors_of_python}


def of_python(kind: str, data: bytes) -> Any:
    """What Python reads, or None where it refuses; any other exception is a defect and passes through."""
    try:
        return READERS[kind](data)
    except (BundleError, ValueError, safetensors.SafetensorError):
        return None


def is_built() -> bool:
    """Whether ``make cpp`` has left a program to compare with."""
    return FUZZER.is_file() or JUDGE.is_file()


def of_cpp(inputs: list[tuple[str, bytes]]) -> list[Any]:
    """What C++ reads of each input, None where it refuses."""
    program = FUZZER if FUZZER.is_file() else JUDGE
    given = b"".join(b"%s %d\n%s" % (kind.encode(), len(data), data) for kind, data in inputs)
    done = subprocess.run([program, "--judge"], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(inputs)
    return [None if "error" in item else item for item in told]


def seeds_of(bundle: Path) -> dict[str, list[bytes]]:
    """A bundle's own files by kind."""
    tenants = sorted((bundle / "tenants").glob("*.safetensors"))
    return {"manifest": [(bundle / "manifest.json").read_bytes()], "safetensors": [tenants[0].read_bytes()]}


def corpus() -> list[tuple[str, bytes]]:
    """The kept inputs."""
    return [(kind, path.read_bytes()) for kind in READERS for path in sorted((CORPUS / kind).iterdir())]


def mutations(seeds: dict[str, list[bytes]], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Inputs with a few damages each: of bytes, or of the JSON's values, which get past the parser."""
    source = random.Random(seed)
    for number in range(count):
        kind = list(seeds)[number % len(seeds)]
        data = source.choice(seeds[kind])
        if number % 4 < 2:
            yield kind, _changed_values(kind, data, source)
        else:
            yield kind, _changed_bytes(data, source)


def _changed_values(kind: str, data: bytes, source: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little") if kind == "safetensors" else 0
    try:
        fields = json.loads(data[8 : 8 + length] if length else data)
    except ValueError:
        return _changed_bytes(data, source)
    fields = copy.deepcopy(fields)
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        _change(fields, source)
    text = json.dumps(fields, ensure_ascii=source.random() < 0.5).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :] if length else text


def _change(fields: Any, source: random.Random) -> None:
    """One change at a random depth of lists and objects."""
    holder = fields
    while isinstance(holder, dict | list) and holder:
        key = source.choice(list(holder)) if isinstance(holder, dict) else source.randrange(len(holder))
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or source.random() < 0.15:
            break
        holder = inner
    else:
        return
    deed = source.randrange(7)
    if deed == 0:
        del holder[key]
    elif deed == 1 and isinstance(holder, dict):
        holder[source.choice(("colour", "name", "dtype", "path", "min", ""))] = source.choice(ODD)
    elif deed == 2 and isinstance(holder, list):
        holder.append(copy.deepcopy(inner))
    elif deed == 3 and isinstance(inner, int) and not isinstance(inner, bool):
        holder[key] = inner + source.choice((-1, 1, 2**31, -(2**31), 2**63))
    else:
        holder[key] = copy.deepcopy(source.choice(ODD))


def _changed_bytes(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 4))):
        at = source.randrange(min(len(changed), 20_000) + 1)
        deed = source.randrange(5)
        if deed == 0 and at < len(changed):
            changed[at] = source.randrange(256)
        elif deed == 1:
            del changed[at:]
        elif deed == 2:
            changed[at:at] = source.choice(WORDS)
        elif deed == 3:
            del changed[at : at + source.randrange(1, 40)]
        else:
            changed[at:at] = changed[at : at + source.randrange(1, 200)]
    return bytes(changed)


Judged = tuple[str, bytes, Any, Any]
"""Kind, bytes, what Python read, what C++ read."""


def judged(inputs: list[tuple[str, bytes]]) -> list[Judged]:
    """What both readers make of inputs."""
    told = zip(inputs, of_cpp(inputs), strict=True)
    return [(kind, data, json.loads(json.dumps(of_python(kind, data))), cpp) for (kind, data), cpp in told]


def differences(inputs: list[tuple[str, bytes]]) -> list[Judged]:
    """The inputs on which the two readers do not agree."""
    return [item for item in judged(inputs) if item[2] != item[3]]


def main() -> None:
    """Print the differences, and keep them in a folder where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for inputs that differ")
    asked = parser.parse_args()
    found, accepted = [], 0
    inputs = list(mutations(seeds_of(asked.bundle), asked.count, asked.seed))
    for first in range(0, len(inputs), 500):
        batch = inputs[first : first + 500]
        told = judged(batch)
        found += [item for item in told if item[2] != item[3]]
        accepted += sum(python is not None for _, _, python, _ in told)
    for number, (kind, data, python, cpp) in enumerate(found):
        if asked.keep:
            (asked.keep / kind).mkdir(parents=True, exist_ok=True)
            (asked.keep / kind / f"{number}").write_bytes(data)
        print(number, kind, "python:", str(python)[:150], "c++:", str(cpp)[:150])
    print(f"{len(inputs)} inputs, {accepted} accepted by Python, {len(found)} differences")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
