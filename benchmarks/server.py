"""The server engine against a plain concurrent loop over the `openai` client, on the same vLLM server, with the same parameters and seeds.

A small random policy is served on loopback (some 30 s, not counted), and responses are short, so that requests and not the model are
what takes time. Both keep as many requests in flight, in alternating rounds after one that is not counted, best round each; every
response must have the same tokens. What is measured is what our engine adds around the client: groups in order, checks, a thread,
log-probabilities. Needs the environment of `make setup-vllm`, or the address of a running server and the folder that it serves.

    .venv-vllm/bin/python benchmarks/server.py          # about a minute on two cores
    .venv-vllm/bin/python benchmarks/server.py --json   # one object a goal
    python benchmarks/server.py --url http://127.0.0.1:8000/v1 --model FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fidelity import ROOT
from goals import Goal, best_seconds, print_json, print_lines, processor
from serving import serving

from cropi_tools.engines.protocol import Completion, Request, Sampling, sample_seed
from cropi_tools.engines.server_engine import SEED_BITS, ServerEngine
from cropi_tools.policy.tokens import load_tokens

sys.path.insert(0, str(ROOT / "examples" / "tiny"))
from warmup import make_model, make_tokenizer

GOAL = 0.9
GROUP = 64  # requests a group; fewer than cropi-rollout commits at once, so that several are in flight


def main() -> None:
    parser = argparse.ArgumentParser(description="The server engine against a plain loop over the openai client.")
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--url", help="a running server; otherwise one is started")
    parser.add_argument("--model", type=Path, help="the folder that it serves")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    if (options.url is None) != (options.model is None):
        parser.error("--url and --model belong together")
    if options.url:
        measure(options, options.url, options.model)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "policy"
        tokenizer = make_tokenizer()
        make_model(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with serving(folder, Path(name) / "log", "--logprobs-mode", "processed_logprobs") as url:
            measure(options, url, folder)


def measure(options: argparse.Namespace, url: str, folder: Path) -> None:
    """Both, in alternating rounds, and the goal."""
    sampling = Sampling(options.max_tokens, 1.0)
    asked = [
        Request([2 + (7 * k + 3 * t) % 60 for t in range(24)], sample_seed("bench", k)) for k in range(options.requests)
    ]
    groups = [asked[start : start + GROUP] for start in range(0, len(asked), GROUP)]
    engine = ServerEngine(url, load_tokens(str(folder)), concurrency=options.concurrency)
    ours: list[Completion] = []
    plain: list[list[int]] = []

    def engine_round() -> None:
        ours[:] = [one for group in engine.stream(groups, sampling) for one in group]

    def plain_round() -> None:
        plain[:] = asyncio.run(plain_loop(engine, asked, sampling, options.concurrency))

    try:
        seconds = best_seconds({"ours": engine_round, "plain": plain_round}, options.rounds)
    finally:
        engine.close()
    if [one.token_ids for one in ours] != plain:
        raise SystemExit("the two gave different responses")
    goals = [Goal("server-client", seconds["plain"] / seconds["ours"], GOAL, "a plain loop over the openai client")]
    rates = {name: options.requests / taken for name, taken in seconds.items()}
    if options.json:
        print_json(goals, processor(), **{f"{name}_per_second": round(rate, 1) for name, rate in rates.items()})
        return
    print(f"responses a second: ours {rates['ours']:.1f}, plain {rates['plain']:.1f}")
    print_lines(goals)


async def plain_loop(
    engine: ServerEngine, asked: Sequence[Request], sampling: Sampling, concurrency: int
) -> list[list[int]]:
    """Token ids of every request, by the client alone; the parameters are those that the engine says it sends."""
    import openai

    said = engine.settings(sampling)
    ours = ("engine", "server", "version", "url", "served_model", "end_token_ids", "seed_bits")
    fields = {name: value for name, value in said.items() if name not in ours}
    places = asyncio.Semaphore(concurrency)
    key = os.environ.get("OPENAI_API_KEY") or "none"
    async with openai.AsyncOpenAI(base_url=said["url"], api_key=key, max_retries=8, timeout=600) as client:

        async def one(request: Request) -> list[int]:
            async with places:
                found = await client.completions.create(
                    model=said["served_model"],
                    prompt=request.prompt_token_ids,
                    seed=request.seed % 2**SEED_BITS,
                    extra_body=fields,
                )
            return found.choices[0].token_ids  # type: ignore[attr-defined]

        return await asyncio.gather(*map(one, asked))


if __name__ == "__main__":
    main()
