#!/usr/bin/env bash
# transformers reads an FP8 checkpoint by blocks that it guesses, and is silently wrong where the last block is cut off.
#
# Expected: `weight_block_size = [128, 128]` says which values share a scale, so a matrix of 192 rows has scales for rows
# 0 to 127 and 128 to 191 (DeepSeek-V3's own conversion to bf16 reads it so).
# Seen in transformers 5.23.0 with torch 2.13.0 on a CPU, `FineGrainedFP8Config(dequantize=True)`: 192 rows over 2 scales
# are taken for blocks of 96 rows, and rows 96 to 127 get the other block's scale. Nothing is said; rows that do not
# divide by the number of their scales are refused.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 safetensors==0.8.0
cat >"$folder/try.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
config = LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=False,
)
LlamaForCausalLM(config).save_pretrained(folder)
NAME = "model.layers.0.mlp.gate_proj.weight"
tensors = {}
for name, weight in load_file(folder / "model.safetensors").items():
    tensors[name] = weight
    if name.endswith("proj.weight"):
        grid = [-(-size // 128) for size in weight.shape]
        tensors[name] = (weight / 0.01).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.full(grid, 0.01)
tensors[NAME + "_scale_inv"] = torch.tensor([[1.0], [2.0]])
rows = torch.where(torch.arange(192) < 128, 1.0, 2.0)[:, None]
wanted = tensors[NAME].float() * rows
guessed = tensors[NAME].float() * torch.where(torch.arange(192) < 96, 1.0, 2.0)[:, None]
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
fields = json.loads((folder / "config.json").read_text())
fields["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
(folder / "config.json").write_text(json.dumps(fields))
model = AutoModelForCausalLM.from_pretrained(
    folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
)
found = model.state_dict()[NAME]
differing = (found - wanted).abs().amax(1).nonzero().flatten().tolist()
print("rows with another scale than the block's:", f"{differing[0]} to {differing[-1]}" if differing else "none")
raise SystemExit(0 if torch.allclose(found, guessed) and differing == list(range(96, 128)) else 1)
PY
"$folder/env/bin/python" "$folder/try.py" "$folder/model" 2>/dev/null || { echo "this has changed"; exit 1; }
