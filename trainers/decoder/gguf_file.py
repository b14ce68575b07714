"""Open a GGUF file: its fields as Python values, and its tensors dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from iapt_export.contract.errors import IaptError
from trainers.decoder.gguf_header import read_header

NO_MEANING = ("tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual")
"""Fields that llama.cpp does not compute with: notes of the converter. Residuals of StableLM go by its tensors."""

NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.sliding_window": 0}
"""Fields that may be there with this value alone, which leaves the decoder as it is."""


class GgufFile:
    """One opened file; tensors stay on disk until they are asked for.

    Raises:
        IaptError: the file is not GGUF, is cut short, or is one part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fields, self.tensors = read_header(path)
        except ValueError as error:
            raise IaptError(f"{path} is not a whole GGUF file ({error}); download or convert it again") from error
        if self.fields.get("split.count", 1) > 1:
            raise IaptError(
                f"{path} is one of {self.fields['split.count']} parts; join them with llama.cpp's "
                "llama-gguf-split --merge and give the whole file"
            )
        if "general.architecture" not in self.fields:
            raise IaptError(f"{path} has no field general.architecture; expected a decoder's weights")
        self.architecture: str = self.fields["general.architecture"]

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as fp32, rows first.

        Raises:
            IaptError: it is stored in a format that gguf-py does not dequantise.
        """
        from gguf.quants import dequantize

        stored = self.tensors[name]
        try:
            return np.asarray(dequantize(stored.data, stored.kind), np.float32)
        except NotImplementedError as error:
            raise IaptError(
                f"{self.path} stores {name} as {stored.kind.name}, which the package gguf does not read; "
                "give a file of another quantisation, for example Q8_0"
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first."""
        return self.tensors[name].shape


class Fields:
    """The fields of one file's architecture, each taken once; what nobody took is refused."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        prefix = f"{file.architecture}."
        self._left = {name.removeprefix(prefix): v for name, v in file.fields.items() if name.startswith(prefix)}

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field, or the default where the file has none.

        Raises:
            IaptError: the field holds a list whose items differ, one a layer.
        """
        value = self._left.pop(name, default)
        if isinstance(value, list) and value and name != "attention.sliding_window_pattern":
            if any(item != value[0] for item in value):
                raise self.refusal(name, f"differs from layer to layer ({value[:8]}…)")
            return value[0]
        return value

    def need(self, name: str) -> Any:
        """The value of a field that must be there."""
        value = self.take(name)
        if value is None:
            raise IaptError(
                f"{self.file.path} lacks the field {self.file.architecture}.{name}; "
                "the file is not whole, download or convert it again"
            )
        return value

    def refuse_rest(self) -> None:
        """Refuse fields that nobody took and that may change the answer.

        Raises:
            IaptError: naming the first such field and its value.
        """
        for name, value in self._left.items():
            if name not in NO_MEANING and (name not in NEUTRAL or NEUTRAL[name] != value):
                raise self.refusal(name, f"is {value!r}, which transformers' configuration cannot hold here")

    def refusal(self, name: str, problem: str) -> IaptError:
        """The error that names a field which no configuration holds."""
        return IaptError(
            f"{self.file.path}: the field {self.file.architecture}.{name} {problem}; without it the model would "
            "answer differently. Give the model's Hugging Face folder instead of the GGUF file"
        )
