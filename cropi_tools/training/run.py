"""cropi-train from its options to its output: what is loaded, in which order, and what the manifest says."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.data.manifest import write_json
from cropi_tools.data.output import Output
from cropi_tools.data.policies import TRAINING_OPTIONS, tokenizer_digest
from cropi_tools.data.records import read_prompts
from cropi_tools.engines.protocol import Engine
from cropi_tools.engines.transformers_engine import ReplicaEngine, TransformersEngine
from cropi_tools.policy.adapters import inject_adapters
from cropi_tools.policy.layers import checkpoint_activations
from cropi_tools.policy.loading import Policy, choose_device, load_policy
from cropi_tools.policy.prompts import PromptCheck
from cropi_tools.policy.sharding import share_out
from cropi_tools.rewards import VerifierPool, check_record
from cropi_tools.training.checkpoints import PROGRESS, resume_folder
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.inputs import reference_folder, warn_of_shared_questions
from cropi_tools.training.loop import Trainer
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.trackers import open_trackers


def train(
    options: TrainOptions,
    own_verifiers: Mapping[str, str],
    output: Output,
    ranks: Ranks,
    grading: type[VerifierPool] = VerifierPool,
) -> None:
    """Train into an opened output, from where an earlier try came to. own_verifiers: those that records name, with their fingerprints.

    grading: what grades responses.
    """
    records, evaluations = read_records(options)
    if ranks.first:
        warn_of_shared_questions(records, evaluations)
    device = ranks.device or options.device
    autocast = options.dtype == "bfloat16" or (options.dtype == "auto" and choose_device(device).type == "cuda")
    shared = ranks.size > 1
    # what processes share is loaded on the CPU, so that a GPU holds no more than its part
    loaded_on = "cpu" if shared else device
    policy = _starting_policy(options, output, loaded_on)
    every = [*records, *(one for found in evaluations.values() for one in found)]
    check_lengths(policy, every, options.max_tokens)
    adapters = None
    if options.lora:
        adapters = inject_adapters(policy, options.lora, options.lora_alpha, options.seed)
    observed = None
    if options.against:
        from cropi_tools.training.influence import by_product

        observed = by_product(policy, options, autocast)
    reference = _reference(options, policy, loaded_on)
    if options.checkpoint_activations:
        checkpoint_activations(policy.model)
    if shared:
        for one in {id(found.model): found for found in (policy, reference) if found is not None}.values():
            share_out(one, device, autocast)
    trackers = []
    if ranks.first:
        resolved = options.resolved(own_verifiers)
        write_json(output.part / TRAINING_OPTIONS, resolved)
        trackers = open_trackers(options.track, output.path, resolved, output.state.get("step"))
    engine = _engine(options, policy, device, autocast, shared)
    pool = grading(options.verifier, seconds=options.verify_seconds, partial_credit=options.partial_credit)
    with contextlib.closing(engine), pool:
        counters = Trainer(
            policy,
            reference,
            engine,
            pool,
            records,
            evaluations,
            options,
            output,
            ranks=ranks,
            autocast=autocast,
            adapters=adapters,
            carried=Path(options.model) if options.carry == "full" else None,
            trackers=trackers,
            by_product=observed,
        ).run()
        facts = {
            "tokenizer": tokenizer_digest(options.model),
            "steps": options.steps,
            "sampling": engine.settings(options.sampling),
            "evaluation_sampling": engine.settings(options.evaluation_sampling),
            "processes": ranks.size,
        }
    if ranks.first:
        output.finish(rows=options.steps, ledger={**counters, "device": str(policy.device)}, facts=facts)
        runtime.notify(f"{output.path}: trained for {options.steps} steps on {len(records)} prompts")


def read_records(options: TrainOptions) -> tuple[list[Record], dict[str, list[Record]]]:
    """The prompts to train on, and those of each evaluation set. InputError: one that its verifier cannot grade."""
    records = list(read_prompts(options.prompts))
    evaluations = {name: list(read_prompts([path])) for name, path in options.evaluations}
    for record in (*records, *(record for found in evaluations.values() for record in found)):
        check_record(record, options.verifier)
    return records, evaluations


def _starting_policy(options: TrainOptions, output: Output, device: str) -> Policy:
    """The policy of the last checkpoint, or the one to begin with; under the name of that one."""
    # adapters are kept apart from the weights they are beside, which a resumed run takes from the beginning
    resumed = resume_folder(output.part, output.resumed(PROGRESS))
    start = options.model if resumed is None or options.lora else str(resumed)
    policy = load_policy(start, device, "float32", options.date)._replace(folder=options.model)
    policy.tokens.tell_ends()
    return policy


def _reference(options: TrainOptions, policy: Policy, device: str) -> Policy | None:
    """The policy of the KL term: the trained one itself where adapters can be switched off in it."""
    folder = reference_folder(options)
    if folder is None:
        return None
    if options.lora and Path(folder).samefile(options.model):
        return policy
    return load_policy(folder, device, "float32")


def check_lengths(policy: Policy, records: Sequence[Record], max_tokens: int) -> None:
    """InputError when the policy cannot take a prompt, or has no room for its response: found before hours of training."""
    check = PromptCheck(policy.tokens, max_tokens)
    for record in records:
        check(record)


def _engine(options: TrainOptions, policy: Policy, device: str, autocast: bool, shared: bool) -> Engine:
    """What samples: from the policy's present weights, or from a copy that follows them (of a shared policy, or in vLLM)."""
    dtype = "bfloat16" if autocast else "float32"
    if options.engine == "vllm":
        from cropi_tools.engines.vllm_engine import VllmEngine

        return VllmEngine(policy.folder, policy.tokens, dtype, options.engine_memory)
    if shared:
        return ReplicaEngine(load_policy(policy.folder, device, dtype))
    return TransformersEngine(policy)
