"""The three graphs as files: names, sizes, shared weights, clean bytes, equal bytes for equal inputs."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import iapt_export
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.graphs.export import export_graphs
from tests.bundles import METHOD, NUM_LAYERS, TENANTS, TinyBuild, random_method, run
from tests.graphs import (
    flat,
    iapt_feeds,
    installed,
    operators,
    past_feeds,
    run_onnx,
    trained_prefill,
    trained_prompt,
    worst,
)
from tests.thorough import default_for
from tests.tiny import padded
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import load_backbone
from trainers.decoder.generate import decode, prefill
from trainers.decoder.method import Method, Rows, rows_of

ROOT = Path(iapt_export.__file__).resolve().parent.parent
GRAPHS = ("prefill", "decode", "generator")
ONNX_FILES = [f"{name}.onnx" for name in GRAPHS]
OPSET_23 = {"Attention": NUM_LAYERS, "RMSNormalization": 2 * NUM_LAYERS + 1, "RotaryEmbedding": 2 * NUM_LAYERS}
LIMIT = 2e-5
"""fp32 rounding through two tiny layers stays a hundred times below."""


@pytest.fixture(scope="module")
def model(tiny_build: TinyBuild) -> Any:
    return load_backbone(str(tiny_build.model)).model


@pytest.fixture(scope="module")
def opset20(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opset20")
    export_graphs(model, installed(), folder, dtype="fp32", opset=20, names=GRAPHS)
    return folder


@pytest.fixture(scope="module", params=default_for(lambda opset: opset == 23, (23, 20)))
def graphs(request: pytest.FixtureRequest, tiny_build: TinyBuild) -> Path:
    return tiny_build.bundle if request.param == 23 else request.getfixturevalue("opset20")


@pytest.fixture(scope="module")
def tenants(tiny_build: TinyBuild) -> list[Method]:
    modules = [load_adapter(folder).module().requires_grad_(False) for folder in tiny_build.adapters.values()]
    return [*modules, random_method(9)]


def proto(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in values
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_interface_is_the_manifests(graphs: Path, tiny_build: TinyBuild, name: str) -> None:
    spec = BundleManifest.load(tiny_build.bundle).target().graphs[name]
    graph = proto(graphs / f"{name}.onnx").graph
    assert shapes(graph.input) == {tensor.name: tensor.shape for tensor in spec.inputs}
    assert shapes(graph.output) == {tensor.name: tensor.shape for tensor in spec.outputs}
    assert [value.name for value in graph.input] == [tensor.name for tensor in spec.inputs]
    kinds = {"int64": onnx.TensorProto.INT64, "fp32": onnx.TensorProto.FLOAT}
    for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
        assert [value.type.tensor_type.elem_type for value in values] == [kinds[tensor.dtype] for tensor in tensors]


def test_names_follow_the_ecosystem(graphs: Path) -> None:
    assert list(shapes(proto(graphs / "prefill.onnx").graph.input)) == [
        "input_ids",
        "attention_mask",
        "iapt.tenant_index",
        *(f"iapt.{name}" for name in ("down_weight", "down_bias", "query", "numerator", "denominator")),
        "iapt.up_weight",
        "iapt.up_bias",
    ]
    pairs = [f"{layer}.{part}" for layer in range(NUM_LAYERS) for part in ("key", "value")]
    decode_graph = proto(graphs / "decode.onnx").graph
    assert list(shapes(decode_graph.input)) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{pair}" for pair in pairs),
    ]
    assert list(shapes(decode_graph.output)) == ["logits", *(f"present.{pair}" for pair in pairs)]


@pytest.mark.parametrize(
    ("lengths", "index"),
    [([1], [0]), ([1, 1], [1, 0]), ([13, 4, 1, 9, 13], [2, 0, 1, 1, 0]), ([40], [1])],
    ids=["one token", "one token a row", "five rows", "long"],
)
@pytest.mark.parametrize("num_tenants", [1, 3, 4])
def test_prefill_at_other_sizes(
    graphs: Path, model: Any, tenants: list[Method], lengths: list[int], index: list[int], num_tenants: int
) -> None:
    index = [min(tenant, num_tenants - 1) for tenant in index]
    ids, mask = padded(lengths, "left")
    made = run_onnx(
        graphs / "prefill.onnx",
        {
            "input_ids": ids.numpy(),
            "attention_mask": mask.numpy(),
            **iapt_feeds(tenants[:num_tenants], index),
        },
    )
    logits, cache = trained_prefill(model, tenants, index, ids, mask)
    assert worst(made["logits"][:, 0], logits) < LIMIT
    real = torch.cat([torch.ones(len(lengths), METHOD.prompt_length, dtype=torch.long), mask], dim=1).bool().numpy()
    for name, wanted in zip(list(made)[1:], cache, strict=True):
        for row in range(len(lengths)):
            assert worst(made[name][row][:, real[row]], wanted[row][:, torch.from_numpy(real[row])]) < LIMIT


@pytest.mark.parametrize(("batch", "past"), [(1, 1), (1, 5), (5, 17), (3, 60)])
def test_decode_at_other_sizes(graphs: Path, model: Any, tenants: list[Method], batch: int, past: int) -> None:
    ids, mask = padded([max(past - METHOD.prompt_length, 1)] * batch)
    _, cache = prefill(model, rows_of(tenants[0]), ids, mask)
    cache.crop(past - cache.get_seq_length())
    feeds = past_feeds(cache)
    assert feeds["past_key_values.0.key"].shape[2] == past
    ones = torch.ones(batch, past + 1, dtype=torch.long)
    token = torch.arange(2, 2 + batch)
    made = run_onnx(
        graphs / "decode.onnx",
        {
            "input_ids": token[:, None].numpy(),
            "attention_mask": ones.numpy(),
            "position_ids": np.full((batch, 1), past, np.int64),
            **feeds,
        },
    )
    logits = decode(model, Rows(), token, ones, cache)
    assert worst(made["logits"][:, 0], logits) < LIMIT
    for name, wanted in zip(list(made)[1:], flat(cache), strict=True):
        assert worst(made[name], wanted) < LIMIT


def test_generator_at_other_sizes(graphs: Path, tenants: list[Method]) -> None:
    hidden = torch.randn(5, NUM_LAYERS, 11, 32)
    _, mask = padded([11, 1, 4, 7, 11], "left")
    index = [3, 1, 0, 2, 2]
    feeds = {"hidden_states": hidden.numpy(), "attention_mask": mask.numpy(), **iapt_feeds(tenants, index)}
    made = run_onnx(graphs / "generator.onnx", feeds)["prompts"]
    for row, tenant in enumerate(index):
        for layer in range(NUM_LAYERS):
            wanted = trained_prompt(tenants[tenant], layer, hidden[row : row + 1, layer], mask[row : row + 1])
            assert worst(made[row, layer], wanted[0]) < LIMIT


def external(path: Path) -> dict[str, tuple[int, int]]:
    """Weights outside the graph's file: name to offset and length."""
    found = {}
    for tensor in proto(path).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            assert fields["location"] == "weights.data"
            found[tensor.name] = (int(fields["offset"]), int(fields["length"]))
    return found


