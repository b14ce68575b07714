"""Kinds of adapters that stock PEFT makes, each with what is expected: taken as it is, taken once PEFT has merged it,
or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.tiny import tiny_gpt2, tiny_llama

AS_IT_IS, MERGED, REFUSED = "as it is", "merged by PEFT first", "refused"
TASK = 1
"""The task that is asked of a multitask prompt."""


def llama() -> Any:
    """Tied embeddings, as in many small models."""
    return tiny_llama(num_hidden_layers=2)


def untied() -> Any:
    """A head of its own."""
    return tiny_llama(num_hidden_layers=2, tie_word_embeddings=False)


def gpt2() -> Any:
    """Fused projections whose weights stand transposed, and biases everywhere."""
    return tiny_gpt2(n_layer=2)


@dataclass(frozen=True)
class Kind:
    """One configuration of PEFT's."""

    config: str
    """PEFT's class."""
    options: dict[str, Any]
    expected: str = AS_IT_IS
    backbone: Callable[[], Any] = llama
    names: tuple[str, ...] = field(default=("lora_", "prompt_encoder"))
    """Parts of the names of what training would change: these tensors are drawn at random."""

    def made(self) -> Any:
        """A tiny model in stock PEFT, every trained weight far from where it starts."""
        import peft

        torch.manual_seed(0)
        kind = getattr(peft, self.config)
        model = peft.get_peft_model(self.backbone(), kind(task_type="CAUSAL_LM", **self.options)).eval()
        source = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if any(part in name for part in self.names):
                parameter.data = torch.randn(parameter.shape, generator=source) * 0.3
        return model


PROMPT = {"num_virtual_tokens": 4}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6}
ALL = {"target_modules": "all-linear"}
CHANGED = ("lora_", "magnitude", "lm_head.modules_to_save", "trainable_tokens_delta")

KINDS: dict[str, Kind] = {
    "PROMPT_TUNING": Kind("PromptTuningConfig", PROMPT),
    "PROMPT_TUNING, GPT-2": Kind("PromptTuningConfig", PROMPT, backbone=gpt2),
    "P_TUNING, MLP": Kind("PromptEncoderConfig", PROMPT | {"encoder_hidden_size": 8}),
    "P_TUNING, LSTM": Kind(
        "PromptEncoderConfig", PROMPT | {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}
    ),
    "MULTITASK_PROMPT_TUNING": Kind("MultitaskPromptTuningConfig", PROMPT | {"num_tasks": 3, "num_ranks": 2}),
    "PREFIX_TUNING": Kind("PrefixTuningConfig", PROMPT),
    "PREFIX_TUNING, network": Kind("PrefixTuningConfig", PROMPT | {"prefix_projection": True}),
    "PREFIX_TUNING, GPT-2": Kind("PrefixTuningConfig", PROMPT, backbone=gpt2),
    "LORA, plain": Kind("LoraConfig", LORA),
    "LORA, every linear": Kind("LoraConfig", LORA | ALL),
    "LORA, pattern of modules": Kind("LoraConfig", LORA | {"target_modules": r".*mlp\.(up|down)_proj"}),
    "LORA, one layer by name": Kind("LoraConfig", LORA | {"target_modules": ["layers.1.self_attn.q_proj", "up_proj"]}),
    "LORA, some layers": Kind(
        "LoraConfig", LORA | {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}
    ),
    "LORA, exclusions": Kind("LoraConfig", LORA | ALL | {"exclude_modules": r".*\.1\..*k_proj"}),
    "LORA, ranks": Kind("LoraConfig", LORA | ALL | {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7}}),
    "LORA, alphas": Kind(
        "LoraConfig", LORA | ALL | {"alpha_pattern": {"layers.0.self_attn.v_proj": 20, "down_proj": 1}}
    ),
    "LORA, rsLoRA": Kind("LoraConfig", LORA | {"use_rslora": True}),
    "LORA, rsLoRA, ranks": Kind("LoraConfig", LORA | {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "LORA, GPT-2": Kind("LoraConfig", LORA | {"fan_in_fan_out": True}, backbone=gpt2),
    "LORA, DoRA": Kind("LoraConfig", LORA | ALL | {"use_dora": True}, names=CHANGED),
    "LORA, DoRA, ranks": Kind(
        "LoraConfig",
        LORA | {"use_dora": True, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}},
        names=CHANGED,
    ),
    "LORA, DoRA, GPT-2": Kind("LoraConfig", LORA | {"use_dora": True, "fan_in_fan_out": True}, AS_IT_IS, gpt2, CHANGED),
    "LORA, biases": Kind(
        "LoraConfig", LORA | {"bias": "all", "fan_in_fan_out": True}, MERGED, gpt2, names=(*CHANGED, "bias")
    ),
    "LORA, bias in B": Kind("LoraConfig", LORA | {"lora_bias": True}, MERGED, gpt2),
    "LORA, trained head": Kind("LoraConfig", LORA | {"modules_to_save": ["lm_head"]}, MERGED, untied, names=CHANGED),
    "LORA, trained head, tied": Kind("LoraConfig", LORA | {"modules_to_save": ["lm_head"]}, MERGED, names=CHANGED),
    "LORA, trained tokens": Kind("LoraConfig", LORA | {"trainable_token_indices": [3, 40]}, MERGED, names=CHANGED),
    "LORA, embeddings": Kind("LoraConfig", LORA | {"target_modules": ["embed_tokens", "q_proj"]}, MERGED, untied),
    "LORA, PiSSA": Kind("LoraConfig", LORA | {"init_lora_weights": "pissa"}, MERGED),
    "LORA, OLoRA": Kind("LoraConfig", LORA | {"init_lora_weights": "olora"}, MERGED),
    "LORA, repeated layers": Kind("LoraConfig", LORA | {"layer_replication": [[0, 2], [1, 2]]}, REFUSED),
    "ADALORA": Kind("AdaLoraConfig", {"init_r": 4, "target_r": 4, "total_step": 10} | ALL, MERGED),
    "IA3": Kind(
        "IA3Config", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}, MERGED, names=("ia3_",)
    ),
    "LOHA": Kind("LoHaConfig", {"r": 4, "target_modules": ["q_proj"]}, MERGED, names=("hada_",)),
    "LOKR": Kind("LoKrConfig", {"r": 4, "target_modules": ["q_proj"]}, MERGED, names=("lokr_",)),
    "OFT": Kind("OFTConfig", {"oft_block_size": 4, "target_modules": ["q_proj"]}, MERGED, names=("oft_R",)),
    "VERA": Kind("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}, MERGED, names=("vera_lambda",)),
    "CPT": Kind(
        "CPTConfig",
        {
            "cpt_token_ids": [5, 6, 7, 8],
            "cpt_mask": [1, 1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 3, 4],
            "opt_weighted_loss_type": "none",
        },
        REFUSED,
        names=("delta_embedding",),
    ),
    "ADAPTION_PROMPT": Kind(
        "AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}, REFUSED, names=("adaption_",)
    ),
}
"""Name in the table to the configuration. What PEFT has besides is refused by the name of its method, like IA3."""
