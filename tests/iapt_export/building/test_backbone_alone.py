"""A bundle without adapters: the backbone is built, proven, and answers by itself what ``generate`` answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from engines.bench import measure
from engines.serving.session import Request, Session
from iapt_export import build
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.graphs.save import WEIGHTS_FILE
from tests.bundles import TinyBuild, rehash, run
from tests.engines.http.served import in_thread
from tests.native.built import needs_runner, needs_tokenizer
from tests.native.test_iapt_run import iapt_run
from tests.tiny import tiny_tokenizer
from tests.traces import run_folder
from trainers.decoder.backbone import load_backbone
from validation.reporting.report import read_report

TOKENS = ((5, 40, 77, 12), (9,), tuple(range(30, 60)))
TEXT = "what is the topic of this news text?"
STEPS = 12


@pytest.fixture(scope="module")
def bundle(tiny_build: TinyBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folder(tmp_path_factory) / "backbone-alone"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            build(tiny_build.request(folder, adapters=[], past="1:64:160"))
    return folder


def stock_tokens(model: Path, prompt: tuple[int, ...]) -> list[int]:
    """What stock transformers generates."""
    ids = torch.tensor([prompt])
    stock: Any = load_backbone(str(model)).model
    fed = {"attention_mask": torch.ones_like(ids), "pad_token_id": 1, "eos_token_id": None, "do_sample": False}
    return stock.generate(input_ids=ids, max_new_tokens=STEPS, **fed)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_session_answers_as_generate(bundle: Path, tiny_build: TinyBuild, in_place: bool) -> None:
    with Session.open(bundle, in_place=in_place) as session:
        assert session.tenants == []
        assert session.base == "model"
        for name in ("", "model"):
            requests = [Request(name, tokens=ids, max_new_tokens=STEPS, ignore_eos=True) for ids in TOKENS]
            answers = [answer.tokens for answer in session.generate(requests)]  # rows of one batch
            assert answers == [stock_tokens(tiny_build.model, ids) for ids in TOKENS]


def test_the_proof_is_of_the_backbone(bundle: Path) -> None:
    manifest = BundleManifest.load(bundle)
    assert (manifest.methods, manifest.tenants, manifest.serves_backbone) == ([], [], True)
    assert manifest.parity.verdict == "pass"
    report = read_report(bundle / "report.json")
    assert (report.verdict, report.method, report.tenants) == ("pass", "none", [])
    tokens = report.targets[0].tokens
    assert len(tokens) >= 8
    assert "model alone, without tenants" in (bundle / "report.html").read_text(encoding="utf-8")
    outcome = run("validate", bundle, "--case=prompts", "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["verdict"] == "pass", outcome.err


def test_an_altered_graph_is_found(bundle: Path, tmp_path: Path) -> None:
    """There are rows to compare: weights that are off by a hundredth fail."""
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    path = copy / WEIGHTS_FILE
    weights = np.frombuffer(path.read_bytes(), dtype=np.float32) * np.float32(1.01)
    path.write_bytes(weights.tobytes())
    rehash(copy)
    outcome = run("validate", copy, "--quick")
    assert outcome.code == 3 and "prefill logits" in outcome.err, outcome.err


def test_the_command_line_asks_it_without_a_name(bundle: Path, tiny_build: TinyBuild) -> None:
    ids = tiny_tokenizer().apply_chat_template([{"role": "user", "content": TEXT}], add_generation_prompt=True)
    wanted = stock_tokens(tiny_build.model, tuple(ids["input_ids"]))
    for flags in ([], ["--tenant=model"], ["--tenant="]):
        outcome = run("generate", bundle, *flags, f"--prompt={TEXT}", f"--max-new-tokens={STEPS}", "--json")
        assert outcome.code == 0, outcome.err
        (row,) = json.loads(outcome.out)
        assert row["tokens"] == (wanted[: wanted.index(1) + 1] if 1 in wanted else wanted)


@needs_runner
@needs_tokenizer
def test_iapt_run_answers_alike(bundle: Path, tiny_build: TinyBuild) -> None:
    flags = [f"--prompt={TEXT}", f"--max-new-tokens={STEPS}", "--json"]
    wanted = run("generate", bundle, *flags).out
    for named in ([], ["--tenant=model"], ["--tenant="], ["--portable"]):
        made = iapt_run(bundle, *named, *flags)
        assert (made.returncode, made.stdout) == (0, wanted), made.stderr
    beside = iapt_run(tiny_build.bundle, "--tenant=model", *flags)
    assert (beside.returncode, beside.stdout) == (0, wanted), beside.stderr
    unnamed = iapt_run(tiny_build.bundle, *flags)
    assert unnamed.returncode == 1
    assert "--tenant is missing: whose adapter answers; this bundle has alpha, beta, gamma" in unnamed.stderr
    unknown = iapt_run(bundle, "--tenant=alpha", *flags)
    assert "tenant 'alpha' is not in this bundle; its tenants are none" in unknown.stderr


def test_it_answers_over_http(bundle: Path, tiny_build: TinyBuild) -> None:
    with in_thread(bundle) as server:
        _, models, _ = server.ask("/v1/models")
        assert [model["id"] for model in models["data"]] == ["model"]
        asked = {"model": "model", "prompt": list(TOKENS[0]), "max_tokens": STEPS, "ignore_eos": True, "temperature": 0}
        status, answer, _ = server.ask("/v1/completions", asked)
        assert status == 200, answer
        assert answer["choices"][0]["text"] == tiny_tokenizer().decode(stock_tokens(tiny_build.model, TOKENS[0]))
        status, refused, _ = server.ask("/v1/completions", asked | {"model": "alpha"})
        assert status == 404, refused


def test_it_is_measured_and_planned(bundle: Path) -> None:
    with Session.open(bundle) as session:
        figures = measure(session, 2, 8, 4, 1)
    assert (figures["rows"], figures["tenants"]) == (2, 0)
    outcome = run("plan", bundle, "--json")
    assert outcome.code == 0, outcome.err
    assert not any("tenants of" in share["name"] for share in json.loads(outcome.out))
    shown = run("inspect", bundle, "--json")
    assert shown.code == 0, shown.err


def test_no_adapter_can_be_added_later(bundle: Path, tiny_build: TinyBuild, tmp_path: Path) -> None:
    """Its graphs take no method's tensors."""
    made = tmp_path / "alpha.safetensors"
    flags = [tiny_build.adapters["alpha"], f"--bundle={tiny_build.bundle}", f"--output={made}"]
    assert run("tenant", *flags).code == 0
    with Session.open(bundle) as session, pytest.raises(IaptError) as refused:
        session.add_tenant(made)
    assert "this bundle has no method IAPT" in str(refused.value) and "it has none." in str(refused.value)
    outcome = run(
        "tenant", tiny_build.adapters["alpha"], f"--bundle={bundle}", f"--output={tmp_path / 'b.safetensors'}"
    )
    assert outcome.code == 1 and "has no method IAPT" in outcome.err, outcome.err


@pytest.mark.thorough
def test_int4_weights_are_proven_too(tiny_build: TinyBuild, tmp_path: Path) -> None:
    build(tiny_build.request(tmp_path / "out", adapters=[], past="1:64:160", targets=["onnxruntime:int4"]))
    report = read_report(tmp_path / "out" / "report.json")
    assert report.verdict == "pass"
    assert [target.name for target in report.targets][-1] == "onnxruntime with int4 weights, otherwise"
