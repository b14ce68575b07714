"""What the trainers' tests share: a tiny backbone in a folder, and data to train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import save_tiny_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny-llama"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty texts; the answer is yes when the text begins with joy."""
    path = tmp_path_factory.mktemp("data") / "joy.jsonl"
    records = [
        {"instruction": "joy?", "input": f"{'joy' if i % 2 else 'dull'} {i} film", "output": "yes" if i % 2 else "no"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
