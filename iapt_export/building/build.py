"""The build: load, plan, export, build engines, lay out, validate, publish.

Beside the command line, which imports it only to build, this is the one file that may look into every room.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from contextlib import nullcontext
from pathlib import Path

from engines.native import plugin_library
from engines.tensorrt.builder import BuildOptions, check_options, engine_from_onnx
from engines.tensorrt.engine_info import EngineInfo
from engines.tensorrt.flavour import check_target, load_tensorrt, runtime_version
from iapt_export.building import layout as layout
from iapt_export.building.plan import (
    TENSORRT,
    TargetPlan,
    TenantPlan,
    check_device,
    check_ranges,
    load_tenants,
    onnx_variant,
    plan_ranges,
    plan_targets,
    plan_tenants,
)
from iapt_export.building.stage_cache import (
    check_output,
    content_key,
    default_cache,
    publish,
    run_stage,
    temporary_folder,
)
from iapt_export.contract.errors import IaptError, ParityError
from iapt_export.contract.manifest import BackboneSpec, BundleManifest, GraphSpec, Ranges, TargetSpec, file_sha256
from iapt_export.graphs.export import Serving, export_graphs
from iapt_export.graphs.installed import computing_fields
from iapt_export.graphs.interface import ModelShape, graph_specs
from iapt_export.graphs.save import WEIGHTS_FILE
from iapt_export.progress import Steps
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.methods.forms import form_name
from validation.judging.compare import Settings
from validation.reporting.report import write_report
from validation.reporting.summary import failure
from validation.validate import parity_from_report, validate_bundle


def build_bundle(args: argparse.Namespace) -> None:
    """Make a bundle at ``args.output``, or find an up-to-date one there.

    Raises:
        IaptError: bad input, or something that cannot be built here.
        ParityError: what was built does not compute what PyTorch computes; nothing stands at the output then.
    """
    output, cache = Path(args.output), Path(args.cache) if args.cache else default_cache()
    check_output(output)
    targets = plan_targets(args.target, args.dtype, args.opset)
    check_device(targets, args.device)
    _check_engines(targets, args.compute_capability, args.rational)
    with Steps(quiet=args.quiet) as steps:
        steps(f"loading {args.model}")
        backbone = _load(args, "fp32")
        adapters = load_tenants(args.adapter, backbone, args.peft_prompt_format)
        tenants = plan_tenants(
            adapters, backbone.model, merge_lora=args.merge_lora, fold_embeddings=args.fold_embeddings
        )
        ranges = plan_ranges({name: getattr(args, name) for name in ("batch", "sequence", "past", "tenants")})
        spec = layout.backbone_spec(backbone)
        check_ranges(ranges, tenants.num_slots, spec.max_positions, len(adapters), tenants.fewest)
        settings = {
            "targets": [dataclasses.asdict(target) for target in targets],
            "ranges": dataclasses.asdict(ranges),
            "flags": [args.compute_capability, args.rational, args.seed, args.new_tokens, args.device],
            "tenants": [args.merge_lora, args.fold_embeddings, args.peft_prompt_format],
        }
        key = content_key(layout.build_inputs(spec, adapters, settings))
        steps("looking for an up-to-date bundle")
        if layout.is_current(output, key):
            return
        job = _Job(args, cache, spec, ModelShape.from_config(backbone.model.config), tenants, ranges, steps, backbone)
        del backbone  # the job keeps one at a time, in the type that a target needs
        shipped = onnx_variant(targets)
        variants = dict.fromkeys(target.variant for target in reversed(targets))
        graphs = {
            variant: job.export([target for target in targets if target.variant == variant], variant == shipped)
            for variant in variants
        }
        backbone = job.load("fp32")
        with temporary_folder(output) as bundle:
            layout.place_files(graphs[shipped], bundle)
            layout.place_tokenizer(backbone, bundle)
            manifest = layout.new_manifest(
                spec,
                [layout.method_spec(item) for item in tenants.installed],
                ranges,
                layout.place_tenants(tenants, bundle, spec),
                [job.target(target, graphs[target.variant], bundle) for target in targets],
                key,
            )
            manifest = layout.with_files(manifest, bundle)
            manifest.save(bundle)
            manifest = _prove(args, bundle, manifest, backbone, steps)
            manifest.save(bundle)
            publish(bundle, output)


@dataclasses.dataclass
class _Job:
    """What the stages of one build share."""

    args: argparse.Namespace
    cache: Path
    spec: BackboneSpec
    shape: ModelShape
    tenants: TenantPlan
    ranges: Ranges
    steps: Steps
    backbone: Backbone | None
    dtype: str = "fp32"

    def load(self, dtype: str) -> Backbone:
        """The backbone in that type; only one is in memory at a time.

        Loaded again rather than cast: transformers keeps rotary frequencies in fp32, a cast would not.
        """
        if self.backbone is None or dtype != self.dtype:
            self.backbone = None
            gc.collect()  # modules refer to each other, so counting references frees nothing
            self.backbone, self.dtype = _load(self.args, dtype), dtype
        return self.backbone

    def specs(self, target: TargetPlan) -> dict[str, GraphSpec]:
        """The interfaces of the graphs that a target can use; of quantised weights only those to serve from."""
        specs = graph_specs(self.tenants.installed, self.shape, target.graph_dtype, self.capacity(target))
        return specs if target.weight_bits is None else layout.served_graphs(specs)

    def capacity(self, target: TargetPlan) -> int | None:
        """Cache entries of a row that a target's graphs have room for, if that is fixed."""
        return self.ranges.past.max if target.name in TENSORRT and target.opset >= 23 else None

    def export(self, targets: list[TargetPlan], shipped: bool) -> Path:
        """The folder with the ONNX graphs that targets of one variant are built from; all if the bundle ships them."""
        wanted = [self.specs(target) for target in targets]
        chosen = [tuple(specs) if shipped else layout.engine_graphs(specs) for specs in wanted]
        names = tuple(dict.fromkeys(name for own in chosen for name in own))
        target, capacity = targets[0], next(filter(None, map(self.capacity, targets)), None)
        merged = self.tenants.merged
        # one position more than a step finds, for the entry that it adds
        serving = Serving(self.ranges.past.max + 1 if "serve" in names else None, capacity, target.weight_bits)
        inputs = {
            "backbone": [self.spec.fingerprint, self.spec.weights_sha256],
            "methods": [
                [item.name, form_name(item.stacked), computing_fields(item.stacked.config)]
                for item in self.tenants.installed
            ],
            "merged": layout.adapter_hashes(self.tenants.adapters) if merged else None,
            "variant": target.variant,
            "graphs": names,
            "serving": dataclasses.asdict(serving),
            "versions": layout.export_versions(quantises=target.weight_bits is not None),
        }

        def make(folder: Path) -> None:
            model = self.load(target.graph_dtype).model
            with merged.merged(model) if merged else nullcontext():
                export_graphs(
                    model,
                    self.tenants.installed,
                    folder,
                    dtype=target.graph_dtype,
                    opset=target.opset,
                    names=names,
                    serving=serving,
                    on_step=lambda text: self.steps(f"{target.variant}: {text}"),
                )

        folder, found = run_stage(self.cache, f"graphs-{target.variant}", inputs, make)
        if found:
            self.steps(f"{target.variant}: graphs are up to date")
        return folder

    def target(self, target: TargetPlan, graphs: Path, bundle: Path) -> TargetSpec:
        """Describe a target; for TensorRT, build its engines first."""
        specs = self.specs(target)
        if target.name == "onnxruntime":
            version = layout.versions().get("onnxruntime", "not installed")
            return TargetSpec(target.name, target.dtype, target.opset, specs, version)
        return self._engines(target, specs, graphs, bundle)

    def _engines(self, target: TargetPlan, specs: dict[str, GraphSpec], graphs: Path, bundle: Path) -> TargetSpec:
        options = BuildOptions(target.name, self.args.compute_capability, rational=self.args.rational)
        version = runtime_version(target.name)
        weights = file_sha256(graphs / WEIGHTS_FILE)
        plugin = plugin_library() if self.args.rational == "plugin" else None
        sources = {name: file_sha256(graphs / f"{name}.onnx") for name in layout.engine_graphs(specs)}
        for name, source in sources.items():
            inputs = {
                "graph": [source, weights],
                "ranges": dataclasses.asdict(self.ranges),
                "options": dataclasses.asdict(options),
                "versions": layout.engine_versions(version, plugin),
            }
            text = f"{target.name}: building {name}.engine"

            def make(folder: Path, name: str = name, text: str = text) -> None:
                engine_from_onnx(
                    graphs / f"{name}.onnx",
                    folder / f"{name}.engine",
                    specs[name],
                    self.ranges,
                    options,
                    on_progress=lambda step: self.steps(text, step.done / step.total if not step.parent else None),
                )

            self.steps(text)
            folder, _ = run_stage(self.cache, f"engine-{target.name}-{name}", inputs, make)
            layout.place_files(folder, bundle / "engines" / target.name)
        engines = layout.engine_specs(specs, target.name)
        built_for = EngineInfo.load(bundle / next(iter(engines.values())).path).compute_capability
        return TargetSpec(
            target.name, target.dtype, target.opset, engines, version, built_for, sources, self.args.rational
        )


