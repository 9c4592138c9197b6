"""What an update says of each of its prompts on the side: its gradient's norm, inner products and cosines with mean gradients (--against).

A prompt's gradient is cropi-grad's, of the step's rollouts at the policy before the update: `--aggregation`, `--advantage` and
`--policy-temperature` (the sampling temperature) as in training, token weights, `--ppo-clip` as `--clip`, or with --importance-cap C in its
place `--weight-clip 0,C`. On policy, where ratios are 1, neither of these matters. The loss has the same terms over the denominator of the
whole mini-batch, so the two differ by one factor a prompt.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from cropi_tools.data.jsonl import Record
from cropi_tools.data.means import read_finished
from cropi_tools.data.policies import policy_input
from cropi_tools.data.records import Rollout, Sample, pass_rate
from cropi_tools.gradients.accumulator import Direction
from cropi_tools.gradients.pass_figures import Figures, PassFigures, Share
from cropi_tools.gradients.per_sample_rules import NoRule
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.gradients.targets import check_mean
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import SequenceBatch
from cropi_tools.policy.packing import PackedBatch
from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches.spec import Layout
from cropi_tools.training.batches import Group
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.update import mixed_precision


class ByProduct:
    """Observes updates through `figures`. norms: of the means that these take products with. settings: whose gradients are told."""

    def __init__(self, figures: PassFigures, norms: Mapping[str, float], settings: GradientSettings) -> None:
        self._figures, self._norms, self._settings = figures, norms, settings
        # by a group's number: its micro-batches, how many of them are to come, and a response's length with its coefficient
        self._parts: Counter[int] = Counter()
        self._left: Counter[int] = Counter()
        self._known: dict[int, tuple[int, float]] = {}

    def begin(self, parts: Sequence[Sequence[Group]]) -> None:
        """These micro-batches come; the numbers of their groups are places among the step's rollouts."""
        groups = [group for part in parts for group in part]
        self._parts = Counter(group.number for group in groups)
        self._left = self._parts.copy()
        firsts = {group.number: group.responses[0] for group in groups}
        self._known = {number: (len(one.tokens), one.coefficient) for number, one in firsts.items()}
        self._figures.begin(1 + max(self._parts, default=0))

    def watching(
        self, part: Sequence[Group], batch: PackedBatch | SequenceBatch
    ) -> contextlib.AbstractContextManager[None]:
        """Around the forward pass of a micro-batch."""
        shares = [Share(group.number, len(group.responses), self._parts[group.number] == 1) for group in part]
        return self._figures.watching(batch, shares)

    def passed(self, part: Sequence[Group]) -> None:
        """The backward pass of a micro-batch was made."""
        for group in part:
            self._left[group.number] -= 1
        self._figures.close([group.number for group in part if not self._left[group.number]])

    def records(self, step: int, parts: Sequence[Sequence[Record]]) -> Iterator[Record]:
        """A line for each prompt of the update that was observed last."""
        found = self._figures.finish()
        for number, rollout in enumerate(rollout for part in parts for rollout in part):
            yield {"step": step, **self._record(number, rollout, found)}

    def _record(self, number: int, record: Record, found: Sequence[Figures]) -> Record:
        samples = [Sample(one["token_ids"], one["logprobs"], float(one["reward"])) for one in record["samples"]]
        rollout = Rollout(record["id"], record["source"], record["prompt_token_ids"], samples, record)
        task = prepare(rollout, self._settings)
        known = {"id": rollout.id, "source": rollout.source, "pass_rate": pass_rate(rollout.rewards)}
        if isinstance(task, GradientTask):
            factor = self._factor(number, task)
            norm, inner = found[number]
            norm *= factor
            if norm > 0 and math.isfinite(norm):
                # the loss is minimized, the objective maximized
                products = {name: -factor * value for name, value in inner.items()}
                scores = {name: _cosine(value, norm * self._norms[name]) for name, value in products.items()}
                return {**known, "scores": scores, "norm": norm, "inner": products, "status": "ok"}
            task = "zero-gradient"
        return {**known, "scores": None, "norm": None, "inner": None, "status": task}

    def _factor(self, number: int, task: GradientTask) -> float:
        """What cropi-grad's coefficient of a token is to the loss's, the same for all tokens of a prompt."""
        length, coefficient = self._known[number]
        place = next(place for place, response in enumerate(task.responses) if len(response) == length)
        return task.coefficients[place] / coefficient


def by_product(policy: Policy, options: TrainOptions, autocast: bool) -> ByProduct:
    """What --against asks for. InputError: a mean is of another policy or objective, or of other parameters, or damaged.

    NoRule: the model has a module whose gradients cannot be told apart by prompt; the message names it.
    """
    layout, start = Layout.of(policy.trained), policy_input(options.model).sha256
    norms, directions = {}, {}
    for name, path in options.against:
        facts = read_finished(path, "layout", "policy", "objective", "content")
        check_mean(path, facts, layout, start, _objective(path, facts["objective"], options))
        norms[name], directions[name] = facts["norm"], Direction(path)
    precision = torch.bfloat16 if autocast else torch.float32
    try:
        figures = PassFigures(
            policy, directions, options.temperature, lambda: mixed_precision(policy.device, autocast), precision
        )
    except NoRule as reason:
        raise NoRule(f"--against: {reason}; leave it out, and take the gradients from cropi-grad") from None
    return ByProduct(figures, norms, GradientSettings(aggregation=options.aggregation, baseline=options.advantage))


def _cosine(product: float, norms: float) -> float:
    return max(-1.0, min(1.0, product / norms))


def _objective(path: str, known: Any, options: TrainOptions) -> dict[str, Any]:
    """The objective of a mean. InputError: it differs from training's in what decides a gradient on policy, where all ratios are 1."""
    wanted = {
        "aggregation": options.aggregation,
        "advantage": options.advantage,
        "policy_temperature": options.temperature,
        "preconditioner": None,
        "adapter_seed": None,
    }
    differs = {key: value for key, value in wanted.items() if known.get(key) != value}
    if differs:
        told = ", ".join(f"{key} {known.get(key)}, here {value}" for key, value in differs.items())
        flags = f"--aggregation {options.aggregation} --advantage {options.advantage}"
        raise InputError(
            f"{path}: is a mean of another objective than this training's ({told}); make it with cropi-grad --mean {flags} "
            f"--policy-temperature {options.temperature:g}, without --preconditioner and --lora"
        )
    return dict(known)
