"""What a build will make and need, said before the work: stages, disk, memory, and time where there is a basis for it.

Figures are estimates from shapes; they leave out what is small beside weights, and what libraries need for themselves.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt_export.building.footprint import model_weights
from iapt_export.building.layout import are_equal
from iapt_export.building.plan import TenantPlan, onnx_variant
from iapt_export.building.stage_cache import bytes_per_second, made_stage
from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import KINDS
from iapt_export.contract.resources import GIB, file_system, free_disk, free_memory
from iapt_export.contract.types import FLOAT_BYTES
from trainers.decoder.insertion import sizes_of
from trainers.decoder.streamed import RESTORED_BYTES, copies_compared, has_room_for

Keyed = Sequence[tuple[Any, dict[str, Any]]]
"""Each `iapt_export.building.jobs.GraphJob` with what decides its stage; see
`iapt_export.building.stage_cache.run_stage`."""
RUNTIME_BYTES = GIB // 2
"""What Python with PyTorch and ONNX Runtime takes before anything is loaded; 0.3 GiB measured, and something."""
PACKED = re.compile(r"(^|\.)[qkv]_proj$")
"""Products that graphs over a cache in place have side by side in one matrix, and portable graphs apart."""
IN_HAND = 2.2
"""Copies in fp32 of the largest matrix while it is cast and written or quantised; 1.05 GiB measured for one of 0.49."""


@dataclass(frozen=True)
class Stage:
    """One step of a build."""

    name: str
    is_made: bool
    """It lies in the cache, and is used again."""
    bytes: int | None
    """What it takes on disk; None where that is not foreseen."""
    seconds: float | None = None
    """How long it may take, by how quickly one of its name was made here before."""


@dataclass(frozen=True)
class Need:
    """Something that a build takes of what this machine has."""

    what: str
    needed: int
    free: int | None
    """None where the system does not say."""
    remedy: str

    @property
    def is_met(self) -> bool:
        """Whether there is enough."""
        return self.free is None or self.needed <= self.free


@dataclass(frozen=True)
class Outlook:
    """All of it."""

    stages: list[Stage]
    needs: list[Need]
    proof: str
    """How PyTorch's side of the comparison will compute."""

    def check(self) -> None:
        """Refuse a build that this machine cannot carry out.

        Raises:
            IaptError: each thing of which there is too little, with what is needed, what is free, and what to do.
        """
        short = [need for need in self.needs if not need.is_met]
        if short:
            said = "; ".join(
                f"{need.what}: about {_size(need.needed)} is needed, {_size(need.free)} is free; {need.remedy}"
                for need in short
            )
            raise IaptError(f"this build does not fit here. {said}. build --dry-run shows the whole plan")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """For people, a line each."""
        lines = []
        for stage in self.stages:
            size = "" if stage.bytes is None else f", about {_size(stage.bytes)}"
            time = "" if stage.is_made or stage.seconds is None else f", about {_duration(stage.seconds)}"
            lines.append(f"{stage.name}: {'made already' if stage.is_made else f'to do{size}{time}'}")
        for need in self.needs:
            short = "" if need.is_met else f" — too little: {need.remedy}"
            lines.append(f"{need.what}: about {_size(need.needed)} of {_size(need.free)} that is free{short}")
        return "\n".join([*lines, self.proof])


def outlook_of(
    plan: Any,
    model: Any,
    jobs: Keyed,
    depth: str,
    *,
    has_gpu: bool,
    others: Keyed = (),
    weighed: Sequence[tuple[str, dict[str, Any]]] = (),
) -> Outlook:
    """Foresee a build.

    Args:
        plan: its `iapt_export.building.jobs.BuildPlan`, which only the build itself may import.
        model: the backbone; its shapes count alone.
        jobs: the plan's graphs.
        depth: of the comparison; see `validation.judging.compare.Settings`.
        has_gpu: it runs TensorRT's engines; else ONNX Runtime runs the graphs of those with rounded weights.
        others: the same graphs with other weights, among which a search chooses, with a session open for each.
        weighed: name and inputs of the stages that measure by what weights are rounded.
    """
    stages = [Stage(name, made_stage(plan.cache, name, inputs) is not None, None) for name, inputs in weighed]
    for job, key in (*jobs, *others):
        name = f"graphs-{job.variant}"
        found, size = made_stage(plan.cache, name, key), graph_bytes(job, plan, model)
        rate = bytes_per_second(plan.cache, name)
        shown = f"{name} ({job.target.quantise})" if job.target.quantise else name
        stages.append(Stage(shown, found is not None, size, size / rate if rate else None))
    if others:
        what = (
            f"search for --quantise among {len(others) + 1} settings, of which the fastest that answers alike is taken"
        )
        stages.append(Stage(what, False, None))
    # an engine is found by its graph's bytes, which are not there before the graph is
    sizes = [engine_bytes(job, plan, model) for job in plan.engines]
    stages += [
        Stage(f"engine-{job.target}-{job.name}", False, size) for job, size in zip(plan.engines, sizes, strict=True)
    ]
    shipped = next(job for job in plan.graphs if job.variant == onnx_variant(plan.targets))
    tenants = tenant_bytes(plan.tenants)
    cached = sum(stage.bytes or 0 for stage in stages if not stage.is_made)
    bundle = graph_bytes(shipped, plan, model) + sum(sizes) + tenants
    disk = [(plan.cache, cached, "--cache"), (plan.output, bundle, "--output")]
    copies = copies_compared(target.rounding for target in plan.targets)
    streams = plan.request.prove and not has_room_for(model, copies)
    if streams and any(target.rounding for target in plan.targets):
        disk.append((Path(tempfile.gettempdir()), max(graph_bytes(job, plan, model) for job in plan.graphs), "TMPDIR"))
    how = "PyTorch reads the weights layer by layer" if streams else "PyTorch has the backbone in memory"
    proof = f"comparison with PyTorch: {depth}; {how}" if plan.request.prove else "no comparison with PyTorch"
    searched = sum(graph_bytes(job, plan, model) for job, _ in (*jobs, *others)) if others else 0
    return Outlook(stages, [*_disk_needs(disk), _memory_need(plan, model, searched, has_gpu=has_gpu)], proof)


