#!/usr/bin/env bash
# A transformers model with longrope can be exported by torch.export once, and not again.
#
# Expected: an export leaves the model as it was, so that a second one gives the same program.
# Seen in transformers 5.23.0 with torch 2.13.0: the forward pass keeps `long_inv_freq` in a plain attribute, which holds a
# fake tensor after the first export; the second raises that the fake modes do not match. With the attribute deleted in
# between, the second export works.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, LlamaForCausalLM

rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
model = LlamaForCausalLM(
    LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rope_parameters=rope)
).eval()


class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def exported():
    try:
        torch.export.export(Logits(), (torch.ones(1, 7, dtype=torch.long),), strict=False)
    except Exception as error:
        return "fake modes differ" if "fake mode" in str(error) else f"another error: {str(error)[:200]}"
    return "exported"


with torch.no_grad():
    print("first:", exported())
    kept = [m for m in model.modules() if isinstance(vars(m).get("long_inv_freq"), FakeTensor)]
    print("left behind:", len(kept))
    print("second:", exported())
    for module in kept:
        del module.long_inv_freq
    print("third, without it:", exported())
PYTHON
said=$("$folder/env/bin/python" "$folder/run.py" 2> "$folder/log" | grep -E "^(first|left|second|third)")
echo "$said"
wanted="first: exported
left behind: 1
second: fake modes differ
third, without it: exported"
if [ "$said" = "$wanted" ]; then echo "as described"; else echo "this has changed"; exit 1; fi
