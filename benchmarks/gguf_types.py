"""The same model in another type of llama.cpp's: ``python -m benchmarks.gguf_types MODEL.gguf Q8_0 OUTPUT.gguf``.

Matrices are rounded anew by the package `gguf`; the embedding, which is the head as well, keeps at least 8 bits, as
llama.cpp's own tool has it. A type that is coarser than the file's own is rounded twice, which changes no speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Type

TYPES = {name: Type[name] for name in ("Q4_0", "Q4_1", "Q8_0")}
FILE_TYPES = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1}
EMBEDDING = "token_embd.weight"


def convert(source: Path, name: str, output: Path) -> None:
    """Write it, with all metadata of the source.

    Args:
        source: a GGUF file of one part.
        name: one of `TYPES`.
        output: where to.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(output, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(FILE_TYPES.get(name, gguf.LlamaFileType.MOSTLY_Q8_0))
    for tensor in reader.tensors:
        if tensor.tensor_type not in (*TYPES.values(), Type.F16):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        chosen = Type.Q8_0 if tensor.name == EMBEDDING else TYPES[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Read the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("output", type=Path)
    asked = parser.parse_args()
    convert(asked.source, asked.type, asked.output)


if __name__ == "__main__":
    main()
