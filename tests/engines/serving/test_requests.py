"""What one request may ask for beside its neighbours: penalties, log-probabilities, forms, deadlines, the base."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.serving.sampling import Sampling
from engines.serving.session import Grammar, Request, Session
from engines.serving.shaping import Shaping
from iapt_export.contract.errors import IaptError
from tests.bundles import TENANTS, TinyBuild

PROMPT = (5, 9, 30, 42)


@pytest.fixture(scope="module")
def session(tiny_build: TinyBuild) -> Iterator[Session]:
    with Session.open(tiny_build.bundle, verify=False) as session:
        yield session


@pytest.fixture(scope="module")
def backbone(tiny_build: TinyBuild) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_build.model, dtype=torch.float32).eval()


def ask(session: Session, tenant: str = "", **fields: Any) -> Any:
    wanted = {"tokens": PROMPT, "max_new_tokens": 12, "ignore_eos": True, **fields}
    return session.submit(Request(tenant, **wanted))


def sampled(**fields: Any) -> dict[str, Any]:
    return {"sampling": Sampling(**fields)}


def by_transformers(backbone: Any, **fields: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1, "eos_token_id": None, **fields}
    return backbone.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(PROMPT) :].tolist()


def test_the_base_answers_as_transformers_does_beside_its_tenants(session: Session, backbone: Any) -> None:
    assert session.base == "model"
    tenants = ["", *TENANTS, "model", session.manifest.backbone.name_or_path]
    rows = [Request(tenant, tokens=PROMPT, max_new_tokens=12, ignore_eos=True) for tenant in tenants]
    answers = [answer.tokens for answer in session.generate(rows)]
    wanted = by_transformers(backbone)
    assert answers[0] == answers[4] == answers[5] == wanted
    assert all(tokens != wanted for tokens in answers[1:4])


def test_a_repetition_penalty_is_that_of_transformers(session: Session, backbone: Any) -> None:
    answer = ask(session, **sampled(repetition_penalty=1.7)).result().tokens
    assert answer == by_transformers(backbone, repetition_penalty=1.7) != by_transformers(backbone)


def test_a_bias_forces_and_forbids(session: Session) -> None:
    free = ask(session).result().tokens
    assert ask(session, **sampled(logit_bias={77: 100.0})).result().tokens == [77] * 12
    banned = ask(session, **sampled(logit_bias={free[0]: -100.0})).result().tokens
    assert free[0] not in banned and len(banned) == 12


def test_presence_and_frequency() -> None:
    shaping = Shaping(Sampling(presence_penalty=1.5, frequency_penalty=0.5), [3])
    answer = [7, 7, *range(20, 60)]
    for token in answer:
        shaping.took(token)
    changed = shaping.apply(np.zeros(100, np.float32), answer)
    wanted = np.zeros(100, np.float32)
    wanted[7], wanted[20:60] = -2.5, -2.0
    assert (changed == wanted).all()


def test_log_probabilities_are_the_models_own(session: Session, backbone: Any) -> None:
    generation = ask(session, logprobs=3, **sampled(temperature=1.5, seed=3, top_k=5))
    tokens = list(generation)
    ids = [*PROMPT, *(token.token for token in tokens)]
    with torch.no_grad():
        wanted = backbone(torch.tensor([ids])).logits[0, len(PROMPT) - 1 : -1].double().log_softmax(-1)
    for token, row in zip(tokens, wanted, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token]), abs=1e-4)
        assert [place for place, _ in token.top_logprobs] == row.topk(3).indices.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert all(token.logprob is None for token in ask(session))


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"min_p": 1.0}, {"top_k": 1, "min_p": 0.1, "top_p": 0.5}])
def test_the_narrowest_choice_is_greedy(session: Session, fields: dict[str, Any]) -> None:
    assert ask(session, **sampled(temperature=3.0, seed=1, **fields)).result() == ask(session).result()


def test_an_answer_is_no_shorter_than_asked(session: Session) -> None:
    free = ask(session).result().tokens
    stops = {"stop_token_ids": (free[0],), "ignore_eos": False}
    assert ask(session, **stops).result().tokens == free[:1]
    longer = ask(session, min_tokens=5, **stops).result()
    assert len(longer.tokens) >= 5 and free[0] not in longer.tokens[:5]


def test_a_hooks_own_array_stays_as_it_is(session: Session) -> None:
    """What rules tokens out for one answer must not reach the next, whose hook gives the same array again."""
    own = np.zeros(320, np.float32)
    own[1], own[50] = 2, 1  # the end token first
    ends = {"logits_hook": lambda answer, logits: own, "ignore_eos": False}
    assert ask(session, min_tokens=2, **ends).result().tokens == [50, 50, 1]
    assert (own[1], own[50]) == (2, 1)
    assert ask(session, **ends).result().tokens == [1]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
def test_what_a_hook_raises_ends_its_request_alone(session: Session, error: BaseException) -> None:
    def hook(answer: Any, logits: np.ndarray) -> np.ndarray:
        raise error

    wanted = ask(session).result().tokens
    beside = ask(session)
    with pytest.raises(IaptError, match="failed"):
        ask(session, logits_hook=hook).result()
    assert beside.result().tokens == ask(session).result().tokens == wanted
    assert session.state().status == "serving"


def test_a_hook_sees_what_was_said_and_decides(session: Session) -> None:
    seen: list[list[int]] = []

    def hook(answer: Any, logits: np.ndarray) -> np.ndarray:
        seen.append(list(answer))
        logits[50 + len(answer)] = 1e9
        return logits

    assert ask(session, logits_hook=hook).result().tokens == list(range(50, 62))
    assert seen == [list(range(50, 50 + size)) for size in range(12)]
    with pytest.raises(IaptError, match=r"its hook on logits gave float32 \[3\]; expected float32 \[320\]"):
        ask(session, logits_hook=lambda answer, logits: logits[:3]).result()
    with pytest.raises(IaptError, match="no token is left"):
        ask(session, logits_hook=lambda answer, logits: np.full_like(logits, -np.inf)).result()
    assert len(ask(session).result().tokens) == 12, "others go on"


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        (Grammar(choice=["positive", 'né"gative\n']), lambda text: text in ("positive", 'né"gative\n')),
        (Grammar(regex="[0-9]{3}-(yes|no)"), lambda text: text[:3].isdigit() and text[3:] in ("-yes", "-no")),
        (
            Grammar(
                json_schema={
                    "type": "object",
                    "properties": {"label": {"enum": ["a", "b"]}, "sure": {"type": "boolean"}},
                    "required": ["label", "sure"],
                    "additionalProperties": False,
                }
            ),
            lambda text: set(json.loads(text)) == {"label", "sure"},
        ),
    ],
    ids=["choice", "regex", "schema"],
)
def test_an_answer_has_its_form(session: Session, grammar: Grammar, fits: Any) -> None:
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    hot = Sampling(temperature=5.0, seed=4)
    rows = [Request(t, tokens=PROMPT, max_new_tokens=80, grammar=grammar, sampling=hot) for t in ("", *TENANTS)]
    free = Request("alpha", tokens=PROMPT, max_new_tokens=20, ignore_eos=True)
    *formed, beside = session.generate([*rows, free])
    for answer in formed:
        assert answer.finish_reason in ("eos", "stop") and fits(answer.text), answer
    assert beside.tokens == next(iter(session.generate([free]))).tokens


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"min_tokens": 13}, "min_tokens", "min_tokens is 13, expected 0 to max_new_tokens"),
        ({"logprobs": -1}, "logprobs", "logprobs is -1, expected None, or 0 to 100"),
        ({"deadline_s": 0}, "deadline_s", "deadline_s is 0, expected more than 0 seconds"),
        ({"priority": "high"}, "priority", "priority is 'high', expected a whole number"),
        ({"grammar": "json"}, "grammar", "grammar is str, expected a Grammar"),
        ({"logits_hook": 3}, "logits_hook", "logits_hook is int, expected a function"),
        ({"sampling": Sampling(logit_bias={320: 1.0})}, "logit_bias", "token id 320 is out of range"),
        ({"max_new_tokens": 1000}, "max_new_tokens", "needs 1003 cache entries"),
        ({"tokens": (5,) * 97}, "tokens", "the prompt has 97 tokens"),
    ],
)
def test_a_refusal_names_the_field(session: Session, fields: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(IaptError) as caught:
        ask(session, **fields)
    assert caught.value.field == field and text in str(caught.value)
    assert "--" not in caught.value.what, "a server's clients have no command line"


def nested(kind: type, depth: int = 100_000) -> Any:
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


STRANGE = {
    "nan": math.nan,
    "infinite": math.inf,
    "huge": 10**5000,
    "negative": -1,
    "lists in lists": nested(list),
    "objects in objects": nested(dict),
    "object": object(),
    "bytes": b"x",
    "set": {1},
    "half a character": "\ud800",
    "list": [],
}


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(Request)])
def test_whatever_stands_in_a_field_is_answered_or_refused_in_words(session: Session, name: str) -> None:
    refused = []
    for value in STRANGE.values():
        fields = {"tenant": "alpha", "tokens": PROMPT, "max_new_tokens": 2, name: value}
        if name in ("prompt", "messages", "system"):
            del fields["tokens"]
        try:
            list(session.generate([Request(**fields)]))
        except IaptError as error:
            refused.append(str(error))
    assert all(len(text) < 600 for text in refused)
    assert refused or name == "ignore_eos"
    assert ask(session).result().tokens, "it goes on for others"


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(Sampling)])
def test_whatever_stands_in_a_field_of_sampling_is_taken_or_refused_in_words(session: Session, name: str) -> None:
    refused = []
    for kind, value in STRANGE.items():
        try:
            sampling = Sampling(**{"temperature": 0.5, name: value})
        except IaptError as error:
            refused.append(error)
        else:
            assert len(ask(session, sampling=sampling).result().tokens) == 12, kind
    assert len(refused) > 5 and all(error.field == name and len(str(error)) < 600 for error in refused)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "expected one of json_object, json_schema, regex, choice, found none"),
        ({"regex": "a", "choice": ["b"]}, "found regex and choice"),
        ({"choice": "yes"}, "choice is 'yes', expected texts in a list"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is no JSON"),
        ({"regex": "a" * 70_000}, "characters; expected at most 65536"),
    ],
)
def test_grammars_that_are_none(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(IaptError, match="the answer's grammar: ") as caught:
        Grammar(**fields)
    assert text in str(caught.value) and caught.value.field == "grammar"


@pytest.mark.parametrize("grammar", [Grammar(regex="(?=a)b"), Grammar(json_schema={"type": "frog"})])
def test_a_grammar_that_is_not_supported_is_refused_at_once(session: Session, grammar: Grammar) -> None:
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    with pytest.raises(IaptError, match="the answer's grammar: ") as caught:
        ask(session, grammar=grammar, ignore_eos=False)
    assert "\n" not in str(caught.value)


def test_a_grammar_that_grows_too_large_fails_its_request_alone_and_soon(session: Session) -> None:
    """An answer that was cut there had looked like one that came to its end, and all rows had waited for seconds."""
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a{1000}){1000}$"}}}
    grammar = Grammar(json_schema={**schema, "required": ["a"], "additionalProperties": False})
    start = time.process_time()
    with pytest.raises(IaptError, match="the answer's grammar: lexer error: too many expressions") as caught:
        ask(session, grammar=grammar, ignore_eos=False).result()
    assert time.process_time() - start < 0.5
    assert caught.value.field == "grammar" and caught.value.code == "invalid" and "<" not in str(caught.value)
    assert ask(session).result().finish_reason == "length"


@pytest.mark.parametrize("penalty", [1e-300, 1e-38, 1e39, 1e300])
def test_the_strongest_repetition_penalties_are_finite(session: Session, penalty: float) -> None:
    for temperature in (0.0, 1e-300, 1.0):
        sampling = Sampling(repetition_penalty=penalty, temperature=temperature)
        assert len(ask(session, sampling=sampling).result().tokens) == 12


def test_partial_text_survives_a_deadline_and_a_close(tiny_build: TinyBuild) -> None:
    fields: dict[str, Any] = {"tokens": PROMPT, "max_new_tokens": 150, "ignore_eos": True}
    with Session.open(tiny_build.bundle, verify=False) as session:
        late = session.submit(Request("alpha", deadline_s=0.02, **fields)).result()
        cut = session.submit(Request("beta", **fields))
        first = next(token for token in iter(cut.take, 0) if token is not None)
    assert late.finish_reason in ("deadline", "length") and late.text == session.codec.decode(late.tokens)
    with pytest.raises(IaptError, match="closed before the answer was finished"):
        cut.result()
    assert cut.partial.tokens[0] == first.token and cut.partial.finish_reason in ("error", "length")  # type: ignore[union-attr]
    whole = session.codec.decode(cut.partial.tokens)
    assert cut.partial.text in (whole, whole.rstrip("\ufffd")), "half a character at the cut is left out"


def test_a_draining_session_answers_what_it_took_and_takes_no_more(tiny_build: TinyBuild) -> None:
    session = Session.open(tiny_build.bundle, verify=False)
    session.activate()
    request = Request("alpha", tokens=PROMPT, max_new_tokens=120, ignore_eos=True)
    taken = [session.submit(request) for _ in range(12)]
    closing = threading.Thread(target=session.close, kwargs={"drain": True})
    closing.start()
    while session.state().status == "serving":
        pass
    with pytest.raises(IaptError, match=r"takes no more requests|is not open") as caught:
        session.submit(request)
    assert caught.value.code == "session_closed"
    closing.join(60)
    assert [len(generation.result().tokens) for generation in taken] == [120] * 12
    assert session.state().status == "closed"


def test_tasks_in_line_are_served_in_order_and_may_give_up(tiny_build: TinyBuild) -> None:
    started: dict[int, float] = {}

    async def one(session: Session, number: int) -> None:
        request = Request("alpha", tokens=PROMPT, max_new_tokens=3, ignore_eos=True)
        generation = await session.submit_async(request, number)
        await generation.wait()
        assert generation.times.started is not None
        started[number] = generation.times.started

    async def everyone(session: Session) -> None:
        tasks = [asyncio.create_task(one(session, number)) for number in range(40)]
        await asyncio.sleep(0)
        for task in tasks[30:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    with Session.open(tiny_build.bundle, verify=False, max_waiting=1) as session:
        asyncio.run(everyone(session))
        assert sorted(range(30), key=started.__getitem__) == list(range(30))
        session.close(drain=True, timeout=20)
    assert {tenant.users for tenant in session.stepper.bank.tenants.values()} == {0}


def test_penalties_of_one_row_leave_the_others_alone(session: Session) -> None:
    plain = Request("alpha", tokens=PROMPT, max_new_tokens=12, ignore_eos=True)
    shaped = dataclasses.replace(plain, sampling=Sampling(repetition_penalty=2.0, logit_bias={5: -100.0}))
    alone = next(iter(session.generate([plain]))).tokens
    answers = [answer.tokens for answer in session.generate([plain, shaped, plain])]
    assert answers[0] == answers[2] == alone != answers[1]
