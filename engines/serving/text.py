"""Text to token ids and back without transformers: ``tokenizer.json`` and the chat template of the bundle."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from iapt_export.contract.errors import BundleError, IaptError

TOKENIZER_FILE = "tokenizer.json"


class TextCodec:
    """A bundle's tokenizer and chat template; the ids equal those that the trainer's tokenizer gives (tested)."""

    def __init__(self, bundle: Path) -> None:
        path = bundle / TOKENIZER_FILE
        if not path.is_file():
            raise BundleError(
                f"{bundle} holds no {TOKENIZER_FILE}: its backbone came without a fast tokenizer, so feed token ids"
            )
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._settings = _read_json(bundle / "tokenizer_config.json")
        self._template = self._load_template(bundle)

    def encode(self, prompt: str, prompt_format: str) -> list[int]:
        """Token ids of an instruction.

        Args:
            prompt: the user's text.
            prompt_format: ``chat`` puts it as one user message into the chat template, ``plain`` takes it as it is.

        Raises:
            IaptError: the prompt is empty, or the bundle has no chat template.
        """
        if not prompt.strip():
            raise IaptError("the prompt is empty; expected an instruction of at least one word")
        if prompt_format == "chat":
            ids = self._tokenizer.encode(self._rendered(prompt), add_special_tokens=False).ids
        else:
            ids = self._tokenizer.encode(prompt).ids
        if not ids:
            raise IaptError(f"the prompt {prompt!r} has no tokens in the bundle's vocabulary")
        return ids

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _rendered(self, prompt: str) -> str:
        """The prompt as one user message in the chat template."""
        if self._template is None:
            raise IaptError("the adapter expects chat prompts, but the bundle's tokenizer has no chat template")
        try:
            return self._template.render(
                messages=[{"role": "user", "content": prompt}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens(),
            )
        except TemplateError as error:
            raise BundleError(f"the bundle's chat template failed: {error}") from error

    def _load_template(self, bundle: Path) -> Template | None:
        path = bundle / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else self._settings.get("chat_template")
        if not isinstance(source, str):
            return None
        # a template is code of the model's author: sandboxed, and with the settings that transformers renders with
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise BundleError(f"the bundle's chat template is not valid: {error}") from error

    def _special_tokens(self) -> dict[str, str]:
        values = {name: self._settings.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in values.items()
            if value is not None
        }


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
