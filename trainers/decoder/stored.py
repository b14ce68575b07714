"""A backbone in another type than its checkpoint's, whose weights stay in the files until one is read.

The checkpoint is mapped in its own type, which takes no memory of its own. Beside it stands the same model in the type
that is wanted, with weights that have a shape and no values: it can be traced and described, and computing with it
raises an error. `stored_weight` reads a weight, in the type of the model that it is asked of. Weights in FP8 have no
type to compute in, and are mapped as they are, with their scales.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from iapt_export.contract.errors import IaptError
from iapt_export.contract.types import TENSOR_TYPES
from trainers.decoder.backbone import Backbone, load_backbone, load_unread
from trainers.decoder.checkpoint import read_checkpoint, read_warnings

STORED = "stored_weights"
"""Attribute of an outline: name to the mapped tensor of the checkpoint, or what reads it."""
WEIGHTS_SHA256 = "weights_sha256"
"""Attribute of an outline: what `weights_sha256` found."""
TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def stored_type(name_or_path: str) -> str | None:
    """The one type of all floating-point weights of a checkpoint in a local folder.

    Returns:
        ``fp32``, ``fp16`` or ``bf16``; None for anything else, which is loaded as a whole.
    """
    folder = Path(name_or_path)
    if not (folder / "config.json").is_file():
        return None
    floats = {place.dtype for place in read_checkpoint(folder).values() if "F" in place.dtype}
    return TYPES.get(floats.pop()) if len(floats) == 1 else None


def load_mapped(name_or_path: str, **options: Any) -> Backbone | None:
    """A backbone in the type of its checkpoint, mapped from its files.

    Args:
        name_or_path: as `trainers.decoder.backbone.load_backbone` takes it.
        options: of `load_backbone`.

    Returns:
        None where the checkpoint has several types, or is no local folder of safetensors. One in FP8 is on the meta
        device: all of it is in what `outline_of` makes of it.
    """
    dtype = stored_type(name_or_path)
    if dtype is not None:
        return load_backbone(name_or_path, dtype=dtype, asks_generate=False, **options)
    return _load_fp8(name_or_path, **options) if (Path(name_or_path) / "config.json").is_file() else None


def _load_fp8(folder: str, **options: Any) -> Backbone | None:
    """`load_mapped` of a checkpoint in FP8; None for others, and where its tensors are not the model's one by one."""
    found = load_unread(folder, **options)
    if found is None:
        return None
    backbone, weights = found
    state = backbone.model.state_dict(keep_vars=True)
    fitting = {
        id(tensor): weights[name]  # tied ones have one
        for name, tensor in state.items()
        if name in weights and tuple(weights[name].get_shape()) == tuple(tensor.shape)
    }
    if len(fitting) != len(weights) or any(id(tensor) not in fitting for tensor in state.values()):
        return None
    vars(backbone.model)[STORED] = {name: fitting[id(tensor)] for name, tensor in state.items()}
    return backbone


def outline_of(stored: Backbone, dtype: str) -> Backbone | None:
    """The backbone in another type, its weights unread; the stored one itself where it has that type.

    Args:
        stored: of `load_mapped`; must stay as it is while the outline is used.
        dtype: ``fp32``, ``fp16`` or ``bf16``.

    Returns:
        None where transformers cannot make the model from its weights' names.
    """
    kind = getattr(torch, TENSOR_TYPES[dtype])
    model = stored.model
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if not is_outline(model) and types == {kind}:
        return stored
    sources = vars(model)[STORED] if is_outline(model) else model.state_dict(keep_vars=True)
    weights = dict(model.named_parameters())  # tied ones once
    # never written and so never in memory, but real: transformers puts them into the model as they are
    empty = {
        name: torch.empty(tensor.shape, dtype=kind if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in weights.items()
    }
    buffers = dict(model.named_buffers())
    kept = {name: source[...] for name, source in sources.items() if name in buffers}
    config = copy.deepcopy(model.config)
    with read_warnings():
        made, info = type(model).from_pretrained(
            None, config=config, state_dict=empty | kept, dtype=kind, output_loading_info=True
        )
    if any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    made.generation_config = model.generation_config
    made.config._name_or_path = model.config._name_or_path
    made.requires_grad_(False).eval()
    _forget_values(made)
    vars(made)[STORED] = sources
    return dataclasses.replace(stored, model=made)


def _forget_values(model: nn.Module) -> None:
    """Replace parameters by ones that have no values, tied ones by one."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with mode:
                    unread = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), unread)


def stored_weight(model: Any, name: str) -> Tensor:
    """A parameter or buffer of a model, by its name in the state: its own, or read for this call.

    Raises:
        IaptError: an outline's weight has no place in the checkpoint.
    """
    owner, _, own = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), own)
    if not isinstance(tensor, FakeTensor):
        return tensor.detach()
    source = vars(model)[STORED].get(name)
    if source is None:
        raise IaptError(f"the checkpoint has no weight {name}")
    read: Tensor = source[...].detach().to(tensor.dtype)
    return read


def weights_sha256(model: Any) -> str:
    """SHA-256 over the names and bytes of a model's tensors, in the order of their names, read one by one.

    An outline keeps it, because its weights stay as they are, and reading all of them takes long.
    """
    if known := vars(model).get(WEIGHTS_SHA256):
        return str(known)
    digest = hashlib.sha256()
    for name in sorted(model.state_dict()):
        digest.update(name.encode())
        digest.update(stored_weight(model, name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if is_outline(model):
        vars(model)[WEIGHTS_SHA256] = digest.hexdigest()
    return digest.hexdigest()


def is_outline(model: Any) -> bool:
    """Whether a model's weights are read by `stored_weight` alone."""
    return STORED in vars(model)
