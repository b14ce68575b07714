"""What all tests of a run share, on all workers of pytest-xdist: a folder, and the graphs that were traced once.

Tracing takes seconds a graph and asks only for the backbone, the methods and the interface. Everything behind it
(passes, files, engines) runs anew in every test. What a graph depends on is in the name of its file; a test of
tracing itself takes the fixture `fresh_traces`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from filelock import FileLock

import iapt_export.graphs.export
from iapt_export.building.stage_cache import content_key
from iapt_export.contract.manifest import GraphSpec
from iapt_export.graphs.installed import Installed
from iapt_export.graphs.trace import trace_graph
from trainers.decoder.method import Method
from trainers.decoder.stored import is_outline
from trainers.methods.forms import form_name

LARGEST = 1 << 20
"""Parameters of a backbone beyond which a trace is not kept: tests share tiny ones."""


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that is this run's, and the same for each of its workers."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


class SharedTraces:
    """Stands for `trace_graph`: traces a graph that no test of this run has traced yet, and reads any other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, name: str, backbone: Any, installed: list[Installed], spec: GraphSpec, opset: int) -> ir.Model:
        if not is_plain(backbone):
            return trace_graph(name, backbone, installed, spec, opset)
        fields = {
            "backbone": [str(type(backbone)), configuration(backbone), tensors_sha256(backbone)],
            "methods": [[item.name, *map(described, (item.method, item.encoder))] for item in installed],
            "spec": dataclasses.asdict(spec),
            "opset": opset,
        }
        path = self.folder / f"{name}-{content_key(fields)}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                made, traced = path.with_suffix(".new"), trace_graph(name, backbone, installed, spec, opset)
                ir.save(traced, made)
                path.with_suffix(".json").write_text(json.dumps(counters(traced)), encoding="utf-8")
                made.rename(path)
        model = ir.load(path)
        # passes go on counting the names of values where the exporter stopped: a file has the names, not the number
        vars(model.graph._name_authority).update(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        return model


def counters(model: ir.Model) -> dict[str, int]:
    """The numbers of the next value and node that get no name of their own."""
    return {name: count for name, count in vars(model.graph._name_authority).items() if isinstance(count, int)}


def is_plain(backbone: Any) -> bool:
    """Whether a small backbone does what its class says, so that its configuration and weights tell all of it."""
    if is_outline(backbone):
        return False
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    return not hooks and sum(parameter.numel() for parameter in backbone.parameters()) <= LARGEST


def configuration(backbone: Any) -> str:
    """A backbone's configuration, without what only loading or saving it adds."""
    fields = backbone.config.to_diff_dict()
    kept = {name: value for name, value in fields.items() if name not in ("architectures", "dtype", "_name_or_path")}
    return json.dumps(kept, sort_keys=True, default=str)


def tensors_sha256(backbone: Any) -> str:
    """Over the names, types and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def described(method: Method | None) -> list[str] | None:
    """A method's class and configuration; its weights are inputs of the graphs."""
    return None if method is None else [form_name(method), repr(method.config), repr(method.sizes)]


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports of this run trace equal graphs once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iapt_export.graphs.export, "trace_graph", SharedTraces(run_folder(tmp_path_factory) / "traces"))
        yield


@pytest.fixture
def fresh_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this test's exports trace anew."""
    monkeypatch.setattr(iapt_export.graphs.export, "trace_graph", trace_graph)
