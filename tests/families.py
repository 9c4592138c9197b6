"""Tiny random models of the library's families, with every length-dependent branch within a few tokens; and naive passes through them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cropi_tools.policy.loading import Policy

LIMIT = 16  # tokens: windows, chunks, temperatures by position, and where rotary frequencies change
_SIZES: dict[str, Any] = {
    **{"vocab_size": 90, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 64, "n_positions": 64, "num_key_value_heads": 2},
    **{"d_model": 32, "d_ff": 64, "n_layers": 2, "n_heads": 4, "num_layers": 2, "num_heads": 4, "ffn_dim": 64},
    **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_layers": 1},
    **{"word_embed_proj_dim": 32, "is_decoder": True, "max_position_embeddings": 64, "attention_heads": 4},
    **{"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "shared_expert_intermediate_size": 32},
    **{"sliding_window": LIMIT, "attention_chunk_size": LIMIT, "floor_scale": LIMIT, "local_attention": LIMIT},
    **{"attention_window_size": LIMIT, "window_size": LIMIT, "index_topk": LIMIT, "lru_width": 32},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64},
    **{"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "state_size": 8, "ssm_state_size": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"use_mamba_kernels": False},
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Rotary frequencies of a type; those that follow the length of a pass change beyond LIMIT tokens."""
    settings: dict[str, Any] = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
    original = {"original_max_position_embeddings": LIMIT}
    if kind == "longrope":
        settings |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 7.0], **original}
    elif kind == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **original}
    elif kind == "yarn":
        settings |= original
    return {
        "rope_parameters": {**settings, **more},
        "max_position_embeddings": LIMIT if kind == "dynamic" else 4 * LIMIT,
    }


# name: the kind of model, settings of its own
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("llama", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "phi", "cohere", "bloom")},
    **{kind: (kind, {}) for kind in ("mistral", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "cohere2", "glm4")},
    **{kind: (kind, {}) for kind in ("gpt_oss", "starcoder2", "stablelm", "mpt", "granite", "granitemoe")},
    **{kind: (kind, {}) for kind in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "exaone4")},
    **{kind: (kind, {}) for kind in ("modernbert-decoder", "rwkv", "mamba", "falcon_mamba", "bart", "smollm3", "xglm")},
    **{kind: (kind, {}) for kind in ("falcon_h1", "roberta", "moshi")},
    **{kind: (kind, {}) for kind in ("qwen3_next", "qwen3_5_text", "minimax", "gpt_bigcode", "persimmon", "nanochat")},
    "ministral": ("ministral", {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**rope("dynamic", alpha=50.0), "head_dim": 8}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "deepseek_v4": ("deepseek_v4", {"num_hidden_layers": 4}),
    "recurrent_gemma": ("recurrent_gemma", {"num_hidden_layers": 3}),
    "nemotron_h": ("nemotron_h", {"layers_block_type": ["mamba", "attention", "mamba", "moe"], "num_hidden_layers": 4}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    "falcon": ("falcon", {"head_dim": None, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon with ALiBi": ("falcon", {"head_dim": None, "alibi": True, "new_decoder_architecture": False}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "codegen": ("codegen", {"rotary_dim": 4}),
    "deepseek_v3": ("deepseek_v3", {"head_dim": None, "first_k_dense_replace": 1, "num_key_value_heads": 4}),
    "doge": ("doge", {"keep_window_size": 64}),  # as the next one
    # the keys it attends to are chosen by their rank among scores that are often equal, as 0: rounding decides, so none is left out here
    "deepseek_v32": ("deepseek_v32", {"head_dim": None, "num_key_value_heads": 4, "index_topk": 64}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}),
    "bamba": ("bamba", {"attn_layer_indices": [1]}),
    "granitemoehybrid": ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "llama4_text": ("llama4_text", {"no_rope_layers": [1, 0], "attn_scale": 1.0, "num_hidden_layers": 2}),
    "ministral3": ("ministral3", rope("yarn", llama_4_scaling_beta=0.5)),
    "phi3 longrope": ("phi3", {**rope("longrope"), "sliding_window": None, "original_max_position_embeddings": LIMIT}),
    "phi3 longrope with a window": ("phi3", {**rope("longrope"), "original_max_position_embeddings": LIMIT}),
    "phimoe longrope": (
        "phimoe",
        {**rope("longrope", short_mscale=1.1, long_mscale=1.5), "original_max_position_embeddings": LIMIT},
    ),
    **{f"llama {kind}": ("llama", rope(kind)) for kind in ("longrope", "dynamic", "yarn", "linear", "llama3")},
    "qwen2 dynamic": ("qwen2", rope("dynamic")),
    "mistral longrope": ("mistral", rope("longrope")),
    "falcon dynamic": (
        "falcon",
        {**rope("dynamic"), "head_dim": None, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
}


def build(name: str, **more: Any) -> Any:
    """The model of a family, always the same."""
    kind, own = FAMILIES[name]
    known = CONFIG_MAPPING[kind]()
    # what a family leaves open it decides itself
    sizes = {
        key: value
        for key, value in _SIZES.items()
        if getattr(known, key, None) is not None or (hasattr(known, key) and key == "pad_token_id")
    }
    given = {
        key: value for key, value in {**sizes, **own, **more}.items() if value is not None or key == "sliding_window"
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**given)).eval()


def policy(name: str, **more: Any) -> Policy:
    """It as a policy without end tokens, so that responses are of full length."""
    model = build(name, **more)
    model.get_input_embeddings().padding_idx = None
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return Policy(model, None, [], "memory")


def logprobs(pristine: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens] of a response by one pass over prompt and response, through a model no pass went through before."""
    model = copy.deepcopy(pristine)
    return differentiable_logprobs(model, prompt, response).detach()


def differentiable_logprobs(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The same, of this very model, with a graph."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(response)[:, None])[:, 0]
