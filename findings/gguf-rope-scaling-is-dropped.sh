#!/usr/bin/env bash
# transformers reads a Llama GGUF file without its linear rope scaling, and says nothing.
#
# Expected: `llama.rope.scaling.type = linear` with `llama.rope.scaling.factor = 4` (GGUF specification, "Scaling")
# becomes a configuration whose rope_type is linear with factor 4, or an error; llama.cpp divides positions by 4.
# Seen in transformers 5.23.0 with gguf 0.19.0: rope_type is "default", so every position but the first is rotated four
# times too far; rope.freq_base beside it is read. The same holds for the yarn fields.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cat > "$folder/run.py" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoConfig

folder = Path(sys.argv[1])


def read(scaling):
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_vocab_size(16)
    writer.add_block_count(1)
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_scaling_type(scaling)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(256)
    writer.add_tensor("token_embd.weight", np.zeros((16, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoConfig.from_pretrained(folder, gguf_file="model.gguf").rope_parameters


for scaling in (gguf.RopeScalingType.LINEAR, gguf.RopeScalingType.YARN):
    rope = read(scaling)
    print(f"{scaling.value} scaling by 4 in the file, base 500000; in the configuration: {rope}")
    if rope != {"rope_theta": 500000.0, "rope_type": "default"}:
        sys.exit("this has changed")
print("as described")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder"
