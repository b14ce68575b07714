"""What a build will make: targets with dtype and opset, ranges, tenants; decided and checked before long work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt_export.errors import IaptError
from iapt_export.manifest import Range, Ranges
from trainers.adapter import Adapter, check_adapter_fits, load_adapter
from trainers.config import IAPTConfig

OPSETS = (20, 23)
"""20 decomposes attention and normalisation; 23 has operators for them."""
DEFAULT_OPSET = 23
DTYPES = ("fp32", "fp16", "bf16")
TENSORRT = ("tensorrt-rtx", "tensorrt")
TARGETS = ("onnxruntime", *TENSORRT)
DEFAULT_DTYPE = {"onnxruntime": "fp32", "tensorrt-rtx": "fp16", "tensorrt": "fp16"}


@dataclass(frozen=True)
class TargetPlan:
    """A target to build for."""

    name: str
    dtype: str
    opset: int

    @property
    def variant(self) -> str:
        """Targets with the same variant share ONNX graphs."""
        return f"{self.dtype}-opset{self.opset}"


def plan_targets(requested: list[str], dtype: str | None, opset: int | None) -> list[TargetPlan]:
    """Turn ``NAME`` or ``NAME:DTYPE`` into targets.

    Args:
        requested: as on the command line; empty means ONNX Runtime.
        dtype: for the targets that name none; None takes each target's default.
        opset: for all targets; None takes 23.

    Raises:
        IaptError: unknown or repeated target, unknown dtype or opset.
    """
    if opset not in (None, *OPSETS):
        raise IaptError(f"opset {opset} is not supported; use one of {', '.join(map(str, OPSETS))}")
    plans: list[TargetPlan] = []
    for text in requested or ["onnxruntime"]:
        name, _, suffix = text.partition(":")
        if name not in TARGETS:
            raise IaptError(f"target {name!r} is not known; use one of {', '.join(TARGETS)}, as NAME or NAME:DTYPE")
        chosen = suffix or dtype or DEFAULT_DTYPE[name]
        if chosen not in DTYPES:
            raise IaptError(f"dtype {chosen!r} of target {text!r} is not known; use one of {', '.join(DTYPES)}")
        if any(plan.name == name for plan in plans):
            raise IaptError(f"target {name!r} is given twice; build a second bundle for another dtype")
        plans.append(TargetPlan(name, chosen, opset or DEFAULT_OPSET))
    return plans


def check_device(targets: list[TargetPlan], device: str) -> None:
    """Refuse what ONNX Runtime cannot run on the device that the comparison will use.

    Raises:
        IaptError: bf16 on the CPU, where ONNX Runtime has no matrix product in it.
    """
    if device == "cpu" and any((target.name, target.dtype) == ("onnxruntime", "bf16") for target in targets):
        raise IaptError(
            "ONNX Runtime multiplies no bf16 matrices on the CPU, so onnxruntime:bf16 could not be compared; "
            "use fp32 or fp16, or --device cuda on a machine with an NVIDIA GPU"
        )


def onnx_variant(targets: list[TargetPlan]) -> str:
    """The variant whose ONNX graphs the bundle holds: ONNX Runtime's, which runs them, wherever it stands."""
    return next((target.variant for target in targets if target.name == "onnxruntime"), targets[0].variant)


def parse_range(text: str, name: str) -> Range:
    """Read ``MAX`` or ``MIN:OPT:MAX``.

    Raises:
        IaptError: not numbers, or not ordered.
    """
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
        raise IaptError(f"--{name} {text!r} is not MAX or MIN:OPT:MAX in whole numbers, for example 8 or 1:4:8")
    values = [int(part) for part in parts]
    if len(values) == 1:
        values = [1, max(1, values[0] // 2), values[0]]
    low, opt, high = values
    if not 1 <= low <= opt <= high:
        raise IaptError(f"--{name} {text!r} is not ordered: expected 1 <= MIN <= OPT <= MAX")
    return Range(low, opt, high)


def plan_ranges(texts: dict[str, str]) -> Ranges:
    """Read the four ranges as on the command line; see `parse_range`."""
    return Ranges(**{name: parse_range(text, name) for name, text in texts.items()})


def check_ranges(ranges: Ranges, prompt_length: int, max_positions: int, num_tenants: int) -> None:
    """Refuse ranges that contradict each other, the backbone or the tenants.

    Raises:
        IaptError: with every problem listed.
    """
    problems = []
    if ranges.past.max < ranges.sequence.max + prompt_length:
        problems.append(
            f"--past {ranges.past.max} cannot hold {prompt_length} prompt rows and --sequence {ranges.sequence.max}"
        )
    if ranges.past.max + 1 > max_positions:
        problems.append(f"--past {ranges.past.max} is more than the backbone's {max_positions} positions less one")
    if num_tenants > ranges.tenants.max:
        problems.append(f"{num_tenants} adapters are more than --tenants {ranges.tenants.max}")
    if problems:
        raise IaptError("; ".join(problems))


def load_tenants(arguments: list[str], backbone: Any) -> dict[str, Adapter]:
    """Load ``DIR`` or ``NAME=DIR`` for each tenant and check that they fit the backbone and each other.

    Args:
        arguments: as on the command line; the folder's name is the tenant's unless one is given.
        backbone: a `trainers.backbone.Backbone`.

    Raises:
        IaptError: a bad adapter, one for another backbone, a repeated name, or generators that differ.
    """
    tenants: dict[str, Adapter] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        path = Path(folder if equals else argument)
        name = name if equals else path.resolve().name
        if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
            raise IaptError(f"tenant name {name!r} must be letters, digits, '-', '_' or '.'; give --adapter NAME=DIR")
        if name in tenants:
            raise IaptError(f"two adapters are called {name!r}; tell them apart with --adapter NAME=DIR")
        adapter = load_adapter(path)
        check_adapter_fits(adapter.config, backbone, str(path))
        tenants[name] = adapter
    if not tenants:
        raise IaptError("no adapter was given; add --adapter DIR, once for each tenant")
    shared_method(tenants)
    return tenants


def shared_method(tenants: dict[str, Adapter]) -> IAPTConfig:
    """The one generator configuration of all tenants: their weights are stacked, so all must have it.

    Raises:
        IaptError: two tenants differ; the fields are named.
    """
    (first_name, first), *rest = tenants.items()
    for name, adapter in rest:
        mine, theirs = vars(first.config.method), vars(adapter.config.method)
        # how weights were found does not change what they compute
        differing = [
            f"{field}: {mine[field]} and {theirs[field]}"
            for field in mine
            if mine[field] != theirs[field] and field not in ("coefficients", "init_function")
        ]
        if differing:
            raise IaptError(
                f"{first_name} and {name} cannot share a bundle, their generators differ in {'; '.join(differing)}; "
                "build one bundle for each kind"
            )
    return first.config.method
