"""The accuracy of a bundle, on the tiny one."""

from __future__ import annotations

import json
from pathlib import Path

from engines.serving.session import Request, Session
from examples.evaluate_bundle import measure
from tests.bundles import TinyBuild


def test_an_answer_counts_where_it_is_the_label_and_nothing_else(tiny_build: TinyBuild, tmp_path: Path) -> None:
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
    found = measure(tiny_build.bundle, tmp_path, 2, 6)
    assert found["dtype"] == "fp32" and found["bytes"] > 1000
    assert set(found["accuracy"]) == {"alpha", "beta", "gamma"}
    assert all(0 <= share <= 1 for share in found["accuracy"].values())
