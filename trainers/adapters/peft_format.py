"""Adapter directories of stock PEFT, read and written in its own layout; see `trainers.adapters.peft_forms`.

PEFT records neither a fingerprint of the backbone nor how prompts were fed: shapes are checked against the backbone
that is given, and the prompt format is "plain" where no tokenizer has a chat template and the user says nothing. In a
padded batch PEFT's forward counts padding as positions and ours does not, so the two agree where padding stands on the
right or not at all.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from iapt_export.contract.errors import IaptError
from iapt_export.contract.schema import read_object
from iapt_export.contract.settings import raise_problems
from trainers.adapters.adapter import Adapter, AdapterConfig, read_fields, read_tensors
from trainers.adapters.peft_forms import PREFIX_FORM, PROMPT_FORM, PeftForm, check_tensors
from trainers.adapters.peft_lora import LORA_FORM, REMEDY
from trainers.decoder.backbone import Backbone
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import sizes_of
from trainers.decoder.instruction import resolve_prompt_format
from trainers.methods.configs import method_name

FORMS: dict[str, PeftForm] = {
    "PROMPT_TUNING": PROMPT_FORM,
    "P_TUNING": PROMPT_FORM,
    "MULTITASK_PROMPT_TUNING": PROMPT_FORM,
    "PREFIX_TUNING": PREFIX_FORM,
    "LORA": LORA_FORM,
}
"""PEFT's name of a method to its layout."""
PEFT_METHODS = tuple(FORMS)
"""Methods of stock PEFT whose directories are read, by its names."""


def adapter_from_peft(
    folder: str | Path, backbone: Backbone, prompt_format: str | None = None, task: int | None = None
) -> Adapter:
    """Read an adapter directory that stock PEFT wrote.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        backbone: what it was trained for; PEFT keeps no fingerprint, so only shapes can be checked.
        prompt_format: ``plain``, ``newline`` or ``chat``, how it was fed; PEFT does not say. May be left out where
            the tokenizer has no chat template.
        task: which task of a multitask prompt, from 0.

    Returns:
        The adapter with fp32 tensors.

    Raises:
        IaptError: a file is missing or broken, the method or one of its options is not supported, or the tensors
            do not fit the backbone, ``chat`` where the tokenizer has no chat template, or nothing where it has one.
    """
    folder = Path(folder)
    fields, tensors, sizes = read_fields(folder), read_tensors(folder), sizes_of(backbone.model)
    form = _checked_form(fields, sizes, str(folder))
    if task is not None and fields["peft_type"] != "MULTITASK_PROMPT_TUNING":
        raise IaptError(f"{folder}: task={task} is for PEFT's MULTITASK_PROMPT_TUNING; this is {fields['peft_type']}")
    method, weights = form.read(fields, tensors, backbone.model, str(folder), task)
    config = AdapterConfig(
        base_model_name_or_path=fields.get("base_model_name_or_path") or backbone.name_or_path,
        backbone_fingerprint=backbone.fingerprint,
        **asdict(replace(sizes, linears=form.linears(method, sizes))),
        revision=fields.get("revision"),
        prompt_format=_prompt_format(backbone.tokenizer, prompt_format, folder),
        method=method,
    )
    multitask = fields["peft_type"] == "MULTITASK_PROMPT_TUNING"
    return Adapter(config, weights, folder, from_peft=True, peft_task=(task or 0) if multitask else None)


def _prompt_format(tokenizer: Any, prompt_format: Any, folder: Path) -> Any:
    """What was said; text as it is where there is nothing to choose. A wrong guess would answer worse in silence."""
    if prompt_format is None and (question := format_question(tokenizer, folder)):
        raise IaptError(f"{folder} {question}")
    theirs, ours = _saved_template(folder), getattr(tokenizer, "chat_template", None)
    if prompt_format == "chat" and theirs and ours and theirs.strip() != str(ours).strip():
        logging.getLogger(__name__).warning(
            "%s was saved with another chat template than the backbone's, which is used; answers may be worse", folder
        )
    return resolve_prompt_format(tokenizer, prompt_format or "plain", continues=True)


