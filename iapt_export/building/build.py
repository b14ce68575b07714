"""The build: load, plan, export, build engines, lay out, validate, publish.

Beside the command line and the plan, this is the one file that may look into every room. The package has `build` as
``iapt_export.build``.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from engines.cuda.driver import find_driver
from engines.native import plugin_library
from engines.tensorrt.builder import engine_from_onnx
from engines.tensorrt.engine_info import EngineInfo
from engines.tensorrt.flavour import runtime_version
from iapt_export.building import layout as layout
from iapt_export.building.backbones import Backbones
from iapt_export.building.build_request import BuildRequest
from iapt_export.building.jobs import (
    BuildPlan,
    EngineJob,
    GraphJob,
    cache_of,
    check_request,
    plan_build,
    stored_as,
)
from iapt_export.building.outlook import Outlook as Outlook
from iapt_export.building.outlook import outlook_of
from iapt_export.building.output import claimed, publish, temporary_folder
from iapt_export.building.plan import TENSORRT, TargetPlan, onnx_variant
from iapt_export.building.rounding_choice import Search, candidates
from iapt_export.building.rounding_search import ask_pytorch, check_searchable, machine, measure, searched_target
from iapt_export.building.stage_cache import in_use, made_stage, run_stage
from iapt_export.building.telling import tell_of_generation_settings, tell_of_other_weights
from iapt_export.contract.errors import ParityError
from iapt_export.contract.integrity import sign
from iapt_export.contract.low_bits import AUTO
from iapt_export.contract.manifest import BundleManifest, TargetSpec, file_sha256
from iapt_export.contract.settings import computing_fields
from iapt_export.graphs.export import export_graphs
from iapt_export.graphs.save import WEIGHTS_FILE
from trainers.decoder.backbone import Backbone
from trainers.decoder.importance import importance_of, load_importance, save_importance, uses_importance
from trainers.decoder.rounded import Importance
from trainers.decoder.stored import is_outline
from trainers.decoder.streamed import streamed
from trainers.methods.forms import form_name
from validation.judging.compare import Settings, depth_for
from validation.reporting.report import write_report
from validation.reporting.summary import failure
from validation.sides.peft_side import folders_of
from validation.validate import parity_from_report, validate_bundle

LOGGER = logging.getLogger("iapt_export")
OnStep = Callable[..., None]
"""Takes a word on each step, and how far it is (0 to 1) where that is known."""


def build(
    request: BuildRequest, on_step: OnStep = lambda *_: None, say: Callable[[str], None] = LOGGER.info
) -> BundleManifest:
    """Make a bundle at ``request.output``, or find an up-to-date one there.

    Args:
        request: what is wanted.
        on_step: called with each step, for progress.
        say: told what is to be read afterwards, too: what ``--quantise auto`` measured.

    Returns:
        The manifest of the bundle that stands there now.

    Raises:
        IaptError: bad input, or something that cannot be built here.
        ParityError: what was built does not compute what PyTorch computes; it is not written to the output.
    """
    check_request(request)  # the plan does it again; here, so that it is refused before the backbone is loaded
    with claimed(Path(request.output)) as place, in_use(cache_of(request)):
        try:
            return _build(request, place, on_step, say)
        except OSError as error:
            error.filename = error.filename or request.output  # not every library says which file it was
            raise


def _build(request: BuildRequest, place: Path, on_step: OnStep, say: Callable[[str], None]) -> BundleManifest:
    """`build` at a place that is held for it."""
    on_step(f"loading {request.model}")
    backbones = Backbones(request)
    plan = plan_build(request, backbones.outline("fp32"))
    tell_of_generation_settings(backbones.outline("fp32"))
    if request.quantise == AUTO:
        plan = _searched(plan, backbones, on_step, say)
    tell_of_other_weights(plan.targets, plan.tenants.adapters, merged=plan.tenants.merged is not None)
    on_step("looking for an up-to-date bundle")
    backbones.check_unchanged()  # since before anything was read; the key has hashes of what stands there now
    if layout.is_current(place, plan.key, request.sign):
        return BundleManifest.load(place)
    _outlook(plan, backbones.outline("fp32")).check()
    graphs = {job.variant: _export(job, plan, backbones, on_step) for job in plan.graphs}
    with temporary_folder(place) as bundle:
        targets = [_target(target, plan, graphs[target.variant], bundle, on_step) for target in plan.targets]
        manifest = _lay_out(plan, targets, graphs, backbones.outline("fp32"), bundle)
        if request.prove:
            compared = backbones.to_compare(plan.targets)
            manifest = _prove(plan, bundle, manifest, compared, list(graphs.values()), on_step)
        backbones.check_unchanged()
        if request.sign:
            sign(bundle, Path(request.sign))
        publish(bundle, place)
    shutil.rmtree(_failed_report(place), ignore_errors=True)  # of a build before, which says that this one failed
    return manifest


def foresee(request: BuildRequest, on_step: OnStep = lambda *_: None) -> Outlook:
    """What `build` would make and need; writes nothing.

    Args:
        request: what is wanted.
        on_step: called with each step, for progress.

    Raises:
        IaptError: what `build` would refuse, but for too little memory or disk, which the outlook says.
    """
    check_request(request)
    on_step(f"reading {request.model}")
    backbones = Backbones(request)
    plan = plan_build(request, backbones.outline("fp32"))
    tell_of_generation_settings(backbones.outline("fp32"))
    if request.quantise == AUTO:
        rivals = _rivals(plan, backbones.outline("fp32"))
        search = Search.found(made_stage(plan.cache, *_search_stage(rivals)))
        if search is None:
            return _outlook(plan, backbones.outline("fp32"), rivals)
        plan = stored_as(plan, search.chosen)
    tell_of_other_weights(plan.targets, plan.tenants.adapters, merged=plan.tenants.merged is not None)
    if layout.is_current(plan.output, plan.key, request.sign):
        return Outlook([], [], f"{plan.output} is up to date: nothing to do")
    return _outlook(plan, backbones.outline("fp32"))


def _searched(plan: BuildPlan, backbones: Backbones, on_step: OnStep, say: Callable[[str], None]) -> BuildPlan:
    """The plan with weights stored as ``--quantise auto`` finds best, or found for the same build before."""
    rivals = _rivals(plan, backbones.outline("fp32"))

    def make(folder: Path) -> None:
        _outlook(plan, backbones.outline("fp32"), rivals).check()
        graphs = [_export(_searched_job(rival), rival, backbones, on_step) for rival in rivals]
        with tempfile.TemporaryDirectory() as name:
            asked = ask_pytorch(plan, Path(name), backbones.load("fp32"), on_step)
            backbones.drop()
            measured = measure(asked, rivals, graphs, on_step)
        Search(searched_target(plan).dtype, len(asked.answers), measured).save(folder)

    folder, _ = run_stage(plan.cache, *_search_stage(rivals), make)
    search = Search.load(folder)
    say(search.text())
    if search.doubt:
        LOGGER.warning("%s", search.doubt)
    return stored_as(plan, search.chosen)


def _rivals(plan: BuildPlan, backbone: Backbone) -> list[BuildPlan]:
    """The plan with each of the settings that a search measures, its types' own first."""
    settings = candidates(searched_target(plan).dtype, backbone.model)
    check_searchable(plan, backbone)
    return [stored_as(plan, quantise) for quantise in settings]


