"""Check engines that this machine cannot run, as far as that goes without running them."""

from __future__ import annotations

from pathlib import Path

from iapt_export.contract.manifest import BundleManifest, TargetSpec
from validation.judging.result import Check


def check_built_engines(bundle: Path, manifest: BundleManifest, target: TargetSpec) -> list[Check]:
    """Hold what the builder recorded of each engine against the manifest: inputs, outputs, types, shapes, profiles.

    Returns:
        One check for each engine; none of them says anything about the numbers that the engine computes.
    """
    if target.name == "onnxruntime":
        return []
    from engines.tensorrt.engine_info import EngineInfo, check_engine

    checks = []
    for name, spec in target.graphs.items():
        engine = bundle / spec.path
        problems = check_engine(spec, EngineInfo.load(engine), manifest.ranges, engine)
        detail = "; ".join(problems) or "inputs, outputs, types, shapes and profiles agree with the manifest"
        checks.append(
            Check(
                "interface",
                f"{name}.engine",
                not problems,
                {"problems": float(len(problems))},
                {"problems": 0.0},
                detail,
            )
        )
    return checks
