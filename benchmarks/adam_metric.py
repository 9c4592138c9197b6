"""Which form of Adam's metric ranks prompts as real steps of Adam do, and what the choice does to the demo's ranking: rank correlations.

The policy is the demo's after one stage of cropi: 25 steps on the selected tenth of the pool, which leave an optimizer state. Of each
prompt, one real AdamW step is made on its gradient alone with that state, and another on no gradient, which moves by the momentum alone; the
truth is the difference that the two make to the objective of a validation set, computed in float64. The same is told to first order for a
gradient divided by 32, a prompt's share in a batch. The forms:

    none      no metric
    zeros     1 / (sqrt(v) + 1e-8), only exact zeros of v left out
    cut       cropi-grad --preconditioner: bias corrected, sqrt(v) below 1 % of the median left out
    floor     the same, sqrt(v) raised to 1 % of the median instead
    step's v  v' = beta2 v + (1 - beta2) g^2 with the prompt's own g: exact for the second moment, but a metric of its own for each prompt

    python benchmarks/adam_metric.py                      # policy and rollouts are made in --work (minutes, once)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fidelity import ROOT, demo, make

from cropi_tools import runtime
from cropi_tools.data.policies import OPTIMIZER_STATE, adam_beta2
from cropi_tools.data.records import read_rollouts
from cropi_tools.gradients.preconditioner import EPSILON, LEAST, Preconditioner
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.policy.logprobs import response_logprobs
from cropi_tools.policy.packing import packed, packed_batch
from cropi_tools.scores.rank_metrics import precision_at, spearman
from cropi_tools.sketches.spec import Layout

SETTINGS = GradientSettings()
TOGETHER = 8  # validation prompts in a pass
BETA1 = 0.9
FORMS = ("none", "zeros", "cut", "floor", "step's v")


def main() -> None:
    parser = argparse.ArgumentParser(description="Adam's metric against real steps of Adam.")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "adam", help="folder for what is made, kept")
    parser.add_argument("--prompts", type=int, default=200, help="prompts of which a real step is made")
    parser.add_argument("--rate", type=float, default=1e-6, help="learning rate of these steps")
    parser.add_argument(
        "--batch", type=int, default=32, help="divide gradients by this as well: one prompt's share of a batch"
    )
    options = parser.parse_args()
    runtime.set_quiet(True)
    trained, pool, valid = stage(options.work)
    policy = load_policy(trained, "cpu", "float32")
    tasks = live(pool)
    steps = Steps(policy, trained, [live(path) for path in valid], options.rate)
    chosen = set(np.random.default_rng(0).permutation(len(tasks))[: options.prompts].tolist())
    scores: dict[str, list[np.ndarray]] = {f"{form}, {kind}": [] for form in FORMS for kind in ("cosine", "dot")}
    truth, linear, share, marked = [], [], [], []
    for place, task in enumerate(tasks):
        gradient = flat_gradient(policy, task, steps.layout)
        for name, values in steps.influence(gradient).items():
            scores[name].append(values)
        if place in chosen:
            marked.append(place)
            truth.append(steps.change(gradient))
            linear.append(steps.first_order(gradient))
            share.append(steps.first_order(gradient / options.batch))
    report(
        [Path(path).name.split(".")[0].removeprefix("valid-") for path in valid],
        {name: np.array(values) for name, values in scores.items()},
        np.array(marked), np.array(truth), np.array(linear), np.array(share), steps, options,
    )  # fmt: skip


def stage(work: Path) -> tuple[str, str, list[str]]:
    """The demo's policy after one stage of cropi, by its own rules; rollouts of its pool and of its validation sets."""
    _, pool, valid = demo(work)
    trained = work / "cropi" / "1" / "1" / "policy"
    make(work, [f"{trained.resolve()}/manifest.json"])
    return str(trained), pool, valid


def live(path: str) -> list[GradientTask]:
    """The prompts of a rollouts file that have a gradient."""
    return [task for rollout in read_rollouts([path]) if isinstance(task := prepare(rollout, SETTINGS), GradientTask)]


