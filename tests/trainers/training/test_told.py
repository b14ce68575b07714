"""What training says of its data, backbone and request, that users would else find out from wrong answers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from iapt_export.building.plan import load_tenants
from iapt_export.contract.errors import IaptError
from tests.tiny import save_tiny_backbone, tiny_llama, tiny_tokenizer
from tests.trainers.runs import METHOD, RUN, run
from tests.trainers.training.test_data import jsonl
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import load_backbone
from trainers.decoder.instruction import user_message
from trainers.decoder.stored import weights_sha256
from trainers.training.config import TrainConfig, TrainRequest
from trainers.training.data import encode_examples, told_of_cuts, told_of_system_prompts
from trainers.training.evaluate_adapter import evaluate_adapter
from trainers.training.records import Example, read_examples
from trainers.training.train import train

CHAT = tiny_tokenizer()


def test_words_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"instruction": "Do", "output": "done", "id": f"row-{n}", "text": "a film", "inputs": ""} for n in range(3)]
    rows[2]["text"] = "film"
    assert len(read_examples(jsonl(tmp_path / "data.jsonl", *rows))) == 3
    assert caplog.messages == [f"{tmp_path / 'data.jsonl'}: no model sees the text of the fields text (2 of 3 records)"]


def test_what_is_cut_is_counted() -> None:
    config = TrainConfig(max_instruction_tokens=40, max_response_tokens=3)
    examples = [
        Example((user_message("Is it?\n\n" + "joy " * count),), answer, keep=8)
        for count, answer in ((2, "yes"), (90, "yes"), (90, "positive " * 9))
    ]
    items = encode_examples(CHAT, examples, "chat", 40, 3)
    assert [(item["instruction_is_cut"], item["response_is_cut"]) for item in items] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    assert all(item["instruction_length"] <= 40 for item in items)
    assert len(items[2]["input_ids"]) == items[2]["instruction_length"] + 3
    prompts, answers = told_of_cuts(items, "training examples", config)
    assert prompts.startswith("2 of 3 training examples have prompts longer than max_instruction_tokens=40")
    assert answers.startswith("1 of 3 training examples have answers longer than max_response_tokens=3")
    assert told_of_cuts(items[:1], "training examples", config) == []
    assert not any(item["response_is_cut"] for item in encode_examples(CHAT, examples, "chat", 40, None)), "labels"


def test_system_prompts_that_differ_are_told() -> None:
    judge, user = {"role": "system", "content": "You judge."}, user_message("x")
    alike = [Example((judge, user), "y")] * 3
    assert told_of_system_prompts(alike) == told_of_system_prompts([Example((user,), "y")] * 2) == []
    (told,) = told_of_system_prompts([*alike, Example((user,), "y")])
    assert told.startswith("3 of 4 training examples begin with the system prompt 'You judge.', the others otherwise")
    (told,) = told_of_system_prompts([*alike[:1], *[Example((user,), "y")] * 2])
    assert told.startswith("2 of 3 training examples begin without a system prompt, the others otherwise")


def test_examples_that_no_limit_can_cut_are_named_together(tmp_path: Path) -> None:
    turns = [user_message("joy " * 90), {"role": "assistant", "content": "Yes."}, user_message("And now?")]
    path = jsonl(
        tmp_path / "data.jsonl",
        {"prompt": "joy", "completion": "yes"},
        {"messages": [*turns, {"role": "assistant", "content": "no"}]},
        {"instruction": "joy " * 90, "input": "joy", "output": "yes"},
    )
    with pytest.raises(IaptError, match="2 bad record") as caught:
        encode_examples(CHAT, read_examples(path), "chat", 40, None)
    first, second = str(caught.value).splitlines()[1:]
    assert f"{path}:2: max_instruction_tokens=40 leaves no room" in first and "earlier turns among it" in first
    assert f"{path}:3: max_instruction_tokens=40 leaves no room" in second and "earlier turns" not in second


def test_log_and_card_say_what_no_model_sees(backbone: str, tmp_path: Path) -> None:
    """Prompts that lose their question, and a system prompt that only some conversations have."""
    data = tmp_path / "long.jsonl"
    system = [{"role": "system", "content": "You judge."}]
    rows = [
        {
            "messages": [
                *(system if n % 2 else []),
                {"role": "user", "content": "joy " * (5 + 90 * (n < 8)) + "good?"},
                {"role": "assistant", "content": "yes" if n % 2 else "no"},
            ]
        }
        for n in range(20)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines: list[str] = []
    config = dataclasses.replace(RUN, holdout=0.0, eval_file=str(data), max_instruction_tokens=50, baseline=False)
    train(TrainRequest(backbone, data, tmp_path / "a", METHOD, config), say=lines.append)
    cut = "20 training examples have prompts longer than max_instruction_tokens=50, and the end of their text is cut"
    wanted = [f"8 of {cut}", "10 of 20 training examples begin with", "examples to evaluate on have prompts longer"]
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    for text in wanted:
        assert any(text in line for line in lines) and text in card, text


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"method": "lora"}, "method='lora' is no method's settings; expected one of IAPTConfig(), "),
        (
            {"config": {"max_steps": 2}},
            "config={'max_steps': 2} is no TrainConfig; expected TrainConfig(max_steps=...)",
        ),
        ({"model": Path("m")}, "model=PosixPath('m') is not text"),
        ({"data": None}, "data=None is not text or a path"),
    ],
)
def test_a_request_of_other_kinds_is_refused_at_once(fields: Any, text: str) -> None:
    with pytest.raises(IaptError, match=re.escape(text)):
        TrainRequest(**{"model": "m", "data": "d", "output": "o"} | fields)


def test_a_label_stays_in_its_cell_of_the_card(backbone: str, tmp_path: Path) -> None:
    data = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"joy {n}", "completion": "a|b" if n % 2 else "c\nd"} for n in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(backbone, data, tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "\n| a\\|b | " in card and "\n| c d | " in card


def test_other_weights_of_the_same_sizes_are_told(
    backbone: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A name says nothing of it: not when the model was tuned on in its place, and not when it was copied."""
    run(backbone, data, tmp_path / "a", weights="int8")
    (tmp_path / "changed").mkdir()
    other = save_tiny_backbone(tmp_path / "changed" / Path(backbone).name, tiny_llama(seed=5))
    same = Path(shutil.copytree(backbone, tmp_path / "renamed"))
    mine = load_adapter(tmp_path / "a").config
    assert mine.backbone_weights_sha256 == weights_sha256(load_backbone(backbone).model), "those before rounding"
    for model, said in ((same, False), (other, True)):
        caplog.clear()
        evaluate_adapter(str(model), tmp_path / "a", data, dataclasses.replace(RUN, weights="int8"))
        load_tenants([tmp_path / "a"], load_backbone(str(model)))
        told = [text for text in caplog.messages if "was trained on other weights than those of" in text]
        assert len(told) == 2 * said, caplog.messages
        assert "was trained for" not in caplog.text
    run(backbone, data, tmp_path / "half", precision="bf16")
    assert load_adapter(tmp_path / "half").config.backbone_weights_sha256 == "", "other weights round to the same"
