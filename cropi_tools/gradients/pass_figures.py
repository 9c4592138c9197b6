"""Norm and inner products of each prompt's gradient, taken from a forward and a backward pass that somebody else makes for all of them.

Hooks keep what each module with trained parameters takes and catch the gradient of what it gives; from the two come the figures of each
prompt's gradient (`parameter_figures.py`). They change nothing of the pass. What is trained must have a rule (`per_sample_rules.py`), and
each use of a parameter must be known: a module is called once a pass, an output embedding for one piece of the response tokens after
another, and a weight may be tied as input and output embedding. Whether that is so on this model is tried out on a few tokens.

Of a prompt whose responses do not fit into one pass, and of an output embedding's piece that ends within a prompt, gradients must be added
up before a norm can be taken: these, and only these, are formed and held until their last part has come.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from cropi_tools.gradients.accumulator import Direction, keep_on_device
from cropi_tools.gradients.parameter_figures import crossed, dense_figures, figures_of
from cropi_tools.gradients.per_sample_rules import (
    Rows,
    Rule,
    RuledModule,
    embedding,
    linear,
    refusal_of,
    row_gradients,
    ruled_modules,
)
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import SequenceBatch, has_plain_head, lay_out, response_logprobs
from cropi_tools.policy.packing import PackedBatch, attending
from cropi_tools.policy.trials import trial_prompts, trial_tolerance
from cropi_tools.runtime.clock import starting

_NOISE = 1e-2  # times the tolerance and the whole gradient: what is below counts as zero


class Figures(NamedTuple):
    """Of one prompt's gradient."""

    norm: float
    inner: dict[str, float]


class Share(NamedTuple):
    """A prompt's part of a pass: its number, how many of its responses there are, and whether these are all it has."""

    number: int
    responses: int
    whole: bool


