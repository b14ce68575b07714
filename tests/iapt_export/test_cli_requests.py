"""`iapt-export generate` on conversations and on files of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engines.serving.session import Session
from tests.bundles import TinyBuild, run

PLAIN, CHAT = "alpha", "beta"
DIALOGUE = [
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "a quiet joy"},
    {"role": "user", "content": "yes or no?"},
]


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def answers(build: TinyBuild, *flags: str | Path) -> list[dict[str, Any]]:
    outcome = run("generate", build.bundle, *flags, "--max-new-tokens=6", "--json")
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    return list(json.loads(outcome.out))


def template_tokens(build: TinyBuild, messages: list[dict[str, str]]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(build.model)
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def test_a_file_of_several_tenants_is_answered_in_its_order(tiny_build: TinyBuild, tmp_path: Path) -> None:
    system = {"role": "system", "content": "be kind"}
    lines = [
        {"tenant": CHAT, "tokens": template_tokens(tiny_build, DIALOGUE), "ignore_eos": False},
        {"tenant": PLAIN, "prompt": "the film", "max_new_tokens": 9},
        {"tenant": CHAT, "messages": DIALOGUE},
        {"tenant": "gamma", "prompt": "the film"},
        {"tenant": CHAT, "tokens": template_tokens(tiny_build, [system, *DIALOGUE])},
        {"tenant": CHAT, "messages": DIALOGUE, "system": "be kind"},
        {"tenant": PLAIN, "prompt": "the film", "temperature": 1.5, "top_p": 0.95, "seed": 3, "max_new_tokens": 12},
    ]
    path = write_lines(tmp_path / "asked.jsonl", *lines[:3], "", *lines[3:])
    flags = ("generate", tiny_build.bundle, f"--requests={path}", "--max-new-tokens=6")
    data, shown = run(*flags, "--json"), run(*flags)
    assert (data.code, shown.code, data.err, shown.err) == (0, 0, "", "")
    rows = [json.loads(line) for line in data.out.splitlines()]
    assert [row["tenant"] for row in rows] == [line["tenant"] for line in lines]
    assert rows[0] == rows[2] and rows[4] == rows[5] and rows[0] != rows[4], "what the template renders"
    ((plain,), (gamma,)) = (answers(tiny_build, f"--tenant={name}", "--prompt=the film") for name in (PLAIN, "gamma"))
    assert rows[3]["tokens"] == gamma["tokens"] and rows[1]["tokens"][:6] == plain["tokens"] != gamma["tokens"]
    sampled = ("--temperature=1.5", "--top-p=0.95", "--seed=3", "--max-new-tokens=12", "--json")
    alone = json.loads(run("generate", tiny_build.bundle, f"--tenant={PLAIN}", "--prompt=the film", *sampled).out)
    assert rows[6]["tokens"] == alone[0]["tokens"]
    texts = [f"--- {n} {row['tenant']}\n{row['text']}\n" for n, row in enumerate(rows, 1)]
    assert shown.out == "".join(texts)


def test_lines_stop_where_they_say(tiny_build: TinyBuild, tmp_path: Path) -> None:
    line = {"tenant": PLAIN, "prompt": "the film"}
    (whole,) = answers(tiny_build, f"--tenant={PLAIN}", "--prompt=the film")
    third = whole["tokens"][2]
    path = write_lines(
        tmp_path / "asked.jsonl", {**line, "stop_token_ids": [third]}, {**line, "stop": [whole["text"][1]]}
    )
    rows = [
        json.loads(text) for text in run("generate", tiny_build.bundle, f"--requests={path}", "--json").out.splitlines()
    ]
    assert rows[0]["tokens"] == whole["tokens"][: whole["tokens"].index(third) + 1]
    assert [row["finish_reason"] for row in rows] == ["stop", "stop"]
    assert rows[1]["text"] == whole["text"][: whole["text"].index(whole["text"][1])]


def test_a_conversation_from_a_file(tiny_build: TinyBuild, tmp_path: Path) -> None:
    path = tmp_path / "said.json"
    path.write_text(json.dumps(DIALOGUE), "utf-8")
    system = {"role": "system", "content": "be kind"}
    tokens = write_lines(
        tmp_path / "asked.jsonl",
        {"tenant": CHAT, "tokens": template_tokens(tiny_build, DIALOGUE)},
        {"tenant": CHAT, "tokens": template_tokens(tiny_build, [system, *DIALOGUE])},
    )
    outcome = run("generate", tiny_build.bundle, f"--requests={tokens}", "--max-new-tokens=6", "--json")
    wanted = [json.loads(line)["tokens"] for line in outcome.out.splitlines()]
    (plain,) = answers(tiny_build, f"--tenant={CHAT}", f"--messages={path}")
    (kind,) = answers(tiny_build, f"--tenant={CHAT}", f"--messages={path}", "--system=be kind")
    assert plain["messages"] == DIALOGUE
    assert [plain["tokens"], kind["tokens"]] == wanted
    shown = run("generate", tiny_build.bundle, f"--tenant={CHAT}", f"--messages={path}", "--max-new-tokens=6")
    assert shown.out == plain["text"] + "\n"
    both = answers(tiny_build, f"--tenant={CHAT}", "--prompt=the film", "--system=be kind")
    (said,) = answers(tiny_build, f"--tenant={CHAT}", "--prompt=the film")
    assert both[0]["tokens"] != said["tokens"], "the system prompt is read"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "line 2: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[1]", 'line 2: expected {"tenant": "reviews", "prompt": "A fine film."} or the like, found [1]'),
        ({"prompt": "x"}, "line 2: field tenant is missing"),
        ({"tenant": 3, "prompt": "x"}, "line 2: field tenant: expected a tenant's name, found 3"),
        ({"tenant": PLAIN}, "line 2: expected one of the fields prompt, messages, tokens, found none"),
        ({"tenant": PLAIN, "prompt": "x", "tokens": [1]}, "messages, tokens, found prompt and tokens"),
        ({"tenant": PLAIN, "promt": "x"}, "line 2: expected one of the fields prompt"),
        ({"tenant": PLAIN, "prompt": "x", "top_k": 3}, "line 2: field top_k is not known; expected tenant, prompt, "),
        ({"tenant": PLAIN, "tokens": [1, True]}, "field tokens: expected a list of token ids, found [1, true]"),
        ({"tenant": PLAIN, "tokens": [1, 4000]}, "line 2: token id 4000 is out of range"),
        ({"tenant": PLAIN, "prompt": "x", "temperature": "hot"}, 'temperature: expected a number, found "hot"'),
        ({"tenant": PLAIN, "prompt": "x", "temperature": -1}, "line 2: temperature -1 is negative"),
        ({"tenant": PLAIN, "prompt": "x", "top_p": 2}, "line 2: top_p 2 is out of range"),
        ({"tenant": PLAIN, "prompt": "x", "seed": 1.5}, "line 2: field seed: expected a whole number, found 1.5"),
        ({"tenant": PLAIN, "prompt": "x", "max_new_tokens": 0}, "expected a whole number of at least 1, found 0"),
        ({"tenant": PLAIN, "prompt": "x", "stop": "END"}, 'field stop: expected a list of texts, found "END"'),
        ({"tenant": PLAIN, "prompt": "x", "stop": [""]}, "line 2: a stop text is empty"),
        ({"tenant": PLAIN, "prompt": ""}, "line 2"),
        ({"tenant": PLAIN, "prompt": "x", "system": "be kind"}, "line 2: tenant alpha was trained on plain text"),
        ({"tenant": CHAT, "messages": [{"role": "tool", "content": "x"}]}, "line 2: message 0 has role 'tool'"),
        ({"tenant": "nobody", "prompt": "x"}, "line 2: tenant 'nobody' is not in this bundle; its tenants are alpha"),
        ('{"tenant": "alpha", "prompt": "x", "prompt": "y"}', "line 2: the name 'prompt' is given twice"),
        ({"tenant": PLAIN, "prompt": "x", "max_new_tokens": 4000}, "line 2 needs 40"),
    ],
)
def test_a_bad_line_is_refused_before_anything_runs(
    tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Any, text: str
) -> None:
    def never(_: Session) -> None:
        raise AssertionError("the graphs were loaded")

    monkeypatch.setattr(Session, "activate", never)
    path = write_lines(tmp_path / "asked.jsonl", {"tenant": PLAIN, "prompt": "the film"}, line)
    outcome = run("generate", tiny_build.bundle, f"--requests={path}")
    assert (outcome.code, outcome.out) == (1, "")
    assert f"{path}: 1 request(s) cannot be answered, so none was:\n  line 2" in outcome.err
    assert text in outcome.err


def test_files_that_hold_no_requests(tiny_build: TinyBuild, tmp_path: Path) -> None:
    empty, other, bad = tmp_path / "empty", tmp_path / "other", tmp_path / "bad"
    empty.write_text("\n\n", "utf-8")
    other.write_bytes(b"\xff\xfe{}")
    bad.write_text('{"role": "user"}', "utf-8")
    many = write_lines(tmp_path / "many", *["{"] * 12)
    for flags, text in (
        ([f"--requests={empty}"], "empty holds no request; expected one JSON object a line"),
        ([f"--requests={tmp_path / 'none'}"], "none is no file; expected one JSON object a line"),
        ([f"--requests={other}"], "other is not UTF-8 text"),
        ([f"--requests={many}"], "\n  and 2 more"),
        (["--tenant=beta", f"--messages={bad}"], 'expected a list of {role, content}, found {"role": "user"}'),
        (["--tenant=beta", f"--messages={empty}"], "empty is not JSON"),
        (["--tenant=nobody", "--prompt=x"], "tenant 'nobody' is not in this bundle"),
        (["--prompt=x"], "--tenant is missing: whose adapter answers; this bundle has alpha, beta, gamma"),
    ):
        outcome = run("generate", tiny_build.bundle, *flags)
        assert (outcome.code, outcome.out) == (1, "") and text in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "expected one of --prompt, --messages, --requests, found none of them"),
        (["--tenant=a", "--prompt=x", "--messages=x"], "found --prompt and --messages"),
        (["--requests=x", "--tenant=a"], "--tenant is for --prompt and --messages"),
        (["--requests=x", "--system=a"], "--system is for --prompt and --messages"),
    ],
)
def test_one_source_of_instructions(flags: list[str], text: str) -> None:
    outcome = run("generate", "bundle", *flags)
    assert (outcome.code, outcome.out) == (2, "") and text in outcome.err
    assert outcome.err.endswith(" (see iapt-export generate --help)\n")
