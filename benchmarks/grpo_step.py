"""Seconds and memory of a GRPO step: cropi-train against TRL's GRPOTrainer, on the same policy, prompts, rewards and batch.

Each trainer runs in processes of its own, in turn; of several runs the one with the smaller median step counts, without its first steps.
Both sample 32 prompts x 8 responses, compute one reward a response, and make one AdamW step in float32. TRL has its fastest settings for a
CPU: the whole batch in one pass, no recomputation, no logging, saving or evaluation, no KL term. `update` is all of a step that is not
sampling and rewards. Memory is the most anonymous memory of the process, its library's own imports included, or on a GPU the most that
torch held there.

* demo: the demo's starting policy on its pool (`make CONFIG=examples/tiny/config.mk starting-policy` makes both). About half of the groups
  have equal rewards there; they have no gradient, and only TRL computes it.
* full: a random policy of the same shape, a reward by which no two responses are alike, responses that rarely end early: nothing can be
  skipped and nothing is padding. What is left is arithmetic, which both do with the same library; its share of our update is shown. On
  a GPU that is its utilisation, and TRL has as many tokens in a pass as we do: the whole batch would not fit.

    python benchmarks/grpo_step.py                  # the goals, about three minutes
    python benchmarks/grpo_step.py --json           # one object a goal
    python benchmarks/grpo_step.py --device cuda    # a 0.5B shape in bfloat16 on a GPU, with the utilisation of its arithmetic
    python benchmarks/grpo_step.py --small          # a few prompts of the tiny shape: shows that the script runs, and no more
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from goals import Goal, best_seconds, peak_memory, print_json, print_lines, processor

GOAL_SPEED, GOAL_FULL, GOAL_MEMORY = 2.0, 1.0, 1.0
WARM = 3  # steps that are not counted
REWARD = """
def reward(solution_str, ground_truth, **others):
    return sum(map(ord, solution_str)) % 101 / 100
"""
EXACT = """
def reward(solution_str, ground_truth, **others):
    return float(solution_str.strip() == ground_truth)