class PassFigures:
    """Observes passes through `policy`; directions: mean gradients by name.

    computing: in which passes are made (autocast, say), whose number format is `precision`. NoRule: the figures cannot be taken from this
    model's passes; the message names the module.
    """

    def __init__(
        self,
        policy: Policy,
        directions: Mapping[str, Direction],
        temperature: float = 1.0,
        computing: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._policy, self._directions = policy, dict(directions)
        keep_on_device(self._directions, policy.device)
        self._names = {parameter: name for name, parameter in policy.trained}
        self._modules = ruled_modules(policy.model)
        self._head = policy.model.get_output_embeddings() if has_plain_head(policy.model) else None
        self._tied = _tied_weight(policy.model, self._modules)
        self._sums = torch.empty(0)
        self._by_parameter: dict[str, torch.Tensor] | None = None  # in the trial
        # gradients that wait for a further part, by prompt and parameter
        self._open: dict[int, dict[str, torch.Tensor]] = {}
        self._try_out(temperature, computing, precision)

    def begin(self, prompts: int) -> None:
        """Forget what was observed; prompts are told by numbers below `prompts` from now on."""
        size = (prompts, 1 + len(self._directions))
        self._sums = torch.zeros(size, dtype=torch.float64, device=self._policy.device)
        self._open = {}

    @contextlib.contextmanager
    def watching(self, batch: PackedBatch | SequenceBatch, shares: Sequence[Share]) -> Iterator[None]:
        """Around the forward pass of a batch; its backward pass may follow outside. shares: of its prompts, in order."""
        current = _Pass(self, self._head, self._tied, batch, shares)
        with contextlib.ExitStack() as stack:
            for ruled in self._modules:
                handle = ruled.module.register_forward_hook(
                    lambda _, inputs, output, ruled=ruled: current.called(ruled, inputs, output)
                )
                stack.callback(handle.remove)
            yield

    def close(self, numbers: Sequence[int]) -> None:
        """All passes over these prompts are made, forward and backward."""
        for number in numbers:
            for name in list(self._open.get(number, ())):
                self.settle(name, number)

    def finish(self) -> list[Figures]:
        """The figures of each prompt's gradient since `begin`."""
        rows = self._sums.tolist()
        return [
            Figures(math.sqrt(max(square, 0.0)), dict(zip(self._directions, inner, strict=True)))
            for square, *inner in rows
        ]

    def name_of(self, parameter: torch.nn.Parameter) -> str:
        return self._names[parameter]

    def means_of(self, name: str) -> list[torch.Tensor | None]:
        """Each mean's part of a parameter, flat."""
        return [direction.get(name, self._policy.device) for direction in self._directions.values()]

    def add(self, name: str, numbers: Sequence[int], figures: torch.Tensor) -> None:
        """Add figures [prompts, 1 + means] of these prompts' gradients of a parameter."""
        sums = self._sums
        if self._by_parameter is not None:
            sums = self._by_parameter.setdefault(name, torch.zeros_like(sums))
        sums.index_add_(0, torch.tensor(numbers, device=sums.device), figures)

    def nothing(self) -> torch.Tensor:
        """Figures of one prompt, to be filled in."""
        return torch.zeros_like(self._sums[:1])

    def part(self, name: str, number: int, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, bool]:
        """Where a prompt's gradient that comes in parts is added up, [1, *shape], and whether nothing stands there yet."""
        known = self._open.setdefault(number, {})
        fresh = name not in known
        if fresh:
            known[name] = parameter.new_empty((1, *parameter.shape))
        return known[name], fresh

    def settle(self, name: str, number: int) -> None:
        """A gradient that came in parts is complete."""
        gradient = self._open[number].pop(name)
        self.add(name, [number], dense_figures(gradient.flatten(1), self.means_of(name)))

    @starting()
    def _try_out(
        self, temperature: float, computing: Callable[[], AbstractContextManager[Any]], precision: torch.dtype
    ) -> None:
        """Compare with automatic differentiation on two prompts of a few tokens. NoRule: some module's figures differ."""
        model = self._policy.model
        prompts = [(ids, [one for one in found if one]) for ids, found in trial_prompts(self._policy.vocabulary)]
        batch = lay_out([model], prompts, self._policy.device)
        shares = [Share(number, len(found), True) for number, (_, found) in enumerate(prompts)]
        weights = torch.linspace(-1, 1, len(batch.targets), device=self._policy.device)
        parameters = list(self._names)

        def gradients(values: torch.Tensor, tokens: slice = slice(None)) -> Sequence[torch.Tensor | None]:
            objective = (values * weights)[tokens].sum()
            return torch.autograd.grad(objective, parameters, retain_graph=True, allow_unused=True)

        self.begin(len(prompts))
        self._by_parameter = {}
        with attending(model, batch):
            with computing(), self.watching(batch, shares):
                observed, _ = response_logprobs(model, batch, temperature)
            gradients(observed)
            with computing():
                plain, _ = response_logprobs(model, batch, temperature)
            found, self._by_parameter = self._by_parameter, None
            lengths = [sum(map(len, responses)) for _, responses in prompts]
            for number, (start, end) in enumerate(pairwise(accumulate(lengths, initial=0))):
                expected = dict(zip(self._names.values(), gradients(plain, slice(start, end)), strict=True))
                rows = {name: figures[number].tolist() for name, figures in found.items()}
                self._compare(rows, expected, trial_tolerance(precision))

    def _compare(
        self, found: Mapping[str, list[float]], expected: Mapping[str, torch.Tensor | None], tolerance: float
    ) -> None:
        """NoRule: the figures of a parameter are not those of its gradient. found: square and products, by parameter."""
        known = {name: gradient.double().flatten() for name, gradient in expected.items() if gradient is not None}
        whole = math.sqrt(sum(float(gradient.square().sum()) for gradient in known.values()))
        for name in expected:
            gradient = known.get(name, torch.zeros((), dtype=torch.float64, device=self._policy.device))
            square, *inner = found.get(name, [0.0] * (1 + len(self._directions)))
            allowed = tolerance * (float(gradient.norm()) + _NOISE * whole)
            right = abs(math.sqrt(max(square, 0.0)) - float(gradient.norm())) <= allowed
            for product, mean in zip(inner, self.means_of(name), strict=True):
                if mean is not None:
                    error = abs(product - float((gradient * mean.double()).sum()))
                    right = right and error <= allowed * float(mean.double().norm())
            if not right:
                raise refusal_of(self._policy.model, name)


class _Run(NamedTuple):
    """Prompts whose tokens lie one after another among those that a module was called on. places: theirs in the pass.

    start, end: of their tokens. whole: whether these are all that the prompts' gradients need; a run of others is of one prompt.
    """

    places: list[int]
    numbers: list[int]
    start: int
    end: int
    rows: Rows
    whole: bool


class _Pass:
    """One pass: which tokens belong to whom, and what waits for a gradient that comes later."""

    def __init__(
        self,
        figures: PassFigures,
        head: Any,
        tied: torch.nn.Parameter | None,
        batch: PackedBatch | SequenceBatch,
        shares: Sequence[Share],
    ) -> None:
        self._figures, self._head, self._tied, self._shares = figures, head, tied, shares
        self._ids = batch.input_ids.reshape(-1)
        self._responses = _bounds(batch.lengths, shares)
        if isinstance(batch, PackedBatch):
            self._body = batch.bounds
        else:
            self._body = _bounds([batch.input_ids.shape[1]] * len(batch.lengths), shares)
        self._runs = self._cut(self._body, 0, self._body[-1])
        self._called: Counter[Any] = Counter()
        self._offset = 0  # response tokens that the output embedding has seen
        self._come: Counter[int] = (
            Counter()
        )  # of a prompt's response tokens, those whose part of the output embedding's gradient is there
        # of a tied weight, by prompt: what the output embedding took, and its output's gradient at the prompt's own ids
        self._crossing: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def called(self, ruled: RuledModule, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """A module was called: wait for the gradient of its output. NoRule: it is called in another way than the rules know."""
        self._called[ruled.module] += 1
        if ruled.module is self._head:
            runs = self._cut(self._responses, self._offset, output.shape[0])
            self._offset += output.shape[0]
            usual = output.dim() == 2 and self._offset <= self._responses[-1]
        else:
            runs = self._runs
            usual = self._called[ruled.module] == 1 and output.shape[:2].numel() == self._body[-1]
        if not inputs or not usual:
            raise ruled.refusal()
        states = inputs[0].detach()
        output.register_hook(lambda gradient: self._arrived(ruled, states, gradient, runs))

    def _cut(self, bounds: Sequence[int], first: int, tokens: int) -> list[_Run]:
        """The runs of some tokens, `first` the number of the first one; prompts without a token there are in none."""
        pieces: list[tuple[int, int, int, bool]] = []
        for place, (start, end) in enumerate(pairwise(bounds)):
            low, high = max(start, first), min(end, first + tokens)
            if low < high:
                pieces.append((place, low, high, self._shares[place].whole and (low, high) == (start, end)))
        found: list[list[tuple[int, int, int, bool]]] = []
        for piece in pieces:
            if found and piece[-1] and found[-1][-1][-1]:
                found[-1].append(piece)
            else:
                found.append([piece])
        return [self._run(first, run) for run in found]

    def _run(self, first: int, pieces: Sequence[tuple[int, int, int, bool]]) -> _Run:
        places = [place for place, *_ in pieces]
        ends = [pieces[0][1], *(high for _, _, high, _ in pieces)]
        rows = Rows([end - ends[0] for end in ends], self._ids.device)
        numbers = [self._shares[place].number for place in places]
        return _Run(places, numbers, ends[0] - first, ends[-1] - first, rows, pieces[0][-1])

    def _arrived(self, ruled: RuledModule, states: torch.Tensor, gradient: torch.Tensor, runs: Sequence[_Run]) -> None:
        lead = 0 if ruled.module is self._head else 1
        states, gradient = (each.flatten(0, lead) for each in (states, gradient))
        for run in runs:
            given = states[run.start : run.end], gradient[run.start : run.end]
            if lead:
                given = given[0][None], given[1][None]
            for parameter, rule in ruled.rules:
                name = self._figures.name_of(parameter)
                if run.whole:
                    means = self._figures.means_of(name)
                    self._figures.add(
                        name, run.numbers, figures_of(rule, parameter, ruled.module, *given, run.rows, means)
                    )
                else:
                    target, fresh = self._figures.part(name, run.numbers[0], parameter)
                    narrow = given[0] if rule is embedding else given[0].to(target.dtype)
                    rule(ruled.module, narrow, given[1].to(target.dtype), run.rows, target, fresh)
                if parameter is self._tied:
                    self._cross(ruled.module, rule, name, run, *given)
            if not run.whole:
                self._settle(ruled, run)

    def _settle(self, ruled: RuledModule, run: _Run) -> None:
        """Of an output embedding's piece that ends within a prompt: the gradient is complete with the prompt's last piece."""
        place = run.places[0]
        if not self._shares[place].whole:
            return  # when the prompt is closed
        self._come[place] += run.rows.tokens
        if self._come[place] == self._responses[place + 1] - self._responses[place]:
            for parameter, _ in ruled.rules:
                self._figures.settle(self._figures.name_of(parameter), run.numbers[0])

    def _cross(
        self, module: Any, rule: Rule, name: str, run: _Run, states: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Of a tied weight: the output embedding's gradient comes first; what it has to do with the input embedding's is added with that."""
        outer = rule is linear
        if outer:
            states, each = states.reshape(run.rows.tokens, -1), gradient.reshape(run.rows.tokens, -1)
        else:
            each = row_gradients(module, states, gradient)
        for place, number, (start, end) in zip(run.places, run.numbers, pairwise(run.rows.bounds), strict=True):
            if not self._shares[place].whole:
                continue  # the gradients are added up before they are squared
            if outer:
                ids = self._ids[self._body[place] : self._body[place + 1]]
                self._crossing.setdefault(place, []).append((states[start:end], each[start:end].index_select(1, ids)))
                continue
            for outer_states, chosen in self._crossing.pop(place, ()):
                figures = self._figures.nothing()
                figures[0, 0] = 2 * crossed(chosen, outer_states, each[start:end])
                self._figures.add(name, [number], figures)


def _bounds(lengths: Sequence[int], shares: Sequence[Share]) -> list[int]:
    """Where each prompt's tokens start, one more than there are prompts; lengths: of each response."""
    ends = list(accumulate(lengths, initial=0))
    return [ends[row] for row in accumulate((share.responses for share in shares), initial=0)]


def _tied_weight(model: Any, modules: Sequence[RuledModule]) -> torch.nn.Parameter | None:
    """The weight that is both input and output embedding, or None. NoRule: another one belongs to several modules."""
    owners: dict[torch.nn.Parameter, list[tuple[RuledModule, Rule]]] = {}
    for ruled in modules:
        for parameter, rule in ruled.rules:
            owners.setdefault(parameter, []).append((ruled, rule))
    found = None
    for parameter, several in owners.items():
        if len(several) > 1:
            if {rule for _, rule in several} != {linear, embedding} or len(several) > 2:
                raise several[-1][0].refusal()
            found = parameter
    return found
