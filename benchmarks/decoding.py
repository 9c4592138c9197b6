"""Tokens a second of the decoding loop against the library's own generation, on random policies.

All in one process, best of several interleaved rounds. `loop` is `engines/decoding.py`; its peers, which compute the same distribution:

* processor: `generate` with the logits processor that gives each sample its own numbers, the engine's way for all other models.
* generate: plain `generate(do_sample=True)`, all prompts' samples as rows, with every other parameter off.

A goal's value is the loop's tokens a second divided by those of the faster peer. The tiny policy has the shape of `examples/tiny`; any of
some tokens ends a response, so that lengths are spread as those of real responses are, and of two limits the worse counts. Without an end
token all responses have full length, which suits the library best; that is shown, and is the case for the 0.1B policy, once with 8 samples
a prompt and once with a single one. In a third case all prompts begin with the same 160 tokens, as with worked examples or a long system
message. Also shown: what choosing a token takes in a large vocabulary.

The library's continuous batching (`generate_batch`) runs on a CPU, samples all requests from one generator, takes no sampling of a row's
own, and even with its cache sized for the work (by default it is all of the memory) is slower than `generate`: see `--continuous`.

On a GPU the engine leaves the loop alone, since it was never measured there; here it is measured, in bfloat16, beside the other two.

    python benchmarks/decoding.py                # the goals, about a minute
    python benchmarks/decoding.py --continuous   # with continuous batching
    python benchmarks/decoding.py --device cuda  # the 0.1B policy on a GPU
    python benchmarks/decoding.py --dtype bfloat16   # on a CPU
    python benchmarks/decoding.py --small        # one case once, in seconds: shows that the script runs, and no more
    python benchmarks/decoding.py --json         # one object a goal
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from goals import Goal, best_seconds, print_json, print_lines, processor
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from cropi_tools.engines.decoding import decode
from cropi_tools.engines.generating import ROWS
from cropi_tools.engines.next_token import choose, uniforms
from cropi_tools.engines.protocol import Request, Sampling, sample_seed
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.loading import Policy

GOAL_TINY, GOAL_LARGE, GOAL_CHOICE, GOAL_WORKED = 3.0, 1.0, 2.0, 2.0
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 80,
    },
    "0.1b": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32768,
    },
}


WORKED = "0.1b, worked examples"
COUNTED = {"tiny, 64 tokens", "tiny, 8 tokens", "0.1b, 8 samples, no end", "0.1b, 1 sample, no end"}  # by the goals


class Case(NamedTuple):
    """What is sampled: prompts of `shortest` to `longest` tokens after `start` tokens that all begin with, so many samples of each, `ends` end
    tokens (0: none comes).
    """

    shape: str
    prompts: int
    samples: int
    shortest: int
    longest: int
    limit: int
    ends: int
    start: int = 0


CASES = {
    "tiny, 64 tokens": Case("tiny", 32, 8, 8, 20, 64, 3),
    "tiny, 8 tokens": Case("tiny", 32, 8, 8, 20, 8, 13),
    "tiny, 64 tokens, no end": Case("tiny", 32, 8, 8, 20, 64, 0),
    "0.1b, 8 samples, no end": Case("0.1b", 2, 8, 24, 64, 12, 0),
    "0.1b, 1 sample, no end": Case("0.1b", 16, 1, 24, 64, 12, 0),
    WORKED: Case("0.1b", 16, 1, 16, 32, 12, 0, 160),
}
GPU_CASES = {
    "0.1b, 8 samples, no end": Case("0.1b", 16, 8, 24, 64, 64, 0),
    "0.1b, 1 sample, no end": Case("0.1b", 128, 1, 24, 64, 64, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The decoding loop against the library's own generation.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds on the tiny policy; one on the other (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--small", action="store_true", help="one case, once")
    parser.add_argument("--continuous", action="store_true", help="show the library's continuous batching as well")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = GPU_CASES if options.device == "cuda" else CASES
    if options.small:
        cases = {"tiny, 8 tokens": CASES["tiny, 8 tokens"]}
    kind = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    policies = {name: random_policy(name, options.device, kind) for name in {case.shape for case in cases.values()}}
    found = {}
    for name, case in cases.items():
        rounds = options.rounds if case.shape == "tiny" and not options.small else 1
        found[name] = measured(policies[case.shape], case, rounds)

    def worse(shape: str) -> float:
        return min(lead(one) for name, one in found.items() if name in COUNTED and cases[name].shape == shape)

    peer = "the faster of generate with our processor and generate(do_sample=True)"
    where = "-gpu" if options.device == "cuda" else "-bfloat16" if kind == "bfloat16" else ""
    goals = [
        Goal(f"decoding-{shape}{where}", worse(shape), goal, peer)
        for shape, goal in (("tiny", GOAL_TINY), ("0.1b", GOAL_LARGE))
        if shape in policies
    ]
    if WORKED in found:
        goals.append(Goal(f"decoding-worked-examples{where}", lead(found[WORKED]), GOAL_WORKED, peer))
    if not options.small:
        choice = choosing(options.device)
        value = choice["plain"] / choice["choose"]
        goals.append(Goal(f"choosing-151936{where}", value, GOAL_CHOICE, "log_softmax and a cumulative sum"))
    device = torch.cuda.get_device_name() if options.device == "cuda" else processor(torch.get_num_threads())
    if options.json:
        print_json(goals, device, tokens_per_second=found)
        return
    print(f"{device}; tokens a second")
    print(f"{'':26} {'mean length':>11} {'loop':>9} {'processor':>9} {'generate':>9}")
    for name, rates in found.items():
        print(
            f"{name:26} {rates['mean length']:11.1f} {rates['loop']:9.0f} {rates['processor']:9.0f} {rates['generate']:9.0f}"
        )
    if options.continuous and options.device == "cpu":
        wall, busy = continuous(policies["tiny"], CASES["tiny, 64 tokens"])
        print(
            f"continuous batching, tiny, 64 tokens: {wall:.0f} tokens a second, {busy:.0f} a second of processor time"
        )
    if not options.small:
        print(
            f"choosing 64 tokens of 151936: {1000 * choice['choose']:.0f} ms, plainly {1000 * choice['plain']:.0f} ms"
        )
    print_lines(goals)


def lead(rates: dict[str, float]) -> float:
    """The loop's tokens a second to those of the faster peer."""
    return rates["loop"] / max(rates["processor"], rates["generate"])


