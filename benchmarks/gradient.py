"""What cropi-grad costs beside the forward and backward pass it cannot do without, and what memory it needs.

Peers, on the same prompt, in one process, best of several interleaved rounds:

* plain: the sum of the response tokens' log-probabilities on the same packed row, and its backward pass into `.grad`. The goal's peer.
* rows: the model's own cross-entropy loss with a row for every response, the prompt repeated in each, as trainers do it. Shown for what
  packing saves.

Against them stands cropi-grad's work on a prompt, by the path that `--method auto` takes (several copies of the prompt a pass where they
fit together, and one prompt a pass beside it): the importance-weighted objective and its gradient, consumed parameter by parameter, the exact
norm, exact inner products with two means mapped from disk, and the countsketch. Weights are random, in the shapes of Qwen2.5 (0.5b, 1.5b) and
SmolLM2 (135m). On a GPU the most that torch held there is shown for each stage.

    python benchmarks/gradient.py                                                    # tiny, on a CPU, seconds
    python benchmarks/gradient.py --shape 0.5b --tokens 128                          # minutes and 12 GB on a CPU
    python benchmarks/gradient.py --shape 1.5b --tokens 128 --memory                 # peak of anonymous memory; 13 GB on disk
    python benchmarks/gradient.py --shape 0.5b --layers 2 --tokens 16 --samples 4    # mostly embedding: two prompts a pass, or one
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
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

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
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
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
    """Shortest time of each named stage a prompt, waiting for the device before and after it; on a GPU also the most bytes held meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.best: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def time(self, stage: str, task: Any, counted: bool, prompts: int = 1) -> Any:
        self._wait()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        result = task()
        self._wait()
        if self._device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self._device)
            self.peaks[stage] = max(self.peaks.get(stage, 0), held)
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
    parser.add_argument("--layers", type=int, help="other than the shape's")
    parser.add_argument("--samples", type=int, default=8, help="responses a prompt")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a response")
    parser.add_argument("--dim", type=int, default=65536, help="dimensions of the sketch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recompute", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--memory", action="store_true", help="one pass, no peers: the peak of anonymous memory")
    parser.add_argument("--method", choices=("auto", "reference"), default="reference", help="of --memory")
    parser.add_argument("--work", help="where the means are written (a temporary folder)")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()

    device = torch.device(options.device)
    torch.manual_seed(0)
    peak = Peak()
    if options.layers:
        SHAPES[options.shape]["num_hidden_layers"] = options.layers
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
            way = path if options.method == "reference" else automatic(policy)
            report_memory(options, way, measure, filled(way, task), peak, layout.size)
        else:
            clock = Clock(device)
            together = times(clock, policy, path, measure, task, options.rounds)
            report(options, clock, together, layout.size, name_of(device))


def automatic(policy: Policy) -> GradientPath:
    """The way that cropi-grad takes by itself."""
    return choose_path("auto", policy, GradientSettings(), None, TOKENS_PER_PASS, False)


def filled(way: GradientPath, task: GradientTask) -> list[GradientTask]:
    """As many copies of a prompt as a pass holds."""
    together = [task]
    while way.room_for(together, task):
        together.append(task)
    return together


def times(
    clock: Clock, policy: Policy, path: ReferenceGradients, measure: Measure, task: GradientTask, rounds: int
) -> int:
    """Time every stage. Returns how many prompts shared a pass of cropi-grad."""
    device = policy.device
    ids = torch.tensor([task.prompt + response for response in task.responses], device=device)
    labels = ids.clone()
    labels[:, :PROMPT_TOKENS] = -100  # no loss on the prompt

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

    several = automatic(policy)
    together = filled(several, task)

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

    for count in range(rounds + 1):  # the first is not counted
        for work in (rows, plain, whole):
            work(count > 0)
    return len(together)


def write_random_mean(path: Path, layout: Layout, seed: int) -> None:
    """A mean gradient of random numbers, the same ones again in a large policy, written piece by piece: its size is that of the policy."""
    header: dict[str, Any] = {}
    start = 0
    for name, shape in layout.entries:
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    piece = np.random.default_rng(seed).standard_normal(min(start // 4, 1 << 22), dtype=np.float32).tobytes()
    with path.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for left in range(start, 0, -len(piece)):
            opened.write(piece[:left])


def random_policy(shape: str, device: torch.device, kind: torch.dtype) -> Policy:
    """A Qwen2 model of the shape, for SmolLM2's a Llama, with random weights and tied embeddings."""
    sizes = {"num_key_value_heads": 2, "tie_word_embeddings": True, **SHAPES[shape]}
    with torch.device(device):
        if shape == "135m":
            model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        model = model.to(kind).eval()
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
    layers = f" of {options.layers} layers" if options.layers else ""
    return (
        f"{options.shape}{layers}, {options.dtype}, {options.samples} x {options.tokens} tokens, prompt {PROMPT_TOKENS}"
    )


def report_memory(
    options: argparse.Namespace, path: GradientPath, measure: Measure, tasks: list[GradientTask], peak: Peak, size: int
) -> None:
    """Gradients, sketches and products of one pass, and the highest anonymous memory since the start."""
    before, start = anonymous_memory() / 2**30, time.perf_counter()
    measure.begin(len(tasks))
    path.compute(tasks, measure.add)
    for found in measure.finish():
        assert np.isfinite([found.square, *found.inner.values(), *found.sketch]).all()
    seconds, highest = time.perf_counter() - start, peak.end()
    device = name_of(torch.device("cpu"))
    goal = Goal("gradient-peak-gib", highest, GOAL_GIB, "20 GiB", at_most=True)
    if options.json:
        print_json([goal], f"{device}; {setting(options)}")
        return
    print(f"{setting(options)}, {size} parameters, {device}, prompts of a pass: {len(tasks)}, in {seconds:.1f} s")
    print(f"anonymous memory before: {before:.2f} GiB (the weights alone {4 * size / 2**30:.2f} in float32)")
    print(
        f"peak of anonymous memory: {highest:.2f} GiB   goal {GOAL_GIB:.0f} {'met' if highest <= GOAL_GIB else 'MISSED'}"
    )


def report(options: argparse.Namespace, clock: Clock, together: int, size: int, device: str) -> None:
    """Print the table, or the goals."""
    seconds = clock.best
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
        more = {"parameters": size, "prompts_a_pass": together, "seconds": seconds, "peak_bytes": clock.peaks}
        print_json(goals, f"{device}; {setting(options)}", **more)
        return
    print(f"{setting(options)}, {size} parameters, sketch of {options.dim}, {MEANS} means, {device}")
    print(f"prompts that share a pass of cropi-grad: {together}")
    for stage, spent in seconds.items():
        held = f"   {clock.peaks[stage] / 2**30:6.2f} GiB" if clock.peaks else ""
        print(f"{stage:24} {1000 * spent:10.2f} ms   {spent / plain:7.4f} of the plain pass{held}")
    print(
        f"{1 / seconds['cropi-grad']:.2f} prompts a second; the plain pass with a row for every response: {rows / plain:.2f} of it packed"
    )
    print_lines(goals)


if __name__ == "__main__":
    main()
