"""The portable graphs of a bundle in other runtimes, each in an environment of its own (`make test-runtimes`).

The reference is the ONNX Runtime of the main environment, which `build` holds against PyTorch. ``python -m
tests.runtimes.matrix`` builds two tiny bundles with tenants of all eight methods, of opset 23 and 20; ``--bundle DIR``
takes another one of fp32. Environments stand in ``.cache/runtimes`` and are kept. Graph tools are held against what
ONNX Runtime makes of the file as it was, with nothing allowed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from engines.runner import NOWHERE
from engines.serving.session import Request, Session
from iapt_export import BuildRequest, build
from iapt_export.contract.errors import IaptError
from iapt_export.contract.graphs import PORTABLE
from iapt_export.contract.manifest import GraphSpec
from iapt_export.graphs.table import graph_specs
from tests.bundles import RANGES, save_tiny_adapter
from tests.runtimes.run_graph import Arrays, read_tensors, write_tensors
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.decoder.backbone import config_fingerprint
from trainers.methods import configs

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "runtimes"
LIMIT = 1e-5
"""Of the largest number in an output; runtimes sum in another order, which gives some 1e-6."""
NUMPY = "numpy==2.4.6"
ONNX = "onnx==1.23.2"


@dataclass(frozen=True)
class Reader:
    """A runtime, or a graph tool before ONNX Runtime."""

    title: str
    environment: str
    pins: tuple[str, ...]
    """What stands in the environment."""
    limit: float = LIMIT
    opsets: tuple[int, ...] = (20, 23)


TOOLS = ("onnxruntime==1.32.0", ONNX, NUMPY, "polygraphy==0.53.6", "onnxslim==0.1.98", "onnx-graphsurgeon==0.6.1")
READERS: dict[str, Reader] = {
    "onnxruntime": Reader("ONNX Runtime", "onnxruntime-newest", ("onnxruntime==1.32.0", NUMPY)),
    "onnxruntime-oldest": Reader("ONNX Runtime", "onnxruntime-oldest", ("onnxruntime==1.23.1", NUMPY)),
    "onnxruntime-web": Reader("onnxruntime-web in Node", "onnxruntime-web", ("onnxruntime-web@1.30.0",)),
    "openvino": Reader("OpenVINO", "openvino", ("openvino==2026.4.1", NUMPY)),
    "reference": Reader("onnx.reference", "reference", (ONNX, NUMPY)),
    "iree": Reader(
        "IREE", "iree", ("iree-base-compiler==3.13.0", "iree-base-runtime==3.13.0", ONNX, NUMPY), opsets=(20,)
    ),
    "polygraphy": Reader("polygraphy, constants folded", "tools", TOOLS, limit=0),
    "onnxslim": Reader("onnxslim", "tools", TOOLS, limit=0),
    "graphsurgeon": Reader("onnx-graphsurgeon, there and back", "tools", TOOLS, limit=0),
}
TENANTS: dict[str, Any] = {
    "iapt": configs.IAPTConfig(bottleneck=8),
    "prompt": configs.PromptTuningConfig(prompt_length=4),
    "prefix": configs.PrefixTuningConfig(prompt_length=7),
    "adept": configs.ADePTConfig(prompt_length=3, bottleneck=4),
    "dept": configs.DePTConfig(prompt_length=3, rank=2, max_length=96),
    "lopa": configs.LoPAConfig(prompt_length=6, rank=2),
    "lamp": configs.LAMPConfig(init_length=20, rank=3, window=5),
    "lora": configs.LoRAConfig(rank=2),
}


@dataclass(frozen=True)
class Row:
    """One graph in one runtime."""

    title: str
    version: str
    graph: str
    difference: float | None
    """The largest, over the largest number of the output; None where the runtime gave nothing to compare."""
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is within its limit; NaN is not."""
        return self.difference is not None and self.difference <= self.limit

    def __str__(self) -> str:
        """As a row of a Markdown table."""
        shown = "–" if self.difference is None else f"{self.difference:.1e}" if self.difference else "0"
        verdict = "pass" if self.passed else f"FAIL {self.note}".strip()
        return f"| {self.title} | {self.version} | {self.graph} | {shown} | {verdict} |"


HEADER = "| Runtime | Version | Graph | Largest difference | Verdict |\n| --- | --- | --- | --- | --- |"


def difference(made: Arrays, wanted: Arrays) -> float:
    """The largest difference of any output, over the largest number of that output.

    Raises:
        ValueError: an output is missing or has another shape, as where a runtime gives empty logits.
    """
    errors = []
    for name, right in wanted.items():
        if name not in made or made[name].shape != right.shape:
            found = made[name].shape if name in made else "missing"
            raise ValueError(f"{name} is {found}, expected {right.shape}")
        errors.append(float(np.abs(made[name].astype(np.float64) - right).max() / np.abs(right).max()))
    return float(np.max(errors))


