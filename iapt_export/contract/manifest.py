"""``manifest.json``, the contract between the exporter and everything that runs a bundle.

Standard library only: a deployment machine reads it without torch. The reader checks the schema
version first, then every field, and reports all problems together; `iapt_export.contract.integrity` checks the hashes.

Shape legend of the graphs: ``batch`` B, ``sequence`` T, ``past`` S, ``total`` S+1, ``tenants`` N.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from iapt_export.contract.disk import file_sha256 as file_sha256
from iapt_export.contract.disk import write_atomically as write_atomically
from iapt_export.contract.errors import BundleError
from iapt_export.contract.graphs import step_graphs
from iapt_export.contract.kinds import found_at
from iapt_export.contract.low_bits import Rounding, rounding_of
from iapt_export.contract.prompt_format import ONE_OF, PROMPT_FORMATS
from iapt_export.contract.schema import parse_json, read_fields
from iapt_export.contract.sizes import MOST, MOST_LAYERS, BackboneSizes
from iapt_export.contract.tensors import LONGEST
from iapt_export.contract.tensors import GraphSpec as GraphSpec
from iapt_export.contract.tensors import Range as Range
from iapt_export.contract.tensors import Ranges as Ranges
from iapt_export.contract.tensors import TensorSpec as TensorSpec
from iapt_export.contract.types import TENSOR_TYPES

MANIFEST_FILE = "manifest.json"
HASH_FILE = "manifest.sha256"
"""The manifest's own hash, as ``sha256sum`` writes and checks it."""
SIGNATURE_FILE = "manifest.sig"
OUTSIDE_MANIFEST = (MANIFEST_FILE, HASH_FILE, SIGNATURE_FILE)
"""The files of a bundle that its manifest does not list."""
SCHEMA_VERSION = 2
DOCUMENTATION = "docs/reference/files.md#a-bundle"
READS_INSTRUCTION = "reads_instruction"
"""Input of ``serve``, a boolean: whether this step reads instructions or goes on from them."""
TENANT_INDEX = "tenant_index"
"""``METHOD.tenant_index [B]`` is the input that says which entry of a method's stack a row uses, -1 for none."""
SENT_PROMPTS = "prompts"
"""``METHOD.prompts [B, P, D]`` is the input of a method whose prompts are computed before prefill."""


def served_name(name_or_path: str) -> str:
    """What a backbone is called where it answers: its hub id, or the last folder of its path."""
    is_hub_id = name_or_path.count("/") == 1 and not name_or_path.startswith(("/", ".", "~"))
    return name_or_path if is_hub_id else PurePath(name_or_path).name


@dataclass(frozen=True, kw_only=True)
class BackboneSpec(BackboneSizes):
    """The frozen language model of a bundle."""

    name_or_path: str
    revision: str | None
    fingerprint: str
    """Hash over the architecture's fields, as adapters record it."""
    weights_sha256: str
    """Hash over the names and values of all weights."""
    model_type: str
    max_positions: int
    eos_token_ids: list[int]
    pad_token_id: int

    def __post_init__(self) -> None:
        limits = {item.name: MOST for item in dataclasses.fields(BackboneSizes)}
        for name, most in (limits | {"num_layers": MOST_LAYERS, "max_positions": LONGEST}).items():
            least = 0 if name == "value_dim" else 1
            if not least <= (size := getattr(self, name)) <= most:
                raise BundleError(f"{name} is {size}, expected {least} to {most}")
        for token in (self.pad_token_id, *self.eos_token_ids):
            if not 0 <= token < self.vocab_size:
                raise BundleError(f"token id {token} is not in the vocabulary of {self.vocab_size}")


@dataclass(frozen=True)
class MethodSpec:
    """A method of the bundle; its tenants' weights are stacked, and its graph inputs are called ``NAME.*``."""

    name: str
    """Unique in the bundle: ``iapt``, ``prompt_tuning``, ``iapt_2``."""
    form: str
    """What is computed: ``IAPT``, ``PROMPT_TUNING``, ``POSITION_TABLE``, ... (see docs/methods.md)."""
    config: dict[str, Any]
    """That form's settings."""
    prompt_length: int
    """Cache entries (P) that stand before the instruction."""
    weights: list[TensorSpec]
    """Tensors of one tenant, in the order of the inputs ``NAME.TENSOR``, without the tenants axis."""
    in_decode: bool = False
    """Whether decode steps take its weights too; else they are the plain backbone's."""

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_length <= MOST:
            raise BundleError(f"prompt_length is {self.prompt_length}, expected 0 to {MOST}")


