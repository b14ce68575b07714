"""What becomes of a row: its text comes whole, it stops where it shall, and it joins and leaves in its turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from engines.serving.entry import Entry
from engines.serving.request import Ended, Request, Token
from engines.serving.scheduler import READ_TOKENS, Scheduler
from engines.serving.stepper import Instruction
from engines.serving.tenants import Tenant
from engines.serving.text import TextCodec
from tests.bundles import TinyBuild

NOBODY = Tenant("nobody", None, -1, 4, "plain", "IAPT")
VOCABULARY = 320


def likely(token: int) -> np.ndarray:
    logits = np.zeros(VOCABULARY, np.float32)
    logits[token] = 1.0
    return logits


@pytest.fixture(scope="module")
def codec(tiny_build: TinyBuild) -> TextCodec:
    return TextCodec(tiny_build.bundle)


def entry_of(codec: TextCodec, request: Request, instruction: Sequence[int] = (2,)) -> Entry:
    return Entry(request, 0, NOBODY, list(instruction), codec, frozenset({1}), np.random.default_rng(0))


def spoken(codec: TextCodec, text: str, *stop: str, cut: int = 0) -> list[Token]:
    """What a client gets when the model answers with this text, byte by byte in the tiny vocabulary."""
    script = codec.encode(text, "plain")
    script = script[: len(script) - cut]
    entry = entry_of(codec, Request("nobody", "yes", max_new_tokens=len(script), stop=stop, ignore_eos=True))
    found = []
    for token in script:
        found.append(entry.take(likely(token)))
        if found[-1].finish_reason:
            break
    return found


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🙂👩‍👩‍👧 ok", "a🙂", "é", "mixed ü 字 🎉 end"])
def test_characters_of_several_bytes_come_whole(codec: TextCodec, text: str) -> None:
    tokens = spoken(codec, text)
    assert "".join(token.text for token in tokens) == text == codec.decode([token.token for token in tokens])
    assert all("\N{REPLACEMENT CHARACTER}" not in token.text for token in tokens)
    assert any(token.text == "" for token in tokens), "the tiny vocabulary splits these characters into bytes"
    assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + ["length"]


def test_an_answer_that_ends_within_a_character_shows_that(codec: TextCodec) -> None:
    tokens = spoken(codec, "joy 字", cut=1)
    text = "".join(token.text for token in tokens)
    assert text == codec.decode([token.token for token in tokens])
    assert text.startswith("joy ") and text.endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("the film END is", ("END",), "the film "),
        ("the film ENDE is", ("END?", "ENDE"), "the film "),
        ("one END two STOP", ("STOP", "END"), "one "),
        ("ab 字 cd", ("字",), "ab "),
        ("END", ("END",), ""),
    ],
)
def test_a_stop_text_ends_the_answer_before_it(
    codec: TextCodec, text: str, stops: tuple[str, ...], wanted: str
) -> None:
    tokens = spoken(codec, text, *stops)
    assert "".join(token.text for token in tokens) == wanted
    assert tokens[-1].finish_reason == "stop"


def test_a_stop_token_ends_the_answer_before_its_text(codec: TextCodec) -> None:
    ids = codec.encode("grain oil", "plain")
    entry = entry_of(codec, Request("nobody", "yes", stop_token_ids=(ids[-1],), ignore_eos=True))
    tokens = [entry.take(likely(token)) for token in ids]
    assert [token.finish_reason for token in tokens] == [None] * (len(ids) - 1) + ["stop"]
    assert [token.token for token in tokens] == ids
    assert "".join(token.text for token in tokens) == codec.decode(ids[:-1])


def test_what_only_looks_like_a_stop_text_is_handed_out(codec: TextCodec) -> None:
    tokens = spoken(codec, "the EN and ENDING", "ENDED")
    assert "".join(token.text for token in tokens) == "the EN and ENDING"
    assert tokens[-1].finish_reason == "length"
    shown = "".join(token.text for token in tokens[:-1])
    assert not shown.endswith("END"), "what may become a stop text waits"


class Counter:
    """Steps rows without a model: a row's n-th token is its instruction's first one plus n."""

    max_rows = 3
    reads_beside = False
    can_verify = False

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.log: list[str] = []

    def read(self, rows: Sequence[Instruction]) -> np.ndarray:
        self.log.append(f"read {[len(row.tokens) for row in rows]}")
        self.rows += [row.tokens[0] for row in rows]
        return np.stack([likely(row.tokens[0] + 1) for row in rows])

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        assert len(tokens) == len(self.rows)
        self.log.append(f"step {len(tokens)}")
        return np.stack([likely(token + 1) for token in tokens])

    def leave(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        self.rows.pop()


def run(scheduler: Scheduler) -> dict[Entry, list[int]]:
    made: dict[Entry, list[int]] = {}
    while scheduler.has_work:
        for entry, token in scheduler.step():
            if isinstance(token, Token):
                made.setdefault(entry, []).append(token.token)
    return made


def entries(codec: TextCodec, *lengths: int) -> list[Entry]:
    """Requests that want so many tokens; each counts from a hundred of its own."""
    return [
        entry_of(codec, Request("nobody", max_new_tokens=length), [20 + 40 * number])
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("continuous", [True, False])
def test_every_row_gets_its_own_tokens(codec: TextCodec, continuous: bool) -> None:
    scheduler = Scheduler(Counter(), continuous=continuous)  # type: ignore[arg-type]
    wanted = entries(codec, 5, 1, 9, 2, 2, 7)
    for entry in wanted:
        scheduler.add(entry)
    made = run(scheduler)
    assert made == {
        entry: [entry.instruction[0] + 1 + n for n in range(entry.request.max_new_tokens)] for entry in wanted
    }
    assert scheduler.running == [] and scheduler.stepper.rows == []  # type: ignore[attr-defined]


def test_a_row_that_ends_makes_room_at_once(codec: TextCodec) -> None:
    steps = {}
    for continuous in (True, False):
        counter = Counter()
        scheduler = Scheduler(counter, continuous=continuous)  # type: ignore[arg-type]
        for entry in entries(codec, 8, 2, 2, 2, 2, 2):
            scheduler.add(entry)
        run(scheduler)
        steps[continuous] = counter.log
    assert len([line for line in steps[True] if line.startswith("step")]) == 7
    assert len([line for line in steps[False] if line.startswith("step")]) == 8
    assert steps[True][:4] == ["read [1, 1, 1]", "step 3", "read [1, 1]", "step 3"]
    assert steps[False].index("read [1, 1, 1]", 1) > 7, "the second batch begins after the first one's end"


def test_cancelled_requests_leave_before_the_next_step(codec: TextCodec) -> None:
    counter = Counter()
    scheduler = Scheduler(counter)  # type: ignore[arg-type]
    first, second, third, waiting = entries(codec, 9, 9, 9, 9)
    for entry in (first, second, third, waiting):
        scheduler.add(entry)
    list(scheduler.step())
    second.cancelled = waiting.cancelled = True
    dropped = [entry for entry, item in scheduler.step() if isinstance(item, Ended)]
    assert dropped == [waiting, second] and counter.log[-1] == "step 2"
    assert run(scheduler).keys() == {first, third}


def test_long_instructions_are_read_a_few_at_a_time(codec: TextCodec) -> None:
    counter = Counter()
    scheduler = Scheduler(counter)  # type: ignore[arg-type]
    for _ in range(3):
        scheduler.add(entry_of(codec, Request("nobody", max_new_tokens=3), [20] * (READ_TOKENS // 2 - 4)))
    run(scheduler)
    assert counter.log[:3] == [f"read {[READ_TOKENS // 2 - 4] * 2}", "step 2", f"read {[READ_TOKENS // 2 - 4]}"]
