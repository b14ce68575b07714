"""What memory serving takes, by formulas: of a model from its configuration, of a bundle from its files.

Shape legend: B rows, S cache entries of a row, N tenants, L layers, H key/value heads, K their width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import PAST, step_graphs
from iapt_export.contract.low_bits import Rounding
from iapt_export.contract.manifest import MANIFEST_FILE, BundleManifest, TargetSpec
from iapt_export.contract.types import CACHE_BYTES, FLOAT_BYTES
from trainers.methods.configs import DEFAULT_METHOD, METHOD_CONFIGS, config_of, flag_name


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much is served at once."""

    batch: Annotated[PositiveInt | None, Parameter(metavar="ROWS")] = None
    """Rows of one batch; without it, the bundle's largest, or the largest that build makes without being told."""
    past: Annotated[PositiveInt | None, Parameter(metavar="ENTRIES")] = None
    """Cache entries of a row: prompts, instruction, answer; without it, the bundle's largest, or likewise."""
    tenants: Annotated[PositiveInt | None, Parameter(metavar="N")] = None
    """Tenants side by side; without it, the bundle's own, or 1. In a bundle, further ones count as its largest."""
    target: Annotated[str | None, Parameter(metavar="T[:DTYPE]")] = None
    """As build takes it, such as onnxruntime:int8; without it, a bundle's first, or onnxruntime:fp32."""
    quantise: Annotated[str, Parameter(metavar="KEY=N,...")] = ""
    """As build takes it; a bundle says it itself."""
    method: Annotated[Literal[tuple(map(flag_name, METHOD_CONFIGS))] | None, Parameter(metavar="NAME")] = None  # type: ignore[valid-type]
    """What the tenants of a model will be, with its default settings; without it, iapt. A bundle says it itself."""


@dataclass(frozen=True)
class Share:
    """One thing that takes memory."""

    name: str
    bytes: int
    formula: str
    grows: str
    """With what, in words."""


def plan_memory(path: str, load: Load) -> list[Share]:
    """What each part takes; weights are not read.

    Args:
        path: bundle folder, or a model as ``train`` takes it.
        load: how much is served at once.

    Raises:
        IaptError: neither stands there, or the bundle cannot serve so much.
    """
    if (Path(path) / MANIFEST_FILE).is_file():
        return _of_bundle(Path(path), load)
    return _of_model(path, load)


def table(path: str, shares: list[Share]) -> Any:
    """The shares and their sum as a rich table."""
    from rich.table import Table

    total = sum(share.bytes for share in shares)
    title = f"{path}: {total / 1e6:,.1f} MB, beside the runtime's own and what a step computes in between"
    result = Table(title=title, box=None, title_justify="left")
    for name in ("what", "MB", "bytes", "grows with"):
        result.add_column(name, justify="right" if name == "MB" else "left", overflow="fold")
    for share in shares:
        result.add_row(share.name, f"{share.bytes / 1e6:,.1f}", share.formula, share.grows)
    return result


def _of_bundle(bundle: Path, load: Load) -> list[Share]:
    manifest = BundleManifest.load(bundle)
    name, _, dtype = (load.target or manifest.targets[0].name).partition(":")
    target = manifest.target(name)
    if dtype not in ("", target.dtype):
        raise IaptError(f"{bundle} was built for {name}:{target.dtype}, not for {name}:{dtype}")
    for flag, value in (("--quantise", load.quantise), ("--method", load.method)):
        if value:
            raise IaptError(f"{flag} is for a model, and {bundle} is a bundle, which says it itself; leave it out")
    sizes = {
        "batch": load.batch or manifest.ranges.batch.max,
        "past": load.past or manifest.ranges.past.max,
        "tenants": load.tenants or len(manifest.tenants),
    }
    for field, size in sizes.items():
        if size > (most := getattr(manifest.ranges, field).max):
            raise IaptError(f"--{field} {size} is more than the bundle's {most}; build it again with --{field} {size}")
    in_place = step_graphs(target.graphs, in_place=True)
    graphs = in_place or step_graphs(target.graphs, in_place=False)
    inputs = {spec.name: spec for graph in graphs for spec in target.graphs[graph].inputs}
    caches = [spec for name, spec in inputs.items() if name.startswith(PAST)]  # [B, H, S, K]
    entry = sum(int(spec.shape[1]) * int(spec.shape[3]) * CACHE_BYTES[spec.dtype] for spec in caches)
    return [
        _weights_of(bundle, target, graphs),
        _cache(entry, sizes, manifest.num_slots, copies=1 if in_place else 2),
        *_tenants_of(manifest, inputs, sizes["tenants"]),
        _logits(manifest.backbone.vocab_size, sizes),
    ]


def _weights_of(bundle: Path, target: TargetSpec, graphs: Iterable[str]) -> Share:
    paths = dict.fromkeys(bundle / target.graphs[graph].path for graph in graphs)
    if target.name == "onnxruntime":
        import onnx_ir as ir

        tensors: dict[tuple[str, ...], int] = {}
        for model in map(ir.load, paths):
            for graph in model.graphs():
                for name, value in graph.initializers.items():
                    if value.const_value is not None:
                        tensor = value.const_value
                        place = (tensor.location, str(tensor.offset)) if isinstance(tensor, ir.ExternalTensor) else ()
                        tensors[tuple(map(str, place)) or (model.graph.name or "", name)] = tensor.nbytes
        return Share("weights", sum(tensors.values()), f"{len(tensors):,} tensors of {_names(paths)}", "nothing else")
    size = sum(path.stat().st_size for path in paths)
    return Share("weights", size, f"engines {_names(paths)}; each holds its own", "nothing else")


