"""The adapters in ``examples/adapters`` on the real backbone: PyTorch first, then (slow) the whole path to a bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engines.serving.session import Request, Session
from tests.bundles import run
from trainers.adapters.adapter import EXAMPLES_FILE, WEIGHTS_FILE
from trainers.adapters.directory import check_adapter_fits, load_adapter
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.generate import greedy
from trainers.decoder.instruction import format_instruction
from trainers.decoder.method import rows_of
from validation.sides.cases import MIN_PROMPTS, read_examples

ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"
ANSWERS = {
    "movie-sentiment": {0: "positive", 1: "negative"},
    "sarcasm": {0: "yes", 7: "no"},
    "reuters-r8": {0: "acquisition", 1: "oil"},
}
"""Adapter to the answers it gives to some of its example prompts."""


@pytest.fixture(scope="module")
def backbone(smollm2: Path) -> Backbone:
    return load_backbone(str(smollm2))


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_in_pytorch(name: str, backbone: Backbone) -> None:
    adapter = load_adapter(ADAPTERS / name)
    check_adapter_fits(adapter.config, backbone, name)
    prompts = read_examples(ADAPTERS / name / EXAMPLES_FILE)
    for index, answer in ANSWERS[name].items():
        ids = torch.tensor([format_instruction(backbone.tokenizer, prompts[index], adapter.config.prompt_format)])
        tokens, _ = greedy(
            backbone.model,
            rows_of(adapter.module()),
            ids,
            torch.ones_like(ids),
            max_new_tokens=8,
            eos_token_ids=(2,),
        )
        assert backbone.tokenizer.decode(tokens[0], skip_special_tokens=True) == answer


@pytest.mark.parametrize("name", ANSWERS)
def test_the_card_beats_zero_shot_and_majority(name: str) -> None:
    scores = json.loads((ADAPTERS / name / "evaluation.json").read_text(encoding="utf-8"))
    adapter, baseline = scores["adapter"], scores["baseline"]
    assert adapter["count"] >= 500
    assert adapter["accuracy"] > max(baseline["accuracy"], adapter["majority_accuracy"]) + 0.1
    assert (ADAPTERS / name / WEIGHTS_FILE).stat().st_size < 2e6
    assert f"{adapter['accuracy']:.3f}" in (ADAPTERS / name / "README.md").read_text(encoding="utf-8")
    assert len(read_examples(ADAPTERS / name / EXAMPLES_FILE)) >= MIN_PROMPTS // len(ANSWERS)


@pytest.mark.slow
def test_export_memory_is_at_most_three_times_the_checkpoint(smollm2: Path, tmp_path: Path) -> None:
    """Two element types, through the command line, up to the end of the exports: what follows is not export."""
    code = (
        "import resource, iapt_export.building.build as build\n"
        "from iapt_export.cli import main\n"
        "class Exported(Exception): pass\n"
        "def stop(*_):\n"
        "    raise Exported\n"
        "build.temporary_folder = stop\n"
        "try:\n"
        "    main()\n"
        "except Exported:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = ["build", f"--model={smollm2}", f"--adapter={ADAPTERS / 'sarcasm'}", f"--output={tmp_path / 'bundle'}"]
    options = [f"--cache={tmp_path / 'cache'}", "--target=onnxruntime:fp32", "--target=tensorrt-rtx:fp16", "--quiet"]
    pytest.importorskip("tensorrt_rtx", reason="the second element type is TensorRT for RTX's")
    done = subprocess.run([sys.executable, "-c", code, *command, *options], capture_output=True, text=True, check=True)
    checkpoint = sum(path.stat().st_size for path in smollm2.glob("*.safetensors"))
    ratio = int(done.stdout.split()[-1]) * 1024 / checkpoint
    assert 1 < ratio <= 3, f"peak memory is {ratio:.2f} times the checkpoint"


@pytest.mark.slow
def test_the_whole_path_to_a_bundle(smollm2: Path, tmp_path: Path) -> None:
    adapters = [f"--adapter={ADAPTERS / name}" for name in ANSWERS]
    places = [f"--output={tmp_path / 'bundle'}", f"--cache={tmp_path / 'cache'}"]
    built = run("build", f"--model={smollm2}", *adapters, *places, "--new-tokens=8")
    assert built.code == 0, built.err
    assert "24 of 24 rows identical" in built.out
    prompts = {name: read_examples(ADAPTERS / name / EXAMPLES_FILE) for name in ANSWERS}
    asked = [(name, index) for name, answers in ANSWERS.items() for index in answers]
    requests = [Request(name, prompts[name][index], max_new_tokens=8) for name, index in asked]
    with Session.open(tmp_path / "bundle") as session:
        texts = [answer.text for answer in session.generate(requests)]
    assert texts == [ANSWERS[name][index] for name, index in asked]
