"""Open a GGUF file: its fields as Python values, and its tensors dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from iapt_export.contract.errors import IaptError


class GgufFile:
    """One opened file; tensors stay on disk until they are asked for.

    Raises:
        IaptError: the file is not GGUF, is cut short, or is one part of several.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            reader = GGUFReader(path)
            self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
            self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        except (ValueError, IndexError, KeyError, TypeError) as error:
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
            return np.asarray(dequantize(stored.data, stored.tensor_type), np.float32)
        except NotImplementedError as error:
            raise IaptError(
                f"{self.path} stores {name} as {stored.tensor_type.name}, which the package gguf does not read; "
                "give a file of another quantisation, for example Q8_0"
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first (GGUF itself counts from the other end)."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))