def _search_stage(rivals: list[BuildPlan]) -> tuple[str, dict[str, Any]]:
    """Name and inputs of the stage that keeps what a search measured: a bundle's, on this kind of machine."""
    return f"search-{searched_target(rivals[0]).variant}", {"bundles": [rival.key for rival in rivals], "on": machine()}


def _searched_job(rival: BuildPlan) -> GraphJob:
    return next(job for job in rival.graphs if job.variant == searched_target(rival).variant)


def _outlook(plan: BuildPlan, backbone: Backbone, rivals: Sequence[BuildPlan] = ()) -> Outlook:
    """Of a build, or of one that begins with a search among its rivals, of which the first is the plan itself."""
    jobs = [(job, _graph_key(job, plan)) for job in plan.graphs]
    others = [(job, _graph_key(job, rival)) for rival in rivals[1:] for job in [_searched_job(rival)]]
    rounded = [job for job in plan.graphs if uses_importance(backbone.model, job.target.rounding)]
    weighed = [_importance_stage(job, plan) for job in rounded]
    has_gpu, depth = not find_driver().problem, _depth(plan, backbone)
    return outlook_of(plan, backbone.model, jobs, depth, has_gpu=has_gpu, others=others, weighed=weighed)


def _depth(plan: BuildPlan, backbone: Backbone) -> str:
    return plan.request.depth or depth_for(backbone.model)