def format_question(tokenizer: Any, folder: Path) -> str:
    """What has to be said of how prompts were fed to an adapter of stock PEFT; empty where there is nothing to choose.

    Args:
        tokenizer: the backbone's.
        folder: the adapter's.
    """
    if getattr(tokenizer, "chat_template", None):
        return (
            "was written by stock PEFT, which does not say how prompts were fed, and the backbone's tokenizer has "
            f"a chat template; give --adapter {folder},format=chat if training used it, or {folder},format=plain if "
            "prompts were text as it is, format=newline with a line break behind (--peft-prompt-format for all)"
        )
    if _saved_template(folder):
        return (
            "was saved with a chat template, which this backbone's tokenizer lacks; save the adapter's tokenizer into "
            f"the backbone's folder, or give --adapter {folder},format=plain if training did not use it"
        )
    return ""


def _saved_template(folder: Path) -> str:
    """The chat template of a tokenizer that was saved beside an adapter, as TRL does; empty where there is none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    settings = folder / "tokenizer_config.json"
    found = read_object(settings, "save the tokenizer again").get("chat_template") if settings.is_file() else None
    return found if isinstance(found, str) else ""


def peft_fields(method: Any, sizes: Sizes) -> dict[str, Any]:
    """What stock PEFT reads from ``adapter_config.json``, besides the fields that every adapter of ours has.

    Args:
        method: configuration of prompt tuning, prefix tuning or LoRA.
        sizes: of the backbone.
    """
    return FORMS[method_name(method)].fields(method, sizes)


def to_peft_tensors(method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Our trained tensors under PEFT's names.

    Args:
        method: configuration of prompt tuning, prefix tuning or LoRA.
        tensors: as `trainers.decoder.method.Method.shapes` lists them.
        sizes: of the backbone.
    """
    return FORMS[method_name(method)].to_peft(method, tensors, sizes)


def from_peft_tensors(
    method: Any, peft_tensors: dict[str, Tensor], sizes: Sizes, source: str = "adapter"
) -> dict[str, Tensor]:
    """The tensors that `to_peft_tensors` wrote, back under our names and in fp32.

    Args:
        method: configuration of prompt tuning, prefix tuning or LoRA.
        peft_tensors: as `to_peft_tensors` names them.
        sizes: of the backbone.
        source: where they come from, for error texts.

    Raises:
        IaptError: tensors are missing, unknown, of another shape than the backbone asks for, or not finite.
    """
    form = FORMS[method_name(method)]
    check_tensors(form.shapes(method, sizes), peft_tensors, source)
    return form.from_peft(method, peft_tensors, sizes)


def _checked_form(fields: dict[str, Any], sizes: Sizes, source: str) -> PeftForm:
    """The layout of the method that PEFT's ``adapter_config.json`` describes.

    Raises:
        IaptError: another method, an option that is not supported, or sizes that are not the backbone's.
    """
    kind = fields.get("peft_type")
    form = FORMS.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise IaptError(
            f"{source}: PEFT's method {kind!r} is not supported; use one of {', '.join(FORMS)}, or a method "
            f"of this project's own trainer; or {REMEDY}, where PEFT can do that"
        )
    if kind == "PREFIX_TUNING" and sizes.value_dim:
        raise IaptError(
            f"{source}: PEFT's PREFIX_TUNING has keys and values of one width, and this backbone caches latents of "
            f"{sizes.head_dim} and {sizes.value_dim} numbers; train a prefix with iapt-export train"
        )
    problems = [
        f"{name}={value!r} is not supported"
        for name, value in sorted(fields.items())
        if value and name not in form.options
    ]
    others = {name: values for name, values in form.allowed(sizes).items() if fields.get(name) not in values}
    for name, values in others.items():
        allowed = " or ".join(repr(value) for value in values if value is not None)
        problems.append(f"{name} is {fields[name]!r}, expected {allowed}")
    if form.remedy and problems and others.keys() != {"task_type"}:
        problems.append(form.remedy)
    raise_problems(f"{source}: this adapter of PEFT's {kind} cannot be served as it is", problems)
    return form
