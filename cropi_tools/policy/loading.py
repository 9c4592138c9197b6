"""Opening and saving a policy: model, tokenizer, end tokens, device and number format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from cropi_tools.data.dates import DEFAULT_DATE
from cropi_tools.data.policies import policy_files, tokenizer_files
from cropi_tools.policy.checkpoint import check_causal, check_finite, load_whole
from cropi_tools.policy.loading_errors import CONFIG, opening
from cropi_tools.policy.positions import positions
from cropi_tools.policy.precision import warn_of_lost_updates
from cropi_tools.policy.tokens import Tokens, load_tokens
from cropi_tools.runtime.errors import UsageError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy(NamedTuple):
    """A loaded policy. end_token_ids, usual_end, date, unlisted: as in `Tokens`."""

    model: Any
    tokenizer: Any
    end_token_ids: list[int]
    folder: str
    usual_end: int | None = None
    date: str = DEFAULT_DATE
    unlisted: tuple[str, ...] = ()

    @property
    def tokens(self) -> Tokens:
        """The tokenizer's side of the policy."""
        own = (self.tokenizer, self.end_token_ids, self.folder, self.usual_end)
        return Tokens(*own, self.vocabulary, self.positions, self.date, self.unlisted)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def trained(self) -> list[tuple[str, Any]]:
        """Names and parameters that have gradients, tied weights once."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: every token id lies below."""
        return self.model.get_input_embeddings().num_embeddings

    @property
    def positions(self) -> int | None:
        """The most tokens of a sequence; None: without a limit."""
        return positions(self.model.config)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` as a device; UsageError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device; cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no CUDA device is available; use --device cpu")
    return device


def load_policy(folder: str, device: str = "auto", dtype: str = "auto", date: str = DEFAULT_DATE) -> Policy:
    """Load a Hugging Face causal language model, in evaluation mode (no dropout anywhere: influence and training need the same function).

    dtype `auto`: float32 on a CPU, the stored format elsewhere. InputError: the folder does not open as a causal language model, or its
    weights are not whole.
    """
    policy_files(folder)
    tokens = load_tokens(folder, date)
    tokenizer, end_token_ids = tokens.tokenizer, tokens.end_token_ids
    where = choose_device(device)
    if dtype not in (*_DTYPES, "auto"):
        raise UsageError(f"--dtype {dtype}: expected {', '.join(_DTYPES)} or auto")
    wanted: Any = _DTYPES.get(dtype) or (torch.float32 if where.type == "cpu" else "auto")
    model = load_whole(folder, dtype=wanted)
    with opening(folder, CONFIG):
        model.to(where).eval()
    check_finite(folder, model)
    check_causal(folder, model)
    warn_of_lost_updates(folder, model.dtype)
    # Automatic differentiation leaves this token's input embedding out. Where it is among a prompt's or a response's tokens it is a token
    # as any other; padding has no part in any sum here.
    model.get_input_embeddings().padding_idx = None
    # A model's generation_config.json may switch top_k, top_p or penalties on; sampling settings come from the command alone.
    model.generation_config = GenerationConfig(
        eos_token_id=end_token_ids,
        pad_token_id=_pad_token(tokenizer, end_token_ids, model.get_input_embeddings().num_embeddings),
    )
    return Policy(model, tokenizer, end_token_ids, folder, tokens.usual_end, date, tokens.unlisted)


def save_policy(policy: Policy, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write weights and configuration; tokenizer and generation settings are copied from the folder the policy was loaded from.

    They are copied, not written again: the library may write the same tokenizer in other words, and its rollouts would seem foreign.
    weights: the state dict to write; None: the model's own.
    """
    given = {} if weights is None else {"state_dict": dict(weights)}
    policy.model.save_pretrained(folder, safe_serialization=True, **given)
    settings = Path(policy.folder) / "generation_config.json"
    for path in [*tokenizer_files(policy.folder), *([settings] if settings.exists() else [])]:
        (folder / path.name).write_bytes(path.read_bytes())
    if not settings.exists():
        (folder / settings.name).unlink(missing_ok=True)


def _pad_token(tokenizer: Any, end_token_ids: list[int], vocabulary: int) -> int:
    own = tokenizer.pad_token_id
    return own if own is not None and own < vocabulary else end_token_ids[0]
