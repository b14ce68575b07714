"""What training's evaluation reads is what is served: an adapter with a system prompt, from `train` to ``iapt_run``."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch

from engines.serving.session import Request, Session
from iapt_export import BuildRequest, build
from tests.bundles import RANGES, run
from tests.native.built import RUNNER, needs_runner, needs_tokenizer
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import load_backbone
from trainers.decoder.generate import greedy
from trainers.decoder.method import rows_of
from trainers.methods.configs import PromptTuningConfig
from trainers.training.config import TrainConfig, TrainRequest
from trainers.training.data import fit_instruction
from trainers.training.records import read_examples
from trainers.training.train import train

SYSTEM = "Say yes or no."
NEW_TOKENS = 6


@pytest.mark.thorough
@needs_runner
@needs_tokenizer
def test_a_system_prompt_from_training_to_every_door(tmp_path: Path) -> None:
    model = save_tiny_backbone(tmp_path / "model", tiny_llama(num_hidden_layers=1))
    talks = [[("system", SYSTEM), ("user", f"film {n}?"), ("assistant", "yes" if n % 2 else "no")] for n in range(8)]
    data = tmp_path / "joy.jsonl"
    lines = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = TrainConfig(max_steps=2, batch_size=4, learning_rate=0.3, warmup_steps=0, baseline=False)
    method = PromptTuningConfig(prompt_length=4)
    train(TrainRequest(str(model), data, tmp_path / "joy", method, config), say=lambda _: None)

    backbone = load_backbone(str(model))
    (example, *_) = read_examples(data)
    ids = torch.tensor([fit_instruction(backbone.tokenizer, example, "chat", 512)[1]])  # as `evaluate` encodes it
    trained = load_adapter(tmp_path / "joy").module().requires_grad_(False)
    (wanted,), _ = greedy(backbone.model, rows_of(trained), ids, torch.ones_like(ids), max_new_tokens=NEW_TOKENS)

    bundle = tmp_path / "bundle"
    places = {"model": str(model), "adapters": [tmp_path / "joy"], "output": bundle, "cache": tmp_path / "cache"}
    build(BuildRequest(**places, **RANGES, prove=False))
    with Session.open(bundle, allow_unproven=True, threads=1) as session:
        request = Request("joy", "film 0?", max_new_tokens=NEW_TOKENS, ignore_eos=True)
        served, without = session.generate([request, dataclasses.replace(request, system="")])
    assert served.tokens == wanted
    assert served.tokens != without.tokens, "the system prompt matters"
    flags = [bundle, "--tenant=joy", "--prompt=film 0?", f"--max-new-tokens={NEW_TOKENS}", "--allow-unproven", "--json"]
    command = subprocess.run([RUNNER, *map(str, flags)], capture_output=True, text=True, check=True)
    for text in (run("generate", *flags).out, command.stdout):
        (answer,) = json.loads(text)
        assert answer["tokens"] == wanted[: len(answer["tokens"])] and answer["tokens"]
