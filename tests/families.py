"""Tiny random models of many decoder families, with small windows and cache lengths, where mistakes show.

What is expected of each stands beside it: ``in place``, ``portable`` (no graph over a cache in place), or ``refused``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
WIDE: dict[str, Any] = {"initializer_range": 0.2}
"""Weights are drawn wider than usual, so that outputs differ enough for comparisons to mean something."""
LLAMA = SIZES | TOKENS | WIDE
GPT: dict[str, Any] = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPT |= {"bos_token_id": 0, "eos_token_id": 1} | WIDE
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
NARROW = {"head_dim": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
HEADS = {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8}
LATENT = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    """Rotary parameters of a kind, stretched four times from 32 positions."""
    own = {"rope_theta": 10000.0, "rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": own | fields}


LLAMA3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FALCON = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON |= {"bos_token_id": 0, "eos_token_id": 1} | WIDE

IN_PLACE, PORTABLE, REFUSED = "in place", "portable", "refused"
SINCE_5_24 = IN_PLACE if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else PORTABLE
"""Of code that attended by itself before."""
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (IN_PLACE, "Llama", LLAMA),
    "llama-llama3": (IN_PLACE, "Llama", LLAMA | LLAMA3),
    "llama-yarn": (IN_PLACE, "Llama", LLAMA | rope("yarn")),
    "llama-longrope": (IN_PLACE, "Llama", LLAMA | LONGROPE),
    "mistral": (IN_PLACE, "Mistral", LLAMA | {"sliding_window": 8}),
    "ministral": (IN_PLACE, "Ministral", LLAMA | NARROW | ALTERNATING),
    "ministral3": (IN_PLACE, "Ministral3", LLAMA | NARROW),
    "qwen2-window": (
        IN_PLACE,
        "Qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (IN_PLACE, "Qwen3", LLAMA | NARROW),
    "qwen2_moe": (IN_PLACE, "Qwen2Moe", LLAMA | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": (IN_PLACE, "Qwen3Moe", LLAMA | NARROW | EXPERTS),
    "mixtral": (IN_PLACE, "Mixtral", LLAMA | {"num_local_experts": 4}),
    "olmoe": (IN_PLACE, "Olmoe", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gemma": (IN_PLACE, "Gemma", LLAMA | NARROW),
    "gemma2": (
        IN_PLACE,
        "Gemma2",
        LLAMA
        | NARROW
        | {
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": (IN_PLACE, "Gemma3Text", LLAMA | NARROW | ALTERNATING | {"query_pre_attn_scalar": 16}),
    "phi": (IN_PLACE, "Phi", LLAMA | {"num_key_value_heads": 4}),
    "phi3": (IN_PLACE, "Phi3", LLAMA),
    "phi3-longrope": (IN_PLACE, "Phi3", LLAMA | LONGROPE | {"original_max_position_embeddings": 32}),
    "opt": (IN_PLACE, "OPT", LLAMA | {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}),
    "gpt2": (IN_PLACE, "GPT2", GPT),
    "gpt_neox": (IN_PLACE, "GPTNeoX", LLAMA),
    "gpt_bigcode": (IN_PLACE, "GPTBigCode", GPT | {"multi_query": True}),
    "stablelm": (IN_PLACE, "StableLm", LLAMA),
    "granite": (
        IN_PLACE,
        "Granite",
        LLAMA
        | {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
    "olmo": (IN_PLACE, "Olmo", LLAMA),
    "olmo2": (IN_PLACE, "Olmo2", LLAMA),
    "olmo3": (IN_PLACE, "Olmo3", LLAMA | ALTERNATING),
    "smollm3": (IN_PLACE, "SmolLM3", LLAMA | {"no_rope_layers": [1, 0]}),
    "cohere": (IN_PLACE, "Cohere", LLAMA | {"logit_scale": 0.5}),
    "cohere2": (IN_PLACE, "Cohere2", LLAMA | ALTERNATING | {"logit_scale": 0.5}),
    "gpt_oss": (
        IN_PLACE,
        "GptOss",
        LLAMA | NARROW | ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "glm": (IN_PLACE, "Glm", LLAMA | NARROW | {"partial_rotary_factor": 0.5}),
    "glm4": (IN_PLACE, "Glm4", LLAMA | NARROW | {"partial_rotary_factor": 0.5}),
    "nemotron": (IN_PLACE, "Nemotron", LLAMA | NARROW),
    "biogpt": (IN_PLACE, "BioGpt", LLAMA),
    "persimmon": (IN_PLACE, "Persimmon", LLAMA),
    "bitnet": (IN_PLACE, "BitNet", LLAMA),
    "afmoe": (
        IN_PLACE,
        "Afmoe",
        LLAMA | NARROW | ALTERNATING | EXPERTS | {"num_dense_layers": 1},
    ),
    "gemma3-multimodal": (
        IN_PLACE,
        "Gemma3",
        {
            "text_config": LLAMA | NARROW | ALTERNATING,
            "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28}
            | {"num_attention_heads": 2, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
    "gptj": (SINCE_5_24, "GPTJ", GPT | {"rotary_dim": 8}),
    "codegen": (SINCE_5_24, "CodeGen", GPT | {"rotary_dim": 8}),
    "bloom": (PORTABLE, "Bloom", TOKENS | WIDE | {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon-7b-like": (PORTABLE, "Falcon", FALCON | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon-40b-like": (PORTABLE, "Falcon", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-rw-alibi": (PORTABLE, "Falcon", FALCON | {"multi_query": False, "alibi": True}),
    "diffllama": (PORTABLE, "DiffLlama", LLAMA | NARROW),
    "heads-of-12": (PORTABLE, "Llama", LLAMA | {"head_dim": 12}),
    "llama4_text": (
        REFUSED,
        "Llama4Text",
        LLAMA
        | NARROW
        | {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8, "no_rope_layers": [1, 0]}
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
    ),
    "doge": (REFUSED, "Doge", LLAMA | {"num_experts": 4}),
    "llama-dynamic": (REFUSED, "Llama", LLAMA | rope("dynamic")),
    "opt-350m-like": (REFUSED, "OPT", LLAMA | {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    "gpt_neo": (
        REFUSED,
        "GPTNeo",
        TOKENS
        | {"vocab_size": 320, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 8}
        | {"attention_types": [[["global", "local"], 1]], "intermediate_size": 96},
    ),
    "deepseek_v2": (PORTABLE, "DeepseekV2", LLAMA | LATENT | {"topk_method": "group_limited_greedy"}),
    "deepseek_v2-lite": (PORTABLE, "DeepseekV2", LLAMA | LATENT | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": (PORTABLE, "DeepseekV3", LLAMA | LATENT | rope("yarn", mscale=1.0, mscale_all_dim=0.8)),
    "lfm2": (REFUSED, "Lfm2", LLAMA | {"layer_types": ["conv", "full_attention"]}),
    "mamba": (REFUSED, "Mamba", TOKENS | {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2}),
    "falcon_h1": (REFUSED, "FalconH1", LLAMA | MAMBA | {"mamba_d_ssm": 128}),
    "bamba": (REFUSED, "Bamba", LLAMA | MAMBA | {"attn_layer_indices": [1]}),
    "rwkv": (REFUSED, "Rwkv", {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 256}),
    "mamba2": (REFUSED, "Mamba2", {**TOKENS, "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, **HEADS}),
    "granitemoehybrid": (
        REFUSED,
        "GraniteMoeHybrid",
        LLAMA | MAMBA | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 96},
    ),
    "jamba": (REFUSED, "Jamba", LLAMA | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "qwen3_next": (
        REFUSED,
        "Qwen3Next",
        LLAMA | NARROW | EXPERTS | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "recurrent_gemma": (REFUSED, "RecurrentGemma", LLAMA | {"num_hidden_layers": 3, "lru_width": 64}),
    "zamba2": (
        REFUSED,
        "Zamba2",
        LLAMA | {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1},
    ),
    "gemma3n_text": (
        REFUSED,
        "Gemma3nText",
        LLAMA
        | NARROW
        | {"num_hidden_layers": 4, "intermediate_size": [96] * 4, "layer_types": ALTERNATING["layer_types"] * 2}
        | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16}
        | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, "sliding_window": 8},
    ),
    "jetmoe": (REFUSED, "JetMoe", LLAMA | {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mpt": (REFUSED, "Mpt", {"vocab_size": 320, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "xglm": (REFUSED, "XGLM", TOKENS | {"vocab_size": 320, "d_model": 64, "ffn_dim": 96, "num_layers": 2}),
}


def tiny_family(name: str, seed: int = 0, layers: int = 2) -> Any:
    """A model of a family with random weights; two calls with one seed give equal models.

    Of more than two layers, the first two kinds are repeated.
    """
    _, config, fields = FAMILIES[name]
    torch.manual_seed(seed)
    fields = copy.deepcopy(fields)
    if layers != 2:
        sizes = fields.get("text_config", fields)
        for key in ("layer_types", "no_rope_layers"):
            if key in sizes:
                sizes[key] = [sizes[key][index % 2] for index in range(layers)]
        sizes["n_layer" if "n_layer" in sizes else "num_hidden_layers"] = layers
    kind = getattr(transformers, f"{config}Config")
    if not hasattr(kind(), "num_key_value_heads"):
        fields.pop("num_key_value_heads", None)  # a configuration keeps what it does not know, and PEFT would read it
    model = AutoModelForCausalLM.from_config(kind(**fields)).eval()
    for path, buffer in model.named_buffers():
        if path.endswith("e_score_correction_bias"):  # zeros in a new model, which would leave a mistake unseen
            buffer.normal_(0, 0.5)
    for path, parameter in model.named_parameters():
        if path.endswith("router.gate.weight") and not parameter.any():  # zeros let all experts tie, in any order
            torch.nn.init.normal_(parameter, std=0.2)
    return model