def tiny_bundle(opset: int) -> Path:
    """A bundle with tenants of all methods, built where it is not up to date."""
    root = CACHE / f"tiny-{opset}"
    model = tiny_llama(num_hidden_layers=2)
    save_tiny_backbone(root / "model", model)
    fingerprint = config_fingerprint(model.config)
    adapters = [
        save_tiny_adapter(root / name, 2 * seed, fingerprint, method)
        for seed, (name, method) in enumerate(TENANTS.items())
    ]
    ranges: dict[str, Any] = {**RANGES, "tenants": "1:1:8", "batch": "1:2:8"}
    request = BuildRequest(
        model=str(root / "model"),
        adapters=adapters,
        output=root / "bundle",
        cache=CACHE / "build",
        opset=opset,
        prove=False,  # the tests do that
        **ranges,
    )
    with patch("iapt_export.building.jobs.graph_specs", portable_specs):  # the others would take most of the time
        build(request, lambda text, *_: print(f"opset {opset}: {text}", file=sys.stderr))
    return root / "bundle"


def portable_specs(*sizes: Any) -> dict[str, GraphSpec]:
    """The interfaces of the portable graphs alone."""
    return {name: spec for name, spec in graph_specs(*sizes).items() if name in PORTABLE}


def recorded(bundle: Path) -> dict[str, tuple[Arrays, Arrays]]:
    """Portable graph to what it was last fed and what ONNX Runtime made of it, one row of each tenant in a batch."""
    seen: dict[str, tuple[Arrays, Arrays]] = {}

    def keep(name: str, runner: Any) -> None:
        honest = runner.infer

        def infer(feeds: Any, into: Any = NOWHERE) -> Any:
            outputs = honest(feeds, into)
            seen[name] = ({t.name: np.array(feeds[t.name]) for t in runner.spec.inputs}, outputs)
            return outputs

        runner.infer = infer

    session = Session.open(bundle, "onnxruntime", in_place=False, allow_unproven=True)
    if session.target.dtype != "fp32":
        raise IaptError(f"{bundle} holds {session.target.dtype} graphs; the limit here is for fp32")
    for name, runner in session.stepper.runners.items():
        keep(name, runner)
    prompts = ["the film is a quiet joy", "a dull story that nobody will remember"]
    requests = [
        Request(tenant.name, prompts[number % 2], max_new_tokens=3, ignore_eos=True)
        for number, tenant in enumerate(session.manifest.tenants)
    ]
    with session:
        list(session.generate(requests))
    return {name: seen[name] for name in PORTABLE if name in seen}


def environment(reader: Reader) -> Path:
    """The environment's folder, made where it is not there yet."""
    folder = CACHE / reader.environment
    stamp = folder / "installed.txt"
    pins = "\n".join(reader.pins)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == pins:
        return folder
    print(f"installing {', '.join(reader.pins)}", file=sys.stderr)
    if reader.environment == "onnxruntime-web":
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", folder]
        subprocess.run([*install, *reader.pins], check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *os.environ.get("PIP_ARGS", "").split()]
        subprocess.run([*pip, *reader.pins], check=True)
    stamp.write_text(pins, encoding="utf-8")
    return folder


def run_graph(name: str, reader: Reader, folder: Path, output: Path, graph: str) -> Row:
    """One graph in one runtime."""
    place = environment(reader)
    if reader.environment == "onnxruntime-web":
        command = ["node", ROOT / "tests" / "runtimes" / "run_graph.mjs", place, folder, output]
    else:
        kind = "onnxruntime" if name.startswith("onnxruntime") else name
        command = [place / "bin" / "python", ROOT / "tests" / "runtimes" / "run_graph.py", kind, folder, output]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    if done.returncode:
        return Row(reader.title, "", graph, None, reader.limit, f"(see {output / 'log.txt'})")
    wanted = output / "expected" if (output / "expected").exists() else folder / "wanted"
    version = (output / "version.txt").read_text(encoding="utf-8").strip()
    try:
        return Row(reader.title, version, graph, difference(read_tensors(output), read_tensors(wanted)), reader.limit)
    except ValueError as error:
        return Row(reader.title, version, graph, None, reader.limit, str(error))


def rows_of(bundle: Path, opset: int, chosen: list[str]) -> list[Row]:
    """Every portable graph of a bundle in every chosen runtime that reads its opset."""
    rows = []
    for graph, (feeds, wanted) in recorded(bundle).items():
        folder = CACHE / "runs" / f"{bundle.parent.name}-{bundle.name}" / graph
        write_tensors(folder, feeds)
        write_tensors(folder / "wanted", wanted)
        (folder / "graph.txt").write_text(str((bundle / f"{graph}.onnx").resolve()), encoding="utf-8")
        for name in chosen:
            if opset in READERS[name].opsets:
                row = run_graph(name, READERS[name], folder, folder / name, f"`{graph}.onnx`, opset {opset}")
                print(row, flush=True)
                rows.append(row)
    return rows


def main() -> int:
    """See above; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="instead of the tiny ones")
    parser.add_argument("--runtime", action="append", choices=READERS, help="only these; may be repeated")
    asked = parser.parse_args()
    chosen = asked.runtime or list(READERS)
    bundles = [asked.bundle] if asked.bundle else [tiny_bundle(opset) for opset in (23, 20)]
    print(HEADER, flush=True)
    rows = []
    for bundle in bundles:
        session = Session.open(bundle, "onnxruntime", in_place=False, allow_unproven=True)
        rows += rows_of(bundle, session.target.opset, chosen)
    if not rows:
        print("nothing was compared: no chosen runtime reads this bundle's opset", file=sys.stderr)
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} pass", file=sys.stderr)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