def flat_gradient(policy: Policy, task: GradientTask, layout: Layout) -> torch.Tensor:
    """A prompt's gradient, float64 [P]."""
    found = torch.zeros(layout.size, dtype=torch.float64)

    def consume(name: str, gradients: torch.Tensor) -> None:
        found[layout.places[name]] = gradients.reshape(-1).double()

    ReferenceGradients(policy, SETTINGS).compute([task], consume)
    return found


class Steps:
    """Steps of AdamW from a trained policy, and what the forms of the metric say of them."""

    def __init__(self, policy: Policy, folder: str, valid: Sequence[Sequence[GradientTask]], rate: float) -> None:
        from safetensors.torch import load_file

        self.layout = Layout.of(policy.trained)
        names = list(self.layout.places)
        state = load_file(Path(folder) / OPTIMIZER_STATE)
        self._moments = {
            key: torch.cat([state[f"{key}/{name}"].double().reshape(-1) for name in names])
            for key in ("exp_avg", "exp_avg_sq")
        }
        self._step = float(state[f"step/{names[0]}"])
        beta2 = adam_beta2(folder)
        assert beta2 is not None
        self._beta2, self._rate, self._valid = beta2, rate, valid
        counts = [sum(1 for _ in tasks) for tasks in valid]
        self._means = torch.stack(
            [sum(flat_gradient(policy, t, self.layout) for t in ts) / n for ts, n in zip(valid, counts, strict=True)]  # type: ignore[misc]
        )
        wide = copy.deepcopy(policy.model).double()
        self._wide = policy._replace(model=wide)
        self._parameters = [parameter for _, parameter in self._wide.trained]
        self._start = torch.cat([p.detach().reshape(-1).clone() for p in self._parameters])
        scaling = Preconditioner(folder, self.layout, torch.device("cpu"))
        squares = self._moments["exp_avg_sq"]
        roots = (squares / (1 - beta2**self._step)).sqrt()
        self.residues = float((roots < scaling.least).double().mean())
        self.zeros = float((roots == 0).double().mean())
        self.least = scaling.least
        self._metrics = {
            "none": torch.ones_like(roots),
            "zeros": torch.where(squares > 0, 1 / (squares.sqrt() + EPSILON), 0.0),
            "cut": torch.cat([scaling.scale(name) for name in names]).double() ** 2,
            "floor": 1 / (roots.clamp(min=scaling.least) + EPSILON),
        }
        self.norm_of_residues: list[float] = []
        self._weights = torch.nn.Parameter(self._start.clone())
        self._optimizer = torch.optim.AdamW([self._weights], lr=rate, betas=(BETA1, beta2), weight_decay=0.0)
        self._baseline = self._after(torch.zeros_like(roots))

    def influence(self, gradient: torch.Tensor) -> dict[str, np.ndarray]:
        """Cosine and inner product with each set's mean, by every form."""
        squares = self._beta2 * self._moments["exp_avg_sq"] + (1 - self._beta2) * gradient**2
        own = 1 / ((squares / (1 - self._beta2 ** (self._step + 1))).sqrt() + EPSILON)
        found = {}
        for form, metric in {**self._metrics, "step's v": own}.items():
            parts = metric * gradient**2
            dot = self._means @ (metric * gradient)
            norm = (parts.sum() * (self._means**2 @ metric)).sqrt()
            found[f"{form}, cosine"] = (dot / norm).numpy()
            found[f"{form}, dot"] = dot.numpy()
            if form == "zeros":
                self.norm_of_residues.append(float(parts[self._metrics["cut"] == 0].sum() / parts.sum()))
        return found

    def _step_of(self, gradient: torch.Tensor) -> torch.Tensor:
        """The difference that a step makes to the weights, by torch's own AdamW, float64 [P]."""
        weights, optimizer = (
            self._weights,
            self._optimizer,
        )  # one for all steps: optimizers lie in cycles and are freed late
        weights.data.copy_(self._start)
        optimizer.state[weights] = {
            "step": torch.tensor(self._step), **{key: value.clone() for key, value in self._moments.items()}
        }  # fmt: skip
        weights.grad = -gradient  # the objective is maximized
        optimizer.step()
        return weights.detach() - self._start

    def _after(self, gradient: torch.Tensor) -> np.ndarray:
        """Each set's objective after a step."""
        moved = self._start + self._step_of(gradient)
        with torch.no_grad():
            for parameter, part in zip(
                self._parameters, moved.split([p.numel() for p in self._parameters]), strict=True
            ):
                parameter.copy_(part.view_as(parameter))
        return np.array([objective(self._wide, tasks) for tasks in self._valid])

    def change(self, gradient: torch.Tensor) -> np.ndarray:
        """What a real step on this gradient does to each set's objective, less what one on no gradient does."""
        return (self._after(gradient) - self._baseline) / self._rate

    def first_order(self, gradient: torch.Tensor) -> np.ndarray:
        """The same from the step and the means' gradients."""
        return (
            self._means @ (self._step_of(gradient) - self._step_of(torch.zeros_like(gradient)))
        ).numpy() / self._rate