def random_policy(shape: str, device: str, kind: str) -> Policy:
    """A Qwen2 model of the shape with random weights; its distributions are nearly uniform."""
    config = Qwen2Config(tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0, **SHAPES[shape])
    model = Qwen2ForCausalLM(config).eval().to(device, getattr(torch, kind))
    return Policy(model, None, [1], shape)


def requests_of(case: Case) -> list[Request]:
    """Random prompts and their samples."""
    draw = random.Random(0)
    vocabulary = SHAPES[case.shape]["vocab_size"]
    start = [draw.randrange(vocabulary) for _ in range(case.start)]
    prompts = [
        start + [draw.randrange(vocabulary) for _ in range(draw.randint(case.shortest, case.longest))]
        for _ in range(case.prompts)
    ]
    return [Request(ids, sample_seed(0, p, k)) for p, ids in enumerate(prompts) for k in range(case.samples)]


def measured(policy: Policy, case: Case, rounds: int) -> dict[str, float]:
    """Tokens a second of each way, and the mean length of the loop's responses."""
    requests, sampling = requests_of(case), Sampling(case.limit, 1.0)
    ends = list(range(1, case.ends + 1)) or [-1]
    policy = policy._replace(end_token_ids=ends)
    loop, processor_way = TransformersEngine(policy), TransformersEngine(policy, loop=False)
    assert policy.device.type != "cpu" or loop.settings(sampling)["decoder"] == "loop"
    tokens: dict[str, int] = {}

    def counted(name: str, sample: Callable[[], list[int]]) -> Callable[[], None]:
        def task() -> None:
            tokens[name] = sum(sample())

        return task

    def by_loop() -> list[int]:
        if policy.device.type == "cpu":
            return by_engine(loop)()
        decoded = decode(policy.model, requests, sampling, policy.end_token_ids, ROWS)
        return lengths(decoded.tokens, policy)

    def by_engine(engine: TransformersEngine) -> Callable[[], list[int]]:
        return lambda: [len(response.token_ids) for response in engine.sample(requests, sampling)]

    seconds = best_seconds(
        {
            "loop": counted("loop", by_loop),
            "processor": counted("processor", by_engine(processor_way)),
            "generate": counted("generate", lambda: plain_generate(policy, requests, sampling)),
        },
        rounds,
    )
    rates = {name: tokens[name] / seconds[name] for name in seconds}
    return {**rates, "mean length": tokens["loop"] / len(requests)}


