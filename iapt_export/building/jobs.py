"""A whole build, decided and checked before long work: what it makes, and the jobs that make it.

Like the build itself, this file may look into every room; nothing but the build imports it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engines.native import plugin_library
from engines.onnxruntime.devices import require_device, require_rounded_cache
from engines.serving.conversation import encode_request
from engines.serving.request import Request
from engines.serving.tenants import Tenant
from engines.serving.text import TextCodec, base_format
from engines.tensorrt.builder import BuildOptions, check_options
from engines.tensorrt.flavour import check_target, load_tensorrt
from iapt_export.building import layout as layout
from iapt_export.building.adapter_argument import parse_adapters
from iapt_export.building.build_request import BuildRequest
from iapt_export.building.output import check_output
from iapt_export.building.plan import (
    TENSORRT,
    TargetPlan,
    TenantPlan,
    check_auto,
    check_device,
    check_ranges,
    load_tenants,
    onnx_variant,
    plan_ranges,
    plan_targets,
    plan_tenants,
)
from iapt_export.building.stage_cache import content_key, default_cache
from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import KINDS, VERIFY
from iapt_export.contract.integrity import load_private_key
from iapt_export.contract.low_bits import AUTO, rounding_of
from iapt_export.contract.manifest import BackboneSpec, GraphSpec, Ranges
from iapt_export.graphs.export import Serving
from iapt_export.graphs.passes.use_tensor_scatter import SCATTER_OPSET
from iapt_export.graphs.table import graph_specs
from trainers.adapters.adapter import EXAMPLES_FILE, Adapter, read_fields
from trainers.decoder.backbone import Backbone
from trainers.decoder.family import Family, check_family, max_positions
from trainers.decoder.rounded import rounded_weights
from validation.sides.cases import check_room, read_examples

NOT_IN_KEY = (
    "model",
    "revision",
    "trust_remote_code",
    "adapters",
    "output",
    "cache",
    "prove",
    "sign",
    "dtype",
    "opset",
    "quantise",
)
"""Fields of a request that a build's key leaves out: it hashes what stands at a place, and each target's type,
opset and rounding; a bundle without proof is never up to date."""


@dataclass(frozen=True)
class GraphJob:
    """ONNX graphs of one variant, exported in one stage."""

    variant: str
    target: TargetPlan
    """Any of those that they are for; all have one type and opset."""
    names: tuple[str, ...]
    serving: Serving


@dataclass(frozen=True)
class EngineJob:
    """A TensorRT engine, built in one stage."""

    target: str
    name: str
    spec: GraphSpec
    """The interface of the graph that it is built from."""
    options: BuildOptions


@dataclass(frozen=True)
class BuildPlan:
    """All that a build will do, decided and checked; it holds the adapters, but not the backbone."""

    request: BuildRequest
    targets: list[TargetPlan]
    ranges: Ranges
    tenants: TenantPlan
    backbone: BackboneSpec
    specs: dict[str, dict[str, GraphSpec]]
    """Target to the interfaces of the graphs that it can use."""
    graphs: list[GraphJob]
    engines: list[EngineJob]
    texts: dict[str, str]
    """The backbone's configuration and tokenizer, see `layout.text_hashes`."""
    key: str
    """Equal keys mean equal bundles."""

    @property
    def output(self) -> Path:
        """The bundle's folder, without links."""
        return Path(self.request.output).resolve()

    @property
    def cache(self) -> Path:
        """Where stages are kept."""
        return cache_of(self.request)


def cache_of(request: BuildRequest) -> Path:
    """Where a request's stages are kept."""
    return Path(request.cache) if request.cache else default_cache()


def check_request(request: BuildRequest) -> tuple[list[TargetPlan], Ranges]:
    """Refuse what can be refused without the backbone.

    Returns:
        The targets and ranges that are asked for.

    Raises:
        IaptError: contradicting or unknown settings, an output that is not ours, no adapter where one is named, no
            key to sign with, or engines that this machine cannot build.
    """
    check_output(Path(request.output), cache_of(request))
    for path, _ in parse_adapters(request.adapters).values():
        read_fields(path)
    if request.sign:
        load_private_key(Path(request.sign))
    is_auto = request.quantise == AUTO
    targets = plan_targets(request.targets, request.dtype, request.opset, "" if is_auto else request.quantise)
    if is_auto:
        check_auto(targets, request.device)
    check_device(targets, request.device)
    if any(target.rounding and target.rounding.cache_type for target in targets):
        require_rounded_cache()
    if request.prove and request.device != "cpu" and any(target.name == "onnxruntime" for target in targets):
        require_device(request.device)
    _check_engines(request, targets)
    return targets, plan_ranges({name: getattr(request, name) for name in ("batch", "sequence", "past", "tenants")})