def _names(paths: Iterable[Path]) -> str:
    return " and ".join(path.name for path in paths)


def _tenants_of(manifest: BundleManifest, inputs: dict[str, Any], tenants: int) -> list[Share]:
    """A stack for each method; tenants that are still to come count as ones of the method with the largest."""
    more, shares = tenants - len(manifest.tenants), []
    each = {
        method.name: sum(
            math.prod(map(int, weight.shape)) * FLOAT_BYTES[inputs.get(f"{method.name}.{weight.name}", weight).dtype]
            for weight in method.weights
        )
        for method in manifest.methods
    }
    largest = max(each, key=lambda name: each[name], default=None)
    for name, size in each.items():
        count = len(manifest.tenants_of(name)) + (max(more, 0) if name == largest else 0)
        shares.append(Share(f"tenants of {name}", count * size, f"{count} · {size:,}", "tenants, not with rows"))
    return shares


def _cache(entry: int, sizes: dict[str, int], slots: int, copies: int = 1) -> Share:
    twice = "2 · " if copies == 2 else ""
    why = "; twice, since a step of these graphs returns a longer copy" if copies == 2 else ""
    formula = f"{twice}{_rows(sizes['batch'])} · {sizes['past']:,} entries · {entry:,}"
    prompts = f"; {slots} entries of each row are prompts" if slots else ""
    return Share("KV cache", copies * sizes["batch"] * sizes["past"] * entry, formula, f"rows and past{why}{prompts}")


def _logits(vocabulary: int, sizes: dict[str, int]) -> Share:
    return Share("logits", 4 * sizes["batch"] * vocabulary, f"{_rows(sizes['batch'])} · {vocabulary:,} · 4", "rows")


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


def _of_model(path: str, load: Load) -> list[Share]:
    import torch

    from iapt_export.building.build_request import BuildRequest
    from iapt_export.building.plan import TENSORRT, parse_range, plan_targets
    from trainers.decoder.backbone import load_outline
    from trainers.decoder.family import check_family, max_positions
    from trainers.decoder.insertion import sizes_of
    from trainers.methods.forms import METHODS

    (target,) = plan_targets([load.target] if load.target else [], None, None, load.quantise)
    model = load_outline(path)
    family, shape = check_family(model, path), sizes_of(model)
    longest = max_positions(model) - 1
    sizes = {
        "batch": load.batch or parse_range(BuildRequest.batch, "batch").max,
        "past": load.past or min(parse_range(BuildRequest.past, "past").max, longest),
        "tenants": load.tenants or 1,
    }
    width = FLOAT_BYTES[target.graph_dtype]
    cached = CACHE_BYTES[(target.rounding and target.rounding.cache_type) or target.graph_dtype]
    entry = sum(shape.cache_widths) * shape.num_layers * shape.num_kv_heads * cached
    name = load.method or DEFAULT_METHOD
    method = METHODS[next(each for each in METHOD_CONFIGS if flag_name(each) == name)]
    with torch.device("meta"):
        module = method(config_of(name)(), shape)
        shipped = module if module.is_encoder else module.deployed()
    if not shipped.num_slots < sizes["past"] <= longest:
        raise IaptError(f"--past {sizes['past']} cannot be built: expected {shipped.num_slots + 1} to {longest}")
    each = width * sum(parameter.numel() for parameter in shipped.parameters())
    count, size = model_weights(model, target.rounding, width)
    stored = f"in {target.dtype}" if target.rounding else f"· {width}"
    engines, held = (2, "2 engines · ") if target.name in TENSORRT else (1, "")  # each holds its own
    return [
        Share("weights", engines * size, f"{held}{count:,} parameters {stored}", "nothing else"),
        _cache(entry, sizes, shipped.num_slots, copies=1 if family.in_place else 2),
        Share(
            f"tenants of {name}",
            sizes["tenants"] * each,
            f"{sizes['tenants']} · {each:,}",
            "tenants, not with rows",
        ),
        _logits(shape.vocab_size, sizes),
    ]


def model_weights(model: Any, rounding: Rounding | None, width: int) -> tuple[int, int]:
    """How many parameters a model has, and how many bytes they take as they are stored.

    Args:
        model: its tensors' shapes count alone.
        rounding: to blocks with a scale each, as `trainers.decoder` makes them; None for ``width``.
        width: bytes of a number that is not in blocks.
    """
    from transformers.pytorch_utils import Conv1D

    from trainers.decoder.rounded import rounded_weights

    blocks: dict[int, int] = {}
    for name, num_bits in rounded_weights(model, rounding).items() if rounding else ():
        assert rounding is not None
        module = model.get_submodule(name.rpartition(".")[0])
        inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
        scale, size = rounding.scale_bytes(num_bits), rounding.block_for(num_bits)
        blocks[id(module.weight)] = -(-inputs // size) * outputs * (size * num_bits // 8 + scale)
    parameters = list(model.parameters())
    return (
        sum(item.numel() for item in parameters),
        sum(blocks.get(id(item), item.numel() * width) for item in parameters),
    )