def settings(policy: Policy, sampling: Sampling) -> GenerationConfig:
    """Plain sampling by the library."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_tokens,
        eos_token_id=policy.end_token_ids,
        pad_token_id=0,
    )


@torch.no_grad()
def plain_generate(policy: Policy, requests: list[Request], sampling: Sampling) -> list[int]:
    """Lengths of responses sampled by the library alone."""
    longest = max(len(request.prompt_token_ids) for request in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
        mask[row, longest - len(request.prompt_token_ids) :] = 1
    ids, mask = ids.to(policy.device), mask.to(policy.device)
    found = policy.model.generate(ids, attention_mask=mask, generation_config=settings(policy, sampling))[:, longest:]
    return lengths(found, policy)


def lengths(tokens: torch.Tensor, policy: Policy) -> list[int]:
    """Of responses [rows, tokens], what comes before their first end token."""
    ended = torch.isin(tokens, torch.tensor(policy.end_token_ids, device=tokens.device))
    return (ended.cumsum(1) - ended.long() == 0).sum(1).tolist()


def continuous(policy: Policy, case: Case) -> tuple[float, float]:
    """Tokens a second, and a second of processor time, of the library's continuous batching, once after a first time."""
    requests, sampling = requests_of(case), Sampling(case.limit, 1.0)
    policy = policy._replace(end_token_ids=list(range(1, case.ends + 1)))
    cache = ContinuousBatchingConfig(num_blocks=1024, page_size=32, max_batch_tokens=4096, use_cuda_graph=False)
    inputs = [request.prompt_token_ids for request in requests]
    tokens, start, busy = 0, 0.0, 0.0
    for _ in range(2):
        start, busy = time.perf_counter(), time.process_time()
        found: dict[str, Any] = policy.model.generate_batch(
            inputs, generation_config=settings(policy, sampling), continuous_batching_config=cache
        )
        tokens = sum(len(one.generated_tokens) for one in found.values())
    return tokens / (time.perf_counter() - start), tokens / (time.process_time() - busy)


def choosing(device: str) -> dict[str, float]:
    """Seconds to choose 64 tokens from logits over a vocabulary of 151936, by the engine and plainly."""
    logits = 3 * torch.randn(64, 151936, device=device)
    numbers = torch.from_numpy(uniforms(np.arange(64, dtype=np.uint64), 0)).to(device)

    def plain() -> None:
        logprobs = torch.log_softmax(logits, -1)
        cumulative = logprobs.double().exp().cumsum(-1)
        chosen = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
        logprobs.gather(-1, chosen).cpu()  # which waits for a GPU

    return best_seconds({"choose": lambda: choose(logits, numbers, 1.0)[0].cpu(), "plain": plain}, 5)


if __name__ == "__main__":
    main()
