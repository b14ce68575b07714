"""A bundle's portable graphs as a target of a runtime that no bundle is built for: a second opinion."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engines.openvino.runner import OpenVINORunner, load_openvino
from engines.runner import Runner
from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import PORTABLE, step_graphs
from iapt_export.contract.manifest import BundleManifest, TargetSpec

OPENVINO = "openvino"


def portable_target(manifest: BundleManifest) -> TargetSpec:
    """The portable graphs as OpenVINO's target.

    Raises:
        NotRunnableError: OpenVINO is not installed.
        IaptError: the bundle has no portable graphs, or they are of a type that is not taken here.
    """
    target = next((target for target in manifest.targets if target.name == "onnxruntime"), None)
    graphs = {graph: spec for graph, spec in target.graphs.items() if graph in PORTABLE} if target else {}
    if target is None or not step_graphs(graphs, in_place=False):
        held = ", ".join(f"{target.name}:{target.dtype}" for target in manifest.targets)
        raise IaptError(
            f"--runner {OPENVINO} runs portable graphs (prefill.onnx, decode.onnx), and this bundle's targets ({held}) "
            "have none; build it with --target onnxruntime:fp32"
        )
    if target.dtype not in ("fp32", "fp16"):
        raise IaptError(f"--runner {OPENVINO} takes graphs of fp32 and fp16, and this bundle's are {target.dtype}")
    version = load_openvino().__version__
    return dataclasses.replace(target, name=OPENVINO, graphs=graphs, runtime_version=version)


def portable_runners(bundle: Path, target: TargetSpec) -> dict[str, Runner]:
    """A runner for each of its graphs, not yet active."""
    return {name: OpenVINORunner(bundle / spec.path, spec) for name, spec in target.graphs.items()}
