#!/usr/bin/env bash
# PEFT saves a LoRA's alpha_pattern and rank_pattern in alphabetical order, and where two patterns fit one module the
# first one counts: the adapter that is loaded computes something else than the one that was trained.
#
# Expected: an adapter that is saved and loaded again gives the logits it gave before, or a word that it cannot.
# Seen in peft 0.21.2: with alpha_pattern {"model.layers.1.mlp.down_proj": 64, "down_proj": 8}, the special case first
# as the first one counts, layer 1 is trained with alpha 64. adapter_config.json has "down_proj" first, and layer 1 is
# loaded with alpha 8: other logits, no warning. With rank_pattern it ends in an error about sizes. Patterns whose
# alphabetical order is the one that was meant stay as they were.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy
cat > "$folder/run.py" <<'PYTHON'
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL, GENERAL = "model.layers.1.mlp.down_proj", "down_proj"
IDS = torch.arange(5, 15)[None]


def backbone():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def again(name, patterns):
    config = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **patterns)
    model = get_peft_model(backbone(), config).eval()
    with torch.no_grad():
        trained = model(IDS).logits
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    try:
        with warnings.catch_warnings(record=True) as said, torch.no_grad():
            warnings.simplefilter("always")
            loaded = PeftModel.from_pretrained(backbone(), f"{sys.argv[1]}/{name}").eval()
            same = torch.allclose(loaded(IDS).logits, trained, atol=1e-5)
    except RuntimeError as error:
        return "refused" if "size mismatch" in str(error) else f"another error: {error}"
    heard = any("pattern" in str(each.message) or "alpha" in str(each.message) for each in said)
    alpha = round(loaded.base_model.model.model.layers[1].mlp.down_proj.scaling["default"] * 4)
    return f"{'the same' if same else 'other'} logits, alpha {alpha}, {'warned' if heard else 'no warning'}"


print("alpha, special first:", again("alpha", {"alpha_pattern": {SPECIAL: 64, GENERAL: 8}}))
print("rank, special first:", again("rank", {"rank_pattern": {SPECIAL: 2, GENERAL: 8}}))
print("alpha, one pattern:", again("one", {"alpha_pattern": {SPECIAL: 64}}))
PYTHON
said=$("$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" | grep -E "^(alpha|rank)")
echo "$said"
wanted="alpha, special first: other logits, alpha 8, no warning
rank, special first: refused
alpha, one pattern: the same logits, alpha 64, no warning"
if [ "$said" = "$wanted" ]; then echo "as described"; else echo "this has changed"; exit 1; fi
