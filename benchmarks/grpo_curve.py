"""The same learning curve? cropi-train and TRL's GRPOTrainer from the demo's starting policy, on its pool, a few seeds each.

Both learn with the same settings: 32 prompts x 8 responses of at most 8 tokens at temperature 1, AdamW (.9, .99, 1e-8, no decay) at a
constant rate, gradient norm 1, clip .2, the mean over all tokens, advantages divided by their group's deviation, no KL term, one update a
step. Prompts and samples are each trainer's own, so curves agree in distribution and not line by line. Told are the mean reward of a step,
averaged over windows of ten steps, as the difference of the two trainers' means over seeds with a 95 % t interval (Welch's), and the
accuracy on the demo's two test sets at the end.

    python benchmarks/grpo_curve.py                           # 3 seeds x 60 steps, about four minutes
    python benchmarks/grpo_curve.py --png docs/results/grpo-curve.png
    python benchmarks/grpo_curve.py --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from goals import Goal, print_json, print_lines, processor
from scipy import stats

WINDOW = 10
RATE, BATCH, SAMPLES, TOKENS = 1.5e-4, 32, 8, 8
TESTS = ("reverse", "gcd")


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning curves of cropi-train and TRL's GRPOTrainer.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--demo", type=Path, default=Path("runs/tiny"), help="folder with the demo's P0 and data")
    parser.add_argument("--png", help="draw both curves")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    parser.add_argument("--trl", nargs=2, metavar=("FOLDER", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        run_trl(options.demo, Path(options.trl[0]), int(options.trl[1]), options.steps)
        return
    if not (options.demo / "P0" / "manifest.json").exists():
        sys.exit(f"{options.demo}: has no P0; make CONFIG=examples/tiny/config.mk starting-policy")
    curves: dict[str, list[list[float]]] = {"cropi-train": [], "TRL": []}
    tests: dict[str, list[float]] = {"cropi-train": [], "TRL": []}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seeds):
            for name, train in (("cropi-train", ours), ("TRL", trl)):
                folder = Path(scratch) / f"{name}-{seed}"
                curves[name].append(train(options.demo, folder, seed, options.steps))
                tests[name].append(accuracy(options.demo, folder, seed))
    rows = {name: smoothed(np.array(found)) for name, found in curves.items()}
    differences = [difference(mine, theirs) for mine, theirs in zip(rows["cropi-train"].T, rows["TRL"].T, strict=True)]
    last = difference(tests["cropi-train"], tests["TRL"])
    inside = sum(low <= 0 <= high for _, low, high in differences) / len(differences)
    peer = f"TRL's GRPOTrainer, {options.seeds} seeds"
    goals = [
        Goal("grpo-curve-windows-without-difference", inside, 0.8, peer),
        Goal("grpo-curve-test-difference", abs(last[0]), 0.05, peer, at_most=True),
    ]
    if options.png:
        draw(rows, options.png)
    if options.json:
        means = {name: found.mean(0).round(4).tolist() for name, found in rows.items()}
        print_json(goals, processor(), curves=means, tests=tests)
        return
    print(f"{processor()}; mean reward in windows of {WINDOW} steps, mean of {options.seeds} seeds")
    print(f"{'steps':>10} {'cropi-train':>12} {'TRL':>8} {'difference':>11}   95 % interval")
    for place, (mean, low, high) in enumerate(differences):
        steps = f"{place * WINDOW + 1}-{(place + 1) * WINDOW}"
        mine, theirs = (rows[name][:, place].mean() for name in ("cropi-train", "TRL"))
        print(f"{steps:>10} {mine:12.3f} {theirs:8.3f} {mean:+11.3f}   [{low:+.3f}, {high:+.3f}]")
    for name, found in tests.items():
        print(f"{name:12} test accuracy after {options.steps} steps: " + ", ".join(f"{value:.3f}" for value in found))
    print(f"test accuracy, difference {last[0]:+.3f} [{last[1]:+.3f}, {last[2]:+.3f}]")
    print_lines(goals)


def smoothed(rewards: np.ndarray) -> np.ndarray:
    """[seeds, steps] as means over windows, [seeds, windows]."""
    whole = rewards.shape[1] // WINDOW * WINDOW
    return rewards[:, :whole].reshape(len(rewards), -1, WINDOW).mean(2)


def difference(mine: Any, theirs: Any) -> tuple[float, float, float]:
    """Difference of means, and its 95 % interval by Welch's t."""
    found = stats.ttest_ind(mine, theirs, equal_var=False)
    interval = found.confidence_interval(0.95)
    return float(np.mean(mine) - np.mean(theirs)), float(interval.low), float(interval.high)


