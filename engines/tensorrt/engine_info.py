"""What is known of a TensorRT engine without running it: the record beside the file, and the file's header.

An engine opens only where its GPU's driver is. So the builder writes down what it built (``prefill.json``
beside ``prefill.engine``), and `check_engine` holds record, file, manifest and ranges against each other.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from engines.tensorrt.flavour import PORTABLE, RTX
from iapt_export.contract.errors import BundleError
from iapt_export.contract.manifest import GraphSpec, Range, Ranges, TensorSpec, file_sha256, write_atomically
from iapt_export.contract.schema import read_fields, read_object

SCHEMA_VERSION = 1

_HEADER = struct.Struct("<4s4xQQ4B4sQ24x")
"""TensorRT for RTX 1.7's 64 bytes: magic, layout, file size, version, magic, capabilities as bits."""
_MAGIC, _LAYOUT = b"vtrt", 2


@dataclass(frozen=True)
class EngineTensor:
    """An input or output as TensorRT sees it."""

    name: str
    dtype: str
    """As in `TensorSpec`."""
    shape: list[int]
    """-1 where the size is dynamic."""


@dataclass(frozen=True)
class ProfileShape:
    """Shapes of one input that an engine takes and is tuned for."""

    min: list[int]
    opt: list[int]
    max: list[int]


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """The record of one build."""

    target: str
    runtime_version: str
    """Of the TensorRT that built it, for example ``1.7.1.116``."""
    compute_capability: str
    """``portable``, or the GPU's, for example ``8.9``."""
    version_compatible: bool = False
    """Newer runtimes may open it too."""
    rational: str = "function"
    """``plugin`` where the engine needs our TensorRT plugin, see `engines.native.load_plugin`."""
    source_sha256: str
    """Hash of the ONNX file; its external weights have their own in the manifest."""
    sha256: str
    size_bytes: int
    seconds: float
    """Time that the build took."""
    inputs: list[EngineTensor]
    outputs: list[EngineTensor]
    profiles: list[dict[str, ProfileShape]]
    """For each optimisation profile: dynamic input to shapes."""
    schema_version: int = SCHEMA_VERSION

    def save(self, engine_path: Path) -> None:
        """Write the record beside the engine, whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_atomically(info_path(engine_path), text.encode())

    @classmethod
    def load(cls, engine_path: Path) -> EngineInfo:
        """Read the record beside an engine.

        Raises:
            BundleError: it is missing, no JSON, of another schema, or lacks fields.
        """
        path = info_path(engine_path)
        try:
            fields = read_object(path, "build the engine again")
            if (version := fields.get("schema_version")) != SCHEMA_VERSION:
                raise BundleError(
                    f"{path}: schema_version is {version!r}, this version of iapt-export reads {SCHEMA_VERSION}; "
                    "upgrade iapt-export, or build the engine again"
                )
            problems: list[str] = []
            info: EngineInfo = read_fields(cls, fields, "record", problems)
            if problems:
                raise BundleError(f"{path} is no engine record ({'; '.join(problems)}); build the engine again")
            return info
        except FileNotFoundError as error:
            raise BundleError(
                f"{path} is missing; the builder writes it beside every engine: copy or build both again"
            ) from error


@dataclass(frozen=True)
class EngineHeader:
    """The first bytes of a TensorRT for RTX engine."""

    size_bytes: int
    runtime_version: str
    compute_capabilities: tuple[str, ...]


def info_path(engine_path: Path) -> Path:
    """Where an engine's record lies."""
    return engine_path.with_suffix(".json")


def read_header(engine_path: Path) -> EngineHeader | None:
    """Read an RTX engine's header; None when the file does not begin like one, or uses another layout.

    The layout is no published format: it was read off engines of 1.7.1, and a test builds engines to check it.
    """
    with engine_path.open("rb") as stream:
        data = stream.read(_HEADER.size)
    if len(data) < _HEADER.size:
        return None
    magic, layout, size, major, minor, patch, build, second_magic, bits = _HEADER.unpack(data)
    if (magic, second_magic, layout) != (_MAGIC, _MAGIC, _LAYOUT):
        return None
    capabilities = tuple(name for bit, name in enumerate(RTX.compute_capabilities) if bits >> bit & 1)
    return EngineHeader(size, f"{major}.{minor}.{patch}.{build}", capabilities)


def check_engine(spec: GraphSpec, info: EngineInfo, ranges: Ranges, engine_path: Path) -> list[str]:
    """Hold an engine against the manifest, as far as that goes without a GPU.

    Args:
        spec: the graph that the engine must offer.
        info: the record beside the engine.
        ranges: sizes that it must take.
        engine_path: the file.

    Returns:
        Problems in words; empty when all fits.
    """
    problems = _file_problems(info, engine_path)
    problems += interface_problems(spec, info.inputs, info.outputs)
    problems += _profile_problems(spec, info, ranges)
    return problems


def profile_from_spec(spec: GraphSpec, ranges: Ranges) -> dict[str, ProfileShape]:
    """Shapes of every dynamic input, smallest, usual and largest, from the manifest's named sizes.

    Raises:
        BundleError: an input has a dynamic size that no range speaks of.
    """
    past = ranges.past
    sizes = {
        "batch": ranges.batch,
        "sequence": ranges.sequence,
        "places": Range(ranges.sequence.min, ranges.sequence.opt, past.max),
        "past": past,
        "total": Range(past.min + 1, past.opt + 1, past.max + 1),
        **dict.fromkeys(_tenant_sizes(spec), ranges.tenants),
    }
    return {tensor.name: _profile_shape(tensor, sizes) for tensor in spec.inputs if _is_dynamic(tensor)}