def test_weights_are_stored_once(graphs: Path, model: Any) -> None:
    in_prefill, in_decode = external(graphs / "prefill.onnx"), external(graphs / "decode.onnx")
    matrices = {name for name, place in in_decode.items() if place[1] > 1024}
    assert len(matrices) == 7 * NUM_LAYERS + 1  # four of attention and three of the MLP a layer; the tied embedding
    assert {name: in_prefill[name] for name in matrices} == {name: in_decode[name] for name in matrices}
    places = sorted(
        set(in_prefill.values()) | set(in_decode.values()) | set(external(graphs / "generator.onnx").values())
    )
    for (offset, length), (following, _) in itertools.pairwise(places):
        assert offset + length <= following
    assert all(offset % 4096 == 0 for offset, _ in places)
    size = sum(parameter.nbytes for parameter in model.parameters())
    stored = sum(length for _, length in places)
    assert size * 0.95 <= stored <= size * 1.01
    assert (graphs / "weights.data").stat().st_size == places[-1][0] + places[-1][1]


def test_weights_keep_their_names_and_values(graphs: Path, model: Any) -> None:
    wanted = model.state_dict()
    folder = str(graphs)
    found = 0
    for tensor in proto(graphs / "decode.onnx").graph.initializer:
        name = tensor.name.removesuffix(".transposed")
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        array = onnx.numpy_helper.to_array(tensor, folder)
        assert np.array_equal(array.T if name != tensor.name else array, wanted[name].numpy())
        found += 1
    assert found == 7 * NUM_LAYERS + 1