def command(name: str, *words: object) -> None:
    program = Path(sys.executable).parent / name
    subprocess.run([str(program), *map(str, words), "--quiet"], check=True, stdout=subprocess.DEVNULL)


def ours(demo: Path, folder: Path, seed: int, steps: int) -> list[float]:
    """The mean reward of each step."""
    shape = ("--steps", steps, "--batch", BATCH, "-n", SAMPLES, "--max-tokens", TOKENS, "--verifier", "exact")
    rule = ("--learning-rate", RATE, "--betas", "0.9,0.99", "--save-every", steps, "--seed", seed, "--collapse", 0)
    command("cropi-train", "--model", demo / "P0", demo / "data" / "pool.jsonl", *shape, *rule, "-o", folder)
    return [json.loads(line)["reward"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trl(demo: Path, folder: Path, seed: int, steps: int) -> list[float]:
    """The same by TRL, in a process of its own."""
    words = ["--trl", folder, seed, "--steps", steps, "--demo", demo]
    subprocess.run([sys.executable, __file__, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "rewards.json").read_text())


def run_trl(demo: Path, folder: Path, seed: int, steps: int) -> None:
    warnings.simplefilter("ignore")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(folder / "work"),
        seed=seed,
        per_device_train_batch_size=BATCH * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=TOKENS,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        mask_truncated_completions=False,
        num_iterations=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    told: list[float] = []

    def exact(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        found = [float(text.strip() == gold) for text, gold in zip(completions, answer, strict=True)]
        told.append(sum(found) / len(found))
        return found

    lines = [json.loads(line) for line in (demo / "data" / "pool.jsonl").read_text().splitlines()]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(demo / "P0", dtype=torch.float32),
        args=config,
        reward_funcs=exact,
        train_dataset=Dataset.from_dict({name: [line[name] for line in lines] for name in ("prompt", "answer")}),
        processing_class=AutoTokenizer.from_pretrained(demo / "P0"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(folder))
    for path in (demo / "P0").glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "generation_config.json").write_bytes((demo / "P0" / "generation_config.json").read_bytes())
    (folder / "rewards.json").write_text(json.dumps(told))


def accuracy(demo: Path, folder: Path, seed: int) -> float:
    """The mean over the demo's test sets, 8 samples a prompt at temperature 1."""
    found = []
    for name in TESTS:
        target = folder.with_name(f"{folder.name}.{name}.jsonl")
        words = ("-n", 8, "--max-tokens", TOKENS, "--verifier", "exact", "--seed", seed)
        command("cropi-rollout", "--model", folder, demo / "data" / f"test.{name}.jsonl", *words, "-o", target)
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        found.append(np.mean([sample["reward"] for row in rows for sample in row["samples"]]))
    return float(np.mean(found))


def draw(rows: dict[str, np.ndarray], path: str) -> None:
    """Both curves with the range of their seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name, found in rows.items():
        steps = (np.arange(found.shape[1]) + 0.5) * WINDOW
        (line,) = axes.plot(steps, found.mean(0), marker="o", label=f"{name}, mean of {len(found)} seeds")
        axes.fill_between(steps, found.min(0), found.max(0), alpha=0.2, color=line.get_color())
    axes.set_xlabel("step")
    axes.set_ylabel(f"mean reward, windows of {WINDOW} steps")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