@dataclass(frozen=True)
class TenantSpec:
    """An adapter installed in a bundle; its position among its method's tenants is its ``tenant_index``."""

    name: str
    method: str | None
    """Name of its `MethodSpec`; None where it is merged into the backbone's weights."""
    path: str | None
    """Its weights as the graphs take them; None where it is merged."""
    trained_form: str
    """The method that it was trained with: ``IAPT``, ``LAMP``, ..."""
    trained_config: dict[str, Any]
    """The settings that it was trained with."""
    prompt_format: str
    """One of `iapt_export.contract.prompt_format.PROMPT_FORMATS`."""
    labels: list[str] = field(default_factory=list)
    """The answers of a classification task; empty for free generation."""
    trained: str | None = None
    """Its weights as they were trained, where they are not shipped as they are; validation compares with them."""
    examples: str | None = None
    """JSONL with a ``prompt`` on each line: inputs that the tenant was made for, used by validation."""
    system_prompt: str | None = None
    """What all of its training examples began with; empty for none, None where they differ or did not say."""

    def __post_init__(self) -> None:
        if self.prompt_format not in PROMPT_FORMATS:
            raise BundleError(f"prompt_format is {self.prompt_format!r}, expected {ONE_OF}")


@dataclass(frozen=True)
class TargetSpec:
    """A runtime with its settings, and the files that it runs."""

    name: str
    """``onnxruntime``, ``tensorrt-rtx`` or ``tensorrt``."""
    dtype: str
    opset: int
    graphs: dict[str, GraphSpec]
    """Name (see `iapt_export.contract.graphs.KINDS`) to interface and file."""
    runtime_version: str
    """Version of the runtime that built or checked the files."""
    compute_capability: str | None = None
    """``8.9``, ``portable``, or None off the GPU."""
    source_sha256: dict[str, str] = field(default_factory=dict)
    """Hash of the ONNX file that each engine was built from."""
    rational: str = "function"
    """``plugin`` where engines need our TensorRT plugin; ONNX Runtime chooses its form when it loads a graph."""
    passes: dict[str, dict[str, str]] = field(default_factory=dict)
    """Graph to pass over it to what that did, or why it did nothing; for people."""
    quantise: str = ""
    """What of its weights' rounding is not as ``dtype`` has it, such as ``block=64,narrow=4``; in the file only where
    there is something."""

    @property
    def rounding(self) -> Rounding | None:
        """How the backbone's weights are stored; None where they are not rounded.

        Raises:
            IaptError: ``quantise`` says what is not stored so.
        """
        return rounding_of(self.name, self.dtype, self.quantise)


@dataclass(frozen=True)
class FileSpec:
    """One file of the bundle."""

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256) or self.size_bytes < 0:
            raise BundleError("expected a SHA-256 in 64 hex digits and a size of at least 0")


@dataclass(frozen=True)
class Parity:
    """What validation measured when the bundle was built."""

    verdict: str
    """``pass`` or ``fail``; ``not run`` while a build is under way."""
    tolerances: dict[str, Any] = field(default_factory=dict)
    """Stage to limits, per target."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Stage to worst figures, per target."""
    depth: str = ""
    """How much was compared: ``quick``, ``standard`` or ``full``; empty where nothing was, and in older bundles."""
    cases: dict[str, Any] = field(default_factory=dict)
    """Target to the names of what was fed to it and to PyTorch."""


