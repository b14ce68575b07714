"""C++ reads texts, conversations and ids as Python's session does, or refuses them: never other ids in silence."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from engines.serving.text import TextCodec
from iapt_export.building.probes import CHATS, DATE, TEXTS, make_probes
from iapt_export.contract.errors import BundleError
from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.probes import PROBES_FILE, Probes
from tests.bundles import TinyBuild, rehash, run
from tests.native.built import READER, ROOT, TOKENIZER, needs_runner, needs_tokenizer
from tests.native.test_iapt_run import iapt_run
from tests.native.tokenizers_of import TEMPLATES, TOKENIZERS, byte_level, save

READ = {"gpt2", "smollm2", "llama3", "qwen", "split by gpt2", "gemma"}
READ |= {"strips right", "normalized token", "token of letters"}
"""Tokenizers that C++ must read; others may be refused."""
RENDERED = set(TEMPLATES) - {"length", "slice", "letters", "division", "upper", "replace", "think", "raw"}
"""Templates that C++ must render."""
PIECES = [
    *("don't", "I'LL", "it’s", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x85", "\u00a0", "\u3000"),
    *("12", "1234567", "3.14", "½", "²", "Ⅷ", "٣", "१", "〇", "①", "𝟘", "é", "e\u0301", "\u0301", "ﬁ", "Å"),
    *("日本", "カ", "한국", "नमस्ते", "ไทย", "שלום", "مرحبا", "Привет", "🙂", "👩‍👩‍👧", "\u200b", "\ufeff", "\u0378"),
    *("film", "The", "HTTPServer", "snake_case", "...", "!?", "(", "--", "'", '"', "'s", "_", "joy", "\x07", "\x7f"),
    *("<s>", "</s>", "<|im_start|>", "<pad>", "<tool>", "<0x41>", "▁", "Ġ", "##a", "\ue000", "ſ", "İ", "𐐀", "ࡰ"),
]

pytestmark = [needs_runner, needs_tokenizer]


@pytest.fixture(autouse=True)
def installed_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of the build folder lie elsewhere than the library."""
    monkeypatch.setenv("IAPT_GENAI_LIBRARY", str(TOKENIZER))


def some_texts(count: int) -> list[str]:
    draw = random.Random(1)
    letters = [chr(c) for c in draw.sample(range(0x80, 0x30000), count) if not 0xD800 <= c <= 0xDFFF]
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 9))) for _ in range(count)]
    texts += [f"x {c}{c}  {c}'s 1{c}\n\n{c}" for c in letters]
    return [text for text in (*TEXTS, *texts) if text.strip() and "\0" not in text]


def some_answers(size: int) -> list[list[int]]:
    draw = random.Random(2)
    return [[], *([token] for token in range(20)), *(draw.choices(range(size), k=9) for _ in range(300))]


def read_texts(folder: Path, eos: int, **given: Any) -> dict[str, Any]:
    words = {"eos": [eos], "date": DATE, "texts": [], "chats": [], "answers": [], **given}
    outcome = subprocess.run([READER, folder], input=json.dumps(words), capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)


def compare(folder: Path, tokenizer: Any, texts: list[str], *, must_read: bool) -> None:
    make_probes(tokenizer).save(folder)
    codec, answers = TextCodec(folder), some_answers(len(tokenizer))
    made = read_texts(folder, tokenizer.eos_token_id, texts=texts, answers=answers)
    if "error" in made:
        assert not must_read, made
        assert "read" in made["error"]
        return
    for prompt_format, all_found in (("plain", made["texts"]), ("newline", made["lines"])):
        refused = 0
        for text, found in zip(texts, all_found, strict=True):
            if "error" in found:
                refused += 1
                assert found["error"].startswith("the text cannot be read as training did: ")
            else:
                assert found["ids"] == codec.encode(text, prompt_format), text
        assert refused < 0.75 * len(texts), prompt_format
    assert [found["text"] for found in made["answers"]] == [codec.decode(ids) for ids in answers]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_equal_ids_or_refused(name: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, TOKENIZERS[name]())
    compare(tmp_path, tokenizer, some_texts(1500), must_read=name in READ)


