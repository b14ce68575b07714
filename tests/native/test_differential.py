"""Python and C++ take and refuse the same manifests and safetensors files, and read the same from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundles import TinyBuild
from tests.native import differential
from tests.native.differential import corpus, differences, mutations, of_cpp, of_python, seeds_of

needs_judge = pytest.mark.skipif(
    not differential.is_built(), reason="the fuzz target is not built; 'make cpp' builds it"
)
COUNT = 300


@needs_judge
def test_the_kept_corpus_is_judged_alike() -> None:
    assert differences(corpus()) == []
    told = {data: read for (_, data), read in zip(corpus(), of_cpp(corpus()), strict=True)}
    for kind in ("manifest", "safetensors"):
        folder = Path(differential.CORPUS) / kind
        accepted = {path.name for path in folder.iterdir() if told[path.read_bytes()] is not None}
        assert accepted == {"valid", {"safetensors": "no-tensors", "manifest": "value-dim"}[kind]}


@needs_judge
def test_mutated_files_are_judged_alike(tiny_build: TinyBuild) -> None:
    """A short form of ``python -m tests.native.differential``, which makes 10,000."""
    inputs = list(mutations(seeds_of(tiny_build.bundle), COUNT, seed=1))
    assert differences(inputs) == []
    accepted = sum(of_python(kind, data) is not None for kind, data in inputs)
    assert COUNT / 50 < accepted < COUNT / 2, "some get past all checks, most do not"


@needs_judge
def test_a_difference_is_seen(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = seeds_of(tiny_build.bundle)
    inputs = [(kind, data) for kind in seeds for data in seeds[kind]]
    assert [read is None for read in of_cpp(inputs)] == [False, False]
    assert differences(inputs) == []
    monkeypatch.setitem(differential.READERS, "manifest", lambda _: {"backbone": []})
    assert [item[0] for item in differences(inputs)] == ["manifest"]
