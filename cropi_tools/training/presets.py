"""Published recipes as values of cropi-train's options, by the names of their fields. What is given on the command line comes before them."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2510.26491, and where it is silent the defaults of verl, which it used
    "paper": {
        "aggregation": "token",
        "advantage": "group",
        "batch": 128,
        "samples": 8,
        "temperature": 1.0,
        "max_tokens": 2048,
        "learning_rate": 1e-6,
        "schedule": "constant",
        "weight_decay": 0.01,
        "betas": (0.9, 0.999),
        "max_gradient_norm": 1.0,
        "clip": (0.2, 0.2),
        "kl": 0.001,
        "entropy": 0.001,
    },
    # arXiv 2503.14476, section 4.1. Its soft punishment of long responses has no place in a reward that only checks answers; masking truncated
    # ones is the paper's own other way (section 3.4).
    "dapo": {
        "aggregation": "token",  # the mean over all tokens
        "advantage": "group",
        "batch": 512,
        "samples": 16,
        "minibatch": 32,
        "temperature": 1.0,
        "max_tokens": 20480,
        "learning_rate": 1e-6,
        "schedule": "constant",
        "warmup": 20,
        "weight_decay": 0.1,
        "betas": (0.9, 0.999),
        "max_gradient_norm": 1.0,
        "clip": (0.2, 0.28),
        "kl": 0.0,
        "entropy": 0.0,
        "mask_truncated": True,
        "dynamic_sampling": 10,
    },
    # arXiv 2503.20783, section 4 (the Oat recipe: 128 questions x 8 responses, no KL)
    "dr_grpo": {
        "aggregation": "constant",  # a fixed denominator, and rewards only centered
        "advantage": "centered",
        "batch": 128,
        "samples": 8,
        "temperature": 1.0,
        "max_tokens": 3000,
        "learning_rate": 1e-6,
        "schedule": "constant",
        "weight_decay": 0.0,
        "betas": (0.9, 0.95),
        "max_gradient_norm": 1.0,
        "clip": (0.2, 0.2),
        "kl": 0.0,
        "entropy": 0.0,
    },
}