def test_the_real_tokenizer(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(tmp_path)
    compare(tmp_path, tokenizer, some_texts(1500), must_read=True)
    plain = [text for text in TEXTS if text.isascii() and text.isprintable()]
    made = read_texts(tmp_path, tokenizer.eos_token_id, texts=plain, chats=[list(chat) for chat in CHATS])
    assert all("ids" in found for found in (*made["texts"], *made["chats"]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_conversations_or_refused(name: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level(), TEMPLATES[name])
    probes = make_probes(tokenizer)
    probes.save(tmp_path)
    made = read_texts(tmp_path, tokenizer.eos_token_id, chats=[list(chat) for chat in CHATS])
    if "error" in made:
        assert name not in RENDERED, made
        assert "this program reads the bundle's text in another way than training did: the text of the" in made["error"]
        return
    assert name in RENDERED
    for probe, found in zip(probes.chats, made["chats"], strict=True):
        assert found.get("text") == probe.text
        assert "error" in found or found["ids"] == probe.ids or DATE in found["text"]


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_conversation_with_a_zero_byte_is_refused_whole(role: str, tmp_path: Path) -> None:
    """The library's template takes a C string, which would end at that byte, the user's words among what is lost."""
    tokenizer = save(tmp_path, byte_level(), TEMPLATES["chatml"])
    make_probes(tokenizer).save(tmp_path)
    chat = [{"role": each, "content": "yes\0no" if each == role else "yes"} for each in ("system", "user")]
    (found,) = read_texts(tmp_path, tokenizer.eos_token_id, chats=[chat])["chats"]
    assert found["error"].startswith("the text cannot be read as training did: it holds a zero byte")


def test_letters_that_are_their_own_normal_form() -> None:
    """C++ passes no letter on, in the name of normal form C, that NFC changes, reorders or composes with another."""
    source = (ROOT / "engines" / "cpp" / "src" / "utf8.cc").read_text(encoding="utf-8")
    table = source.split("kOwnForm[] = {")[1].split("};")[0]
    blocks = [(int(first, 16), int(last, 16)) for first, last in re.findall(r"\{(0x\w+), (0x\w+)\}", table)]
    assert blocks == sorted(blocks) and len(blocks) > 20
    letters = [chr(code) for code in range(0x110000)]
    pairs = [unicodedata.decomposition(c).split() for c in letters if unicodedata.is_normalized("NFC", c)]
    seconds = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    seconds |= {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # of Hangul, by rule
    for first, last in blocks:
        for c in letters[first : last + 1]:
            assert unicodedata.is_normalized("NFC", c) and not unicodedata.combining(c) and c not in seconds, hex(
                ord(c)
            )


def test_numbers_are_those_that_hugging_face_splits_off() -> None:
    source = (ROOT / "engines" / "cpp" / "src" / "utf8.cc").read_text(encoding="utf-8")
    table = source.split("kNumbers[] = {")[1].split("};")[0]
    blocks = [(int(first, 16), int(last, 16)) for first, last in re.findall(r"\{(0x\w+), (0x\w+)\}", table)]
    numbers = {code for first, last in blocks for code in range(first, last + 1)}
    split = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str
    codes = [code for code in range(0x80, 0x20000) if not 0xD800 <= code < 0xE000]
    assert {code for code in codes if len(split("a" + chr(code))) > 1} == numbers and len(numbers) > 1500


@pytest.mark.parametrize("field", ["texts", "chats", "answers"])
def test_a_probe_that_differs_is_refused(field: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level(), TEMPLATES["chatml"])
    probes = make_probes(tokenizer)
    damaged = [dataclasses.replace(probe, ids=[*probe.ids, 9]) for probe in getattr(probes, field)]
    dataclasses.replace(probes, **{field: damaged}).save(tmp_path)
    made = read_texts(tmp_path, tokenizer.eos_token_id)
    assert "in another way than training did: the " in made["error"] and "give token ids (--tokens)" in made["error"]
    with pytest.raises(BundleError, match="in another way than training did"):
        TextCodec(tmp_path)


def test_probes_that_cannot_be_read(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level())
    assert "holds no probes.json" in read_texts(tmp_path, tokenizer.eos_token_id)["error"]
    make_probes(tokenizer).save(tmp_path)
    content = json.loads((tmp_path / PROBES_FILE).read_text(encoding="utf-8"))
    for change, text in (
        ({"schema_version": 2}, "schema_version is 2, this program reads 1"),
        (
            {"texts": [{"text": 1, "ids": ["x"]}]},
            'texts[0].text is 1, expected str; probes.texts[0].ids[0] is "x"',
        ),
        ({"more": 1}, "probes.more is not a known field"),
    ):
        (tmp_path / PROBES_FILE).write_text(json.dumps(content | change), encoding="utf-8")
        assert text in read_texts(tmp_path, tokenizer.eos_token_id)["error"]


def test_token_ids_are_answered_where_text_is_refused(tiny_bundle: Path) -> None:
    probes = Probes.load(tiny_bundle)
    texts = [dataclasses.replace(probe, ids=[*probe.ids, 9]) for probe in probes.texts]
    dataclasses.replace(probes, texts=texts).save(tiny_bundle)
    rehash(tiny_bundle)
    refused = iapt_run(tiny_bundle, "--tenant=alpha", "--prompt=the film")
    assert refused.returncode == 1 and "in another way than training did" in refused.stderr and refused.stdout == ""
    assert iapt_run(tiny_bundle, "--tenant=alpha", "--tokens=5").returncode == 0


def test_the_system_prompt_of_training_comes_first(tiny_bundle: Path) -> None:
    flags = [tiny_bundle, "--tenant=beta", "--prompt=the film", "--json"]
    without = iapt_run(*flags).stdout
    manifest = BundleManifest.load(tiny_bundle)
    tenants = [dataclasses.replace(tenant, system_prompt="answer yes or no") for tenant in manifest.tenants]
    dataclasses.replace(manifest, tenants=tenants).save(tiny_bundle)
    assert run("generate", *flags).out == iapt_run(*flags).stdout != without


def test_the_tiny_bundle_is_read(tiny_build: TinyBuild) -> None:
    codec = TextCodec(tiny_build.bundle)
    texts = some_texts(200)
    made = read_texts(tiny_build.bundle, 0, texts=texts)
    for text, found in zip(texts, made["texts"], strict=True):
        assert "error" in found or found["ids"] == codec.encode(text, "plain")
