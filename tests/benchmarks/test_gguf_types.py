"""A GGUF file in another type keeps its metadata, and its matrices to that type's rounding."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.gguf_types import EMBEDDING, convert
from tests.trainers.decoder.gguf_files import TinyFile, write


def read(path: Path) -> tuple[dict[str, object], dict[str, tuple[str, np.ndarray]]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {
        tensor.name: (tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return fields, tensors


# half a step of 1/127 and a step of 1/8 of the largest (eight steps down, seven up), and scales are fp16
@pytest.mark.parametrize(("name", "error"), [("Q8_0", 0.0045), ("Q4_0", 0.13)])
def test_only_matrices_change(name: str, error: float, tmp_path: Path) -> None:
    source = write(tmp_path / "source.gguf", TinyFile("llama", quantised=gguf.GGMLQuantizationType.Q4_1))
    convert(source, name, tmp_path / "made.gguf")
    (fields, tensors), (made_fields, made) = read(source), read(tmp_path / "made.gguf")
    assert {key: value for key, value in made_fields.items() if key != "general.file_type"} == {
        key: value for key, value in fields.items() if key != "general.file_type"
    }
    assert made.keys() == tensors.keys() and EMBEDDING in made
    for key, (kind, values) in tensors.items():
        found_kind, found = made[key]
        if values.ndim == 1:
            assert found_kind == kind and np.array_equal(found, values)
        else:
            assert found_kind == ("Q8_0" if key == EMBEDDING else name)
            assert np.abs(found - values).max() <= error * np.abs(values).max()
