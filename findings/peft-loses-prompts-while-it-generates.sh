#!/usr/bin/env bash
# With transformers 5.24, a prompt or prefix that PEFT trained is lost while PEFT generates: other tokens, and no word of it.
#
# Expected: `generate` of a PeftModel, which takes the likeliest token each time, gives the tokens that the model's own
# forward pass gives for the whole text so far; so it is with peft 0.21.2 and transformers 5.23.0.
# Seen in peft 0.21.2 with transformers 5.24.0: other tokens, for prompt tuning, P-tuning and prefix tuning alike. LoRA's
# are right. transformers 5.24 renamed the cache that `generate` hands from step to step, `past_key_values`, to `cache`.
# PeftModelForCausalLM.prepare_inputs_for_generation looks under the old name, finds nothing, and takes every step for
# the first one: prompts stand in front of each new token, and a prefix takes the place of the cache. With
# use_cache=False prompts are right; so are forward passes always. peft 0.21.2 allows this transformers, and pip
# installs the two together.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
cat > "$folder/run.py" <<'PYTHON'
import warnings

import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, IDS = 8, torch.tensor([[5, 6, 7, 8, 9]])
KINDS = {
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=32, task_type="CAUSAL_LM"),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "lora": LoraConfig(r=2, task_type="CAUSAL_LM"),
}
warnings.simplefilter("ignore", UserWarning)


def adapted(kind):
    torch.manual_seed(0)
    fields = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, **fields))
    model = get_peft_model(model, KINDS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


@torch.no_grad()
def by_forward_passes(model):
    ids = IDS
    for _ in range(STEPS):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids.tolist()


def generated(model, **options):
    made = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
        pad_token_id=0, **options,
    )
    return made.tolist()


for kind in KINDS:
    model = adapted(kind)
    wanted = by_forward_passes(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        same = generated(model) == wanted
    # what is said of the arguments' new name is of transformers, and of its own inner calls
    told = [each for each in said if "prompt" in str(each.message).lower() or "prefix" in str(each.message).lower()]
    words = f"{transformers.__version__} {kind}: {'the same' if same else 'other'} tokens"
    if kind in ("prompt tuning", "p-tuning"):
        words += f", without a cache {'the same' if generated(model, use_cache=False) == wanted else 'other'}"
    print(words + (", warned" if told else ""))
PYTHON
for version in 5.23.0 5.24.0; do
    "$folder/env/bin/pip" install --quiet torch==2.13.0 "transformers==$version" peft==0.21.2 numpy
    "$folder/env/bin/python" "$folder/run.py" 2>> "$folder/log" | grep "^5" >> "$folder/said"
done
cat "$folder/said"
wanted="5.23.0 prompt tuning: the same tokens, without a cache the same
5.23.0 p-tuning: the same tokens, without a cache the same
5.23.0 prefix tuning: the same tokens
5.23.0 lora: the same tokens
5.24.0 prompt tuning: other tokens, without a cache the same
5.24.0 p-tuning: other tokens, without a cache the same
5.24.0 prefix tuning: other tokens
5.24.0 lora: the same tokens"
if [ "$(cat "$folder/said")" = "$wanted" ]; then echo "as described"; else echo "this has changed"; exit 1; fi
