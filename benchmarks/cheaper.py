"""What cheaper influence costs and what it still knows: one table, against the full exact influence of the same run.

Scoring is what the method really costs. Every row ranks the same pool by the same validation sets; `time` is seconds a prompt for gradient
(or forward mode) and exact products, the policy loaded and everything warm; `precision` is the share of the exact top tenth (reference path, all
parameters, all samples, cosine) that the row's top tenth holds, `rank` Spearman's correlation with it. Each row takes a mean gradient of
its own validation rollouts (same parameters, all their samples); making it is not counted, it is done once for a whole pool.

    python benchmarks/cheaper.py                      # the demo's starting policy and pool, made in --work (minutes, once)
    python benchmarks/cheaper.py --limit 200 --json   # one object a goal
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fidelity import ROOT, demo
from goals import Goal, print_json, print_lines
from gradient import name_of

from cropi_tools import runtime
from cropi_tools.data.manifest import Fingerprint
from cropi_tools.data.means import read_facts
from cropi_tools.data.output import Output
from cropi_tools.data.records import read_rollouts
from cropi_tools.gradients.accumulator import Direction, Measure
from cropi_tools.gradients.batching import batches, survey
from cropi_tools.gradients.estimates import GradientPath
from cropi_tools.gradients.jvp import ForwardMode
from cropi_tools.gradients.per_sample import FastGradients
from cropi_tools.gradients.prompt_objective import (
    GradientSettings,
    GradientTask,
    behavior_of_each,
    prepare,
    token_gradients,
)
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.gradients.write_mean import collect_mean
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.policy.packing import packed, packed_batch
from cropi_tools.policy.parameters import add_adapters, train_only
from cropi_tools.scores.rank_metrics import precision_at, spearman
from cropi_tools.sketches.spec import Layout

SETTINGS = GradientSettings()
GOAL_FORWARD, GOAL_FAST, GOAL_EQUAL = 0.6, 3.0, 1e-4


class Row(NamedTuple):
    """A way to score: seconds a prompt, and for every set the scores of all prompts (NaN where the prompt has none)."""

    name: str
    seconds: float
    scores: dict[str, np.ndarray]


class Pool(NamedTuple):
    """Rollouts of the pool and of the validation sets, all prompts of the pool live."""

    rollouts: list
    valid: dict[str, str]

    def tasks(self, samples: int | None = None) -> list[GradientTask | str]:
        return [prepare(r._replace(samples=r.samples[:samples]), SETTINGS) for r in self.rollouts]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cheaper influence: time and precision@10 % against the exact one.")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "fidelity", help="folder for what is made, kept")
    parser.add_argument("--policy", help="a policy folder (default: the demo's starting policy, made in --work)")
    parser.add_argument("--rollouts", help="rollouts of the pool")
    parser.add_argument("--valid", action="append", metavar="FILE", help="rollouts of a validation set")
    parser.add_argument("--limit", type=int, help="live prompts of the pool, at most")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    runtime.set_quiet(True)
    given = (options.policy, options.rollouts, options.valid)
    if any(given) and not all(given):
        parser.error("--policy, --rollouts and --valid go together")
    options.work.mkdir(parents=True, exist_ok=True)
    folder, rollouts, valid = given if all(given) else demo(options.work)
    live = [r for r in read_rollouts([rollouts]) if isinstance(prepare(r, SETTINGS), GradientTask)][: options.limit]
    pool = Pool(live, {Path(path).name.split(".")[0]: path for path in valid})
    policy = load_policy(folder, "cpu", "float32")

    def fresh(change: Callable[[Policy], None]) -> Policy:
        other = policy._replace(model=copy.deepcopy(policy.model))
        change(other)
        return other

    exact = backward("reference path, all parameters", ReferenceGradients(policy, SETTINGS), policy, pool)
    rows = [exact, backward("fast path", FastGradients(policy, SETTINGS), policy, pool)]
    rows += forward(policy, pool)
    rows.append(head_alone(policy, pool))
    for share in (4, 2):
        rows.append(backward(f"fast path, {share} samples", FastGradients(policy, SETTINGS), policy, pool, share))
    last = policy.model.config.num_hidden_layers - 1
    for words in ([f"model.layers.{last}.*"], ["*.mlp.*"], ["*norm*"], ["*embed*"]):
        some = fresh(lambda other, words=words: train_only(other, words))
        rows.append(backward(f"--params '{words[0]}'", FastGradients(some, SETTINGS), some, pool))
    adapted = fresh(lambda other: add_adapters(other, 8, 0))
    rows.append(backward("--lora 8", FastGradients(adapted, SETTINGS), adapted, pool))
    report(options, rows, exact, len(live))


def mean_files(path: GradientPath, policy: Policy, pool: Pool, folder: Path) -> dict[str, Path]:
    """The mean gradient of every validation set over the path's parameters."""
    made = {}
    for name, rollouts in pool.valid.items():
        made[name] = folder / f"{name}.safetensors"
        output = Output(made[name], Fingerprint("cropi-grad", {}, {}), {})
        output.open()
        work = survey([rollouts], policy.vocabulary, SETTINGS)
        facts = {"policy": "", "tokenizer": "", "objective": {}}
        collect_mean(path, SETTINGS, work, output, Layout.of(path.parameters), facts)
    return made