@dataclass(frozen=True, kw_only=True)
class BundleManifest:
    """Everything a reader must know about a bundle."""

    versions: dict[str, str]
    """Tool and library versions that wrote it."""
    build_key: str
    """Hash over everything that went into the build; an equal one means up to date."""
    backbone: BackboneSpec
    methods: list[MethodSpec]
    tenants: list[TenantSpec]
    ranges: Ranges
    cache_layout: str = "batch, kv_heads, prompts then tokens, head_dim; key then value for each layer"
    op_domain: str
    """Domain of the custom operators."""
    op_version: int
    targets: list[TargetSpec]
    parity: Parity
    files: dict[str, FileSpec]
    """Every file but this one, by path."""
    serves_backbone: bool = False
    """Whether a row may have no method, so that the backbone alone answers beside its tenants."""
    documentation: str = DOCUMENTATION
    """The page of iapt-export's documentation that explains this file and the others beside it."""
    schema_version: int = SCHEMA_VERSION

    def target(self, name: str | None = None) -> TargetSpec:
        """The target of that name, or the first one.

        Raises:
            BundleError: no such target.
        """
        for target in self.targets:
            if name in (None, target.name):
                return target
        known = ", ".join(target.name for target in self.targets)
        raise BundleError(f"target {name!r} is not in this bundle, which has {known}; build again with --target {name}")

    @property
    def num_slots(self) -> int:
        """Prompt slots (P) of a cache: those of the method that has most; rows of others leave the first empty."""
        return max((method.prompt_length for method in self.methods), default=0)

    def tenant(self, name: str) -> TenantSpec:
        """The tenant of that name.

        Raises:
            BundleError: no such tenant.
        """
        for tenant in self.tenants:
            if tenant.name == name:
                return tenant
        known = ", ".join(tenant.name for tenant in self.tenants)
        raise BundleError(f"tenant {name!r} is not in this bundle; its tenants are {known}")

    def tenants_of(self, method: str) -> list[TenantSpec]:
        """A method's tenants in the order of their ``tenant_index``."""
        return [tenant for tenant in self.tenants if tenant.method == method]

    def prompt_length(self, tenant: str) -> int:
        """Prompt slots that a tenant's rows use; none those of the backbone alone, which has no name."""
        method = self.tenant(tenant).method if tenant else None
        return next((spec.prompt_length for spec in self.methods if spec.name == method), 0)

    def save(self, bundle: Path) -> None:
        """Write ``manifest.json`` and ``manifest.sha256``, each whole or not at all."""
        fields = dataclasses.asdict(self)
        for target in fields["targets"]:
            if not target["quantise"]:  # so that versions without this field read it
                del target["quantise"]
        data = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
        write_atomically(bundle / MANIFEST_FILE, data)
        write_atomically(bundle / HASH_FILE, hash_line(data).encode())

    @classmethod
    def load(cls, bundle: Path) -> BundleManifest:
        """Read and check ``manifest.json``; its hash and the files are checked by `iapt_export.contract.integrity`.

        Raises:
            BundleError: it is missing, no JSON, of another schema, has missing, unknown or wrong fields, or
                names a file outside the bundle.
        """
        path = bundle / MANIFEST_FILE
        if not path.is_file():
            raise BundleError(
                f"{bundle} holds no {MANIFEST_FILE}; expected a bundle written by 'iapt-export build', "
                f"found {found_at(bundle)}"
            )
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, data: bytes, path: str) -> BundleManifest:
        """`load` from bytes; ``path`` names them in errors."""
        try:
            fields = parse_json(data)
        except ValueError as error:
            raise BundleError(f"{path} is not JSON: {error}; build the bundle again") from error
        version = fields.get("schema_version") if isinstance(fields, dict) else None
        if version != SCHEMA_VERSION:
            is_older = isinstance(version, int) and version < SCHEMA_VERSION
            raise BundleError(
                f"{path}: schema_version is {version!r}, this version of iapt-export reads {SCHEMA_VERSION}; "
                + ("build the bundle again" if is_older else "upgrade iapt-export, or build the bundle again")
            )
        problems: list[str] = []
        manifest: BundleManifest = read_fields(cls, fields, "manifest", problems)
        for check in (_path_problems, _reference_problems, _type_problems) if manifest else ():
            problems += check(manifest)
        if problems:
            raise BundleError(f"{path} is not a valid manifest: " + "; ".join(problems))
        return manifest


def used_paths(manifest: BundleManifest) -> list[str]:
    """Paths of the files that a session or a comparison opens by name."""
    tenants = [path for tenant in manifest.tenants for path in (tenant.path, tenant.trained, tenant.examples)]
    graphs = [graph.path for target in manifest.targets for graph in target.graphs.values()]
    return [path for path in tenants if path is not None] + graphs


def _path_problems(manifest: BundleManifest) -> list[str]:
    """One line for each path that could lead out of the bundle."""
    paths = sorted({*used_paths(manifest), *manifest.files})
    return [
        f"path {path!r} leaves the bundle; expected a relative path without '..'"
        for path in paths
        if "\\" in path or "\0" in path or not set(path.split("/")).isdisjoint({"", ".", ".."})
    ]


def _reference_problems(manifest: BundleManifest) -> list[str]:
    """One line for each name that is there twice, each tenant without weights or with a method that is not described,
    and each target without graphs to serve from.
    """
    known = {method.name for method in manifest.methods}
    kinds: dict[str, list[Any]] = {"method": manifest.methods, "tenant": manifest.tenants, "target": manifest.targets}
    return (
        [
            f"{kind} {name} is named twice"
            for kind, specs in kinds.items()
            for name, count in Counter(spec.name for spec in specs).items()
            if count > 1
        ]
        + [
            f"target {target.name} has no graphs that read instructions and go on from them"
            for target in manifest.targets
            if not step_graphs(target.graphs, in_place=True) and not step_graphs(target.graphs, in_place=False)
        ]
        + [
            f"tenant {tenant.name} is of method {tenant.method!r}, which the manifest does not describe"
            for tenant in manifest.tenants
            if tenant.method is not None and tenant.method not in known
        ]
        + [
            f"tenant {tenant.name} names no weights, neither as path nor as trained"
            for tenant in manifest.tenants
            if tenant.path is None and tenant.trained is None
        ]
    )


def hash_line(data: bytes) -> str:
    """What ``manifest.sha256`` says of a manifest's bytes."""
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_FILE}\n"


def _type_problems(manifest: BundleManifest) -> list[str]:
    """One line for each tensor of a type that no graph takes or gives."""
    graphs = [graph for target in manifest.targets for graph in target.graphs.values()]
    tensors = [tensor for graph in graphs for tensor in (*graph.inputs, *graph.outputs)]
    tensors += [tensor for method in manifest.methods for tensor in method.weights]
    return [
        f"dtype of {tensor.name} is {tensor.dtype!r}, expected one of {', '.join(TENSOR_TYPES)}"
        for tensor in tensors
        if tensor.dtype not in TENSOR_TYPES
    ]
