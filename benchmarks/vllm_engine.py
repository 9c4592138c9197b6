"""The vLLM engine against a bare `LLM.generate` of the same vLLM, on the same prompts, with the same sampling parameters and seeds.

A random Qwen2 whose responses end early or late, several samples a prompt. Both run in the one `LLM`, the best of alternating rounds after
one that is not counted, each with an empty prefix cache, and every response must have the same tokens. What is measured is what our engine adds
around vLLM: groups that stream, seeds, log-probabilities as lists. Loading (some 20 s) is not counted. Needs `make setup-vllm`.

    .venv-vllm/bin/python benchmarks/vllm_engine.py          # about a minute on two cores
    .venv-vllm/bin/python benchmarks/vllm_engine.py --json   # one object a goal
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goals import Goal, best_seconds, print_json, print_lines, processor

GOAL = 0.95
GROUP = 256  # requests a group, as cropi-rollout commits them
ENDS = [1, 2, 3, 4]  # a random policy ends a response with each as seldom as with any other token
VOCABULARY = 512


def main() -> None:
    parser = argparse.ArgumentParser(description="The vLLM engine against a bare LLM.generate.")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="samples a prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=256, help="hidden size")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    # as the commands do; threads that spin while they wait slow torch down many times over beside any other process
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with tempfile.TemporaryDirectory() as folder:
        save_random_policy(Path(folder), options.width, options.layers)
        report(options, *measured(options, folder))


def save_random_policy(folder: Path, width: int, layers: int) -> None:
    """A Qwen2 without a tokenizer: only token ids are sampled."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def measured(options: argparse.Namespace, folder: str) -> tuple[dict[str, float], int, float]:
    """Best seconds of the engine (`ours`) and of `LLM.generate` (`bare`), tokens a round, and mean response length."""
    from cropi_tools.engines.protocol import Request, Sampling, sample_seed
    from cropi_tools.engines.vllm_engine import VllmEngine
    from cropi_tools.policy.tokens import Tokens

    engine = VllmEngine(folder, Tokens(None, ENDS, folder), "float32")
    from vllm import SamplingParams  # now that the engine has made it quiet

    llm: Any = engine._llm
    sampling = Sampling(options.max_tokens, 1.0)
    requests = [
        Request([5 + (p * 31 + t * 7) % (VOCABULARY - 5) for t in range(48 + p % 32)], sample_seed(0, p, k))
        for p in range(options.prompts)
        for k in range(options.samples)
    ]
    groups = [requests[start : start + GROUP] for start in range(0, len(requests), GROUP)]
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
    parameters = engine._parameters(sampling)

    def ours() -> list[list[int]]:
        return [found.token_ids for group in engine.stream(groups, sampling) for found in group]

    def bare() -> list[list[int]]:
        wanted = [SamplingParams(**parameters, seed=request.seed % (1 << 63)) for request in requests]
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, wanted, use_tqdm=False)]

    answers: dict[str, list[list[int]]] = {}

    def afresh(name: str, task: Callable[[], list[list[int]]]) -> Callable[[], None]:
        def run() -> None:
            llm.reset_prefix_cache()
            answers[name] = task()

        return run

    seconds = best_seconds({"ours": afresh("ours", ours), "bare": afresh("bare", bare)}, options.rounds)
    assert answers["ours"] == answers["bare"], "the two sampled other tokens"
    engine.close()
    tokens = sum(len(answer) for answer in answers["ours"])
    return seconds, tokens, tokens / len(requests)


def report(options: argparse.Namespace, seconds: dict[str, float], tokens: int, length: float) -> None:
    """The ratio of the two rates, of the best rounds."""
    goals = [Goal("vllm-to-bare", seconds["bare"] / seconds["ours"], GOAL, "LLM.generate in the same vLLM")]
    rates = {name: tokens / time for name, time in seconds.items()}
    if options.json:
        print_json(goals, processor(), tokens_per_second=round(rates["ours"]), bare=round(rates["bare"]))
        return
    print(
        f"{options.prompts} prompts x {options.samples} samples, {length:.1f} tokens a response on average: "
        f"{rates['ours']:.0f} tokens/s, bare {rates['bare']:.0f} (best of {options.rounds} rounds)"
    )
    print_lines(goals)


if __name__ == "__main__":
    main()
