"""Text to token ids and back without transformers: ``tokenizer.json`` and the chat template of the bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from engines.serving.chat_template import ChatTemplate
from iapt_export.contract.errors import BundleError, IaptError
from iapt_export.contract.probes import PROBES_FILE, Probes
from iapt_export.contract.prompt_format import before_answer
from iapt_export.contract.schema import read_object

TOKENIZER_FILE = "tokenizer.json"
HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are no character yet decode to."""
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTE_LETTERS = {chr(byte): byte for byte in _PRINTED} | {chr(256 + number): byte for number, byte in enumerate(_OTHERS)}
"""How byte-level vocabularies, since GPT-2's, write each byte."""


class TextCodec:
    """A bundle's tokenizer and chat template; its results equal those of the trainer's tokenizer, or it refuses."""

    def __init__(self, bundle: Path, *, check: bool = True) -> None:
        """Read the tokenizer, and compare it with the bundle's probes.

        Args:
            bundle: the folder with ``tokenizer.json``.
            check: compare with the probes, where the bundle has some.

        Raises:
            BundleError: no tokenizer, no valid template, or a probe whose result is not the recorded one.
        """
        path = bundle / TOKENIZER_FILE
        if not path.is_file():
            raise BundleError(
                f"{bundle} holds no {TOKENIZER_FILE}: its backbone came without a fast tokenizer, so feed token ids"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except BaseException as error:  # the library has no class of its own for it, and its panics are no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise BundleError(f"{path} is no tokenizer that can be read ({error}); build the bundle again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = _settings(bundle / "tokenizer_config.json")
        source = template_source(bundle)
        self._template = None if source is None else ChatTemplate(source, special_tokens(settings))
        self._streams = True
        """Whether tokenizers' stream gives the text that decoding all at once gives; else each step decodes all."""
        if check and (bundle / PROBES_FILE).is_file():
            self.check_probes(Probes.load(bundle))

    def encode(self, prompt: str | Sequence[Mapping[str, str]], prompt_format: str) -> list[int]:
        """Token ids of an instruction.

        Args:
            prompt: the user's text, or for ``chat`` the whole conversation.
            prompt_format: ``chat`` renders the chat template, in which a text is one user message; ``plain`` takes
                the text as it is, ``newline`` with a line break behind it.

        Raises:
            IaptError: the prompt is empty, or the bundle has no chat template.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = messages[-1]["content"]
        if not text.strip():
            raise IaptError("the prompt is empty; expected an instruction of at least one word", field="prompt")
        if prompt_format == "chat":
            ids = self._ids_of(self.render(messages), add_special_tokens=False)
        else:
            ids = self._ids_of(before_answer(text, prompt_format))
        if not ids:
            raise IaptError(f"the prompt {text!r} has no tokens in the bundle's vocabulary", field="prompt")
        return ids

    def _ids_of(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except BaseException as error:  # as above
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise BundleError(f"the bundle's tokenizer failed: {error}; build the bundle again") from error

    def render(self, messages: Sequence[Mapping[str, str]], date: str | None = None) -> str:
        """A conversation as the chat template writes it, up to where the answer begins.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            date: what templates that write the date are told; None tells today's, in local time.

        Raises:
            IaptError: the bundle has no chat template.
            BundleError: the template refuses the conversation.
        """
        if self._template is None:
            raise IaptError("the adapter expects chat prompts, but the bundle's tokenizer has no chat template")
        return self._template.render(messages, date)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; special tokens are left out, unless they are asked for."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)

    def bytes_of(self, token: int) -> bytes | None:
        """What a token adds to a text in UTF-8, also where that is no whole character; None where nothing says it."""
        text = self.decode([token], special=True)
        if HALF_CHARACTER not in text:
            return text.encode()
        piece = self._tokenizer.id_to_token(token) or ""
        if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(match[1])
        if not all(letter in BYTE_LETTERS for letter in piece):
            return None
        found = bytes(BYTE_LETTERS[letter] for letter in piece)
        return found if found.decode(errors="replace") == text else None

    def stream(self) -> TextStream:
        """The text of one answer, token by token."""
        return TextStream(self._tokenizer, self._streams)

    def to_json(self) -> str:
        """The tokenizer as ``tokenizer.json`` holds it."""
        return str(self._tokenizer.to_str())

    def check_probes(self, probes: Probes) -> None:
        """Compare with what transformers made of texts, conversations and ids when the bundle was built.

        Raises:
            BundleError: the first that differs, with what was expected and what came.
        """
        for text in probes.texts:
            _compare(f"the ids of {text.text!r}", text.ids, self._ids_of(text.text))
        for chat in probes.chats:
            what = f"the conversation {json.dumps(chat.messages, ensure_ascii=False)}"
            try:
                rendered = self.render(chat.messages, probes.date)
            except BundleError:
                rendered = None
            _compare(f"the text of {what}", chat.text, rendered)
            if rendered is not None:
                _compare(f"the ids of {what}", chat.ids, self._ids_of(rendered, add_special_tokens=False))
        for answer in probes.answers:
            _compare(f"the text of the ids {answer.ids}", answer.text, self.decode(answer.ids))
            stream = self.stream()
            streamed = "".join(stream.add(answer.ids[: size + 1]) for size in range(len(answer.ids)))
            self._streams = self._streams and answer.text.startswith(streamed)


class TextStream:
    """The text that each token adds to an answer; what may be half a character waits for the next."""

    def __init__(self, tokenizer: Tokenizer, streams: bool) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True) if streams else None
        self._length = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The text that the last of all the answer's tokens adds."""
        if self._stream is not None:
            try:
                added = self._stream.step(self._tokenizer, tokens[-1]) or ""
            except Exception:  # tokenizers raises plain Exception where a text does not begin with the one before
                self._stream = None
            else:
                self._length += len(added)
                return added
        added = self._tokenizer.decode(list(tokens), skip_special_tokens=True).rstrip(HALF_CHARACTER)[self._length :]
        self._length += len(added)
        return added


def template_source(bundle: Path) -> str | None:
    """The bundle's chat template, if it has one."""
    path = bundle / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    source = _settings(bundle / "tokenizer_config.json").get("chat_template")
    return source if isinstance(source, str) else None


def base_format(bundle: Path) -> str:
    """How the backbone alone is asked: ``chat`` where the bundle has a chat template, else ``plain``."""
    return "plain" if template_source(bundle) is None else "chat"


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a template may call ``bos_token``, ``eos_token``, ... and a model's own, as transformers names them.

    Args:
        settings: the content of ``tokenizer_config.json`` as transformers saves it.
    """
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    for named in ("extra_special_tokens", "model_specific_special_tokens"):
        extra = settings.get(named)
        tokens |= extra if isinstance(extra, dict) else {}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _compare(what: str, expected: Any, actual: Any) -> None:
    if expected != actual:
        raise BundleError(
            f"this machine reads the bundle's text in another way than training did: {what} should be {expected!r} "
            f"and is {actual!r}; install the version of tokenizers that the manifest names, or feed token ids"
        )


def _settings(path: Path) -> dict[str, Any]:
    return read_object(path, "build the bundle again") if path.is_file() else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8: {error}; build the bundle again") from error