def _failed_report(place: Path) -> Path:
    return place.with_name(f"{place.name}-failed-report")


def _graph_key(job: GraphJob, plan: BuildPlan) -> dict[str, Any]:
    """Everything that decides a job's ONNX graphs."""
    installed, merged = plan.tenants.installed, plan.tenants.merged
    return {
        "backbone": [
            *(plan.texts[name] for name in (layout.MODEL_CONFIG, layout.MODEL_CODE) if name in plan.texts),
            plan.backbone.weights_sha256,
        ],
        "methods": [[item.name, form_name(item.stacked), computing_fields(item.stacked.config)] for item in installed],
        "merged": layout.adapter_hashes(plan.tenants.adapters) if merged else None,
        "variant": job.variant,
        "graphs": job.names,
        "serving": dataclasses.asdict(job.serving),
        "versions": layout.export_versions(quantises=bool(job.target.rounding and not job.target.rounding.is_scaled)),
    }


def _export(job: GraphJob, plan: BuildPlan, backbones: Backbones, on_step: OnStep) -> Path:
    """The folder with a job's ONNX graphs."""
    installed, merged = plan.tenants.installed, plan.tenants.merged

    def make(folder: Path) -> None:
        model = backbones.outline(job.target.graph_dtype).model
        with merged.merged(model) if merged else nullcontext():
            export_graphs(
                model,
                installed,
                folder,
                dtype=job.target.graph_dtype,
                opset=job.target.opset,
                names=job.names,
                serving=dataclasses.replace(job.serving, importance=_importance(job, plan, backbones, on_step)),
                on_step=lambda text: on_step(f"{job.variant}: {text}"),
            )
        backbones.check_unchanged()

    folder, is_found = run_stage(plan.cache, f"graphs-{job.variant}", _graph_key(job, plan), make)
    if is_found:
        on_step(f"{job.variant}: graphs are up to date")
    return folder


def _importance(job: GraphJob, plan: BuildPlan, backbones: Backbones, on_step: OnStep) -> Importance:
    """What a job's weights and cache are rounded by, measured once for a backbone; nothing where none of them is."""
    model = backbones.outline(job.target.graph_dtype).model
    if not uses_importance(model, job.target.rounding):
        return {}
    cache = _rounds_cache(job)

    def make(folder: Path) -> None:
        on_step("measuring how much each input of a matrix counts" + (", and the cache" if cache else ""))
        found = importance_of(streamed(model) if is_outline(model) else model, cache=cache)
        save_importance(found, set(found), folder)
        backbones.check_unchanged()

    return load_importance(run_stage(plan.cache, *_importance_stage(job, plan), make)[0])


def _importance_stage(job: GraphJob, plan: BuildPlan) -> tuple[str, dict[str, Any]]:
    key = _graph_key(job, plan) | {"cache": _rounds_cache(job)}
    return "importance", {name: key[name] for name in ("backbone", "merged", "versions", "cache")}


def _rounds_cache(job: GraphJob) -> bool:
    return bool(job.target.rounding and job.target.rounding.cache_type)


