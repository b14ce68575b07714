"""The ONNX graphs that TensorRT's engines were built from, run by ONNX Runtime where no GPU runs the engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engines.runner import Runner
from iapt_export.contract.manifest import TargetSpec, file_sha256
from validation.sides.taps import TappedGraph, TappedRunner


def graphs_folder(target: TargetSpec, folders: Sequence[Path]) -> Path | None:
    """The first of these folders that holds the very graphs of a target's engines; None where none does."""
    for folder in folders:
        paths = {name: folder / f"{name}.onnx" for name in target.graphs}
        if target.source_sha256 and all(
            path.is_file() and file_sha256(path) == target.source_sha256[name] for name, path in paths.items()
        ):
            return folder
    return None


def graph_runners(folder: Path, target: TargetSpec) -> dict[str, Runner]:
    """A runner for each of the graphs, not yet active, which multiplies with the weights as they are restored."""
    return {
        name: TappedRunner(path := folder / f"{name}.onnx", spec, TappedGraph(path), [])
        for name, spec in target.graphs.items()
    }
