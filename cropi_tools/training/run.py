"""cropi-train from options to output: what is loaded, in which order, and what the manifest says."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.data.manifest import write_json
from cropi_tools.data.output import Output
from cropi_tools.data.policies import TRAINING_OPTIONS, tokenizer_digest
from cropi_tools.data.records import read_prompts
from cropi_tools.engines.protocol import Engine, Sampling
from cropi_tools.engines.transformers_engine import ReplicaEngine, TransformersEngine
from cropi_tools.policy.adapters import inject_adapters
from cropi_tools.policy.layers import checkpoint_activations
from cropi_tools.policy.loading import Policy, choose_device, load_policy
from cropi_tools.policy.prompts import PromptCheck
from cropi_tools.policy.sharding import share_out
from cropi_tools.rewards import VerifierPool, check_record
from cropi_tools.rewards.verifiers import DEFAULT
from cropi_tools.training.checkpoints import PROGRESS, resume_folder
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.loop import Trainer
from cropi_tools.training.settings import LossSettings, TrainSettings
from cropi_tools.training.trackers import open_trackers


class Job(NamedTuple):
    """What is trained on what. options: the resolved ones, of which the rest follows; reference: a policy folder, or None.

    trackers, device, engine_memory, tokens_per_pass, checkpoint_activations: part of no result beyond float rounding.
    """

    model: str
    reference: str | None
    prompts: Sequence[str]
    evaluations: Mapping[str, str]
    verifier: str | None
    options: Mapping[str, Any]
    trackers: Sequence[str]
    device: str
    engine_memory: float
    tokens_per_pass: int
    checkpoint_activations: bool


def settings_of(job: Job, autocast: bool) -> TrainSettings:
    """The options as the loop's values."""
    given = job.options
    loss = LossSettings(
        temperature=given["temperature"],
        clip=tuple(given["clip"]),
        kl=given["kl"],
        entropy=given["entropy"],
        aggregation=given["aggregation"],
        advantage=given["advantage"],
        fixed_length=given["max_tokens"],
        mask_truncated=given["mask_truncated"],
        importance_cap=given["importance_cap"],
    )
    return TrainSettings(
        steps=given["steps"],
        batch=given["batch"],
        samples=given["samples"],
        sampling=Sampling(given["max_tokens"], given["temperature"]),
        loss=loss,
        learning_rate=given["learning_rate"],
        schedule=given["schedule"],
        warmup=given["warmup"],
        betas=tuple(given["betas"]),
        weight_decay=given["weight_decay"],
        max_gradient_norm=given["max_gradient_norm"],
        evaluate_every=given["eval_every"],
        evaluation_samples=given["eval_samples"],
        evaluation_sampling=Sampling(given["max_tokens"], given["eval_temperature"]),
        save_every=given["save_every"],
        seed=given["seed"],
        minibatch=given["minibatch"],
        refills=given["dynamic_sampling"],
        keep=given["keep"],
        collapse=given["collapse"],
        autocast=autocast,
        tokens_per_pass=job.tokens_per_pass,
    )


def train(job: Job, output: Output, ranks: Ranks) -> None:
    """Do the job into an opened output, from where an earlier try came to."""
    options = job.options
    records, evaluations = _prompts(job)
    device = ranks.device or job.device
    autocast = options["dtype"] == "bfloat16" or (options["dtype"] == "auto" and choose_device(device).type == "cuda")
    settings = settings_of(job, autocast)
    # adapters are kept apart from the weights they are beside, which a resumed run takes from the beginning
    resumed = resume_folder(output.part, output.resumed(PROGRESS))
    start = job.model if resumed is None or options["lora"] else str(resumed)
    shared = ranks.size > 1
    # what processes share is loaded on the CPU, so that a GPU holds no more than its part
    policy = load_policy(start, "cpu" if shared else device, "float32", options["date"])
    policy = policy._replace(folder=job.model)
    policy.tokens.tell_ends()
    check_lengths(policy, [*records, *(one for found in evaluations.values() for one in found)], options["max_tokens"])
    adapters = None
    if options["lora"]:
        adapters = inject_adapters(policy, options["lora"], options["lora_alpha"], options["seed"])
    reference = None
    if job.reference is not None:
        own = adapters is not None and Path(job.reference).samefile(job.model)
        reference = policy if own else load_policy(job.reference, "cpu" if shared else device, "float32")
    if job.checkpoint_activations:
        checkpoint_activations(policy.model)
    if shared:
        for one in {id(found.model): found for found in (policy, reference) if found is not None}.values():
            share_out(one, device, autocast)
    trackers = []
    if ranks.first:
        write_json(output.part / TRAINING_OPTIONS, {**options, "verifier": job.verifier or DEFAULT})
        trackers = open_trackers(job.trackers, output.path, dict(options), output.state.get("step"))
    engine = _engine(
        options["engine"], policy, device, "bfloat16" if autocast else "float32", job.engine_memory, shared
    )
    pool = VerifierPool(job.verifier, seconds=options["verify_seconds"], partial_credit=options["partial_credit"])
    with contextlib.closing(engine), pool:
        counters = Trainer(
            policy,
            reference,
            engine,
            pool,
            records,
            evaluations,
            settings,
            output,
            ranks=ranks,
            adapters=adapters,
            carried=Path(job.model) if options["carry"] == "full" else None,
            trackers=trackers,
        ).run()
        facts = {
            "tokenizer": tokenizer_digest(job.model),
            "steps": settings.steps,
            "sampling": engine.settings(settings.sampling),
            "evaluation_sampling": engine.settings(settings.evaluation_sampling),
            "processes": ranks.size,
        }
    if ranks.first:
        output.finish(rows=settings.steps, ledger={**counters, "device": str(policy.device)}, facts=facts)
        runtime.notify(f"{output.path}: trained for {settings.steps} steps on {len(records)} prompts")


def _prompts(job: Job) -> tuple[list[Record], dict[str, list[Record]]]:
    records = list(read_prompts(job.prompts))
    evaluations = {name: list(read_prompts([path])) for name, path in job.evaluations.items()}
    for record in (*records, *(record for found in evaluations.values() for record in found)):
        check_record(record, job.verifier)
    return records, evaluations


def check_lengths(policy: Policy, records: Sequence[Record], max_tokens: int) -> None:
    """InputError when the policy cannot take a prompt, or has no room for its response: found before hours of training."""
    check = PromptCheck(policy.tokens, max_tokens)
    for record in records:
        check(record)


def _engine(name: str, policy: Policy, device: str, dtype: str, memory: float, shared: bool) -> Engine:
    """What samples: from the policy's present weights, or from a copy that follows them (of a shared policy, or in vLLM)."""
    if name == "vllm":
        from cropi_tools.engines.vllm_engine import VllmEngine

        return VllmEngine(policy.folder, policy.tokens, dtype, memory)
    if shared:
        return ReplicaEngine(load_policy(policy.folder, device, dtype))
    return TransformersEngine(policy)
