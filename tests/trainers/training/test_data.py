"""Reading records, formatting and truncating instructions, batches, labels and splits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from iapt_export.building.probes import make_probes
from iapt_export.contract.errors import IaptError
from tests.tiny import tiny_tokenizer
from trainers.decoder.instruction import format_instruction, padding_id, resolve_prompt_format
from trainers.training.data import (
    IGNORED,
    collate,
    encode_examples,
    encode_response,
    example_prompts,
    find_labels,
    fit_instruction,
    format_of,
    pad_instructions,
    sample,
    shared_system_prompt,
    split_holdout,
)
from trainers.training.records import Example, example_of, read_examples

CHAT = tiny_tokenizer()
PLAIN = tiny_tokenizer(chat=False)


def test_a_system_prompt_that_all_examples_share() -> None:
    def example(*system: str) -> Example:
        return Example(
            (*({"role": "system", "content": text} for text in system), {"role": "user", "content": "u"}), "a"
        )

    assert shared_system_prompt([example("s"), example("s")]) == "s"
    assert shared_system_prompt([example(), example()]) == ""
    assert shared_system_prompt([example("s"), example()]) is None
    assert shared_system_prompt([example("s"), example("t")]) is None


@pytest.mark.parametrize(("pad", "expected"), [(320, 1), (-1, 1), (None, 1), (7, 7)])
def test_any_token_of_the_table_pads(pad: int | None, expected: int) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=1)
    assert padding_id(tokenizer, 320) == expected
    assert padding_id(SimpleNamespace(), 320) == 0


def jsonl(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_three_kinds_of_record(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    path = jsonl(
        tmp_path / "data.jsonl",
        {"instruction": "Do", "input": "this", "output": "done"},
        {"instruction": "Do", "input": "", "output": "done"},
        "",
        {"prompt": "Say", "completion": " it"},
        {"messages": turns},
    )
    user = {"role": "user", "content": "Do\n\nthis"}
    assert read_examples(path) == [
        Example((user,), "done", keep=4),
        Example(({"role": "user", "content": "Do"},), "done"),
        Example(({"role": "user", "content": "Say"},), " it", continues=True),
        Example(tuple(turns[:2]), "a"),
    ]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("{broken", "data.jsonl:1: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ([1], "data.jsonl:1: a record is a JSON object, this is list"),
        ({"text": "x"}, "data.jsonl:1: no known fields; expected instruction (and input) with output, prompt with"),
        ({}, "found none"),
        ({"instruction": "", "output": "x"}, "data.jsonl:1: 'instruction' is empty"),
        ({"instruction": "x"}, "data.jsonl:1: 'output' is missing"),
        ({"instruction": "x", "input": 3, "output": "x"}, "data.jsonl:1: 'input' is int, expected a string"),
        ({"prompt": "x", "completion": " "}, "data.jsonl:1: 'completion' is empty"),
        ({"prompt": 7, "completion": "x"}, "data.jsonl:1: 'prompt' is int, expected a string"),
        ({"messages": "hi"}, "'messages' is not a list of at least two messages"),
        ({"messages": ["a", "b"]}, "message 0 is str, expected an object with role and content"),
        ({"messages": [{"role": "robot", "content": "x"}] * 2}, "message 0 has role 'robot', expected system, user"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "does not end with a user message and the assistant's"),
        ({"instruction": "x", "output": "y", "system": "Be kind."}, "its system would not be read; put what the model"),
        (
            {"prompt": "x", "completion": "y", "tools": [{}], "history": [["a", "b"]]},
            "its history and tools would not be",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]},
            "message 1 has weight, which is not read; expected role and content",
        ),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "'content' is missing"),
        ({"instruction": "x", "output": "y", "context": "a text"}, "its context would not be read; put what the model"),
        ({"instruction": "x", "output": "y", "inputs": "a text"}, "'inputs' would not be read; expected 'input', with"),
        ({"instruction": "x", "output": "y", "Input": "a text"}, "'Input' would not be read; expected 'input', with"),
        ({"prompt": "x", "completion": "y", "Prompt ": "z"}, "'Prompt ' would not be read; expected 'prompt', with"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, record: Any, text: str) -> None:
    with pytest.raises(IaptError) as caught:
        read_examples(jsonl(tmp_path / "data.jsonl", record))
    assert text in str(caught.value)


def test_bad_records_are_shown_together_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", *[{"instruction": ""}] * 13)
    with pytest.raises(IaptError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert message.startswith("13 bad record(s)") and message.endswith("and 3 more")
    assert f"{path}:10:" in message and f"{path}:11:" not in message


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n')
    (example,) = read_examples(tmp_path / "data.jsonl")
    assert (example.messages[0]["content"], example.response) == ("a", "b")


def test_files_that_hold_no_data(tmp_path: Path) -> None:
    with pytest.raises(IaptError, match="does not exist; expected JSONL"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(IaptError, match="holds no records"):
        read_examples(jsonl(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IaptError, match="is not UTF-8 text"):
        read_examples(tmp_path / "binary.jsonl")


def test_prompt_formats() -> None:
    for continues in (True, False):
        assert resolve_prompt_format(CHAT, "auto", continues=continues) == "chat"
        for asked in ("plain", "newline"):
            assert resolve_prompt_format(CHAT, asked, continues=continues) == asked
        with pytest.raises(IaptError, match="needs a tokenizer with a chat template; this one has none, use newline"):
            resolve_prompt_format(PLAIN, "chat", continues=continues)


def test_without_a_template_an_answer_begins_on_its_own_line_unless_it_completes_a_prompt() -> None:
    records = ({"prompt": "Say", "completion": " it"}, {"instruction": "Say", "output": "it"})
    completion, answer = map(example_of, records)
    assert format_of(PLAIN, "auto", [completion]) == "plain"
    assert format_of(PLAIN, "auto", [answer]) == format_of(PLAIN, "newline", [completion, answer]) == "newline"
    assert format_of(CHAT, "auto", [completion]) == format_of(CHAT, "auto", [completion, answer]) == "chat"
    with pytest.raises(
        IaptError, match=r"1 records are prompts with completions and 2 have another form; .* say prompt_f"
    ):
        format_of(PLAIN, "auto", [completion, answer, answer])
    ids = [format_instruction(PLAIN, "is it?", form) for form in ("plain", "newline")]
    assert [PLAIN.decode(each) for each in ids] == ["is it?", "is it?\n"]


def test_chat_instruction_is_the_rendered_template() -> None:
    ids = format_instruction(CHAT, "is this positive?", "chat")
    assert CHAT.decode(ids) == (
        "<|im_start|>system\nYou help.<|im_end|>\n"
        "<|im_start|>user\nis this positive?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert format_instruction(CHAT, [{"role": "user", "content": "is this positive?"}], "chat") == ids


def test_plain_instruction_is_the_text() -> None:
    assert PLAIN.decode(format_instruction(PLAIN, "is this positive?", "plain")) == "is this positive?"


def test_instructions_that_cannot_be_fed() -> None:
    with pytest.raises(IaptError, match="the prompt is empty"):
        format_instruction(CHAT, "  ", "chat")
    with pytest.raises(IaptError, match="2 messages need a chat template"):
        format_instruction(PLAIN, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "plain")

    def no_tokens(_text: str) -> dict[str, list[int]]:
        return {"input_ids": []}

    with pytest.raises(IaptError, match="has no tokens"):
        format_instruction(no_tokens, "a", "plain")


def test_response_ends_unless_cut() -> None:
    whole = encode_response(CHAT, "yes")
    assert whole[-1] == CHAT.eos_token_id and CHAT.decode(whole[:-1]) == "yes"
    example = Example(({"role": "user", "content": "What?"},), "positive negative")
    (cut,) = encode_examples(CHAT, [example], "chat", 100, 1)
    assert cut["input_ids"][cut["instruction_length"] :] == encode_response(CHAT, "positive negative")[:1]
    assert cut["response_is_cut"]
    nameless = tiny_tokenizer()
    nameless.eos_token = None
    with pytest.raises(IaptError, match="names no eos_token"):
        encode_response(nameless, "yes")


def test_truncation_cuts_the_input_and_nothing_else() -> None:
    text = "the film is a quiet joy from the first scene to the last " * 4
    example = Example(({"role": "user", "content": f"What?\n\n{text}"},), "yes", keep=7)
    whole = fit_instruction(CHAT, example, "chat", 10_000)[1]
    limit = len(whole) - 30
    cut = fit_instruction(CHAT, example, "chat", limit)[1]
    assert limit - 3 <= len(cut) <= limit
    shown = CHAT.decode(cut)
    head, tail = "<|im_start|>user\nWhat?\n\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert head in shown and shown.endswith(tail)
    assert text.startswith(shown.split(head)[1].removesuffix(tail))


class WithoutOffsets:
    """A tokenizer in Python, which says no offsets: transformers' own raise `NotImplementedError` for them."""

    is_fast = False

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __call__(self, *given: Any, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self._of(*given, **options)


@pytest.mark.parametrize("text", ["the film is a quiet joy from the first scene to the last " * 4, "Ω漢字😀 " * 40])
def test_a_tokenizer_without_offsets_cuts_as_much(text: str) -> None:
    example = Example(({"role": "user", "content": f"What?\n\n{text}"},), "yes", keep=7)
    limit = len(fit_instruction(CHAT, example, "chat", 10_000)[1]) - 30
    wanted = fit_instruction(CHAT, example, "chat", limit)[1]
    cut = fit_instruction(WithoutOffsets(CHAT), example, "chat", limit)[1]
    assert limit - 4 <= len(cut) <= limit
    shared = sum(1 for mine, other in zip(cut, wanted, strict=False) if mine == other)
    assert shared >= min(len(cut), len(wanted)) - 12  # all but the template's end and a character


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            "of system, user: System role not supported; give",
        ),
        ("{% for x %}", "messages of system, user: expected token 'in'"),
        ("{{ messages | mystery }}", "No filter named 'mystery'"),
        ("{{ messages[7].content.strip() }}", "has no element 7"),
        ("{{ 1 // 0 }}", "by zero"),
        ({"rag": "{{ 1 }}"}, "multiple chat templates with no default specified"),
    ],
)
def test_a_template_that_does_not_render_is_refused_in_words(template: Any, words: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    with pytest.raises(IaptError, match=words):
        format_instruction(tokenizer, messages, "chat")
    assert all(probe.text is None for probe in make_probes(tokenizer).chats if probe.messages[0]["role"] == "system")


def test_truncation_that_would_cut_the_instruction() -> None:
    example = Example(({"role": "user", "content": "A long instruction\n\ninput"},), "yes", keep=20)
    with pytest.raises(IaptError, match="max_instruction_tokens=30 leaves no room for the input"):
        fit_instruction(CHAT, example, "chat", 30)


def test_batch() -> None:
    examples = [Example(({"role": "user", "content": text},), "yes") for text in ("hi", "hello there")]
    items = encode_examples(CHAT, examples, "chat", 100, None)
    batch = collate(items, pad_token_id=1)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, max(len(item["input_ids"]) for item in items))}
    answer = encode_response(CHAT, "yes")
    for row, item in enumerate(items):
        length, split = len(item["input_ids"]), item["instruction_length"]
        assert batch["input_ids"][row, :length].tolist() == item["input_ids"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert batch["instruction_mask"][row].sum() == split
        assert batch["labels"][row, split:length].tolist() == answer
        assert (batch["labels"][row, :split] == IGNORED).all() and (batch["labels"][row, length:] == IGNORED).all()


def test_generation_sees_the_ids_that_training_saw() -> None:
    example = Example(({"role": "user", "content": "hi"},), "yes")
    (item,) = encode_examples(CHAT, [example], "chat", 100, None)
    ids, mask = pad_instructions([format_instruction(CHAT, "hi", "chat")], 1)
    assert ids[0].tolist() == item["input_ids"][: item["instruction_length"]]
    assert mask.all()


def test_example_prompts_go_from_the_shortest_to_the_longest() -> None:
    def example(*messages: tuple[str, str]) -> Example:
        return Example(tuple({"role": role, "content": text} for role, text in messages), "yes")

    texts = ["word " * count + "end" for count in range(9, 0, -1)]
    examples = [example(("user", text)) for text in [*texts, texts[0]]]
    assert example_prompts(CHAT, examples, "chat", 1000, 3) == [texts[8], texts[4], texts[0]]
    assert example_prompts(CHAT, examples, "chat", 1000, 99) == texts[::-1]
    assert example_prompts(CHAT, examples, "chat", 1000, 1) == [texts[8]]
    assert example_prompts(CHAT, examples, "chat", 1000, 0) == []
    conversation = example(("user", "a"), ("assistant", "b"), ("user", "c"))
    with_system = example(("system", "Be brief."), ("user", "d"))
    assert example_prompts(CHAT, [conversation, with_system], "chat", 1000, 8) == ["d"]
    cut = example_prompts(CHAT, examples[:1], "chat", 60, 8)
    assert cut == [texts[0][: len(cut[0])]] and 0 < len(cut[0]) < len(texts[0])


def examples_with(*responses: str) -> list[Example]:
    return [
        Example(({"role": "user", "content": f"text {index}"},), response) for index, response in enumerate(responses)
    ]


def test_labels_are_found() -> None:
    assert find_labels(examples_with("no", "yes", "no", "yes"), "auto") == ("no", "yes")
    assert find_labels(examples_with("no", "yes", "no"), "auto") == ()
    assert find_labels(examples_with("yes", "yes"), "auto") == ()
    assert find_labels(examples_with("no", "yes", "no", "yes"), "generation") == ()
    assert find_labels(examples_with("b", "a"), "classification") == ("a", "b")
    with pytest.raises(IaptError, match="needs at least two distinct responses, the data has 1"):
        find_labels(examples_with("yes", "yes"), "classification")


def test_holdout_is_never_trained_on() -> None:
    examples = examples_with(*"ab" * 20) + [Example(({"role": "user", "content": "TEXT  3"},), "a")] * 5
    training, held_out = split_holdout(examples, 0.5, seed=1)
    keys = [{example.messages[0]["content"].lower().split()[1] for example in part} for part in (training, held_out)]
    assert not keys[0] & keys[1]
    assert len(held_out) == round(0.5 * len(examples))
    assert split_holdout(examples, 0.5, seed=1) == (training, held_out)
    with pytest.raises(IaptError, match=r"holdout=0\.1 of 2 examples leaves 0 to evaluate and 2 to train"):
        split_holdout(examples[:2], 0.1, seed=0)


def test_sample() -> None:
    examples = examples_with(*"abcdefgh")
    chosen = sample(examples, 3, seed=0)
    assert len(chosen) == 3 and chosen == sample(examples, 3, seed=0) != sample(examples, 3, seed=2)
    assert chosen == [example for example in examples if example in chosen]
    assert sample(examples, 0, seed=0) == examples == sample(examples, 99, seed=0)
