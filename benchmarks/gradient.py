"""What cropi-grad costs beside the forward and backward pass it cannot do without, and what memory it needs.

Peers, on the same prompt, in one process, best of several interleaved rounds:

* plain: the sum of the response tokens' log-probabilities on the same packed row, and its backward pass into `.grad`. The goal's peer.
* rows: the model's own cross-entropy loss with a row for every response, the prompt repeated in each, as trainers do it. Shown for what
  packing saves.

Against them stands cropi-grad's work on a prompt, by the path that `--method auto` takes (several copies of the prompt a pass where they
fit together, and one prompt a pass beside it): the importance-weighted objective and its gradient, consumed parameter by parameter, the exact
norm, exact inner products with two means mapped from disk, and the countsketch. Weights are random, in the shapes of Qwen2.5.

    python benchmarks/gradient.py                                                    # tiny, on a CPU, seconds
    python benchmarks/gradient.py --shape 0.5b --tokens 128                          # minutes and 12 GB on a CPU
    python benchmarks/gradient.py --shape 1.5b --tokens 128 --memory                 # peak of anonymous memory; 13 GB on disk
    python benchmarks/gradient.py --shape 1.5b --device cuda --dtype bfloat16        # 20 GB on a GPU
    python benchmarks/gradient.py --json                                             # one object a goal
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from goals import Goal, anonymous_memory, print_json, print_lines, processor
from transformers import Qwen2Config, Qwen2ForCausalLM

from cropi_tools.data.records import Rollout, Sample
from cropi_tools.gradients.accumulator import Direction, Measure
from cropi_tools.gradients.choose_method import choose_path
from cropi_tools.gradients.estimates import GradientPath
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, batch_of, prepare
from cropi_tools.gradients.reference import TOKENS_PER_PASS, ReferenceGradients, attending
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import response_logprobs, sequence_batch
from cropi_tools.sketches.spec import Layout, ProjectionSpec

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "vocab_size": 151936,
    },
}
PROMPT_TOKENS = 64
MEANS = 2
GOAL_RATIO, GOAL_SHARE, GOAL_GIB = 1.15, 0.05, 20.0


class Clock:
    """Shortest time of each named stage a prompt, waiting for the device before and after it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.best: dict[str, float] = {}

    def time(self, stage: str, task: Any, counted: bool, prompts: int = 1) -> Any:
        self._wait()
        start = time.perf_counter()
        result = task()
        self._wait()
        if counted:
            self.best[stage] = min(self.best.get(stage, float("inf")), (time.perf_counter() - start) / prompts)
        return result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Peak:
    """Highest anonymous memory of the process, in GiB: heap and gradients, not the pages of mapped files. Looked at every 10 ms."""

    def __init__(self) -> None:
        self.highest = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.highest = max(self.highest, anonymous_memory() / 2**30)

    def end(self) -> float:
        self._stop.set()
        self._thread.join()
        return self.highest