def _check_engines(targets: list[TargetPlan], compute_capability: str | None, rational: str) -> None:
    """Refuse, before any long work, engines that cannot be built here."""
    plans = [target for target in targets if target.name in TENSORRT]
    if compute_capability and not plans:
        raise IaptError("--compute-capability is for TensorRT targets; add --target tensorrt-rtx or leave it out")
    if rational == "plugin" and not plans:
        raise IaptError("--rational plugin is for TensorRT targets; add --target tensorrt or leave it out")
    for target in plans:
        check_options(BuildOptions(target.name, rational=rational))
        check_target(target.name, target.dtype, target.opset, compute_capability)
        load_tensorrt(target.name)
    if rational == "plugin":
        plugin_library()


def _load(args: argparse.Namespace, dtype: str) -> Backbone:
    """The backbone that the command names."""
    return load_backbone(args.model, dtype=dtype, revision=args.revision, trust_remote_code=args.trust_remote_code)


def _prove(
    args: argparse.Namespace, bundle: Path, manifest: BundleManifest, backbone: Backbone, steps: Steps
) -> BundleManifest:
    """Validate a bundle that is not published yet; its manifest with parity and report files."""
    settings = Settings(args.seed, args.new_tokens, args.device)
    report = validate_bundle(bundle, manifest, backbone, settings, steps, Path(args.output).name)
    # how long it took is not part of what was built: equal inputs give equal bytes
    report = dataclasses.replace(report, targets=[dataclasses.replace(t, seconds=0.0) for t in report.targets])
    if report.verdict != "pass":
        failed = Path(args.output).with_name(f"{Path(args.output).name}-failed-report")
        where = write_report(report, failed)
        raise ParityError(f"{failure(report)}. Nothing was written to {args.output}; the report is {where}")
    steps("writing the report")
    write_report(report, bundle)
    return dataclasses.replace(layout.with_files(manifest, bundle), parity=parity_from_report(report))