def inline_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from (tensor for tensor in model.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL)
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


@pytest.mark.parametrize("file", ONNX_FILES)
def test_no_large_tensor_stands_in_a_graphs_file(graphs: Path, file: str) -> None:
    sizes = [onnx.numpy_helper.to_array(tensor).nbytes for tensor in inline_tensors(proto(graphs / file))]
    assert max(sizes) <= 1024
    assert (graphs / file).stat().st_size < 64 * 1024


@pytest.mark.parametrize("file", ONNX_FILES)
def test_no_trace_of_where_it_was_made(graphs: Path, file: str) -> None:
    data = (graphs / file).read_bytes()
    words = [b"site-packages", b".py", b"stack_trace", b"Traceback", b"pkg.torch", b"pkg.onnx", str(ROOT).encode()]
    assert [word for word in words if word in data] == []
    model = proto(graphs / file)
    assert not model.doc_string and not model.graph.doc_string and not model.metadata_props
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        assert not node.doc_string and not node.metadata_props
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer]:
        assert not value.doc_string and not value.metadata_props
    for value in model.graph.value_info:
        for size in value.type.tensor_type.shape.dim:
            assert not re.search(r"\bs\d+\b", size.dim_param), "an exporter's symbol instead of the interface's word"
    assert (model.producer_name, model.producer_version) == ("iapt-export", "")


@pytest.mark.parametrize("file", ONNX_FILES)
def test_onnx_own_checks(graphs: Path, file: str) -> None:
    onnx.checker.check_model(graphs / file, full_check=False)
    inferred = onnx.shape_inference.infer_shapes(proto(graphs / file), strict_mode=True)
    assert all(value.type.tensor_type.elem_type for value in inferred.graph.output)


@pytest.mark.thorough
def test_operators_of_each_opset(tiny_build: TinyBuild, opset20: Path) -> None:
    for file in ("prefill.onnx", "decode.onnx"):
        newer = Counter(operators(tiny_build.bundle / file))
        normalised = NUM_LAYERS * (file == "prefill.onnx")  # what the generators read
        wanted = {**OPSET_23, "RMSNormalization": OPSET_23["RMSNormalization"] + normalised}
        assert {name: newer[name] for name in OPSET_23} == wanted
        assert not set(operators(opset20 / file)) & set(OPSET_23)
    for file in ONNX_FILES:
        for folder, opset in ((tiny_build.bundle, 23), (opset20, 20)):
            versions = {entry.domain: entry.version for entry in proto(folder / file).opset_import}
            assert versions == {"": opset} | ({"ai.iapt": 1} if file == "generator.onnx" else {})


@pytest.mark.parametrize(("file", "nodes"), [("prefill.onnx", 0), ("generator.onnx", NUM_LAYERS), ("decode.onnx", 0)])
def test_rational_nodes_and_their_body(graphs: Path, file: str, nodes: int) -> None:
    model = proto(graphs / file)
    found = [node for node in model.graph.node if node.op_type == "Rational"]
    assert len(found) == nodes
    assert {node.domain for node in found} <= {"ai.iapt"}
    assert all([(a.name, a.s) for a in node.attribute] == [("form", b"B")] for node in found)
    assert [(function.domain, function.name) for function in model.functions] == [("ai.iapt", "Rational")] * bool(nodes)
    assert {node.domain for node in model.graph.node} <= {"", "ai.iapt"}


def test_the_activation_is_written_out_where_any_runtime_reads(graphs: Path) -> None:
    nodes = proto(graphs / "prefill.onnx").graph.node
    written = [node for node in nodes if ".rational/" in node.name]
    modules = {node.name.rpartition("/")[0] for node in written}
    assert modules == {f"model.layers.{layer}.rational" for layer in range(NUM_LAYERS)}
    assert Counter(node.op_type for node in written) == {
        name: count * NUM_LAYERS for name, count in {"Split": 2, "Mul": 9, "Add": 9, "Abs": 1, "Div": 1}.items()
    }


