"""``build --quantise auto``: it measures, builds with what it found, and refuses where it could not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iapt_export
from engines.serving.text import TextCodec
from iapt_export.building import build as building
from iapt_export.building import outlook, rounding_search
from iapt_export.building.jobs import plan_build
from iapt_export.building.rounding_choice import MARGIN, RECORD_FILE, Search
from iapt_export.contract.errors import IaptError
from iapt_export.contract.low_bits import rounding_of
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import METHOD, PROMPTS, RANGES, random_method, run
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.adapters.adapter import AdapterConfig
from trainers.adapters.directory import save_adapter
from trainers.decoder.backbone import config_fingerprint, load_backbone
from trainers.decoder.insertion import sizes_of
from validation.judging.metrics import kl
from validation.sides.cases import GENERAL_PROMPTS, own_prompts
from validation.sides.reference import Reference
from validation.sides.rounding import with_rounded_weights
from validation.sides.truth import record_truth

Request = Callable[..., iapt_export.BuildRequest]


def save_small_adapter(folder: Path, model: Any, **fields: Any) -> Path:
    sizes = sizes_of(model)
    places = {"base_model_name_or_path": "small", "backbone_fingerprint": config_fingerprint(model.config)}
    config = AdapterConfig(**places, method=METHOD, **{**dataclasses.asdict(sizes), "prompt_format": "plain", **fields})
    save_adapter(folder, config, dict(random_method(0, METHOD, sizes).state_dict()))
    lines = "".join(json.dumps({"prompt": f"{text} {number}"}) + "\n" for text in PROMPTS for number in range(2))
    (folder / "examples.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone that 64 divides, and adapters of it."""
    root = tmp_path_factory.mktemp("auto")
    model = tiny_llama(num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    save_tiny_backbone(root / "model", model)
    save_small_adapter(root / "own", model)
    save_small_adapter(root / "coarse", model, weights="int4", quantise="block=64")
    return root


@pytest.fixture
def request_of(root: Path, tmp_path: Path) -> Request:
    def make(**fields: Any) -> iapt_export.BuildRequest:
        # what rounding costs so small and random a model is beyond the limits of a proof
        usual = {"model": str(root / "model"), "adapters": [root / "own"], "output": tmp_path / "bundle"}
        usual |= {"cache": tmp_path / "cache", "targets": ["onnxruntime:int8"], "quantise": "auto", "prove": False}
        return iapt_export.BuildRequest(**{**usual, **RANGES, **fields})

    return make


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of a step by setting, in place of what a clock says; empty for the type's own."""
    seconds = {"": 1.0, "block=64": 0.5}
    monkeypatch.setattr(rounding_search, "_step_seconds", lambda session, _: seconds[session.target.quantise])
    return seconds


def agreeing(monkeypatch: pytest.MonkeyPatch, *, lost: int = 0) -> None:
    """Let blocks of 64 lose so many of 200 tokens."""

    def compare(_: Any, session: Any) -> tuple[dict[str, list[bool]], float]:
        others = lost if session.target.quantise else 0
        return {"own": [False] * others + [True] * (200 - others)}, 0.01

    monkeypatch.setattr(rounding_search, "_compare", compare)


def test_the_faster_of_two_is_built_where_both_answer_alike(
    request_of: Request, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    agreeing(monkeypatch)
    said: list[str] = []
    planned = building.foresee(request_of()).text()
    assert "graphs-int8-opset23 (block=64): to do" in planned and "search for --quantise among 2 settings" in planned
    assert not (tmp_path / "cache").exists()
    made = iapt_export.build(request_of(), say=said.append)
    assert [target.quantise for target in made.targets] == ["block=64"]
    assert "chosen: int8 (block=64), the fastest that" in said[0] and "* block=64" in said[0]
    # the same as if it had been typed
    typed = iapt_export.build(request_of(quantise="block=64", output=tmp_path / "typed"))
    assert typed == made and typed.build_key == made.build_key
    # and kept: nothing is measured again, whatever a clock says then
    monkeypatch.setattr(building, "measure", lambda *_: pytest.fail("it measured again"))
    timed["block=64"] = 2.0
    assert iapt_export.build(request_of()).build_key == made.build_key
    again = building.foresee(request_of()).stages
    assert [(stage.name, stage.is_made) for stage in again] == [("graphs-int8-opset23 (block=64)", True)]


def test_a_fast_one_that_answers_otherwise_is_not_built(
    request_of: Request, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    agreeing(monkeypatch, lost=9)
    said: list[str] = []
    made = iapt_export.build(request_of(), say=said.append)
    assert made.targets[0].quantise == "" and "chosen: int8 as it is" in said[0]
    assert made.build_key == iapt_export.build(request_of(quantise="")).build_key


def test_few_tokens_change_nothing_and_are_told_of(
    request_of: Request, timed: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    made = iapt_export.build(request_of(new_tokens=2))
    assert made.targets[0].quantise == ""
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any("had 32 answer tokens to compare" in text and "--example-prompts" in text for text in warnings)
    assert sum("was trained on" in text for text in warnings) == 1, "told once, of what was chosen"


def test_the_backbone_alone_is_asked_general_prompts(
    request_of: Request, timed: dict[str, float], tmp_path: Path
) -> None:
    iapt_export.build(request_of(adapters=[], past="1:64:160"))
    (record,) = (tmp_path / "cache").glob(f"search-int8-opset23-*/{RECORD_FILE}")
    search = Search.load(record.parent)
    assert 0 < search.num_prompts <= len(GENERAL_PROMPTS) and list(search.settings[0].agreed) == [""]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"targets": ["onnxruntime"]},
            "auto measures how int8 and int4 store .* what is built is onnxruntime:fp32; le",
        ),
        ({"targets": ["tensorrt-rtx:int4"]}, "which says nothing of tensorrt-rtx:int4; give settings"),
        ({"device": "cuda"}, "nothing of --device cuda; give settings, such as --quantise block=64, or leave it out"),
        (
            {"adapters": ["coarse"]},
            r"coarse was trained on int4 \(block=64\) weights.* onnxruntime:int4 --quantise block=64$",
        ),
    ],
)
def test_what_could_not_be_measured_is_refused_before_the_export(
    request_of: Request, root: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(building, "run_stage", lambda *_: pytest.fail("it began to work"))
    if "adapters" in fields:
        fields = {"adapters": [root / name for name in fields["adapters"]]}
    for ask in (iapt_export.build, building.foresee):
        with pytest.raises(IaptError, match=said):
            ask(request_of(**fields))


def test_a_backbone_without_room_is_refused_before_the_export(
    request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "run_stage", lambda *_: pytest.fail("it began to work"))
    monkeypatch.setattr(rounding_search, "has_room_for", lambda *_: False)
    with pytest.raises(IaptError, match=r"too large here; give settings, such as --quantise block=64, and measure"):
        iapt_export.build(request_of())


def test_a_search_that_does_not_fit_is_refused_before_the_export(
    request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_export", lambda *_: pytest.fail("it began to work"))
    plain, searched = building.foresee(request_of(quantise="")), building.foresee(request_of())
    assert searched.needs[0].needed > 1.5 * plain.needs[0].needed - 10**5, "graphs of both settings"
    monkeypatch.setattr(outlook, "free_disk", lambda _: 5000)
    with pytest.raises(IaptError, match=r"disk for .* is needed, 0.0 MB is free"):
        iapt_export.build(request_of())


def test_other_commands_refuse_it(root: Path) -> None:
    said = "quantise='auto' is for build alone, which measures settings with its tenants; name settings here"
    assert said in run("plan", root / "model", "--target", "onnxruntime:int4", "--quantise", "auto").err
    places = ("--model", root / "model", "--data", root / "data.jsonl", "--output", root / "trained")
    assert said in run("train", *places, "--weights", "int4", "--quantise", "auto").err


@pytest.mark.thorough
def test_a_search_measures_what_is_served(request_of: Request, root: Path, tmp_path: Path) -> None:
    """Nothing is put in: bytes fall with bits, divergences are those of PyTorch with the same rounded weights."""
    said: list[str] = []
    made = iapt_export.build(request_of(targets=["onnxruntime:int4"]), say=said.append)
    (record,) = (tmp_path / "cache").glob(f"search-int4-opset23-*/{RECORD_FILE}")
    search = Search.load(record.parent)
    names = [each.quantise for each in search.settings]
    assert names == ["", "block=64", "block=64,head=4", "block=64,narrow=4", "block=64,head=4,narrow=4"]
    sizes = {each.quantise: each.bytes for each in search.settings}
    assert sizes[""] > sizes["block=64"] > sizes["block=64,head=4"] > sizes["block=64,head=4,narrow=4"]
    assert all(
        list(each.seconds) == [1, 8] and min(min(own) for own in each.seconds.values()) > 0 for each in search.settings
    )
    assert {len(each.tokens) for each in search.settings} == {len(search.settings[0].tokens)}
    expected = divergences(tmp_path / "bundle", root, names)
    assert [each.kl for each in search.settings] == pytest.approx(expected, rel=0.3), "activations are rounded, too"
    judged = {each.measured.quantise: each for each in search.judged}
    able = [name for name, each in judged.items() if not name or each.max_loss <= MARGIN]
    assert search.chosen in able and made.targets[0].quantise == search.chosen
    assert "chosen: int4" in said[0]
    assert (
        BundleManifest.load(tmp_path / "bundle").build_key
        == plan_build(
            request_of(targets=["onnxruntime:int4"], quantise=search.chosen), load_backbone(str(root / "model"))
        ).key
    )


def divergences(bundle: Path, root: Path, settings: list[str]) -> list[float]:
    """Of PyTorch with rounded weights from PyTorch, over the answers that it gives without rounding."""
    manifest = BundleManifest.load(bundle)
    reference = Reference(bundle, manifest, load_backbone(str(root / "model")))
    prompts = own_prompts(bundle, manifest, TextCodec(bundle), 21, 256)
    truths = record_truth(reference, prompts, new_tokens=16, num_kept=len(prompts))
    means = []
    for quantise in settings:
        rounding = rounding_of("onnxruntime", "int4", quantise)
        assert rounding is not None
        rounded = with_rounded_weights(reference, rounding)
        same = record_truth(rounded, [], new_tokens=16, num_kept=0, given=[(each.prompt, each.fed) for each in truths])
        apart = []
        for own, other in zip(truths, same, strict=True):
            ends = [place for place, token in enumerate(own.tokens, 1) if token in manifest.backbone.eos_token_ids]
            apart += [kl(*pair) for pair in zip(other.logits, own.logits, strict=True)][: min(ends, default=16)]
        means.append(float(np.mean(apart)))
    return means