def _tenant_sizes(spec: GraphSpec) -> set[str]:
    """Names of the sizes that count a method's tenants: ``tenants_METHOD``."""
    sizes = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
    return {size for size in sizes if size.startswith("tenants_")}


def interface_problems(spec: GraphSpec, inputs: list[EngineTensor], outputs: list[EngineTensor]) -> list[str]:
    """Differences of names, types, ranks and fixed sizes between the manifest and TensorRT's view."""
    problems: list[str] = []
    for kind, expected, actual in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        by_name = {tensor.name: tensor for tensor in actual}
        names = {tensor.name for tensor in expected}
        problems += [f"{kind} {name} is missing" for name in sorted(names - set(by_name))]
        problems += [f"{kind} {name} is not in the manifest" for name in sorted(set(by_name) - names)]
        for tensor in expected:
            if tensor.name in by_name:
                problems += _tensor_problems(kind, tensor, by_name[tensor.name])
    return problems


def _is_dynamic(tensor: TensorSpec) -> bool:
    return any(isinstance(size, str) for size in tensor.shape)


def _profile_shape(tensor: TensorSpec, sizes: dict[str, Range]) -> ProfileShape:
    unknown = [size for size in tensor.shape if isinstance(size, str) and size not in sizes]
    if unknown:
        raise BundleError(
            f"input {tensor.name} has the dynamic size {unknown[0]!r}; engines are built over {', '.join(sizes)}"
        )

    def resolve(field: str) -> list[int]:
        return [getattr(sizes[size], field) if isinstance(size, str) else size for size in tensor.shape]

    return ProfileShape(resolve("min"), resolve("opt"), resolve("max"))


def _tensor_problems(kind: str, expected: TensorSpec, actual: EngineTensor) -> list[str]:
    problems = []
    if actual.dtype != expected.dtype:
        problems.append(f"{kind} {actual.name} is {actual.dtype}, expected {expected.dtype}")
    same_rank = len(actual.shape) == len(expected.shape)
    if not same_rank or not all(
        _fits(kind, wanted, size) for wanted, size in zip(expected.shape, actual.shape, strict=True)
    ):
        problems.append(f"{kind} {actual.name} has shape {actual.shape}, expected {expected.shape}")
    return problems


def _fits(kind: str, wanted: int | str, size: int) -> bool:
    if kind == "input":
        return size == (-1 if isinstance(wanted, str) else wanted)
    # TensorRT leaves an output's size open where it cannot prove it; only the run tells
    return size == -1 or isinstance(wanted, str) or size == wanted


def _profile_problems(spec: GraphSpec, info: EngineInfo, ranges: Ranges) -> list[str]:
    """Inputs whose sizes no profile covers from the ranges' smallest to their largest."""
    problems = []
    for name, wanted in profile_from_spec(spec, ranges).items():
        shapes = [profile[name] for profile in info.profiles if name in profile]
        covered = any(
            len(shape.min) == len(wanted.min)
            and all(low <= size for low, size in zip(shape.min, wanted.min, strict=True))
            and all(high >= size for high, size in zip(shape.max, wanted.max, strict=True))
            for shape in shapes
        )
        if not covered:
            came = ", ".join(f"{shape.min} to {shape.max}" for shape in shapes) or "nothing"
            problems.append(f"input {name} takes {came}, the manifest's ranges need {wanted.min} to {wanted.max}")
    return problems


def _file_problems(info: EngineInfo, engine_path: Path) -> list[str]:
    if not engine_path.is_file():
        return [f"{engine_path.name} is missing"]
    size = engine_path.stat().st_size
    if size != info.size_bytes:
        return [f"{engine_path.name} has {size} bytes, expected {info.size_bytes}: it is truncated or another file"]
    if file_sha256(engine_path) != info.sha256:
        return [f"{engine_path.name} was altered: its SHA-256 differs from the record's"]
    problems = _header_problems(info, engine_path) if info.target == RTX.target else []
    return problems + _name_problems(info, engine_path)


def _header_problems(info: EngineInfo, engine_path: Path) -> list[str]:
    header = read_header(engine_path)
    if header is None:
        return [f"{engine_path.name} does not begin like an engine of {RTX.target} {info.runtime_version}"]
    problems = []
    if header.size_bytes != info.size_bytes:
        problems.append(f"{engine_path.name} says that it has {header.size_bytes} bytes, it has {info.size_bytes}")
    if header.runtime_version != info.runtime_version:
        problems.append(
            f"{engine_path.name} was built by {RTX.target} {header.runtime_version}, its record says "
            f"{info.runtime_version}"
        )
    expected = RTX.portable if info.compute_capability == PORTABLE else (info.compute_capability,)
    if header.compute_capabilities != expected:
        came = ", ".join(header.compute_capabilities) or "none"
        problems.append(f"{engine_path.name} serves the compute capabilities {came}, expected {', '.join(expected)}")
    return problems


def _name_problems(info: EngineInfo, engine_path: Path) -> list[str]:
    """Inputs and outputs that the record claims and the file never mentions: the two belong to different graphs."""
    with engine_path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        absent = [tensor.name for tensor in [*info.inputs, *info.outputs] if data.find(tensor.name.encode()) < 0]
    return [f"{engine_path.name} knows no tensor called {name}" for name in absent]
