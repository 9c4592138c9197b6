"""cropi-grad from its options to its output: load the policy, choose the way to differentiate, fill a store or a mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cropi_tools import runtime
from cropi_tools.data.output import Output
from cropi_tools.data.policies import same_tokenizer, tokenizer_digest
from cropi_tools.gradients.accumulator import Measure
from cropi_tools.gradients.batching import survey
from cropi_tools.gradients.choose_method import choose_path
from cropi_tools.gradients.estimates import BackwardEstimates, Estimates
from cropi_tools.gradients.jvp import ForwardMode
from cropi_tools.gradients.jvp_estimates import ForwardEstimates
from cropi_tools.gradients.preconditioner import Preconditioner
from cropi_tools.gradients.prompt_objective import GradientSettings
from cropi_tools.gradients.targets import Against
from cropi_tools.gradients.write_mean import collect_mean
from cropi_tools.gradients.write_store import collect_store, fits
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.policy.parameters import add_adapters, train_only
from cropi_tools.runtime.clock import starting
from cropi_tools.sketches.spec import Layout, ProjectionSpec


@dataclass(frozen=True)
class Request:
    """What cropi-grad was asked for; the options of its page, resolved. facts: policy and objective, as they are compared."""

    rollouts: Sequence[str]
    model: str
    behavior: str | None
    preconditioner: str | None
    settings: GradientSettings
    facts: Mapping[str, Any]
    against: Mapping[str, str]
    mean: bool
    halves: bool
    method: Any
    samples: int | None
    params: Sequence[str]
    lora: int | None
    sketch: str
    dim: int
    keep: float | None
    seed: int
    max_store: int
    max_tokens: int
    recompute: bool
    shard: tuple[int, int]
    limit: int | None
    device: str
    dtype: str


def compute(request: Request, output: Output) -> tuple[dict[str, int], int]:
    """Do it. Returns counts by status (and `tokens` that went through the policy), and the number of prompts."""
    for file in request.rollouts:
        same_tokenizer(file, request.model)
    policy = load_policy(request.model, request.device, request.dtype)
    output.begin_work()  # reading the rollouts is work; what is loaded and tried out after it is start again
    work = survey(
        request.rollouts,
        policy.vocabulary,
        request.settings,
        request.shard,
        request.limit,
        request.samples,
        request.facts["objective"]["behavior"] if request.behavior else None,
        policy.positions,
    )
    with starting():
        if request.lora:
            add_adapters(policy, request.lora, request.seed)
        elif request.params:
            train_only(policy, request.params)
        behavior = load_policy(request.behavior, request.device, request.dtype) if request.behavior else None
        layout = Layout.of(policy.trained)
        scaling = Preconditioner(request.preconditioner, layout, policy.device) if request.preconditioner else None
    facts = {**request.facts, "tokenizer": tokenizer_digest(request.model)}
    if request.mean:
        path = choose_path(request.method, policy, request.settings, behavior, request.max_tokens, request.recompute)
        counts = collect_mean(path, request.settings, work, output, layout, facts, request.halves, scaling)
        return counts, work.prompts
    if work.prompts and not work.live:
        runtime.warn(f"none of the {work.prompts} prompts has samples of different rewards: there is nothing to rank")
    forward = request.method == "jvp"  # which has no gradients to sketch, so no products with groups
    with starting():
        against = Against(
            request.against, layout, facts["policy"], facts["objective"], request.halves, groups=not forward
        )
    attributes = {**facts, "layout": layout.to_json(), "device": str(policy.device), "against": against.attributes}
    if forward:
        attributes["projection"] = None
        estimates = _forward(request, policy, behavior, against, scaling)
    else:
        dim = None if request.sketch == "none" else request.dim
        spec = ProjectionSpec.create(request.sketch, layout, dim, request.seed, request.keep)
        if request.sketch == "none":
            fits(output.path, work.live, layout.size, request.max_store)
        attributes["projection"] = spec.to_json()
        estimates = _backward(request, policy, behavior, against, scaling, layout, spec)
    return collect_store(estimates, request.settings, work, output, attributes), work.prompts


@starting()
def _forward(
    request: Request, policy: Policy, behavior: Policy | None, against: Against, scaling: Preconditioner | None
) -> Estimates:
    directions = against.half_directions if request.halves else against.directions
    if scaling is not None:
        for direction in directions.values():
            direction.scale_by(scaling)
    forward = ForwardMode(policy, request.settings, directions, behavior, request.max_tokens)
    return ForwardEstimates(forward, request.settings, against, request.halves)


@starting()
def _backward(
    request: Request,
    policy: Policy,
    behavior: Policy | None,
    against: Against,
    scaling: Preconditioner | None,
    layout: Layout,
    spec: ProjectionSpec,
) -> Estimates:
    path = choose_path(request.method, policy, request.settings, behavior, request.max_tokens, request.recompute)
    device: torch.device = policy.device
    measure = Measure(layout, spec, against.directions, device, scaling)
    halves = Measure(layout, against.groups, against.half_directions, device, scaling) if request.halves else None
    return BackwardEstimates(path, request.settings, measure, against, halves)
