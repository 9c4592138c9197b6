"""cropi-grad from its options to its output: load the policy, choose the way to differentiate, fill a store or a mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.jsonl import is_stream
from cropi_tools.data.manifest import read_manifest
from cropi_tools.data.output import Output
from cropi_tools.data.policies import same_tokenizer, tokenizer_digest
from cropi_tools.gradients.accumulator import Measure
from cropi_tools.gradients.batching import Work, survey
from cropi_tools.gradients.choose_method import choose_path
from cropi_tools.gradients.estimates import BackwardEstimates, Figures, GradientPath
from cropi_tools.gradients.jvp import ForwardMode
from cropi_tools.gradients.jvp_estimates import ForwardEstimates
from cropi_tools.gradients.options import GradOptions
from cropi_tools.gradients.preconditioner import Preconditioner
from cropi_tools.gradients.prompt_objective import GradientSettings
from cropi_tools.gradients.targets import Against
from cropi_tools.gradients.write_mean import collect_mean
from cropi_tools.gradients.write_store import check_room, collect_store
from cropi_tools.objective import Estimator
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.policy.parameters import add_adapters, train_only
from cropi_tools.runtime.clock import starting
from cropi_tools.sketches.spec import Layout, ProjectionSpec


class Job(NamedTuple):
    """What there is to do, and what is loaded for it. facts: policy, objective and tokenizer, as they are compared."""

    policy: Policy
    behavior: Policy | None
    settings: GradientSettings
    work: Work
    layout: Layout
    scaling: Preconditioner | None
    facts: Mapping[str, Any]


def run(options: GradOptions, facts: Mapping[str, Any], output: Output) -> tuple[dict[str, int], int]:
    """Fill the opened output. facts: policy and objective, as they are compared.

    Returns counts by status (and `tokens` that went through the policy), and the number of prompts.
    """
    job = prepared(options, facts, output.begin_work)
    work = job.work
    if options.mean:
        path = path_of(options, job)
        found = collect_mean(path, job.settings, work, output, job.layout, job.facts, options.halves, job.scaling)
        return found, work.prompts
    if work.prompts and not work.live:
        runtime.warn(f"none of the {work.prompts} prompts has samples of different rewards: there is nothing to rank")
    if options.sketch == "none" and options.method != "jvp":
        check_room(output.path, work.live, job.layout.size)
    runtime.notify(f"{work.live} of {work.prompts} prompts have samples of different rewards: these will be ranked")
    estimates, attributes = figures_of(options, job)
    return collect_store(estimates, job.settings, work, output, attributes), work.prompts


def prepared(options: GradOptions, facts: Mapping[str, Any], begin_work: Callable[[], None]) -> Job:
    """Load the policy and read the rollouts, all checked. facts: policy and objective. begin_work: called between the two."""
    for file in options.rollouts:
        same_tokenizer(file, options.model)
    _warn_of_temperatures(options)
    estimator = Estimator(options.weighting, options.weight_clip, options.ppo_clip, options.self_normalize)
    settings = GradientSettings(estimator, options.policy_temperature, options.aggregation, options.advantage)
    policy = load_policy(options.model, options.device, options.dtype)
    begin_work()  # reading the rollouts is work; what is loaded and tried out after it is start again
    work = survey(
        options.rollouts,
        policy.vocabulary,
        settings,
        options.shard,
        options.limit,
        options.samples,
        facts["objective"]["behavior"] if options.behavior else None,
        policy.positions,
    )
    with starting():
        if options.lora:
            add_adapters(policy, options.lora, options.seed)
        elif options.params:
            train_only(policy, options.params)
        behavior = load_policy(options.behavior, options.device, options.dtype) if options.behavior else None
        layout = Layout.of(policy.trained)
        scaling = Preconditioner(options.preconditioner, layout, policy.device) if options.preconditioner else None
    facts = {**facts, "tokenizer": tokenizer_digest(options.model)}
    return Job(policy, behavior, settings, work, layout, scaling, facts)


def figures_of(options: GradOptions, job: Job) -> tuple[Figures, dict[str, Any]]:
    """What computes a store's figures, and the attributes of the store."""
    forward = options.method == "jvp"  # which has no gradients to sketch, so no products with groups
    facts = job.facts
    with starting():
        against = Against(
            options.means, job.layout, facts["policy"], facts["objective"], options.halves, groups=not forward
        )
    attributes = {
        **facts,
        "layout": job.layout.to_json(),
        "device": str(job.policy.device),
        "against": against.attributes,
    }
    if forward:
        return _forward(options, job, against), {**attributes, "projection": None}
    dim = None if options.sketch == "none" else options.dim
    spec = ProjectionSpec.create(options.sketch, job.layout, dim, options.seed, options.kept)
    return _backward(options, job, against, spec), {**attributes, "projection": spec.to_json()}


def _warn_of_temperatures(options: GradOptions) -> None:
    """Say where the ratios compare the policy at one temperature with log-probabilities that are recorded at another."""
    if options.behavior or (options.weighting == "none" and not options.ppo_clip):
        return  # recomputed at the policy's temperature, or no ratios at all
    for file in options.rollouts:
        manifest = None if is_stream(file) else read_manifest(file)
        sampled = (manifest or {}).get("fingerprint", {}).get("options", {}).get("temperature")
        if type(sampled) in (int, float) and sampled > 0 and sampled != options.policy_temperature:
            runtime.warn(
                f"{file}: was sampled at temperature {sampled:g}, and --policy-temperature is {options.policy_temperature:g}: importance ratios "
                f"differ from 1 for that alone; give --policy-temperature {sampled:g}, unless that is what you want"
            )


def path_of(options: GradOptions, job: Job) -> GradientPath:
    """The way to differentiate."""
    assert options.method != "jvp"
    return choose_path(
        options.method,
        job.policy,
        job.settings,
        job.behavior,
        options.tokens_per_pass,
        options.checkpoint_activations,
    )


@starting()
def _forward(options: GradOptions, job: Job, against: Against) -> Figures:
    directions = against.half_directions if options.halves else against.directions
    if job.scaling is not None:
        for direction in directions.values():
            direction.scale_by(job.scaling)
    forward = ForwardMode(job.policy, job.settings, directions, job.behavior, options.tokens_per_pass)
    return ForwardEstimates(forward, job.settings, against, options.halves)


@starting()
def _backward(options: GradOptions, job: Job, against: Against, spec: ProjectionSpec) -> Figures:
    path, layout, device = path_of(options, job), job.layout, job.policy.device
    measure = Measure(layout, spec, against.directions, device, job.scaling)
    halves = Measure(layout, against.groups, against.half_directions, device, job.scaling) if options.halves else None
    return BackwardEstimates(path, job.settings, measure, against, halves)