def plan_build(request: BuildRequest, backbone: Backbone) -> BuildPlan:
    """Decide all that a build will do, before long work.

    With ``--quantise auto`` the weights are stored as their type has it, until `stored_as` says otherwise.

    Args:
        request: what is wanted.
        backbone: the request's, in fp32.

    Raises:
        IaptError: something in the request, the adapters or this machine does not go together.
    """
    targets, ranges = check_request(request)
    family = check_family(backbone.model, request.model)
    _check_targets(request, targets, family, backbone)
    adapters = load_tenants(request.adapters, backbone, request.peft_prompt_format)
    texts = _check_text(backbone, adapters)
    for adapter in adapters.values():
        if request.prove and adapter.path and (examples := adapter.path / EXAMPLES_FILE).is_file():
            read_examples(examples)
    tenants = plan_tenants(
        adapters,
        backbone.model,
        merge_lora=request.merge_lora,
        fold_embeddings=request.fold_embeddings,
        max_lora_rank=request.max_lora_rank,
    )
    most = max_positions(backbone.model)
    check_ranges(ranges, tenants.num_slots, most, len(adapters), tenants.fewest)
    if request.prove:
        check_room(ranges, tenants.num_slots, request.new_tokens)
    spec = layout.backbone_spec(backbone, adapters.values())  # reads all weights, a minute for 7 billion
    specs = {}
    for target in targets:
        capacity = _capacity(target, ranges, request.device) if family.in_place else None
        drafts = 0 if target.name in TENSORRT else request.drafts
        cache = target.rounding.cache_type if target.rounding else ""
        wanted = graph_specs(tenants.installed, spec, target.graph_dtype, capacity, drafts, cache)
        if not family.in_place:
            del wanted["serve"]
        specs[target.name] = _specs_of(target, wanted)
    return BuildPlan(
        request=request,
        targets=targets,
        ranges=ranges,
        tenants=tenants,
        backbone=spec,
        specs=specs,
        graphs=_graph_jobs(targets, specs, ranges, request),
        engines=[
            EngineJob(target.name, name, specs[target.name][name], _options(request, target))
            for target in targets
            if target.name in TENSORRT
            for name in layout.engine_graphs(specs[target.name])
        ],
        texts=texts,
        key=_key(request, targets, ranges, spec, adapters, texts),
    )


def stored_as(plan: BuildPlan, quantise: str) -> BuildPlan:
    """A plan with rounded weights stored otherwise: equal to what ``--quantise`` with that text gives.

    Raises:
        IaptError: the text says what a target's type has not.
    """
    request = dataclasses.replace(plan.request, quantise=quantise)
    targets = []
    for target in plan.targets:
        rounding = rounding_of(target.name, target.dtype, quantise)
        targets.append(dataclasses.replace(target, quantise=rounding.quantise if rounding else ""))
    return dataclasses.replace(
        plan,
        request=request,
        targets=targets,
        graphs=_graph_jobs(targets, plan.specs, plan.ranges, request),
        key=_key(request, targets, plan.ranges, plan.backbone, plan.tenants.adapters, plan.texts),
    )


def _key(
    request: BuildRequest,
    targets: list[TargetPlan],
    ranges: Ranges,
    spec: BackboneSpec,
    adapters: dict[str, Adapter],
    texts: dict[str, str],
) -> str:
    """Of everything that a bundle depends on."""
    settings = {name: value for name, value in vars(request).items() if name not in NOT_IN_KEY}
    settings |= {
        "targets": [dataclasses.asdict(target) for target in targets],
        **dataclasses.asdict(ranges),
    }
    return content_key(layout.build_inputs(spec, adapters, settings) | {"texts": texts})


def _specs_of(target: TargetPlan, specs: dict[str, GraphSpec]) -> dict[str, GraphSpec]:
    """Of all graphs, those of a target: rounded weights are for serving alone."""
    if target.rounding is None:
        return specs
    if not target.rounding.is_scaled:
        return layout.served_graphs(specs)
    return {name: specs[name] for name in layout.engine_graphs(specs)}


def _check_text(backbone: Backbone, adapters: dict[str, Adapter]) -> dict[str, str]:
    """Refuse, before the export, a tokenizer or a template with which the bundle could not be served; hash them."""
    with tempfile.TemporaryDirectory() as folder:
        layout.place_tokenizer(backbone, Path(folder))
        codec = TextCodec(Path(folder))
        tenants = [
            Tenant(name, None, -1, 0, config.prompt_format, config.peft_type, config.system_prompt)
            for name, config in ((name, adapter.config) for name, adapter in adapters.items())
        ] or [Tenant(backbone.name_or_path, None, -1, 0, base_format(Path(folder)), "none")]
        for tenant in tenants:
            encode_request(f"tenant {tenant.name}", Request(tenant.name, "Hello"), tenant, codec)
        return layout.text_hashes(Path(folder), backbone.model)


