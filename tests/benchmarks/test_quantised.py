"""The accuracy benchmark's own arithmetic, on the tiny bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quantised
from engines.serving.session import Request, Session
from tests.bundles import TinyBuild


def test_an_answer_counts_where_it_is_the_label_and_nothing_else(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "CHOSEN_ON", 2)
    prompts = [f"is this {word} ?" for word in ("good", "bad", "film", "the", "a", "of", "no", "yes", "good", "bad")]
    with Session.open(tiny_build.bundle) as session:
        for tenant in session.tenants:
            answers = session.generate([Request(tenant, text, max_new_tokens=1) for text in prompts])
            # the reference's own first token is right where the end token follows, and wrong with a word more
            texts = [answer.text for answer in answers]
            lines = [
                json.dumps({"prompt": p, "completion": t if t.strip() else "x"})
                for p, t in zip(prompts, texts, strict=True)
            ]
            (tmp_path / f"{tenant}.eval.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = quantised.measure([tiny_build.bundle], tmp_path, 6)
    (entry,) = record["types"].values()
    assert record["skipped"] == 2 and entry["bytes"] > 1000
    assert set(entry["tasks"]) == {"alpha", "beta", "gamma"}
    for figures in entry["tasks"].values():
        assert 0 <= figures["accuracy"] <= 1
        assert figures["relative_max"] == 0 and figures["top1_agreement"] == 1


def test_errors_are_over_the_largest_logit() -> None:
    wanted = np.array([[10.0, 0.0, -20.0], [0.0, 4.0, 1.0]])
    made = np.array([[10.0, 1.0, -20.0], [3.0, 2.0, 1.0]])
    found = quantised.compare(made, wanted)
    assert found == {"relative_max": 0.75, "relative_median": pytest.approx(0.4), "top1_agreement": 0.5}