@pytest.mark.parametrize("file", ["prefill.onnx", "decode.onnx"])
def test_numbers_of_heads_are_written_down(graphs: Path, file: str) -> None:
    model = proto(graphs / file)
    constants = {
        tensor.name: numpy_helper.to_array(tensor).tolist()
        for tensor in model.graph.initializer
        if sum(tensor.dims) == 1
    }
    made = {node.output[0]: node for node in model.graph.node}
    heads = [
        [constants.get(part, "?")[0] for part in made[node.input[1]].input[2:]]
        for node in model.graph.node
        if node.op_type == "Reshape" and node.name.endswith(("attn/Reshape", "attn/Reshape_2", "attn/Reshape_3"))
    ]
    assert heads == [[4, 8], [2, 8], [2, 8]] * NUM_LAYERS
    for node in model.graph.node:
        attributes = {attribute.name for attribute in node.attribute}
        assert node.op_type != "ConstantOfShape" or "value" in attributes
        assert "value_float" not in attributes


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_another_process(*words: str) -> None:
    """Run Python with another hash seed."""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


EXPORT_AND_BUILD = """
import sys
from pathlib import Path
from iapt_export.cli import main
from iapt_export.graphs.export import export_graphs
from tests.graphs import installed
from trainers.decoder.backbone import load_backbone

model, graphs, *words = sys.argv[1:]
export_graphs(load_backbone(model).model, installed(), Path(graphs), dtype="fp32", opset=23, names=("generator",))
main(words)
"""


@pytest.mark.thorough
def test_equal_inputs_give_equal_bytes_in_another_process(model: Any, tiny_build: TinyBuild, tmp_path: Path) -> None:
    """A graph is traced again, and a bundle is made of finished graphs; the next test makes all of it."""
    graphs, output = tmp_path / "graphs", tmp_path / tiny_build.bundle.name
    graphs.mkdir()
    in_another_process("-c", EXPORT_AND_BUILD, str(tiny_build.model), str(graphs), *tiny_build.arguments(output))
    own = tmp_path / "own"
    own.mkdir()
    export_graphs(model, installed(), own, dtype="fp32", opset=23, names=("generator",))
    assert files_of(graphs) == files_of(own)
    assert_equal_bundles(output, tiny_build.bundle)


@pytest.mark.slow
def test_equal_inputs_give_equal_bundles_from_scratch(tiny_build: TinyBuild, tmp_path: Path) -> None:
    """A fresh cache, another folder, another hash seed: every file is the same, the manifest included."""
    output = tmp_path / tiny_build.bundle.name
    in_another_process("-m", "iapt_export", *tiny_build.arguments(output, cache=tmp_path / "cache"))
    assert_equal_bundles(output, tiny_build.bundle)


def assert_equal_bundles(output: Path, bundle: Path) -> None:
    made, wanted = files_of(output), files_of(bundle)
    assert sorted(made) == sorted(wanted)
    differing = [name for name in wanted if made[name] != wanted[name]]
    # the report's figures may differ in the last digit where the processor splits sums in another way
    assert [name for name in differing if not name.startswith(("report.", "manifest.json"))] == []
    assert differing == []


@pytest.mark.thorough
def test_equal_inputs_give_equal_bytes_in_one_process(
    model: Any, opset20: Path, fresh_traces: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing counts up from one export to the next, a shared trace is what a fresh one is, and one is enough."""
    caplog.set_level("INFO", logger="iapt_export")
    export_graphs(model, installed(), tmp_path, dtype="fp32", opset=20, names=("generator",))
    assert (tmp_path / "generator.onnx").read_bytes() == (opset20 / "generator.onnx").read_bytes()
    assert "traced a second time" not in caplog.text


@pytest.mark.thorough
def test_one_tenant_and_three_have_the_same_graphs(tiny_build: TinyBuild, tmp_path: Path) -> None:
    outcome = run(*tiny_build.arguments(tmp_path / "one", "beta"))
    assert outcome.code == 0, outcome.err
    assert "graphs are up to date" in outcome.err and "tracing" not in outcome.err
    for file in [*ONNX_FILES, "weights.data"]:
        assert (tmp_path / "one" / file).read_bytes() == (tiny_build.bundle / file).read_bytes()
    names = [tenant["name"] for tenant in json.loads((tmp_path / "one" / "manifest.json").read_text())["tenants"]]
    assert (names, len(TENANTS)) == (["beta"], 3)


@pytest.mark.parametrize("opset", [22, 19, 24])
def test_other_opsets_are_refused(model: Any, tmp_path: Path, opset: int) -> None:
    with pytest.raises(IaptError, match=f"opset {opset} is not supported; use one of 20, 23"):
        export_graphs(model, installed(), tmp_path, dtype="fp32", opset=opset)
    assert list(tmp_path.iterdir()) == []
