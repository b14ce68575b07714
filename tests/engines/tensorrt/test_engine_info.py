"""Checking an engine without a GPU: every planted fault is found."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from engines.tensorrt.builder import engine_from_onnx
from engines.tensorrt.engine_info import EngineInfo, check_engine, info_path, profile_from_spec, read_header
from iapt_export.contract.errors import BundleError
from iapt_export.contract.manifest import GraphSpec, Range, TensorSpec
from tests.engines.tiny_onnx import RANGES, tiny_decode, tiny_prefill


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraphSpec, EngineInfo]:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = tmp_path_factory.mktemp("engine")
    onnx_path, spec = tiny_prefill(folder)
    engine_path = folder / "engines" / "prefill.engine"
    return engine_path, spec, engine_from_onnx(onnx_path, engine_path, spec, RANGES)


def test_the_header_tells_size_version_and_gpus(built: tuple[Path, GraphSpec, EngineInfo]) -> None:
    engine_path, _, info = built
    header = read_header(engine_path)
    assert header is not None
    assert header.size_bytes == info.size_bytes
    assert header.runtime_version == info.runtime_version
    assert header.compute_capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")


def test_profiles_follow_the_ranges(tmp_path: Path) -> None:
    shapes = profile_from_spec(tiny_decode(tmp_path)[1], RANGES)
    assert shapes["past_key_values_0_key"].min == [1, 2, 5, 16]
    assert shapes["past_key_values_0_key"].max == [4, 2, 32, 16]
    # the step's own entry comes on top of the cache
    assert (shapes["attention_mask"].min, shapes["attention_mask"].opt) == ([1, 6], [2, 17])
    assert shapes["attention_mask"].max == [4, 33]


def test_a_size_without_a_range_is_refused() -> None:
    spec = GraphSpec("g.onnx", [TensorSpec("x", "fp32", ["batch", "beams"])], [])
    with pytest.raises(BundleError, match="input x has the dynamic size 'beams'; engines are built over batch, seq"):
        profile_from_spec(spec, RANGES)


def _planted(info: EngineInfo, **changes: object) -> EngineInfo:
    return dataclasses.replace(info, **changes)  # type: ignore[arg-type]


def test_planted_faults_in_record_and_manifest_are_found(built: tuple[Path, GraphSpec, EngineInfo]) -> None:
    engine_path, spec, info = built
    output = info.outputs[0]
    narrow = {**info.profiles[0], "x": dataclasses.replace(info.profiles[0]["x"], max=[4, 8, 8])}
    cases = [
        (
            _planted(info, inputs=[dataclasses.replace(info.inputs[0], dtype="fp32"), *info.inputs[1:]]),
            "input x is fp32",
        ),
        (
            _planted(info, inputs=[dataclasses.replace(info.inputs[0], shape=[-1, 4, 8]), *info.inputs[1:]]),
            "x has shape",
        ),
        (_planted(info, inputs=info.inputs[1:]), "input x is missing"),
        (_planted(info, outputs=[]), "output y is missing"),
        (_planted(info, outputs=[output, dataclasses.replace(output, name="absent")]), "absent is not in the manifest"),
        (_planted(info, outputs=[output, dataclasses.replace(output, name="absent")]), "no tensor called absent"),
        (_planted(info, outputs=[dataclasses.replace(output, shape=[-1, -1, 9])]), "output y has shape [-1, -1, 9]"),
        (_planted(info, profiles=[narrow]), "input x takes [1, 1, 8] to [4, 8, 8], the manifest's ranges need"),
        (_planted(info, profiles=[]), "input tenant_index takes nothing, the manifest's ranges need [1] to [4]"),
        (_planted(info, runtime_version="1.6.0.1"), "its record says 1.6.0.1"),
        (
            _planted(info, compute_capability="8.9"),
            "serves the compute capabilities 8.0, 8.6, 8.9, 12.0, 12.1, expected",
        ),
        (_planted(info, sha256="0" * 64), "prefill.engine was altered"),
    ]
    for faulty, message in cases:
        problems = check_engine(spec, faulty, RANGES, engine_path)
        assert any(message in problem for problem in problems), (message, problems)


def test_a_profile_too_small_for_the_ranges(built: tuple[Path, GraphSpec, EngineInfo]) -> None:
    engine_path, spec, info = built
    wider = dataclasses.replace(RANGES, batch=Range(1, 4, 8))
    problems = check_engine(spec, info, wider, engine_path)
    assert "input tenant_index takes [1] to [4], the manifest's ranges need [1] to [8]" in problems


def test_damaged_files_are_found(built: tuple[Path, GraphSpec, EngineInfo], tmp_path: Path) -> None:
    engine_path, spec, info = built
    data = engine_path.read_bytes()
    copy = tmp_path / "prefill.engine"
    assert check_engine(spec, info, RANGES, copy) == ["prefill.engine is missing"]
    copy.write_bytes(data[:-100])
    (problem,) = check_engine(spec, info, RANGES, copy)
    assert f"has {len(data) - 100} bytes, expected {len(data)}: it is truncated or another file" in problem


def test_a_record_that_was_made_for_a_damaged_file(built: tuple[Path, GraphSpec, EngineInfo], tmp_path: Path) -> None:
    """The header is a second witness: it knows the size even where record and file agree on a wrong one."""
    engine_path, spec, info = built
    copy = tmp_path / "prefill.engine"
    for data, message in [
        (engine_path.read_bytes()[:-100], "says that it has"),
        (b"x" * 1000, "does not begin like an engine of tensorrt-rtx"),
        (b"short", "does not begin like an engine of tensorrt-rtx"),
    ]:
        copy.write_bytes(data)
        agreeing = _planted(info, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        problems = check_engine(spec, agreeing, RANGES, copy)
        assert any(message in problem for problem in problems), (message, problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing; the builder writes it beside every engine"),
        ("{", "prefill.json is not JSON: .*; build the engine again"),
        ("[]", "prefill.json holds a list; expected a JSON object; build the engine again"),
        ("{}", "schema_version is None, this version of iapt-export reads 1; upgrade"),
        ('{"schema_version": 9}', "schema_version is 9, this version of iapt-export reads 1; upgrade"),
        ('{"schema_version": 1, "inputs": [], "outputs": [], "profiles": []}', "is no engine record .*missing"),
    ],
)
def test_bad_records(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "prefill.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        EngineInfo.load(tmp_path / "prefill.engine")


def test_a_record_survives_the_round_trip(built: tuple[Path, GraphSpec, EngineInfo], tmp_path: Path) -> None:
    info = built[2]
    info.save(tmp_path / "copy.engine")
    assert EngineInfo.load(tmp_path / "copy.engine") == info
    assert info_path(tmp_path / "copy.engine").name == "copy.json"
