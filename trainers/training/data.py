"""Examples in, token rows out: the prompt's format, truncation, batches.

The instruction is tokenised apart from the response, so that generation sees exactly the ids that
training saw.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from iapt_export.contract.errors import IaptError, shown
from iapt_export.contract.prompt_format import PromptFormat
from trainers.decoder.family import max_positions
from trainers.decoder.instruction import AskedFormat, format_instruction, resolve_prompt_format, user_message
from trainers.training.config import Task, TrainConfig
from trainers.training.records import Example, refuse_records

IGNORED = -100
"""Label of positions that carry no loss."""
MAX_LABELS = 50
"""More distinct responses than this are not taken for labels."""


class Item(TypedDict):
    """An encoded example: instruction and response in one row."""

    input_ids: list[int]
    """Instruction, response and end of sequence."""
    instruction_length: int
    """How many of them are instruction."""


class Encoded(Item):
    """An example of a file, perhaps without its end."""

    where: str
    instruction_is_cut: bool
    response_is_cut: bool


def encode_response(tokenizer: Any, response: str) -> list[int]:
    """Token ids of an answer and its end-of-sequence token.

    Raises:
        IaptError: the tokenizer names no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise IaptError("the tokenizer names no eos_token, so no answer could end; set it in tokenizer_config.json")
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], int(tokenizer.eos_token_id)]


def format_of(tokenizer: Any, asked: AskedFormat, examples: Sequence[Example]) -> PromptFormat:
    """How the prompts of examples are fed; see `resolve_prompt_format`.

    Raises:
        IaptError: the examples' forms ask for different formats, and nobody said which.
    """
    count = sum(example.continues for example in examples)
    found = resolve_prompt_format(tokenizer, asked, continues=count == len(examples))
    if asked == "auto" and found != "chat" and 0 < count < len(examples):
        raise IaptError(
            f"{count} records are prompts with completions and {len(examples) - count} have another form; without a "
            "chat template only the others get a line break behind: say prompt_format=plain or newline"
        )
    return found


def fit_instruction(tokenizer: Any, example: Example, prompt_format: str, max_tokens: int) -> tuple[str, list[int]]:
    """What is left of an example's last message, and the ids of the whole instruction, at most ``max_tokens`` long.

    An instruction that is too long loses the end of its last message's text (of its input, where it has one),
    never a part of the template.

    Raises:
        IaptError: the part that must stay is longer than ``max_tokens`` by itself.
    """
    ids = format_instruction(tokenizer, example.messages, prompt_format)
    text = example.messages[-1]["content"]
    while len(ids) > max_tokens:
        # Cutting may change how the remaining end is split, hence the loop; it ends since text gets shorter.
        text = text[: _end_before(tokenizer, text, len(ids) - max_tokens)].rstrip()
        if len(text) < max(example.keep, 1):
            raise IaptError(
                f"max_instruction_tokens={max_tokens} leaves no room for the input: what stands before it"
                f"{', earlier turns among it,' if len(example.messages) > 2 else ''} needs more, with the template; "
                "raise max_instruction_tokens"
            )
        ids = format_instruction(tokenizer, (*example.messages[:-1], user_message(text)), prompt_format)
    return text, ids


