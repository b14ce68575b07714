"""Cases come from the bundle's ranges, are the same for the same seed, and can be run alone by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from engines.serving.text import TextCodec
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest, Range
from tests.bundles import NEW_TOKENS, TinyBuild, run
from validation.judging.compare import Settings, chosen_cases
from validation.sides.cases import GENERAL_PROMPTS, example_text, generated_cases, read_examples

TEXT = list(range(3, 40))


@pytest.fixture(scope="module")
def manifest(tiny_build: TinyBuild) -> BundleManifest:
    return BundleManifest.load(tiny_build.bundle)


def test_cases_reach_every_edge_of_the_ranges(manifest: BundleManifest) -> None:
    cases = {case.name: case for case in generated_cases(manifest, 0, TEXT)}
    ranges = manifest.ranges
    accepted = [case for case in cases.values() if not case.is_refused]
    assert {len(case.rows) for case in accepted} >= {1, ranges.batch.max}
    lengths = {len(row.tokens) for case in accepted for row in case.rows}
    assert min(lengths) == 1 and max(lengths) == ranges.sequence.max
    filled = cases["full-cache"]
    entries = manifest.num_slots + len(filled.rows[0].tokens) + filled.new_tokens - 1
    assert entries == ranges.past.max
    assert {row.tenant for row in cases["largest-batch"].rows} == {"alpha", "beta", "gamma"}
    assert {row.tenant for row in cases["tenant-0"].rows} == {"alpha"}
    assert len({row.tenant for row in cases["one-tenant"].rows}) == 1
    assert [row.tenant for row in cases["backbone-alone"].rows] == ["", "gamma"]
    merged = dataclasses.replace(manifest, serves_backbone=False)
    assert "backbone-alone" not in {case.name for case in generated_cases(merged, 0, TEXT)}
    vocabulary = manifest.backbone.vocab_size
    assert {0, vocabulary - 1, manifest.backbone.pad_token_id} <= set(cases["unusual-tokens"].rows[0].tokens)
    assert all(0 <= token < vocabulary for case in accepted for row in case.rows for token in row.tokens)


def test_cases_read_and_are_fed_text(manifest: BundleManifest, tiny_build: TinyBuild) -> None:
    cases = {case.name: case for case in generated_cases(manifest, 0, TEXT)}
    for name, case in cases.items():
        if case.is_refused or name == "unusual-tokens":
            continue
        for row, fed in zip(case.rows, case.fed, strict=True):
            assert len(fed) == case.new_tokens - 1
            places = [TEXT.index(token) for token in (*row.tokens, *fed)]
            assert all((after - before) % len(TEXT) == 1 for before, after in itertools.pairwise(places))
    unusual = cases["unusual-tokens"]
    assert len(unusual.fed[0]) == unusual.new_tokens - 1 and set(unusual.fed[0]) <= set(TEXT)
    assert not cases["refuse-too-long"].fed
    codec = TextCodec(tiny_build.bundle)
    text = example_text(tiny_build.bundle, manifest, codec)
    first = manifest.tenants[0]
    prompt = (read_examples(tiny_build.bundle / first.examples) if first.examples else GENERAL_PROMPTS)[0]
    wanted = codec.encode(prompt, first.prompt_format)
    assert text[: len(wanted)] == wanted and len(text) > 3 * len(wanted)


def test_long_answers_take_256_steps_where_the_cache_allows(manifest: BundleManifest) -> None:
    ranges = dataclasses.replace(manifest.ranges, past=Range(1, 256, 1024))
    cases = {case.name: case for case in generated_cases(dataclasses.replace(manifest, ranges=ranges), 0, TEXT)}
    assert cases["long-answer"].new_tokens == 256


@pytest.mark.parametrize(("batch", "sequence", "past"), [(1, 1, 6), (1, 3, 8), (2, 96, 16), (3, 8, 200)])
def test_small_ranges_still_give_cases_that_fit(manifest: BundleManifest, batch: int, sequence: int, past: int) -> None:
    ranges = dataclasses.replace(
        manifest.ranges, batch=Range(1, 1, batch), sequence=Range(1, 1, sequence), past=Range(1, 1, past)
    )
    for case in generated_cases(dataclasses.replace(manifest, ranges=ranges), 0, TEXT):
        if not case.is_refused:
            assert len(case.rows) <= batch and case.new_tokens >= 1
            longest = max(len(row.tokens) for row in case.rows)
            assert 1 <= longest <= sequence
            assert manifest.num_slots + longest + case.new_tokens - 1 <= past, case


def test_the_seed_decides_the_tokens(manifest: BundleManifest) -> None:
    assert generated_cases(manifest, 3, TEXT) == generated_cases(manifest, 3, TEXT)
    assert generated_cases(manifest, 3, TEXT) != generated_cases(manifest, 4, TEXT)
    printed = str(generated_cases(manifest, 3, TEXT)[1])
    assert printed == "largest-batch (8 rows of 5, 11, 17, 23, 29, 35, 41, 47 tokens, 16 steps)"


def test_depth_and_name_choose(manifest: BundleManifest) -> None:
    full = {case.name for case in chosen_cases(manifest, Settings(depth="full"), TEXT)}
    quick = {case.name for case in chosen_cases(manifest, Settings(depth="quick"), TEXT)}
    assert full - quick == {"largest-batch", "one-tenant", "longest-instruction", "long-answer", "full-cache"}
    assert quick == {case.name for case in chosen_cases(manifest, Settings(), TEXT)}
    assert [case.name for case in chosen_cases(manifest, Settings(depth="quick", case="full-cache"), TEXT)] == [
        "full-cache"
    ]
    assert chosen_cases(manifest, Settings(case="prompts"), TEXT) == []
    with pytest.raises(IaptError, match="case 'most' does not exist; this bundle's cases are prompts, one-token, "):
        chosen_cases(manifest, Settings(case="most"), TEXT)


def test_one_case_alone_and_all_of_them(tiny_build: TinyBuild, tmp_path: Path) -> None:
    alone = run("validate", tiny_build.bundle, "--json", "--case=full-cache")
    assert alone.code == 0, alone.err
    report = json.loads(alone.out)
    assert {check["case"] for check in report["targets"][0]["checks"]} == {"full-cache"}
    assert report["command"].endswith("--case full-cache")
    assert "case full-cache (1 rows of 96 tokens" in alone.err
    everything = run("validate", tiny_build.bundle, "--json", "--quiet", f"--new-tokens={NEW_TOKENS}")
    cases = {check["case"] for check in json.loads(everything.out)["targets"][0]["checks"]}
    assert {"long-answer", "refuse-only-padding", "refuse-unknown-token", "most-padding"} <= cases


def test_an_answer_to_what_must_be_refused_fails(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.serving.admission import Admission

    honest = Admission.entry

    def cut(self: Admission, request: Any, *rest: Any, **named: Any) -> Any:
        return honest(self, dataclasses.replace(request, tokens=request.tokens[:3]), *rest, **named)

    monkeypatch.setattr(Admission, "entry", cut)
    outcome = run("validate", tiny_build.bundle, "--json", "--quiet", "--case=refuse-too-long")
    assert outcome.code == 3
    (check,) = json.loads(outcome.out)["targets"][0]["checks"]
    assert (check["measured"], check["detail"]) == ({"refused": 0.0}, "it was answered")
