"""Every kind of PEFT's adapters through the whole way: built, proven, and answering as stock PEFT does, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from iapt_export import BuildRequest, build
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import RANGES
from tests.iapt_export.building.test_families import (
    LIMIT,
    NEW_TOKENS,
    Words,
    served_words,
    stock_words,
)
from tests.peft_kinds import AS_IT_IS, KINDS, MERGED, REFUSED, TASK, Kind
from tests.tiny import save_tiny_backbone
from tests.trainers.adapters.test_peft_format import backbone_of
from trainers.adapters.directory import load_adapter

BACKBONES = {kind.backbone.__name__: kind.backbone for kind in KINDS.values() if kind.expected == AS_IT_IS}


def asked(kind: Kind) -> dict[str, Any]:
    """What PEFT's model has to be told of this kind besides."""
    return {"task_ids": torch.tensor([TASK])} if "num_tasks" in kind.options else {}


def compared(ours: list[Words], theirs: list[Words], plain: list[Words]) -> float:
    """The largest difference of a log-probability between equal tokens; the adapter itself must make a larger one."""
    assert [words.tokens for words in ours] == [words.tokens for words in theirs]
    assert max(words.distance(other) for words, other in zip(theirs, plain, strict=True)) > 10 * LIMIT
    return max(words.distance(other) for words, other in zip(ours, theirs, strict=True))


def request(folder: Path, backbone: Any, **fields: Any) -> BuildRequest:
    model = save_tiny_backbone(folder / "model", backbone)
    places = {"model": str(model), "output": folder / "out", "cache": folder / "cache"}
    return BuildRequest(**places, **RANGES | {"past": "1:64:160", "tenants": "1:8:32"}, new_tokens=NEW_TOKENS, **fields)


def served_as_they_are(backbone: str, folder: Path) -> dict[str, float]:
    """All kinds of one backbone that are taken, in one bundle: name to the largest difference to PEFT's own answers."""
    kinds = {
        name: kind for name, kind in KINDS.items() if kind.expected == AS_IT_IS and kind.backbone.__name__ == backbone
    }
    arguments, theirs = [], {}
    for place, (name, kind) in enumerate(kinds.items()):
        model = kind.made()
        model.save_pretrained(folder / f"tenant-{place}")
        arguments.append(f"{folder / f'tenant-{place}'},format=plain" + (f",task={TASK}" if asked(kind) else ""))
        theirs[name] = stock_words(model, **asked(kind))
    build(request(folder, BACKBONES[backbone](), adapters=arguments))
    assert BundleManifest.load(folder / "out").parity.verdict == "pass"
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    (peft,) = [target for target in report["targets"] if target["name"] == "PEFT's own answer"]
    assert peft["status"] == "pass"
    served = served_words(folder / "out", [f"tenant-{place}" for place in range(len(kinds))])
    plain = stock_words(BACKBONES[backbone]())
    return {name: compared(served[f"tenant-{place}"], theirs[name], plain) for place, name in enumerate(kinds)}


def refusal(name: str, folder: Path) -> str:
    """The sentence with which an adapter of this kind is refused."""
    kind = KINDS[name]
    kind.made().save_pretrained(folder / "refused")
    with pytest.raises(IaptError) as caught:
        load_adapter(folder / "refused", backbone_of(kind.backbone()), peft_prompt_format="plain")
    return str(caught.value).removeprefix(f"{folder / 'refused'}: ")


def served_merged(name: str, folder: Path) -> float:
    """What PEFT merged, built as a backbone alone: the largest difference to what PEFT's adapter answered before."""
    kind = KINDS[name]
    model = kind.made()
    theirs = stock_words(model)
    build(request(folder, model.merge_and_unload(), adapters=[]))
    return compared(served_words(folder / "out", [""])[""], theirs, stock_words(kind.backbone()))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_kinds_that_are_taken_answer_as_peft(backbone: str, tmp_path: Path) -> None:
    errors = served_as_they_are(backbone, tmp_path)
    assert errors and max(errors.values()) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.expected == MERGED])
def test_kinds_that_peft_merges_answer_as_peft(name: str, tmp_path: Path) -> None:
    assert served_merged(name, tmp_path) < LIMIT


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.expected != AS_IT_IS])
def test_what_is_not_taken_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """In a sentence that says what to do, where something can be done."""
    pytest.importorskip("peft", reason="needs peft, whose adapters these are")
    text = refusal(name, tmp_path)
    assert "is not supported" in text or "expected" in text
    assert "merge_and_unload()" in text and "build it with --model, without --adapter" in text
    if KINDS[name].expected == REFUSED:
        with pytest.raises((AttributeError, NotImplementedError, RuntimeError)):
            KINDS[name].made().merge_and_unload().save_pretrained(tmp_path / "merged")


def test_the_other_methods_of_peft_are_refused_by_name(tmp_path: Path) -> None:
    """Also those that PEFT will have tomorrow."""
    peft = pytest.importorskip("peft", reason="needs peft, which names its methods")
    taken = {"PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "LORA"}
    others = [kind.value for kind in peft.PeftType if kind.value not in taken]
    assert len(others) > 20
    for kind in (*others, "INVENTED_TOMORROW"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}), encoding="utf-8")
        (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        with pytest.raises(IaptError, match=f"PEFT's method '{kind}' is not supported; use one of PROMPT_TUNING"):
            load_adapter(tmp_path, backbone_of(KINDS["LORA, plain"].backbone()), peft_prompt_format="plain")