def _check_targets(request: BuildRequest, targets: list[TargetPlan], family: Family, backbone: Backbone) -> None:
    """Refuse targets that need graphs which a family cannot have, or weights that a backbone does not have."""
    if request.rational == "plugin" and not family.in_place:
        raise _no_node_for_plugin(f"this backbone ({'; '.join(family.restrictions)})", "use --rational function")
    if request.drafts and all(target.name in TENSORRT for target in targets):
        raise IaptError("--drafts is for ONNX Runtime, and no such target is built; add --target onnxruntime")
    if request.drafts and not family.in_place:
        raise IaptError(
            "--drafts needs a graph over a cache that is written in place, which this backbone cannot have: "
            f"{'; '.join(family.restrictions)}. Leave it out"
        )
    quantised = [target for target in targets if target.rounding]
    if quantised and not family.in_place:
        raise IaptError(
            f"{quantised[0].dtype} is for graphs over a cache that is written in place, which this backbone cannot "
            f"have: {'; '.join(family.restrictions)}. Build for {quantised[0].name}:{quantised[0].graph_dtype}"
        )
    for target in quantised:
        if target.rounding and not rounded_weights(backbone.model, target.rounding):
            raise IaptError(
                f"{target.name}:{target.dtype} stores matrices with inputs in whole blocks of {target.rounding.block}, "
                f"and this backbone has none; build for {target.name}:{target.graph_dtype}"
            )


def _no_node_for_plugin(where: str, try_this: str) -> IaptError:
    return IaptError(
        f"--rational plugin needs a graph over a cache that is written in place, which {where} does not have: engines "
        f"come from the portable graphs then, where the activation is written in standard operators; {try_this}"
    )


def _capacity(target: TargetPlan, ranges: Ranges, device: str) -> int | None:
    """Cache entries of a row in a target's graphs of standard operators over a cache in place; None for no such graphs.

    ONNX Runtime needs them on a GPU, see `iapt_export.contract.graphs.runs_on`.
    """
    wanted = target.name in TENSORRT or (device == "cuda" and not target.rounding)
    return ranges.past.max if wanted and target.opset >= SCATTER_OPSET - 1 else None


def _graph_jobs(
    targets: list[TargetPlan], specs: dict[str, dict[str, GraphSpec]], ranges: Ranges, request: BuildRequest
) -> list[GraphJob]:
    """One job for each variant: all graphs of the one that the bundle ships, of others those of the engines."""
    jobs = []
    shipped = onnx_variant(targets)
    for variant in dict.fromkeys(target.variant for target in reversed(targets)):
        own = [target for target in targets if target.variant == variant]
        chosen = [specs[t.name] if variant == shipped else layout.engine_graphs(specs[t.name]) for t in own]
        names = tuple(dict.fromkeys(name for graphs in chosen for name in graphs))
        capacity = next(filter(None, (_capacity(target, ranges, request.device) for target in own)), None)
        # one position more than a step finds, for the entry that it adds
        positions = ranges.past.max + 1 if any(KINDS[name].needs_onnxruntime for name in names) else None
        drafts = request.drafts if VERIFY in names else 0
        jobs.append(GraphJob(variant, own[0], names, Serving(positions, capacity, own[0].rounding, drafts)))
    return jobs


def _options(request: BuildRequest, target: TargetPlan) -> BuildOptions:
    return BuildOptions(target.name, request.compute_capability, rational=request.rational)


def _check_engines(request: BuildRequest, targets: list[TargetPlan]) -> None:
    """Refuse, before any long work, engines that cannot be built here."""
    plans = [target for target in targets if target.name in TENSORRT]
    if request.compute_capability and not plans:
        raise IaptError("--compute-capability is for TensorRT targets; add --target tensorrt-rtx or leave it out")
    if request.rational == "plugin" and not plans:
        raise IaptError("--rational plugin is for TensorRT targets; add --target tensorrt or leave it out")
    for target in plans:
        check_options(_options(request, target))
        if request.rational == "plugin" and target.opset < SCATTER_OPSET - 1:
            raise _no_node_for_plugin(f"opset {target.opset}", "leave out --opset")
        check_target(target.name, target.dtype, target.opset, request.compute_capability)
        load_tensorrt(target.name)
    if request.rational == "plugin":
        plugin_library()