def tenant_bytes(tenants: TenantPlan) -> int:
    """What the tenants' files take, in fp32: as graphs take them, and as they were trained where that is another."""
    size = 0
    for name, adapter in tenants.adapters.items():
        shipped = tenants.shipped.get(name, {})
        written = [shipped, {} if shipped and are_equal(shipped, adapter.tensors) else adapter.tensors]
        size += sum(FLOAT_BYTES["fp32"] * tensor.numel() for tensors in written for tensor in tensors.values())
    return size


def graph_bytes(job: Any, plan: Any, model: Any) -> int:
    """What the graphs of a job take, nearly all of it weights."""
    width = FLOAT_BYTES[job.target.graph_dtype]
    _, size = model_weights(model, job.target.rounding, width)
    kinds = {KINDS[name].in_place for name in job.names if KINDS[name].reads}
    if len(kinds) == 2:
        linears = sizes_of(model).linears.items()
        packed = sum(inputs * outputs for name, (inputs, outputs) in linears if PACKED.search(name))
        size += packed * plan.backbone.num_layers * width
    return size


def engine_bytes(job: Any, plan: Any, model: Any) -> int:
    """What an engine takes: each holds the weights of its own graph."""
    target = next(target for target in plan.targets if target.name == job.target)
    return model_weights(model, target.rounding, FLOAT_BYTES[target.graph_dtype])[1]


def _disk_needs(places: list[tuple[Path, int, str]]) -> list[Need]:
    """One for each file system, whatever is written there."""
    together: dict[int, list[tuple[Path, int, str]]] = {}
    for place in places:
        together.setdefault(file_system(place[0]), []).append(place)
    return [
        Need(
            f"disk for {' and '.join(str(folder) for folder, *_ in here)}",
            sum(size for _, size, _ in here),
            free_disk(here[0][0]),
            f"free some, or choose another place with {' or '.join(dict.fromkeys(way for *_, way in here))}",
        )
        for here in together.values()
    ]


def _memory_need(plan: Any, model: Any, searched: int, *, has_gpu: bool) -> Need:
    """The larger of writing a matrix and holding a session, or those of a search, with weights in their own order.

    Weights that ``DequantizeLinear`` restores are restored when a session begins, and held so.
    """
    largest = max(parameter.numel() for parameter in model.parameters())
    writing = int(IN_HAND * 4 * largest)
    if plan.request.merge_lora or plan.request.fold_embeddings:
        writing += 4 * sum(parameter.numel() for parameter in model.parameters())
    runs = [job for job in plan.graphs if job.target.name == "onnxruntime"]
    sessions = [graph_bytes(job, plan, model) for job in runs]
    if not has_gpu and any(target.rounding and target.rounding.is_scaled for target in plan.targets):
        sessions.append(RESTORED_BYTES * sum(parameter.numel() for parameter in model.parameters()))
    session = max(max(sessions, default=0) if plan.request.prove else 0, searched)
    remedy = "stop other programs, take a smaller type (--target onnxruntime:int4), or a machine with more"
    tenants = sum(tensor.nbytes for tensors in plan.tenants.shipped.values() for tensor in tensors.values())
    return Need("memory", RUNTIME_BYTES + tenants + max(writing, session), free_memory(), remedy)


def _size(count: int | None) -> str:
    if count is None:
        return "an unknown amount"
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds >= 120 else f"{seconds:,.0f} s"
