"""Run one graph in one runtime; knows nothing of this project, and needs NumPy and that runtime alone.

``python run_graph.py RUNTIME FOLDER OUTPUT`` reads ``FOLDER/tensors.json`` (inputs) and ``FOLDER/graph.txt`` (the path
of the graph), and writes to ``OUTPUT`` what the runtime made of it, in the same form, with the runtime's version. A
folder of tensors is a JSON file that says each one's type and shape, and a file of bytes for each, so that programs in
other languages can read it. For a graph tool, ``OUTPUT/expected`` is what ONNX Runtime makes of the file as it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def write_tensors(folder: Path, arrays: Arrays) -> None:
    """Write ``tensors.json`` and ``N.bin``."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, (name, array) in enumerate(arrays.items()):
        (folder / f"{number}.bin").write_bytes(np.ascontiguousarray(array).tobytes())
        listed.append({"name": name, "dtype": array.dtype.name, "shape": array.shape, "file": f"{number}.bin"})
    (folder / "tensors.json").write_text(json.dumps(listed), encoding="utf-8")


def read_tensors(folder: Path) -> Arrays:
    """Read what `write_tensors` wrote."""
    listed = json.loads((folder / "tensors.json").read_text(encoding="utf-8"))
    return {
        item["name"]: np.frombuffer((folder / item["file"]).read_bytes(), item["dtype"]).reshape(item["shape"])
        for item in listed
    }


def with_onnxruntime(graph: Path, feeds: Arrays) -> Arrays:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def with_openvino(graph: Path, feeds: Arrays) -> Arrays:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = compiled(feeds)
    return {output.any_name: np.array(made[output]) for output in compiled.outputs}


def with_reference(graph: Path, feeds: Arrays) -> Arrays:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(graph))
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def with_iree(graph: Path, feeds: Arrays) -> Arrays:
    import iree.compiler
    import iree.runtime
    import onnx

    folder = Path(sys.argv[3])
    model = onnx.load(graph)
    onnx.save(model, folder / "whole.onnx")
    imported = [
        sys.executable,
        "-m",
        "iree.compiler.tools.import_onnx",
        folder / "whole.onnx",
        "-o",
        folder / "graph.mlir",
    ]
    subprocess.run(imported, check=True)
    module = iree.compiler.compile_file(
        str(folder / "graph.mlir"), target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"]
    )
    context = iree.runtime.SystemContext(config=iree.runtime.Config("local-sync"))
    context.add_vm_module(iree.runtime.VmModule.copy_buffer(context.instance, module))
    made = context.modules.module[model.graph.name](*[feeds[value.name] for value in model.graph.input])
    outputs = made if isinstance(made, list | tuple) else [made]  # an only output comes as it is
    return {value.name: np.asarray(array) for value, array in zip(model.graph.output, outputs, strict=True)}


def through_tool(tool: str, graph: Path, feeds: Arrays) -> Arrays:
    """Let a graph tool write the file again, and run that with ONNX Runtime."""
    folder = Path(sys.argv[3])
    write_tensors(folder / "expected", with_onnxruntime(graph, feeds))
    rewritten = folder / "rewritten.onnx"
    if tool == "polygraphy":
        folding = ["polygraphy", "surgeon", "sanitize", "--fold-constants", graph, "-o", rewritten]
        subprocess.run([Path(sys.executable).parent / folding[0], *folding[1:]], check=True)
    elif tool == "onnxslim":
        subprocess.run([Path(sys.executable).parent / "onnxslim", graph, rewritten], check=True)
    else:
        import onnx
        import onnx_graphsurgeon

        graph_surgeon = onnx_graphsurgeon.import_onnx(onnx.load(graph))
        onnx.save(onnx_graphsurgeon.export_onnx(graph_surgeon.cleanup().toposort()), rewritten)
    return with_onnxruntime(rewritten, feeds)


RUNTIMES: dict[str, tuple[str, Any]] = {
    "onnxruntime": ("onnxruntime", with_onnxruntime),
    "openvino": ("openvino", with_openvino),
    "reference": ("onnx", with_reference),
    "iree": ("iree-base-compiler", with_iree),
}
TOOLS = {"polygraphy": "polygraphy", "onnxslim": "onnxslim", "graphsurgeon": "onnx-graphsurgeon"}


def main(runtime: str, folder: Path, output: Path) -> None:
    """See above."""
    feeds, graph = read_tensors(folder), Path((folder / "graph.txt").read_text(encoding="utf-8"))
    output.mkdir(parents=True, exist_ok=True)
    if runtime in TOOLS:
        package, made = TOOLS[runtime], through_tool(runtime, graph, feeds)
    else:
        package, run = RUNTIMES[runtime]
        made = run(graph, feeds)
    write_tensors(output, made)
    (output / "version.txt").write_text(importlib.metadata.version(package), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