def _end_before(tokenizer: Any, text: str, surplus: int) -> int:
    """Where the last ``surplus`` tokens of a text begin; 0 where it has no more."""
    if not tokenizer.is_fast:  # tells no offsets; a character has four bytes at most, so this cuts no more than asked
        return max(0, len(text) - max(1, surplus // 4))
    pieces = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return int(pieces[-surplus][0]) if surplus < len(pieces) else 0


def encode_examples(
    tokenizer: Any, examples: Iterable[Example], prompt_format: str, max_instruction: int, max_response: int | None
) -> list[Encoded]:
    """Encode examples for training; see `fit_instruction` for what its limit cuts.

    An answer longer than ``max_response`` tokens loses its end, and with it the token that ends it.

    Raises:
        IaptError: examples that no limit can cut, each by file and line.
    """
    items: list[Encoded] = []
    problems: list[str] = []
    for example in examples:
        response = encode_response(tokenizer, example.response)
        try:
            text, instruction = fit_instruction(tokenizer, example, prompt_format, max_instruction)
        except IaptError as error:
            problems.append(f"{example.where}: {error}" if example.where else str(error))
            continue
        items.append(
            {
                "where": example.where,
                "input_ids": instruction + response[:max_response],
                "instruction_length": len(instruction),
                "instruction_is_cut": text != example.messages[-1]["content"],
                "response_is_cut": max_response is not None and len(response) > max_response,
            }
        )
    refuse_records(problems)
    return items


def told_of_cuts(items: Sequence[Encoded], what: str, config: TrainConfig) -> list[str]:
    """How many examples lose their end to the settings' lengths, a sentence each for prompts and answers."""
    told = []
    if count := sum(item["instruction_is_cut"] for item in items):
        told.append(
            f"{count:,} of {len(items):,} {what} have prompts longer than "
            f"max_instruction_tokens={config.max_instruction_tokens}, and the end of their text is cut off"
        )
    if count := sum(item["response_is_cut"] for item in items):
        told.append(
            f"{count:,} of {len(items):,} {what} have answers longer than "
            f"max_response_tokens={config.max_response_tokens}, whose end, and that they end, is cut off"
        )
    return told


def check_rows(items: Sequence[Encoded], tokenizer: Any, model: Any, num_slots: int) -> None:
    """Refuse rows that the backbone's tables do not hold, before a step meets one of them.

    Args:
        items: encoded examples.
        tokenizer: the backbone's.
        model: the backbone.
        num_slots: what an adapter puts before each row.

    Raises:
        IaptError: a token or a position that the backbone has no entry for.
    """
    config, positions = model.config.get_text_config(), max_positions(model)
    for number, item in enumerate(items):
        place = item["where"] or f"example {number}"
        highest, length = max(item["input_ids"]), num_slots + len(item["input_ids"])
        if highest >= config.vocab_size:
            raise IaptError(
                f"{tokenizer.convert_ids_to_tokens(highest)!r} is token {highest}, and the backbone's table has "
                f"{config.vocab_size} entries; its tokenizer had tokens added: resize the table, or leave them out"
            )
        if length > positions:
            raise IaptError(
                f"{place} has {length} tokens, {num_slots} of them the adapter's, and the backbone "
                f"{positions} positions; lower max_instruction_tokens or max_response_tokens"
            )


def check_labels(examples: Sequence[Example], labels: Sequence[str], what: str) -> None:
    """Refuse examples whose response is none of the labels, where there are labels.

    Raises:
        IaptError: ``what``, with the first five.
    """
    strange = sorted({example.response for example in examples} - set(labels)) if labels else []
    if strange:
        raise IaptError(f"{what}: {', '.join(strange[:5])}")


def collate(items: Sequence[Item], pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows on the right.

    Returns:
        int64 tensors ``[B, T]``: ``input_ids``; ``attention_mask`` (1 at real tokens); ``instruction_mask`` (1 at
        the tokens that methods may read); ``labels`` (the response's ids, -100 elsewhere).
    """
    width = max(len(item["input_ids"]) for item in items)
    ids = torch.full((len(items), width), pad_token_id, dtype=torch.long)
    attention, instruction = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, item in enumerate(items):
        tokens, split = torch.tensor(item["input_ids"]), item["instruction_length"]
        ids[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = 1
        instruction[row, :split] = 1
        labels[row, split : len(tokens)] = tokens[split:]
    return {"input_ids": ids, "attention_mask": attention, "instruction_mask": instruction, "labels": labels}


def pad_instructions(rows: Sequence[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """``input_ids [B, T]`` and ``attention_mask [B, T]`` (int64) of instructions, padded on the right."""
    batch = collate([{"input_ids": row, "instruction_length": len(row)} for row in rows], pad_token_id)
    return batch["input_ids"], batch["attention_mask"]


def shared_system_prompt(examples: Sequence[Example]) -> str | None:
    """The system prompt that every example begins with; empty where none has one, None where they differ."""
    firsts = (example.messages[0] for example in examples)
    found = {message["content"] if message["role"] == "system" else "" for message in firsts}
    return found.pop() if len(found) == 1 else None


def told_of_system_prompts(examples: Sequence[Example]) -> list[str]:
    """A sentence where `shared_system_prompt` is None, so that the adapter keeps none."""
    if shared_system_prompt(examples) is not None:
        return []
    firsts = (example.messages[0] for example in examples)
    counts = Counter(message["content"] if message["role"] == "system" else "" for message in firsts)
    (commonest, count), *_ = counts.most_common(1)
    named = f"with the system prompt {shown(commonest)}" if commonest else "without a system prompt"
    return [
        f"{count:,} of {len(examples):,} training examples begin {named}, the others otherwise, so the adapter keeps "
        "none, and requests must bring their own"
    ]


def find_labels(examples: Sequence[Example], task: Task) -> tuple[str, ...]:
    """The labels of classification data in sorted order, or none for generation.

    ``auto`` takes the data for classification when at most 50 distinct responses occur, at least twice each
    on average, and more than one.

    Raises:
        IaptError: classification was asked for and only one distinct response occurs.
    """
    if task == "generation":
        return ()
    labels = tuple(sorted({example.response for example in examples}))
    if task == "classification":
        if len(labels) < 2:
            raise IaptError(f"task=classification needs at least two distinct responses, the data has {len(labels)}")
        return labels
    return labels if 2 <= len(labels) <= min(MAX_LABELS, len(examples) // 2) else ()


def split_holdout(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training and held-out examples; no held-out instruction occurs in the training part.

    Raises:
        IaptError: a part would be empty.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    held = sorted(order[: round(share * len(examples))])
    unseen = {_key(examples[index]) for index in held}
    training = [example for example in examples if _key(example) not in unseen]
    if not held or not training:
        raise IaptError(
            f"holdout={share:g} of {len(examples)} examples leaves {len(held)} to evaluate and {len(training)} to "
            "train; give more data, another share, or an eval_file"
        )
    return training, [examples[index] for index in held]


def count_seen(training: Sequence[Example], held_out: Sequence[Example]) -> int:
    """How many examples to evaluate on have an instruction that is trained on as well."""
    trained = {_key(example) for example in training}
    return sum(_key(example) in trained for example in held_out)


def example_prompts(
    tokenizer: Any, examples: Sequence[Example], prompt_format: str, max_tokens: int, count: int
) -> list[str]:
    """Texts that tenants' users may send: of ``examples``, from the shortest to the longest in even steps.

    A text says what stands after the system prompt, so examples that begin with a conversation give none.

    Args:
        tokenizer: the backbone's.
        examples: held-out ones.
        prompt_format: ``chat``, ``plain`` or ``newline``.
        max_tokens: longer instructions are cut as in training.
        count: how many at most.
    """
    single = [
        example for example in examples if [m["role"] for m in example.messages] in (["user"], ["system", "user"])
    ]
    fitted = {fit_instruction(tokenizer, example, prompt_format, max_tokens)[0] for example in single}
    texts = sorted(fitted, key=lambda text: (len(text), text))
    if count >= len(texts) or count < 2:
        return texts[:count]
    return [texts[place * (len(texts) - 1) // (count - 1)] for place in range(count)]


def _key(example: Example) -> str:
    """Instructions that differ in letter case and spaces only count as the same."""
    return " ".join(" ".join(message["content"] for message in example.messages).casefold().split())


def sample(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """A random sample of at most ``limit`` examples in their own order; 0 takes all."""
    if not limit or len(examples) <= limit:
        return list(examples)
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), limit))]
