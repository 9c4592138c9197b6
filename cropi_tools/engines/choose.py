"""From options to an engine: the embedded one over a loaded policy, vLLM in this process, or a server."""

from __future__ import annotations

from typing import NamedTuple

from cropi_tools.data.dates import DEFAULT_DATE
from cropi_tools.engines.protocol import Engine
from cropi_tools.policy.tokens import Tokens, load_tokens


class Server(NamedTuple):
    """An OpenAI-compatible endpoint: its address, the model's name there (None: the only one), the most requests in flight."""

    url: str
    served_model: str | None
    concurrency: int


class Opened(NamedTuple):
    """An engine with the tokenizer's side of its policy, and where it computes."""

    engine: Engine
    tokens: Tokens
    device: str


def open_engine(
    name: str, folder: str, device: str, dtype: str, server: Server | None = None, date: str = DEFAULT_DATE
) -> Opened:
    """The engine `transformers`, `vllm` or `server` for a policy folder. InputError, UsageError: what it needs is not there."""
    if name == "vllm":
        from cropi_tools.engines.vllm_engine import VllmEngine

        tokens = load_tokens(folder, date)
        vllm = VllmEngine(folder, tokens, dtype=dtype)
        return Opened(vllm, tokens, vllm.device)
    if name == "server":
        from cropi_tools.engines.server_engine import ServerEngine

        assert server is not None
        tokens = load_tokens(folder, date)
        return Opened(
            ServerEngine(server.url, tokens, server.served_model, concurrency=server.concurrency), tokens, "server"
        )
    from cropi_tools.engines.transformers_engine import TransformersEngine
    from cropi_tools.policy.loading import load_policy

    policy = load_policy(folder, device, dtype, date)
    return Opened(TransformersEngine(policy), policy.tokens, str(policy.device))
