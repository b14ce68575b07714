"""Text to ids and back without transformers: the same ids as with it, whatever the text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from engines.serving.text import TextCodec
from iapt_export.building.probes import make_probes
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.probes import Probes
from iapt_export.contract.prompt_format import PROMPT_FORMATS
from tests.tiny import tiny_tokenizer
from trainers.decoder.instruction import format_instruction

TEXTS = (
    "the film is a quiet joy",
    " leading and trailing  ",
    "two\n\nlines\tand a tab",
    "naïve café, 日本語, 🙂👩‍👩‍👧, \u200bzero width",
    "<|im_start|>user\nignore the template<|im_end|>",
    "{{ messages }} {% if x %}",
    "a" * 300,
    "\x00 control \x07",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "bundle"))


def trainers_ids(tokenizer: Any, text: str, prompt_format: str) -> list[int]:
    return format_instruction(tokenizer, [{"role": "user", "content": text}], prompt_format)


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_the_trainers(folder: Path, text: str, prompt_format: str) -> None:
    ids = TextCodec(folder).encode(text, prompt_format)
    assert ids == trainers_ids(AutoTokenizer.from_pretrained(folder), text, prompt_format)
    assert ids


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=60).filter(str.strip))
def test_ids_equal_the_trainers_for_any_text(text: str) -> None:
    codec, tokenizer = _pair()
    for prompt_format in PROMPT_FORMATS:
        assert codec.encode(text, prompt_format) == trainers_ids(tokenizer, text, prompt_format)
    assert codec.decode(codec.encode(text, "plain")) == tokenizer.decode(
        tokenizer(text)["input_ids"], skip_special_tokens=True
    )


def _pair(made: list[Any] = []) -> list[Any]:  # noqa: B006  (one pair serves all examples)
    if not made:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            tiny_tokenizer().save_pretrained(folder)
            made += [TextCodec(Path(folder)), AutoTokenizer.from_pretrained(folder)]
    return made


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
def test_ids_equal_the_trainers_for_a_real_tokenizer(smollm2: Path, prompt_format: str) -> None:
    codec, tokenizer = TextCodec(smollm2), AutoTokenizer.from_pretrained(smollm2)
    for text in TEXTS:
        ids = codec.encode(text, prompt_format)
        assert ids == trainers_ids(tokenizer, text, prompt_format)
        assert codec.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_left_out_of_answers(folder: Path) -> None:
    codec = TextCodec(folder)
    ids = codec.encode("the film", "plain")
    assert codec.decode([0, *ids, 1]) == "the film"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
        "{% if tools is not none %}tools{% endif %}{% if documents is defined %}{{ messages[0].content }}{% endif %}",
        "{{ messages | tojson }}{{ messages | tojson(ensure_ascii=true, indent=2) }}",
        "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}{{ unk_token }}",
        "  {% set x = 1 %}\n  {% if add_generation_prompt %}\n    é<b>\n  {% endif %}\n",
        "{% for m in messages %}\n  {% generation %}\n<{{ m.content }}>\n  {% endgeneration %}\n{% endfor %}",
        "{{ sep_token }}|{{ cls_token }}|{{ mask_token }}|{{ image_token }}|{{ absent_token }}",
        "{{ dict(a=1) | tojson(separators=(',', ':')) }}{{ strftime_now('%Y') }}",
        "{% set x = namespace(n=0) %}{% for c in messages[0].content %}{% set x.n = x.n + 1 %}{% endfor %}{{ x.n }}",
    ],
    ids=[
        "loop controls",
        "tools",
        "tojson",
        "special tokens",
        "white space",
        "generation",
        "all special tokens",
        "functions",
        "namespace",
    ],
)
def test_templates_are_rendered_as_transformers_renders_them(damaged: Path, template: str) -> None:
    (damaged / "chat_template.jinja").write_text(template, encoding="utf-8")
    extra = {"sep_token": "<s>", "cls_token": "<c>", "mask_token": "<m>", "image_token": "<i>"}
    AutoTokenizer.from_pretrained(damaged, **extra).save_pretrained(damaged)
    tokenizer = AutoTokenizer.from_pretrained(damaged)
    for text in ("plain words", 'quotes " and <tags> & ünï'):
        assert TextCodec(damaged).encode(text, "chat") == trainers_ids(tokenizer, text, "chat")


def test_probes_hold_a_bundles_text_to_what_it_was(damaged: Path) -> None:
    probes = make_probes(AutoTokenizer.from_pretrained(damaged))
    probes.save(damaged)
    assert Probes.load(damaged) == probes
    TextCodec(damaged)
    template = damaged / "chat_template.jinja"
    source = template.read_text(encoding="utf-8")
    template.write_text(source.replace("You help.", "You hinder."), encoding="utf-8")
    with pytest.raises(BundleError, match=r"reads the bundle's text in another way .* 'You hinder|You hinder\."):
        TextCodec(damaged)
    template.write_text(source, encoding="utf-8")
    path = damaged / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fields, "normalizer": {"type": "Lowercase"}}), encoding="utf-8")
    with pytest.raises(BundleError, match="the ids of 'The film is a quiet joy"):
        TextCodec(damaged)
    path.write_text(json.dumps({**fields, "decoder": {"type": "Fuse"}}), encoding="utf-8")
    with pytest.raises(BundleError, match="the text of the ids"):
        TextCodec(damaged)


def test_probes_record_what_a_template_refuses(damaged: Path) -> None:
    (damaged / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ strftime_now('%d') }}hello"
    )
    probes = make_probes(AutoTokenizer.from_pretrained(damaged))
    refused = [chat.messages[0]["role"] == "system" for chat in probes.chats]
    assert [chat.text is None for chat in probes.chats] == refused
    assert any(refused)
    assert {chat.text for chat in probes.chats} == {None, "05 Jan 2026hello"}
    probes.save(damaged)
    TextCodec(damaged)
    (damaged / "chat_template.jinja").write_text("{{ strftime_now('%d') }}hello")
    with pytest.raises(BundleError, match="should be None and is '05 Jan 2026hello'"):
        TextCodec(damaged)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema_version": 9}, "schema_version is 9, this version of iapt-export reads 1; upgrade"),
        ({"texts": 3}, "probes.texts is 3, expected list"),
        ({"texts": [{"text": "a"}]}, r"probes.texts\[0\].ids is missing"),
    ],
)
def test_damaged_probes(damaged: Path, change: dict[str, Any], text: str) -> None:
    make_probes(AutoTokenizer.from_pretrained(damaged)).save(damaged)
    path = damaged / "probes.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(BundleError, match=text):
        TextCodec(damaged)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(BundleError, match="cannot be read"):
        TextCodec(damaged)


def test_a_template_in_the_tokenizers_settings_serves_too(damaged: Path) -> None:
    (damaged / "chat_template.jinja").unlink()
    path = damaged / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "chat_template": "user: {{ messages[0]['content'] }}"}), encoding="utf-8")
    codec = TextCodec(damaged)
    assert codec.encode("yes", "chat") == codec.encode("user: yes", "plain")


def test_a_template_cannot_reach_out_of_its_sandbox(damaged: Path) -> None:
    (damaged / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}", encoding="utf-8")
    with pytest.raises(BundleError, match="the bundle's chat template failed: access to attribute '__class__'"):
        TextCodec(damaged).encode("yes", "chat")


def test_a_template_may_refuse(damaged: Path) -> None:
    (damaged / "chat_template.jinja").write_text("{{ raise_exception('only system messages') }}", encoding="utf-8")
    with pytest.raises(BundleError, match="the bundle's chat template failed: only system messages"):
        TextCodec(damaged).encode("yes", "chat")


def test_a_broken_template(damaged: Path) -> None:
    (damaged / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    with pytest.raises(BundleError, match="the bundle's chat template is not valid: "):
        TextCodec(damaged)


def test_no_template_and_no_tokenizer(damaged: Path) -> None:
    (damaged / "chat_template.jinja").unlink()
    codec = TextCodec(damaged)
    assert codec.encode("yes", "plain")
    with pytest.raises(
        IaptError, match="the adapter expects chat prompts, but the bundle's tokenizer has no chat temp"
    ):
        codec.encode("yes", "chat")
    (damaged / "tokenizer.json").unlink()
    with pytest.raises(
        BundleError, match=r"holds no tokenizer\.json: its backbone came without a fast tokenizer, so f"
    ):
        TextCodec(damaged)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
def test_empty_prompts(folder: Path, prompt: str, prompt_format: str) -> None:
    with pytest.raises(IaptError, match="the prompt is empty; expected an instruction of at least one word"):
        TextCodec(folder).encode(prompt, prompt_format)


def test_a_prompt_of_unknown_words_only(tmp_path: Path) -> None:
    Tokenizer(models.BPE(vocab={"y": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    assert TextCodec(tmp_path).encode("y", "plain") == [0]
    with pytest.raises(IaptError, match="the prompt 'nein' has no tokens in the bundle's vocabulary"):
        TextCodec(tmp_path).encode("nein", "plain")


def test_padding_and_truncation_of_the_file_are_ignored(damaged: Path) -> None:
    tokenizer = Tokenizer.from_file(str(damaged / "tokenizer.json"))
    wanted = TextCodec(damaged).encode("the film is a quiet joy", "plain")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(damaged / "tokenizer.json"))
    assert TextCodec(damaged).encode("the film is a quiet joy", "plain") == wanted


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is no tokenizer that can be read ("),
        ("tokenizer.json", b"\xff", "tokenizer.json is no tokenizer that can be read ("),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON: "),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not JSON: "),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list; expected a JSON object"),
        ("tokenizer_config.json", b"[" * 100_000, "it is nested deeper than 64 levels"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8: "),
    ],
)
def test_broken_files_are_refused_in_words(damaged: Path, name: str, data: bytes, text: str) -> None:
    (damaged / name).write_bytes(data)
    with pytest.raises(BundleError) as caught:
        TextCodec(damaged)
    assert text in str(caught.value)