def backward(name: str, path: GradientPath, policy: Policy, pool: Pool, samples: int | None = None) -> Row:
    """Score by gradients: norm and exact products, no sketch."""
    with tempfile.TemporaryDirectory() as folder:
        means = mean_files(path, policy, pool, Path(folder))
        norms = {name: read_facts(file)["norm"] for name, file in means.items()}
        directions = {name: Direction(file) for name, file in means.items()}
        measure = Measure(Layout.of(path.parameters), None, directions, policy.device)
        tasks = [(place, task) for place, task in enumerate(pool.tasks(samples)) if isinstance(task, GradientTask)]
        scores = {name: np.full(len(pool.rollouts), np.nan) for name in means}

        def run(some: Sequence[tuple[int, GradientTask]]) -> None:
            places = iter([place for place, _ in some])
            for batch in batches(iter([task.rollout for _, task in some]), SETTINGS, path.room_for):
                measure.begin(len(batch.tasks))
                path.compute(batch.tasks, measure.add)
                for found in measure.finish():
                    place = next(places)
                    for mean, value in found.inner.items():
                        scores[mean][place] = value / (found.square**0.5 * norms[mean]) if found.square else np.nan

        return Row(name, timed(run, tasks) / len(pool.rollouts), scores)


def forward(policy: Policy, pool: Pool) -> list[Row]:
    """Score by forward mode: inner products, ranked as they are and, where the exact norms are at hand, as cosines."""
    reference = ReferenceGradients(policy, SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        means = mean_files(reference, policy, pool, Path(folder))
        directions = {name: Direction(file) for name, file in means.items()}
        tasks = [task for task in pool.tasks() if isinstance(task, GradientTask)]
        rows = []
        for names in ([next(iter(means))], list(means)):
            path = ForwardMode(policy, SETTINGS, {name: directions[name] for name in names})
            scores = {name: np.full(len(tasks), np.nan) for name in names}

            def run(
                some: Sequence[GradientTask], path: ForwardMode = path, scores: dict[str, np.ndarray] = scores
            ) -> None:
                place = 0
                for batch in batches(iter([task.rollout for task in some]), SETTINGS, path.room_for):
                    for found in path.compute(batch.tasks):
                        for mean, value in found.inner.items():
                            scores[mean][place] = value
                        place += 1

            label = f"forward mode, {len(names)} mean{'s' if len(names) > 1 else ''}, by inner product"
            rows.append(Row(label, timed(run, tasks) / len(tasks), scores))
        return rows


def head_alone(policy: Policy, pool: Pool) -> Row:
    """Score by the gradients of the output embedding alone, as an output (of a tied one its use as an input is left out): one forward pass.

    With c_t the derivative of the objective by log pi_t, h_t the hidden state and e the one-hot vector of the token, a prompt's gradient is
    sum_t c_t (e_t - pi_t) h_t^T; its product with V is sum_t c_t (e_t - pi_t)^T V h_t, and its norm follows from the products of the rows.
    """
    head = policy.model.get_output_embeddings().weight

    @torch.no_grad()
    def parts(some: Sequence[GradientTask]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each prompt the rows c_t (e_t - pi_t), [T, vocabulary], and h_t, [T, width]."""
        found = []
        for batch in batches(iter([task.rollout for task in some]), SETTINGS, room.room_for):
            tasks = batch.tasks
            packed_row = packed_batch([(task.prompt, task.responses) for task in tasks], policy.device)
            with packed(policy.model, packed_row):
                hidden = packed_row.select(packed_row.forward(policy.model.base_model).last_hidden_state)
            logs = torch.log_softmax(hidden @ head.T, -1)
            of_tokens = logs.gather(-1, packed_row.targets[:, None])[:, 0]
            behavior = behavior_of_each(tasks, packed_row, None, SETTINGS)
            start = 0
            for task, beta in zip(tasks, behavior, strict=True):
                own = slice(start, start + task.tokens)
                derivative, _ = token_gradients(task, range(len(task.responses)), of_tokens[own], beta, SETTINGS)
                error = -logs[own].exp()
                error[torch.arange(task.tokens), packed_row.targets[own]] += 1
                found.append((derivative[:, None] * error, hidden[own]))
                start += task.tokens
        return found

    room = ForwardMode(policy, SETTINGS, {"any": _Nothing()})
    means = {}
    for name, file in pool.valid.items():
        rollouts = list(read_rollouts([file]))
        tasks = [task for task in (prepare(r, SETTINGS) for r in rollouts) if isinstance(task, GradientTask)]
        means[name] = sum((errors.T @ states for errors, states in parts(tasks)), torch.zeros_like(head)) / len(
            rollouts
        )
    tasks = [task for task in pool.tasks() if isinstance(task, GradientTask)]
    scores = {name: np.full(len(tasks), np.nan) for name in means}

    def run(some: Sequence[GradientTask]) -> None:
        for place, (errors, states) in enumerate(parts(some)):
            norm = ((errors @ errors.T) * (states @ states.T)).sum().clamp(min=1e-30).sqrt()
            for name, mean in means.items():
                scores[name][place] = float(((errors @ mean) * states).sum() / (norm * mean.norm()))

    return Row("output embedding alone, forward only", timed(run, tasks) / len(tasks), scores)


class _Nothing:
    """A direction that moves no parameter: forward mode is asked for its batches alone."""

    def get(self, name: str, device: torch.device) -> None:
        return None


def timed(run: Callable[[Sequence], None], tasks: Sequence) -> float:
    """Seconds of a run over all tasks, after one over some that is not counted; the better of two."""
    run(tasks[:32])
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        run(tasks)
        best = min(best, time.perf_counter() - start)
    return best


def report(options: argparse.Namespace, rows: list[Row], exact: Row, prompts: int) -> None:
    """Print the table, or the goals."""
    device = name_of(torch.device("cpu"))
    found = {row.name: row for row in rows}
    fast, one = found["fast path"], found["forward mode, 1 mean, by inner product"]
    goals = [
        Goal("fast-to-reference", exact.seconds / fast.seconds, GOAL_FAST, "the reference path, seconds a prompt"),
        Goal(
            "forward-to-fast", one.seconds / fast.seconds, GOAL_FORWARD, "the fast path, seconds a prompt", at_most=True
        ),
    ]
    if options.json:
        print_json(goals, f"{device}; {prompts} prompts")
        return
    print(f"{prompts} live prompts, sets {', '.join(exact.scores)}, {device}")
    print(f"{'':44} {'ms a prompt':>11} {'of exact':>9}  precision@10 %   rank")
    for row in rows:
        kept, rank = agreement(row, exact)
        print(f"{row.name:44} {1000 * row.seconds:11.2f} {row.seconds / exact.seconds:9.3f}  {kept:14.3f} {rank:6.3f}")
    print_lines(goals)


def agreement(row: Row, exact: Row) -> tuple[float, float]:
    """precision@10 % and rank correlation against the exact cosines, the mean over the row's sets; no score is the last rank."""
    pairs = [(np.nan_to_num(scores, nan=-np.inf), exact.scores[name]) for name, scores in row.scores.items()]
    kept = [precision_at(mine, theirs) for mine, theirs in pairs]
    return float(np.mean(kept)), float(np.mean([spearman(mine, theirs) for mine, theirs in pairs]))


if __name__ == "__main__":
    main()
