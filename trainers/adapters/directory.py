"""The adapter directory, PEFT's convention: ``adapter_config.json`` and ``adapter_model.safetensors``.

Methods that stock PEFT has are written so that stock PEFT loads them too, see `trainers.adapters.peft_format`; of the
others only the layout is PEFT's.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors.torch
from torch import Tensor

from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import write_atomically
from iapt_export.contract.settings import raise_problems
from trainers.adapters.adapter import (
    CONFIG_FILE,
    METHOD_FIELD,
    PEFT_TYPES,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    backbone_problems,
    doubt_of_weights,
    is_stock_peft,
    read_adapter_config,
    read_fields,
    read_tensors,
    tensor_problems,
)
from trainers.adapters.peft_format import adapter_from_peft, from_peft_tensors, peft_fields, to_peft_tensors
from trainers.decoder.backbone import Backbone
from trainers.methods.forms import ADAPTER_METHODS


def save_adapter(folder: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Write an adapter directory; each file appears whole or not at all.

    Args:
        folder: made if missing.
        config: written as ``adapter_config.json``.
        tensors: the trained tensors, stored as fp32.
    """
    fields = dataclasses.asdict(config)
    method = fields.pop("method")
    for name in ("quantise", "backbone_weights_sha256"):
        if not fields[name]:  # so that versions without this field read it
            del fields[name]
    if config.peft_type in PEFT_TYPES:
        fields = {**peft_fields(config.method, config.sizes), **fields, METHOD_FIELD: method}
        tensors = to_peft_tensors(config.method, tensors, config.sizes)
    else:
        fields.update(method)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().float().contiguous().cpu() for name, tensor in tensors.items()}
    # not safetensors' save_file, which gives files that only their owner may read, whatever the umask
    write_atomically(folder / WEIGHTS_FILE, safetensors.torch.save(stored))
    # not sort_keys: the order of the linear layers is that of the method's tensors
    text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())


def load_adapter(
    folder: str | Path,
    backbone: Backbone | None = None,
    *,
    peft_prompt_format: str | None = None,
    peft_task: int | None = None,
) -> Adapter:
    """Read and check an adapter directory, ours or stock PEFT's.

    Args:
        folder: the directory.
        backbone: what the adapter is for; needed for a directory that stock PEFT wrote.
        peft_prompt_format: how prompts are fed to an adapter of stock PEFT: ``plain``, ``newline`` or ``chat``; ours
            say it themselves. Needed where the tokenizer has a chat template.
        peft_task: which task of stock PEFT's multitask prompt, from 0.

    Raises:
        IaptError: a file is missing, truncated, not safetensors, of an unknown method or schema, has
            tensors of other names, shapes or types than its configuration says, or holds NaN or infinity.
    """
    folder = Path(folder)
    path = folder / WEIGHTS_FILE
    if backbone is not None and is_stock_peft(read_fields(folder)):
        adapter = adapter_from_peft(folder, backbone, peft_prompt_format, peft_task)
    else:
        config = read_adapter_config(folder)
        tensors = read_tensors(folder)
        if config.peft_type in PEFT_TYPES:
            tensors = from_peft_tensors(config.method, tensors, config.sizes, str(path))
        adapter = Adapter(config, tensors, folder)
    shapes = ADAPTER_METHODS[adapter.config.peft_type].shapes(adapter.config.method, adapter.config.sizes)
    raise_problems(f"{path}", tensor_problems(shapes, adapter.tensors))
    adapter.tensors = {name: tensor.float() for name, tensor in adapter.tensors.items()}
    return adapter


def check_adapter_fits(adapter: AdapterConfig, backbone: Backbone, source: str) -> None:
    """Refuse an adapter that was trained for another backbone.

    Args:
        adapter: the adapter's configuration.
        backbone: the backbone that it is to run on.
        source: the adapter's path, for the error text.

    Raises:
        IaptError: width, depth or fingerprint differ.
    """
    config = backbone.model.config.get_text_config()
    theirs = (config.hidden_size, config.num_hidden_layers, backbone.fingerprint)
    if problems := backbone_problems(adapter, theirs, "backbone"):
        raise IaptError(
            f"the adapter {source} was trained for {adapter.base_model_name_or_path}, not for "
            f"{backbone.name_or_path}: {'; '.join(problems)}. Give its own backbone with --model"
        )


def doubt_of_backbone(adapter: Adapter, backbone: Backbone, sha256: str = "") -> str:
    """See `doubt_of_weights`."""
    return doubt_of_weights(str(adapter.path), adapter.config, backbone.name_or_path, sha256)
