"""One optimizer update: from a mini-batch of rollouts to a gradient, clipped, and a step of AdamW."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.policy.adapters import adapters_off
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import PackedBatch, SequenceBatch, response_logprobs
from cropi_tools.policy.packing import attending
from cropi_tools.runtime.errors import CropiError
from cropi_tools.training.batches import (
    Group,
    Response,
    advantage_groups,
    lay_out,
    micro_batches,
    token_inputs,
)
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.loss import FIGURES, token_loss
from cropi_tools.training.loss_settings import loss_settings
from cropi_tools.training.options import TrainOptions

T = TypeVar("T")
_CPU_FULL = "can't allocate memory"  # what torch says on a CPU, in an error of no class of its own


class NotFinite(Exception):
    """The loss or the gradient is NaN or infinite."""


class Observer(Protocol):
    """Watches the passes of an update, and changes nothing of them."""

    def begin(self, parts: Sequence[Sequence[Group]]) -> None:
        """These micro-batches come, from the first one on; what was seen before does not count."""

    def watching(
        self, part: Sequence[Group], batch: PackedBatch | SequenceBatch
    ) -> contextlib.AbstractContextManager[None]:
        """Around the forward pass of a micro-batch."""

    def passed(self, part: Sequence[Group]) -> None:
        """The backward pass of a micro-batch was made."""


class Updater:
    """Updates a policy in place.

    reference: the policy of the KL term, or None; the policy itself, where adapters are trained, stands for itself without them.
    autocast: matrix products in bfloat16. tokens_per_pass: tokens in one forward pass; halved when memory runs out.
    observer: watches every pass that has a gradient; in a single process, where activations are held.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        options: TrainOptions,
        ranks: Ranks,
        autocast: bool = False,
        observer: Observer | None = None,
    ) -> None:
        self._policy, self._reference, self._ranks, self._autocast = policy, reference, ranks, autocast
        self._observer = observer
        self._loss, self._max_gradient_norm = loss_settings(options), options.max_gradient_norm
        self._models = [policy.model, *([] if reference is None else [reference.model])]  # that take the same passes
        self.parameters = [parameter for _, parameter in policy.trained]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay
        )
        self.tokens_per_pass = options.tokens_per_pass

    def step(self, parts: Sequence[Sequence[Record]], rate: float) -> dict[str, float]:
        """An update for each mini-batch of rollouts, all at learning rate `rate`.

        Returns loss, gradient_norm (means over updates), FIGURES (means over the tokens that had a forward pass) and tokens_trained, the
        same on all processes. NotFinite: a loss or a gradient is; the update is not made.
        """
        settings = self._loss
        batches = [advantage_groups(part, settings, self._ranks) for part in parts]
        if settings.importance_cap > 0:
            # the first update's present log-probabilities are the old ones, later ones need them from before it
            batches[1:] = [self._fitting(groups, self._with_old) for groups in batches[1:]]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = dict.fromkeys((*FIGURES, "loss", "gradient_norm", "tokens_trained"), 0.0)
        for groups in batches:
            found = self._gradient(groups)
            found["gradient_norm"] = clip_gradient(self.parameters, self._max_gradient_norm)
            if not (math.isfinite(found["loss"]) and math.isfinite(found["gradient_norm"])):
                raise NotFinite(f"loss {found['loss']} and gradient norm {found['gradient_norm']}")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            sums = {name: value + found[name] for name, value in sums.items()}
        updates = {name: sums[name] / max(len(parts), 1) for name in ("loss", "gradient_norm")}
        return {**_means(sums), **updates}

    def _gradient(self, groups: Sequence[Group]) -> dict[str, float]:
        """Add the loss's gradient to the parameters' `.grad`; the sums of the figures over all processes."""
        return self._fitting(groups, self._accumulate)

    def _fitting(self, groups: Sequence[Group], work: Callable[[list[list[Group]]], T]) -> T:
        """Work on the groups in micro-batches, smaller ones when memory runs out."""
        while True:
            parts = micro_batches(groups, self.tokens_per_pass, self._models)
            try:
                return work(parts)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
            # outside of the handler, which holds on to what the failed pass had
            self._halve(parts)

    def _halve(self, parts: Sequence[Sequence[Group]]) -> None:
        """Make the next try smaller. CropiError: it cannot be, or other processes wait in the middle of the same pass."""
        if self._ranks.size > 1:
            raise CropiError(f"out of memory with {self.tokens_per_pass} tokens in a pass; lower --tokens-per-pass")
        if all(len(part) == 1 and len(part[0].responses) == 1 for part in parts):
            longest = max(len(part[0].prompt) + len(part[0].responses[0].tokens) for part in parts)
            raise CropiError(
                f"out of memory with a single response in a pass, of {longest} tokens with its prompt; "
                "lower --max-tokens, give --checkpoint-activations, or use more memory"
            )
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.tokens_per_pass = max(self.tokens_per_pass // 2, 1)
        runtime.warn(f"out of memory: going on with {self.tokens_per_pass} tokens in a pass")

    def _accumulate(self, parts: Sequence[Sequence[Group]]) -> dict[str, float]:
        sums = dict.fromkeys((*FIGURES, "loss", "tokens_trained"), 0.0)
        if self._observer is not None:
            self._observer.begin(parts)
        missing = self._missing_passes(len(parts))  # asked now: in between, the others would be in the middle of a pass
        for part in parts:
            for name, value in self._pass(part).items():
                sums[name] += value
        # passes are collective where the policy is shared out: who has fewer takes part without adding anything
        for _ in range(missing):
            self._pass([_nothing()])
        totals = self._ranks.sum(list(sums.values()))
        return dict(zip(sums, totals, strict=True))

    def _missing_passes(self, own: int) -> int:
        return max(self._ranks.gather(own)) - own if self._ranks.size > 1 else 0

    def _pass(self, part: Sequence[Group]) -> dict[str, float]:
        """A micro-batch forward and backward."""
        policy, settings = self._policy, self._loss
        batch = lay_out(self._models, part, policy.device)
        given = token_inputs(part, batch.lengths, policy.device)
        if self._reference is not None:
            given = given._replace(reference=self._reference_logprobs(batch))
        observer = self._observer
        watching = contextlib.nullcontext() if observer is None else observer.watching(part, batch)
        with attending(policy.model, batch):
            with mixed_precision(policy.device, self._autocast), watching:
                logprobs, entropy = response_logprobs(
                    policy.model, batch, settings.temperature, "gradient" if settings.entropy else "value"
                )
            loss, sums = token_loss(logprobs, entropy, given, batch.lengths, settings)
            # gradients are averaged over the processes that share a policy; the loss's denominators are global already, so they should add up
            (loss * self._ranks.size).backward()
        if observer is not None:
            observer.passed(part)
        return {**sums, "loss": float(loss.detach()), "tokens_trained": float(len(batch.targets))}

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch | SequenceBatch) -> torch.Tensor:
        reference = self._reference
        assert reference is not None
        itself = reference.model is self._policy.model
        off = adapters_off(reference.model) if itself else contextlib.nullcontext()
        with off, attending(reference.model, batch), mixed_precision(reference.device, self._autocast):
            return response_logprobs(reference.model, batch, self._loss.temperature)[0]

    @torch.no_grad()
    def _with_old(self, parts: Sequence[Sequence[Group]]) -> list[Group]:
        """The groups with the present policy's log-probabilities of their responses."""
        found: list[Group] = []
        policy = self._policy
        empty: list[list[Group]] = [[_nothing()] for _ in range(self._missing_passes(len(parts)))]
        for part in [*parts, *empty]:
            batch = lay_out(self._models, part, policy.device)
            with attending(policy.model, batch), mixed_precision(policy.device, self._autocast):
                values, _ = response_logprobs(policy.model, batch, self._loss.temperature)
            pieces = iter(values.split(batch.lengths))
            for group in part:
                known = [response._replace(old=next(pieces).tolist()) for response in group.responses]
                found.append(group._replace(responses=known))
        return found[: len(found) - len(empty)]


def _means(sums: dict[str, float]) -> dict[str, float]:
    """FIGURES as means over the tokens trained on."""
    tokens = max(sums["tokens_trained"], 1.0)
    return {name: value / tokens if name in FIGURES else value for name, value in sums.items()}


def _nothing() -> Group:
    """A group that takes a pass and gives no gradient."""
    return Group([0], [Response([0], [0.0], 0.0, 0.0, None)])


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_FULL in str(error)


def mixed_precision(device: torch.device, wanted: bool) -> Any:
    """A block in which matrix products are in bfloat16, if wanted."""
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


def clip_gradient(parameters: Sequence[torch.nn.Parameter], largest: float) -> float:
    """Scale the gradient to norm `largest` at most (0 = leave it); returns the norm before. A norm that is not finite is returned as it is."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