@torch.no_grad()
def objective(policy: Policy, tasks: Sequence[GradientTask]) -> float:
    """The mean over prompts of the objective whose gradient influence takes: the sum of A_k c_kt r_kt."""
    total = 0.0
    for start in range(0, len(tasks), TOGETHER):
        some = tasks[start : start + TOGETHER]
        batch = packed_batch([(task.prompt, task.responses) for task in some], "cpu")
        with packed(policy.model, batch):
            logprobs, _ = response_logprobs(policy.model, batch)
        for task, own in zip(some, logprobs.double().split([task.tokens for task in some]), strict=True):
            beta = torch.tensor([x for s in task.rollout.samples for x in s.logprobs or []], dtype=torch.float64)
            lengths = torch.tensor([len(response) for response in task.responses])
            factors = torch.tensor(task.advantages, dtype=torch.float64) * torch.tensor(
                task.coefficients, dtype=torch.float64
            )
            total += float((factors.repeat_interleave(lengths) * (own - beta).exp()).sum())
    return total / len(tasks)


def report(
    names: Sequence[str], scores: dict[str, np.ndarray], marked: np.ndarray, truth: np.ndarray, linear: np.ndarray,
    share: np.ndarray, steps: Steps, options: argparse.Namespace,
) -> None:  # fmt: skip
    count = len(scores["none, dot"])
    print(
        f"{count} prompts with a gradient; sqrt(v) below {steps.least:.3g}, {LEAST:.0%} of the median: {steps.residues:.1%} of the coordinates, "
        f"{steps.zeros:.1%} exactly zero"
    )
    own = np.array(steps.norm_of_residues)
    print(
        f"they make up more than half of a prompt's squared norm by 'zeros' for {np.mean(own > 0.5):.0%} of the prompts"
    )
    print(f"(mean share {own.mean():.0%}, median {np.median(own):.1%})")
    for place, name in enumerate(names):
        print(f"\n{name}: rank correlation with {len(marked)} real steps (rate {options.rate:g}), precision@10 % of them; "
              f"first order against real {spearman(linear[:, place], truth[:, place]):.4f}")  # fmt: skip
        print(f"  {'':18}{'prompt alone':>28}{f'1/{options.batch} of its gradient':>28}")
        for form, values in scores.items():
            mine = values[marked, place]
            row = [f"{spearman(mine, t[:, place]):.3f}  {precision_at(mine, t[:, place]):.2f}" for t in (truth, share)]
            print(f"  {form:18}{row[0]:>28}{row[1]:>28}")
        print(f"  rankings of all {count} by cosine, Spearman and precision@10 %:")
        for one, other in (("zeros", "cut"), ("zeros", "none"), ("cut", "none"), ("cut", "floor"), ("cut", "step's v")):
            a, b = (scores[f"{form}, cosine"][:, place] for form in (one, other))
            print(f"    {one} and {other}: {spearman(a, b):.3f} and {precision_at(a, b):.2f}")


if __name__ == "__main__":
    main()
