"""The tensors of a GGUF file under transformers' names and in transformers' order of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from iapt_export.contract.errors import IaptError
from trainers.decoder.gguf_config import family_of
from trainers.decoder.gguf_file import GgufFile
from trainers.decoder.gguf_rope import FACTOR_TENSORS


def gguf_state_dict(file: GgufFile, empty: Any, dtype: Any) -> dict[str, Any]:
    """Dequantise every tensor of the file.

    Args:
        file: an opened GGUF file.
        empty: a transformers model of its configuration (see `gguf_config`), which may have no storage.
        dtype: of torch, in which the weights are returned.

    Returns:
        Parameter name of transformers to a tensor with the parameter's shape.

    Raises:
        IaptError: a tensor of the file has no place in the model, named.
    """
    import torch

    config = empty.config
    places = _places(file, empty)
    consumed = FACTOR_TENSORS.get(file.architecture, ())
    if unused := sorted(name for name in file.tensors if name not in places and name not in consumed):
        raise IaptError(
            f"{file.path} holds tensors that have no place in transformers' {config.model_type}: "
            f"{', '.join(unused[:8])}{f' and {len(unused) - 8} more' if len(unused) > 8 else ''}; the model would "
            "answer differently without them. Give the model's Hugging Face folder instead of the GGUF file"
        )
    state = {}
    for name, place in places.items():
        if name in file.tensors:
            array = _in_their_order(file.tensor(name), name, file.architecture, config)
            state[place] = torch.from_numpy(np.array(array, order="C")).to(dtype)
        elif name.endswith(family_of(file).optional_biases):  # transformers switches the biases of a layer together
            weight = file.shape(name.removesuffix("bias") + "weight")
            state[place] = torch.zeros(weight[0], dtype=dtype)
    return state


def _places(file: GgufFile, empty: Any) -> dict[str, str]:
    """GGUF tensor name to parameter name, for every parameter of the model; the names are gguf-py's table."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = get_tensor_name_map(architecture, empty.config.num_hidden_layers)
    names = {table.get_name(name, try_suffixes=(".weight", ".bias")): name for name in empty.state_dict()}
    names.pop(None, None)  # loading the model reports these as missing
    return names


def _in_their_order(array: np.ndarray, name: str, architecture: str, config: Any) -> np.ndarray:
    """Undo what llama.cpp's converter does to a tensor of this name."""
    if architecture == "llama" and ".attn_q." in name:
        return _pairs_apart(array, config.num_attention_heads)
    if architecture == "llama" and ".attn_k." in name:
        return _pairs_apart(array, config.num_key_value_heads)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return array - np.float32(1)  # transformers adds it at run time
    if architecture == "gpt2" and array.ndim == 2 and name.startswith("blk."):
        return array.T  # Conv1D holds [in, out]
    return array


def _pairs_apart(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from llama.cpp's rotary order for llama, (pair, half), to transformers', (half, pair)."""
    paired = array.reshape(heads, -1, 2, *array.shape[1:])
    return paired.swapaxes(1, 2).reshape(array.shape)