def main() -> None:
    parser = argparse.ArgumentParser(description="The work of cropi-grad against a plain forward and backward pass.")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--samples", type=int, default=8, help="responses a prompt")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a response")
    parser.add_argument("--dim", type=int, default=65536, help="dimensions of the sketch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recompute", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--memory", action="store_true", help="one prompt, no peers: the peak of anonymous memory")
    parser.add_argument("--work", help="where the means are written (a temporary folder)")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()

    device = torch.device(options.device)
    torch.manual_seed(0)
    peak = Peak()
    policy = random_policy(options.shape, device, getattr(torch, options.dtype))
    layout = Layout.of(policy.model.named_parameters())
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        files = [Path(folder) / f"mean-{number}.safetensors" for number in range(MEANS)]
        for number, path in enumerate(files):
            write_random_mean(path, layout, number)
        means = {path.stem: Direction(path) for path in files}
        rollout = random_rollout(policy, options.samples, options.tokens)
        task = prepare(rollout, GradientSettings())
        assert isinstance(task, GradientTask)
        path = ReferenceGradients(policy, GradientSettings(), recompute=options.recompute)
        measure = Measure(layout, ProjectionSpec.create("countsketch", layout, options.dim), means, device)
        if options.memory:
            report_memory(options, path, measure, task, peak, layout.size)
        else:
            report(options, times(options, policy, path, measure, task), layout.size, name_of(device))


def times(
    options: argparse.Namespace, policy: Policy, path: ReferenceGradients, measure: Measure, task: GradientTask
) -> dict[str, float]:
    """Shortest seconds of every stage."""
    device = policy.device
    ids = torch.tensor([task.prompt + response for response in task.responses], device=device)
    labels = ids.clone()
    labels[:, :PROMPT_TOKENS] = -100  # no loss on the prompt
    clock = Clock(device)

    def clear() -> None:
        for _, parameter in path.parameters:
            parameter.grad = None

    def rows(counted: bool) -> None:
        loss = clock.time(
            "rows forward", lambda: policy.model(input_ids=ids, labels=labels, use_cache=False).loss, counted
        )
        clock.time("rows backward", loss.backward, counted)
        clear()

    def plain(counted: bool) -> None:
        batch = batch_of(policy, task, range(len(task.responses)))
        with attending(policy.model, batch):
            total = clock.time("plain forward", lambda: response_logprobs(policy.model, batch)[0].sum(), counted)
            clock.time("plain backward", total.backward, counted)
            clear()

    several = choose_path("auto", policy, GradientSettings(), None, TOKENS_PER_PASS, False)
    together = [task]
    while several.room_for(together, task):
        together.append(task)

    def whole(counted: bool) -> None:
        def work(way: GradientPath, tasks: list[GradientTask]) -> None:
            measure.begin(len(tasks))
            way.compute(tasks, measure.add)
            measure.finish()

        clock.time("cropi-grad", lambda: work(several, together), counted, len(together))
        clock.time("one prompt a pass", lambda: work(path, [task]), counted)
        gradients: dict[str, torch.Tensor] = {}
        clock.time("gradient alone", lambda: path.compute([task], gradients.__setitem__), counted)

        def measuring() -> None:
            measure.begin()
            for name, gradient in gradients.items():
                measure.add(name, gradient)
            measure.finish()

        clock.time("norm, products, sketch", measuring, counted)

    for count in range(options.rounds + 1):  # the first is not counted
        for work in (rows, plain, whole):
            work(count > 0)
    return clock.best


def write_random_mean(path: Path, layout: Layout, seed: int) -> None:
    """A mean gradient of random numbers, written piece by piece: its size is that of the policy."""
    header: dict[str, Any] = {}
    start = 0
    for name, shape in layout.entries:
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    draw = np.random.default_rng(seed)
    with path.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for left in range(start // 4, 0, -(1 << 22)):
            opened.write(draw.standard_normal(min(left, 1 << 22), dtype=np.float32).tobytes())


def random_policy(shape: str, device: torch.device, kind: torch.dtype) -> Policy:
    """A Qwen2 model of the shape with random weights and tied embeddings."""
    config = Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **SHAPES[shape])
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(kind).eval()
    return Policy(model, None, [0], shape)


def random_rollout(policy: Policy, samples: int, tokens: int) -> Rollout:
    """One prompt with random responses, sampled by nobody, with the policy's own log-probabilities."""
    draw = random.Random(0)
    sequences = [[draw.randrange(policy.vocabulary) for _ in range(PROMPT_TOKENS + tokens)] for _ in range(samples)]
    prompt = sequences[0][:PROMPT_TOKENS]
    found = []
    for number, sequence in enumerate(sequences):
        response = sequence[PROMPT_TOKENS:]
        with torch.no_grad():
            logprobs, _ = response_logprobs(policy.model, sequence_batch([(prompt, response)], policy.device))
        found.append(Sample(response, logprobs.tolist(), float(number % 2)))
    return Rollout("random", "random", prompt, found, {})


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor(torch.get_num_threads())


def setting(options: argparse.Namespace) -> str:
    return f"{options.shape}, {options.dtype}, {options.samples} x {options.tokens} tokens, prompt {PROMPT_TOKENS}"


def report_memory(
    options: argparse.Namespace, path: ReferenceGradients, measure: Measure, task: GradientTask, peak: Peak, size: int
) -> None:
    """One prompt's gradient, sketch and products, and the highest anonymous memory since the start."""
    before, start = anonymous_memory() / 2**30, time.perf_counter()
    measure.begin()
    path.compute([task], measure.add)
    (found,) = measure.finish()
    seconds, highest = time.perf_counter() - start, peak.end()
    assert np.isfinite([found.square, *found.inner.values(), *found.sketch]).all()
    device = name_of(torch.device("cpu"))
    goal = Goal("gradient-peak-gib", highest, GOAL_GIB, "20 GiB", at_most=True)
    if options.json:
        print_json([goal], f"{device}; {setting(options)}")
        return
    print(f"{setting(options)}, {size} parameters, {device}, one prompt in {seconds:.1f} s")
    print(f"anonymous memory before: {before:.2f} GiB (the weights alone {4 * size / 2**30:.2f} in float32)")
    print(
        f"peak of anonymous memory: {highest:.2f} GiB   goal {GOAL_GIB:.0f} {'met' if highest <= GOAL_GIB else 'MISSED'}"
    )


def report(options: argparse.Namespace, seconds: dict[str, float], size: int, device: str) -> None:
    """Print the table, or the goals."""
    plain = seconds["plain forward"] + seconds["plain backward"]
    rows = seconds["rows forward"] + seconds["rows backward"]
    ratio = seconds["cropi-grad"] / plain
    share = seconds["norm, products, sketch"] / seconds["plain backward"]
    if options.device != "cpu":
        goals = [Goal("gradient-added-to-backward", share, GOAL_SHARE, "the plain pass's backward", at_most=True)]
    else:
        goals = [
            Goal(
                "gradient-to-plain-pass",
                ratio,
                GOAL_RATIO,
                "forward and backward of the same packed tokens",
                at_most=True,
            )
        ]
    if options.json:
        print_json(goals, f"{device}; {setting(options)}")
        return
    print(f"{setting(options)}, {size} parameters, sketch of {options.dim}, {MEANS} means, {device}")
    for stage, spent in seconds.items():
        print(f"{stage:24} {1000 * spent:10.2f} ms   {spent / plain:7.4f} of the plain pass")
    print(
        f"{1 / seconds['cropi-grad']:.2f} prompts a second; the plain pass with a row for every response: {rows / plain:.2f} of it packed"
    )
    print_lines(goals)


if __name__ == "__main__":
    main()