"""
PASS = 16384  # tokens in one forward pass on a GPU: cropi-train's default
# half precision of the dense kind, in FLOP a second
PEAKS_OF_GPU = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12}
VOCABULARY = {"tiny": 258, "0.5b": 151936}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
}


class Case(NamedTuple):
    """What both trainers do. shape: of a random policy, or `demo`; prompts: a step; dtype: of matrix products."""

    shape: str
    prompts: int
    samples: int
    tokens: int
    device: str
    dtype: str


class Found(NamedTuple):
    """Medians of a run, in seconds; memory in bytes; trained tokens for the utilisation."""

    step: float
    sampling: float
    update: float
    memory: int
    tokens: float


def main() -> None:
    parser = argparse.ArgumentParser(description="cropi-train against TRL's GRPOTrainer, a step.")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each trainer (default 2)")
    parser.add_argument("--steps", type=int, default=12, help="steps that are counted (default 12)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a response on a GPU (default 256)")
    parser.add_argument("--small", action="store_true", help="a few prompts, once")
    parser.add_argument("--demo", default="runs/tiny", help="folder with the demo's P0 and data (default runs/tiny)")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    parser.add_argument("--trl", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        run_trl(Path(options.trl[0]), Case(*json.loads(options.trl[1])), options.steps, options.threads)
        return
    cuda = options.device == "cuda"
    where = {"device": options.device, "dtype": "bfloat16" if cuda else "float32"}
    if options.small:
        cases = {"full, 8 tokens": Case("tiny", 4, 4, 8, **where)}
    elif cuda:
        cases = {f"full, {options.tokens} tokens": Case("0.5b", 16, 8, options.tokens, **where)}
    else:
        cases = {
            "demo, 8 tokens": Case("demo", 32, 8, 8, **where),
            "full, 8 tokens": Case("tiny", 32, 8, 8, **where),
            "full, 64 tokens": Case("tiny", 32, 8, 64, **where),
        }
    found: dict[str, dict[str, Found]] = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if case.shape == "demo":
                take_demo(folder, Path(options.demo))
            else:
                make_inputs(folder, case.shape)
            runs: dict[str, list[Found]] = {"ours": [], "trl": []}
            for count in range(options.rounds):
                runs["ours"].append(ours(folder, case, options.steps, options.threads, count))
                runs["trl"].append(trl(folder, case, options.steps, options.threads))
            found[name] = {who: min(all_of) for who, all_of in runs.items()}
    peer = "TRL's GRPOTrainer, same policy, prompts and batch"
    faster = {name: one["trl"].step / one["ours"].step for name, one in found.items()}
    full = min(value for name, value in faster.items() if name.startswith("full"))
    memory = max(one["ours"].memory / one["trl"].memory for one in found.values())
    goals = [
        Goal("grpo-step-full-work", full, GOAL_FULL, peer),
        Goal("grpo-step-memory", memory, GOAL_MEMORY, peer, at_most=True),
    ]
    if "demo, 8 tokens" in faster:
        goals.insert(0, Goal("grpo-step-demo", faster["demo, 8 tokens"], GOAL_SPEED, peer))
    device = gpu_name() if cuda else processor(options.threads)
    if options.json:
        seconds = {name: {who: run._asdict() for who, run in one.items()} for name, one in found.items()}
        shares = {
            name: utilisation(one["ours"], cases[name].shape, PEAKS_OF_GPU)
            for name, one in found.items()
            if any(known in device for known in PEAKS_OF_GPU)
        }
        print_json(goals, device, seconds=seconds, utilisation=shares)
        return
    print(f"{device}; seconds a step (median)")
    print(f"{'':16} {'trainer':8} {'step':>8} {'sampling':>9} {'update':>8} {'memory':>9} {'ratio':>6}")
    for name, one in found.items():
        for who, run in one.items():
            ratio = "" if who == "trl" else f"{faster[name]:6.2f}"
            figures = f"{run.step:8.4f} {run.sampling:9.4f} {run.update:8.4f} {run.memory / 1e6:6.0f} MB"
            print(f"{name:16} {who:8} {figures} {ratio}")
    rate = PEAKS_OF_GPU if cuda else {"": product_rate(options.threads)}
    for name, one in found.items():
        if name.startswith("full"):
            share = utilisation(one["ours"], cases[name].shape, rate)
            what = "the card's peak" if cuda else "the rate of large ones"
            print(f"{name}: {share:.0%} of our update is what its matrix products take at {what}")
    print_lines(goals)


def make_inputs(folder: Path, shape: str) -> None:
    """A random policy with a tokenizer, prompts, and the reward function."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tokenizer_of(VOCABULARY[shape])
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY[shape],
        tie_word_embeddings=True,
        initializer_range=0.06 if shape == "tiny" else 0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[shape],
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "P0")
    tokenizer.save_pretrained(folder / "P0")
    draw = random.Random(0)
    rows = [f"{draw.randrange(10, 99999)}+{draw.randrange(10, 999)}=" for _ in range(512)]
    lines = [{"id": str(n), "prompt": text, "answer": "0", "source": "sums"} for n, text in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "reward.py").write_text(REWARD)


def tokenizer_of(vocabulary: int) -> Any:
    """The demo's tokenizer of bytes, and words up to the size of a vocabulary. None is ever made of a text, but each has one of its own: a token
    that reads as nothing would make responses alike.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny"))
    from warmup import make_tokenizer

    bytewise = make_tokenizer()
    written = json.loads(bytewise.backend_tokenizer.to_str())
    words = written["model"]["vocab"]
    words |= {token["content"]: token["id"] for token in written["added_tokens"]}
    words |= {f"w{number:06d}": number for number in range(len(words), vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)),
        pad_token=bytewise.pad_token,
        eos_token=bytewise.eos_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def take_demo(folder: Path, demo: Path) -> None:
    """The demo's policy and prompts, and its reward in both trainers' forms."""
    if not (demo / "P0" / "manifest.json").exists():
        sys.exit(f"{demo}: has no P0; make CONFIG=examples/tiny/config.mk starting-policy")
    shutil.copytree(demo / "P0", folder / "P0")
    shutil.copyfile(demo / "data" / "pool.jsonl", folder / "prompts.jsonl")
    (folder / "reward.py").write_text(EXACT)


def ours(folder: Path, case: Case, steps: int, threads: int, count: int) -> Found:
    """A run of cropi-train, told by its own logs."""
    target = folder / f"P-{case.tokens}-{count}"
    told = folder / "memory"
    program = (
        f"import atexit, pathlib, torch; torch.set_num_threads({threads}); "
        f"atexit.register(lambda: pathlib.Path({str(told)!r}).write_text(str(torch.cuda.max_memory_reserved()))); "
        "from cropi_tools.cli.train import main; main()"
    )
    words = ["--model", folder / "P0", folder / "prompts.jsonl", "--steps", steps + WARM, "-o", target, "--quiet"]
    words += ["--batch", case.prompts, "-n", case.samples, "--max-tokens", case.tokens, "--learning-rate", 1e-6]
    words += ["--verifier", f"{folder / 'reward.py'}:reward", "--save-every", 1000, "--collapse", 0]
    words += ["--device", case.device, "--dtype", case.dtype]
    memory = peak_memory([sys.executable, "-c", program, *map(str, words)])
    if case.device == "cuda":
        memory = int(told.read_text())
    times = [json.loads(line) for line in (target / "timings.jsonl").read_text().splitlines()][WARM:]
    metrics = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()][WARM:]
    skipped = statistics.mean(record["zero_variance_fraction"] for record in metrics)
    assert case.shape == "demo" or skipped == 0, "a group was skipped: not the same work"
    sampling = statistics.median(record["seconds_sampling"] for record in times)
    update = statistics.median(record["seconds_update"] for record in times)
    step = statistics.median(record["seconds_sampling"] + record["seconds_update"] for record in times)
    return Found(step, sampling, update, memory, statistics.mean(record["tokens_trained"] for record in metrics))


def trl(folder: Path, case: Case, steps: int, threads: int) -> Found:
    """A run of TRL's trainer in a process of its own."""
    told = folder / "trl.json"
    words = ["--trl", folder, json.dumps(case), "--steps", steps, "--threads", threads]
    memory = peak_memory([sys.executable, __file__, *map(str, words)])
    result = json.loads(told.read_text())
    return Found(**{**result, "memory": result["memory"] if case.device == "cuda" else memory})


