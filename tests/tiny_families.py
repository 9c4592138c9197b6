"""Tiny random policies of many families, for sweeps over what a library does to their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_policy
import torch
from transformers import AutoConfig, AutoModelForCausalLM

# what most families call the sizes; each takes those that it knows
_SIZES: dict[str, Any] = {
    "vocab_size": len(tiny_policy.CHARACTERS) + 2,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "hidden_dim": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_OWN: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4},
    "codegen": {"rotary_dim": 4},
    "deepseek_v3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "deepseek_v2": {
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": False},
    "gemma3_text": {"sliding_window": 16},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16, "hidden_size": 32},
    "gpt_oss": {"sliding_window": 16},
    "granitemoe": {"num_local_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "llama_untied": {"tie_word_embeddings": False},
    "llama_tied": {"tie_word_embeddings": True},
    "mamba": {"state_size": 4, "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 16},
    "opt": {"word_embed_proj_dim": 32},
    "phi3": {"sliding_window": None},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "rwkv": {"attention_hidden_size": 32},
    "stablelm": {},
    "xglm": {"attention_heads": 4},
}
# fmt: off
DENSE = [
    "llama_untied", "llama_tied", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "stablelm",
    "starcoder2", "olmo", "olmo2", "cohere", "granite", "smollm3", "exaone4", "glm4", "nemotron", "helium",
    "persimmon", "xglm",
]
EXPERTS = [
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe",
    "glm4_moe", "phimoe",
]
RECURRENT = [
    "mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "rwkv", "jamba",
]
# fmt: on


def config(family: str) -> Any:
    """A tiny configuration of a family."""
    kind = family.partition("_tied")[0].partition("_untied")[0]
    known = AutoConfig.for_model(kind)
    sizes = {name: value for name, value in _SIZES.items() if name in known.attribute_map or hasattr(known, name)}
    if kind == "falcon":
        del sizes["head_dim"]  # follows from the others there
    for name, own in known.attribute_map.items():
        if name in sizes and own in sizes:
            del sizes[name]
    return AutoConfig.for_model(kind, **{**sizes, **_OWN.get(family, {})})


def model(family: str, seed: int = 0) -> Any:
    """A tiny random policy of a family, with weights that no initialization makes: none is a constant."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(family)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """A policy folder of a family."""
    made = model(family, seed)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = 1, 0
    made.save_pretrained(folder)
    tiny_policy.tokenizer().save_pretrained(folder)
    return folder
