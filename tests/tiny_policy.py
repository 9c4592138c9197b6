"""A random policy of a few thousand parameters with a character tokenizer, and prompts it can be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = "0123456789+-*=,?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ "
END, PAD = "<|end|>", "<|pad|>"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {PAD: 0, END: 1, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=PAD)


def model(tie: bool = True, seed: int = 0, width: int = 32, layers: int = 2, scale: float = 0.3) -> Qwen2ForCausalLM:
    """Wider initial weights than usual, so that the distribution is far from uniform and gradients are of ordinary size."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


def save(folder: Path, **settings: Any) -> Path:
    made = model(**settings)
    made.generation_config.eos_token_id = 1
    made.generation_config.pad_token_id = 0
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prompts(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Sums whose `exact` reward a random policy earns now and then: the answer is one character."""
    return [
        {
            "id": f"p{i}",
            "prompt": f"{i % 7}+{i % 5}=",
            "answer": CHARACTERS[i % 10],
            "source": "even" if i % 2 == 0 else "odd",
        }
        for i in range(start, start + count)
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
