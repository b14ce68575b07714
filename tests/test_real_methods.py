"""Every method on the real backbone, alone and all in one bundle: trained, built, and identical to PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.serving.session import Request, Session
from tests.bundles import run
from trainers.methods.configs import METHOD_CONFIGS, flag_name

pytestmark = pytest.mark.slow
METHODS = tuple(flag_name(name) for name in METHOD_CONFIGS)
TRAINED: dict[str, tuple[str, ...]] = {
    **{method: (f"--method={method}",) for method in METHODS},
    "adept-decode": ("--method=adept", "--decode-offset=true"),
    "iapt-raw": ("--method=iapt", "--normalize=false"),
}
"""Tenant to the flags that it is trained with."""
ALONE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TRAINED, ()),
    "adept, folded": ("--fold-embeddings",),
    "lora, merged": ("--merge-lora",),
}
"""A tenant, with what tells its bundle from others, to the flags of the build."""
REVIEWS = {
    "A quiet joy from the first scene to the last.": "positive",
    "Dull, noisy and far too long.": "negative",
    "I would see it again tomorrow.": "positive",
    "Nobody will remember this film.": "negative",
}
QUESTION = "Is this movie review positive or negative?"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few steps of every method: enough to move it away from its start."""
    root = tmp_path_factory.mktemp("adapters")
    rows = [{"instruction": QUESTION, "input": text, "output": label} for text, label in REVIEWS.items()]
    data = root / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4), encoding="utf-8")
    shared = [f"--model={smollm2}", f"--data={data}", "--max-steps=4", "--warmup-steps=1", "--batch-size=4"]
    found = {}
    for tenant, flags in TRAINED.items():
        found[tenant] = root / tenant
        outcome = run("train", *shared, *flags, f"--output={found[tenant]}", "--quiet")
        assert outcome.code == 0, outcome.err
        lines = [json.dumps({"prompt": f"{QUESTION}\n\n{text}"}) for text in REVIEWS]
        (found[tenant] / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def build(smollm2: Path, adapters: dict[str, Path], folder: Path, *flags: str) -> Path:
    """A bundle whose greedy tokens are PyTorch's in every row and in both kinds of cache."""
    words = [f"--model={smollm2}", f"--output={folder / 'bundle'}", f"--cache={folder / 'cache'}", *flags]
    words += [f"--adapter={name}={path}" for name, path in adapters.items()]
    outcome = run("build", *words, f"--new-tokens={NEW_TOKENS}", "--past=1:64:640", "--quiet")
    assert outcome.code == 0, outcome.err
    report = json.loads((folder / "bundle" / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "pass"
    for target in report["targets"]:
        assert {row["tenant"] for row in target["tokens"]} == set(adapters)
        assert all(row["reference"] == row["target"] for row in target["tokens"])
    return folder / "bundle"


@pytest.mark.parametrize("case", ALONE)
def test_a_method_alone(case: str, smollm2: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    tenant = case.partition(",")[0]
    build(smollm2, {tenant: adapters[tenant]}, tmp_path, *ALONE[case])


def test_all_methods_in_one_bundle_and_one_batch(smollm2: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    bundle = build(smollm2, adapters, tmp_path, "--batch=1:4:16", f"--tenants=1:{len(adapters)}:16")
    prompt = f"{QUESTION}\n\n{next(iter(REVIEWS))}"
    requests = [Request(name, prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True) for name in adapters]
    with Session.open(bundle, verify=False) as session:
        together = [answer.tokens for answer in session.generate(requests)]
        alone = [next(session.generate([request])).tokens for request in requests]
    assert together == alone