def _target(target: TargetPlan, plan: BuildPlan, graphs: Path, bundle: Path, on_step: OnStep) -> TargetSpec:
    """Describe a target; for TensorRT, build its engines first."""
    specs = plan.specs[target.name]
    if target.name not in TENSORRT:
        version = layout.versions().get("onnxruntime", "not installed")
        notes = layout.pass_notes(graphs, specs)
        return TargetSpec(
            target.name, target.dtype, target.opset, specs, version, passes=notes, quantise=target.quantise
        )
    jobs = [job for job in plan.engines if job.target == target.name]
    sources = {job.name: _build_engine(job, plan, graphs, bundle, on_step) for job in jobs}
    engines = layout.engine_specs(specs, target.name)
    built_for = EngineInfo.load(bundle / next(iter(engines.values())).path).compute_capability
    version, rational = runtime_version(target.name), plan.request.rational
    notes = layout.pass_notes(graphs, engines)
    fields = (engines, version, built_for, sources, rational, notes, target.quantise)
    return TargetSpec(target.name, target.dtype, target.opset, *fields)


def _build_engine(job: EngineJob, plan: BuildPlan, graphs: Path, bundle: Path, on_step: OnStep) -> str:
    """Build an engine and place it in the bundle; returns the hash of the graph that it was built from."""
    source = file_sha256(graphs / f"{job.name}.onnx")
    plugin = plugin_library() if job.options.rational == "plugin" else None
    inputs = {
        "graph": [source, file_sha256(graphs / WEIGHTS_FILE)],
        "ranges": dataclasses.asdict(plan.ranges),
        "options": dataclasses.asdict(job.options),
        "versions": layout.engine_versions(runtime_version(job.target), plugin),
    }
    text = f"{job.target}: building {job.name}.engine"

    def progress(step: Any) -> None:
        on_step(text, step.done / step.total if not step.parent else None)

    def make(folder: Path) -> None:
        engine = folder / f"{job.name}.engine"
        engine_from_onnx(graphs / f"{job.name}.onnx", engine, job.spec, plan.ranges, job.options, on_progress=progress)

    on_step(text)
    folder, _ = run_stage(plan.cache, f"engine-{job.target}-{job.name}", inputs, make)
    layout.place_files(folder, bundle / "engines" / job.target)
    return source


def _lay_out(
    plan: BuildPlan, targets: list[TargetSpec], graphs: dict[str, Path], backbone: Backbone, bundle: Path
) -> BundleManifest:
    """Bring everything but the proof into the bundle."""
    layout.place_files(graphs[onnx_variant(plan.targets)], bundle)
    layout.place_tokenizer(backbone, bundle)
    tenants = layout.place_tenants(plan.tenants, bundle, plan.backbone)
    manifest = layout.new_manifest(plan, tenants, targets)
    manifest = layout.with_files(manifest, bundle)
    manifest.save(bundle)
    return manifest


def _prove(
    plan: BuildPlan, bundle: Path, manifest: BundleManifest, backbone: Backbone, graphs: list[Path], on_step: OnStep
) -> BundleManifest:
    """Validate a bundle that is not published yet; its manifest with parity and report files, saved.

    ``graphs`` are the folders of all exported graphs, of which the bundle has only some.
    """
    request, output = plan.request, plan.output
    depth = _depth(plan, backbone)
    settings = Settings(request.seed, request.new_tokens, request.device, depth, peft_check=not request.no_peft_check)
    folders = folders_of(plan.tenants.adapters)
    report = validate_bundle(bundle, manifest, backbone, settings, on_step, output.name, folders, graphs)
    # how long it took is not part of what was built: equal inputs give equal bytes
    report = dataclasses.replace(report, targets=[dataclasses.replace(t, seconds=0.0) for t in report.targets])
    if report.verdict != "pass":
        where = write_report(report, _failed_report(output))
        raise ParityError(f"{failure(report)}. Nothing was written to {output}; the report is {where}")
    on_step("writing the report")
    write_report(report, bundle)
    manifest = dataclasses.replace(layout.with_files(manifest, bundle), parity=parity_from_report(report))
    manifest.save(bundle)
    return manifest
