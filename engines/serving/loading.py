"""Open what a bundle's manifest names: the runners of a target, and the stepper over them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engines.runner import Runner
from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.stepper import ConcatenatedStepper, Stepper
from engines.serving.tenants import TenantBank
from iapt_export.contract.errors import IaptError, shown
from iapt_export.contract.graphs import VERIFY, runs_on, step_graphs
from iapt_export.contract.manifest import BundleManifest, TargetSpec


def on_device(target: TargetSpec, device: str) -> TargetSpec:
    """A target with those of its graphs that run on a device.

    Args:
        target: of a bundle; one of TensorRT's stays as it is, because it always runs on the GPU.
        device: ``cpu`` or ``cuda``.

    Raises:
        IaptError: it has none for both reading and going on.
        NotRunnableError: this ONNX Runtime does not run there.
    """
    if device == "cpu" or target.name != "onnxruntime":
        return target
    from engines.onnxruntime.devices import require_device

    require_device(device)
    graphs = {name: spec for name, spec in target.graphs.items() if runs_on(name, device, target.dtype)}
    if not any(step_graphs(graphs, in_place=kind) for kind in (True, False)):
        raise IaptError(
            f"target {target.name}:{target.dtype} has no graphs that run on {device}; use --device cpu, or build the "
            "bundle for onnxruntime:fp16"
        )
    return dataclasses.replace(target, graphs=graphs)


def open_runners(
    bundle: Path, target: TargetSpec, *, device: str = "cpu", threads: int | None = None
) -> dict[str, Runner]:
    """A runner for each graph of a target, not yet active.

    Args:
        bundle: the bundle's folder.
        target: one of its targets.
        device: ``cpu`` or ``cuda``, for ONNX Runtime; TensorRT always runs on the GPU.
        threads: of ONNX Runtime on the CPU; None takes as many as this process may use cores.
    """
    if target.name == "onnxruntime":
        from engines.onnxruntime.runner import OnnxRuntimeRunner

        return {
            name: OnnxRuntimeRunner(bundle / spec.path, spec, device=device, threads=threads)
            for name, spec in target.graphs.items()
        }
    from engines.cuda.memory import CudaStream
    from engines.tensorrt.runner import TensorRTRunner

    stream = CudaStream()  # of all, so that tenants' weights are uploaded once
    return {
        name: TensorRTRunner(bundle / spec.path, spec, target.name, stream=stream)
        for name, spec in target.graphs.items()
    }


def cache_kinds(target: TargetSpec) -> list[bool]:
    """Whether a target's cache can be written in place (True), concatenated (False), or both, the better one first.

    Args:
        target: as `on_device` gives it.
    """
    return [kind for kind in (True, False) if step_graphs(target.graphs, in_place=kind)]


def open_stepper(
    bundle: Path,
    manifest: BundleManifest,
    target: TargetSpec,
    *,
    device: str = "cpu",
    in_place: bool | None = None,
    threads: int | None = None,
    drafts: int = 0,
) -> Stepper:
    """The stepper of a target with the bundle's tenants, not yet active.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
        target: one of its targets.
        device: ``cpu`` or ``cuda``, for ONNX Runtime.
        in_place: take the cache that is written in place, or the one that each step concatenates; None takes the
            first where target and device have it.
        threads: of ONNX Runtime on the CPU; None takes as many as this process may use cores.
        drafts: tokens of a row that may be drafted, and verified in one step.

    Raises:
        BundleError: a tenant's file is damaged.
        IaptError: the target has no such cache, or no graph that verifies so many drafts.
        NotRunnableError: this ONNX Runtime does not run on that device.
    """
    target = on_device(target, device)
    offered = cache_kinds(target)
    chosen = in_place if in_place is not None else next(iter(offered), None)
    if chosen not in offered:
        graphs = ", ".join(target.graphs)
        raise IaptError(f"target {target.name} has no graph for that cache on device {device}; its graphs: {graphs}")
    _check_drafts(drafts, target, device, in_place=chosen)
    runners = open_runners(bundle, target, device=device, threads=threads)
    stepper = stepper_over(bundle, manifest, target, runners, in_place=chosen)
    stepper.drafts = drafts
    return stepper


def _check_drafts(drafts: int, target: TargetSpec, device: str, *, in_place: bool) -> None:
    """Refuse, before anything is loaded, drafts that a target's graphs cannot verify."""
    if not isinstance(drafts, int) or drafts < 0:
        raise IaptError(f"drafts is {shown(drafts)}, expected how many tokens, or 0 for none", field="drafts")
    if not drafts:
        return
    asked = f"drafts={drafts} asks for steps of several tokens a row"
    if device != "cpu" or not in_place:
        where = f"on {device}" if device != "cpu" else "over a cache that each step concatenates"
        raise IaptError(f"{asked}, which a session {where} does not take; leave drafts out", field="drafts")
    verify = target.graphs.get(VERIFY)
    if verify is None:
        text = f"{asked}, and target {target.name} of this bundle has no graph for them"
        remedy = f"build for onnxruntime with --drafts {drafts}, or leave drafts out"
        raise IaptError(text, field="drafts", remedy=remedy)
    built = next(int(tensor.shape[1]) for tensor in verify.inputs if tensor.name == "input_ids") - 1
    if drafts > built:
        text = f"{asked}, and this bundle was built for at most {built}"
        raise IaptError(text, field="drafts", remedy=f"ask for {built}, or build with --drafts {drafts}")


def stepper_over(
    bundle: Path, manifest: BundleManifest, target: TargetSpec, runners: dict[str, Runner], *, in_place: bool
) -> Stepper:
    """The stepper of a target over runners that are there already; see `open_stepper`."""
    bank = TenantBank(bundle, manifest, target)
    if not in_place:
        return ConcatenatedStepper(manifest, target, bank, runners)
    return InPlaceStepper(manifest, target, bank, runners)