def run_trl(folder: Path, case: Case, steps: int, threads: int) -> None:
    """What that process does; it writes what it measured."""
    warnings.simplefilter("ignore")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    scope: dict[str, Any] = {}
    exec((folder / "reward.py").read_text(), scope)
    half = case.dtype == "bfloat16"
    rows = case.prompts * case.samples
    passes = 1 if case.device == "cpu" else -(-rows * case.tokens // PASS)
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows // passes,
        gradient_accumulation_steps=passes,
        num_generations=case.samples,
        max_completion_length=case.tokens,
        max_steps=steps + WARM,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=half,
        use_cpu=case.device == "cpu",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        beta=0.0,
        loss_type="dapo",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_grad_norm=1.0,
        weight_decay=0.0,
    )
    steps_at: list[float] = []
    sampling: list[float] = []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            begun = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            if case.device == "cuda":
                torch.cuda.synchronize()
            sampling.append(time.perf_counter() - begun)
            return found

    class Clock(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            if case.device == "cuda":
                torch.cuda.synchronize()
            steps_at.append(time.perf_counter())

    rows_of = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]

    def rewards(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [scope["reward"](text, gold) for text, gold in zip(completions, answer, strict=True)]

    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(folder / "P0", dtype=torch.float32),
        args=config,
        reward_funcs=rewards,
        train_dataset=Dataset.from_dict({name: [row[name] for row in rows_of] for name in ("prompt", "answer")}),
        processing_class=AutoTokenizer.from_pretrained(folder / "P0"),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    whole = [after - before for before, after in itertools.pairwise(steps_at)][WARM - 1 :]
    parts = list(zip(whole, sampling[WARM:], strict=True))
    result = {
        "step": statistics.median(whole),
        "sampling": statistics.median(one for _, one in parts),
        "update": statistics.median(step - one for step, one in parts),
        "memory": torch.cuda.max_memory_reserved(),
        "tokens": 0.0,
    }
    (folder / "trl.json").write_text(json.dumps(result))


def utilisation(found: Found, shape: str, rates: dict[str, float]) -> float:
    """Six operations a parameter (but the input embedding) and token, forward and backward, at the device's rate; over the update's time."""
    sizes = SHAPES[shape]
    width, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    shared = 2 * width * width * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    parameters = layers * (2 * width * width + shared + 3 * width * inner) + width * VOCABULARY[shape]
    rate = next((value for name, value in rates.items() if name in gpu_name()), float("nan"))
    return 6 * parameters * found.tokens / found.update / rate


def product_rate(threads: int) -> float:
    """Operations a second of a large float32 matrix product here."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = best_seconds({"product": lambda: left @ right}, 5)["product"]
    return 2 * 2048**3 / seconds


def gpu_name() -> str:
    """The first GPU's name; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    found = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return found.stdout.strip().partition("\n")[0]


if __name__ == "__main__":
    main()
