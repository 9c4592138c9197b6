"""Counts over rollouts: accuracy and pass@k with their intervals, lengths, outcomes; for each source and for all."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cropi_tools.data.metadata import AT_LEAST_ONE, COUNT, NUMBER, OBJECT, TEXT, Each, Kind, Listed, Maybe, Shape
from cropi_tools.data.records import outcome_of_score
from cropi_tools.intervals import Cell, share_interval
from cropi_tools.runtime.errors import printable

_CELL = re.compile(r"\d{1,9}/\d{1,9}", re.ASCII)
_COUNTED = {
    **dict.fromkeys(("prompts", "samples", "tokens", "prompt_tokens", "truncated", "equal_rewards"), COUNT),
    "reward": NUMBER,
    "by_correct": Each(COUNT, key=Kind("a pair of counts such as 1/8", lambda key: _CELL.fullmatch(key) is not None)),
    "outcomes": Each(COUNT),
}
SAVED = {
    "sources": Each({**_COUNTED, "prompts": AT_LEAST_ONE, "samples": AT_LEAST_ONE}),
    "sampled": _COUNTED,
    "served_model?": Maybe(TEXT),
}
"""What a commit of rollouts says beside its lines."""

_INTERVAL = Maybe(Listed(NUMBER, 2))
_K = Kind("a number of samples", lambda key: key.isascii() and key.isdigit() and len(key) < 10)
_FIGURES = {
    **dict.fromkeys(("prompts", "samples"), AT_LEAST_ONE),
    **dict.fromkeys(
        ("accuracy", "mean_reward", "response_tokens", "truncated_fraction", "equal_rewards_fraction"), NUMBER
    ),
    "partial_fraction?": NUMBER,  # later than the others
    "accuracy_interval": _INTERVAL,
    "pass_at": Each(NUMBER, key=_K),
    "pass_at_interval?": Each(_INTERVAL),
    "outcomes": Each(COUNT),
}


def summary_shape(summary: Any) -> Shape:
    """What a summary in a manifest must hold: all figures, unless nothing was counted."""
    empty = isinstance(summary, Mapping) and summary.get("samples") == 0
    return {"samples": COUNT, "by_source": OBJECT} if empty else {**_FIGURES, "by_source": Each(_FIGURES)}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


@dataclass
class Tally:
    """Counts over the prompts of one source, added up as rollouts come; kept in the commit, so that a resumed run counts all.

    by_correct: how many prompts have c of n samples correct, by `c/n`. Accuracy, pass@k and their intervals need no more, so that memory
    does not grow with the prompts.
    """

    prompts: int = 0
    samples: int = 0
    reward: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    truncated: int = 0
    equal_rewards: int = 0
    by_correct: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)

    @property
    def correct(self) -> int:
        """Samples with full reward."""
        return self.outcomes.get("correct", 0)

    @property
    def lost(self) -> int:
        """Samples on which the verifier died or took too long."""
        return self.outcomes.get("error", 0) + self.outcomes.get("timeout", 0)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one rollout record."""
        samples = row["samples"]
        outcomes = [outcome_of(sample) for sample in samples]
        correct = outcomes.count("correct")
        self.prompts += 1
        self.samples += len(samples)
        self.reward += math.fsum(sample["reward"] for sample in samples)
        self.tokens += sum(len(sample["token_ids"]) for sample in samples)
        self.prompt_tokens += len(row["prompt_token_ids"])
        self.truncated += sum(sample.get("finish_reason") == "length" for sample in samples)
        self.equal_rewards += len({sample["reward"] for sample in samples}) == 1
        _count(self.by_correct, f"{correct}/{len(samples)}")
        for outcome in outcomes:
            _count(self.outcomes, outcome)

    def saved(self) -> dict[str, Any]:
        """The counts as JSON values; the constructor takes them back."""
        return asdict(self)

    def merge(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for name, value in other.saved().items():
            if isinstance(value, dict):
                for key, count in value.items():
                    _count(getattr(self, name), key, count)
            else:
                setattr(self, name, getattr(self, name) + value)

    def summary(self) -> dict[str, Any]:
        """Accuracy (share of correct samples), pass@k for k = 1, 2, 4, ... and all, their intervals, mean length, truncated share.

        Figures that nothing was counted for, as of an empty shard, are None; so are intervals over a single prompt.
        """
        cells = [
            (int(correct), int(samples), count)
            for (correct, samples), count in sorted((name.split("/"), count) for name, count in self.by_correct.items())
        ]
        fewest = min((samples for _, samples, _ in cells), default=0)
        wanted = sorted(
            {1 << i for i in range(fewest.bit_length()) if 1 << i <= fewest} | ({fewest} if fewest else set())
        )
        # a prompt of n samples has at most n / k independent chances at pass@k
        passed = {
            k: [Cell(pass_at_k(samples, correct, k), 1.0, samples / k, count) for correct, samples, count in cells]
            for k in wanted
        }
        pass_at = {str(k): math.fsum(cell.prompts * cell.share for cell in passed[k]) / self.prompts for k in wanted}
        correct_of = [Cell(correct / samples, samples, samples, count) for correct, samples, count in cells if samples]
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "accuracy": _share(self.correct, self.samples),
            "accuracy_interval": _as_list(share_interval(correct_of)),
            "mean_reward": _share(self.reward, self.samples),
            "pass_at": pass_at,
            "pass_at_interval": {str(k): _as_list(share_interval(passed[k])) for k in wanted},
            "response_tokens": _share(self.tokens, self.samples),
            "truncated_fraction": _share(self.truncated, self.samples),
            "partial_fraction": _share(self.outcomes.get("partial", 0), self.samples),
            "equal_rewards_fraction": _share(self.equal_rewards, self.prompts),
            "outcomes": dict(sorted(self.outcomes.items())),
        }


class Tallies:
    """A `Tally` a source."""

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        self._by_source = {name: Tally(**value) for name, value in (saved or {}).items()}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count rollout records."""
        for row in rows:
            self._by_source.setdefault(row["source"], Tally()).add(row)

    def saved(self) -> dict[str, Any]:
        """The counts as JSON values; the constructor takes them back."""
        return {name: tally.saved() for name, tally in self._by_source.items()}

    def total(self) -> Tally:
        """All sources together."""
        whole = Tally()
        for tally in self._by_source.values():
            whole.merge(tally)
        return whole

    def summary(self) -> dict[str, Any]:
        """The summary of everything, and of each source under `by_source`."""
        return {
            **self.total().summary(),
            "by_source": {name: tally.summary() for name, tally in sorted(self._by_source.items())},
        }


def table(summary: Mapping[str, Any]) -> list[str]:
    """The summary as lines for people: a line a source, and one for all where there are several."""
    if not summary["samples"]:
        return ["no prompts"]
    sources = summary["by_source"]
    rows = [*sources.items(), ("all", summary)] if len(sources) > 1 else [*sources.items()]
    most = max(summary["pass_at"], key=int, default="1")
    head = (
        "source",
        "prompts",
        "accuracy (95 % interval)",
        "reward",
        f"pass@{most} (95 % interval)",
        "tokens",
        "truncated",
    )
    cells: list[tuple[str, ...]] = [(*head, "partial", "unparsed", "timeouts", "errors", "equal rewards")]
    for name, found in rows:
        lost = [found["outcomes"].get(outcome, 0) / found["samples"] for outcome in ("unparsed", "timeout", "error")]
        shares = (
            found["truncated_fraction"],
            found.get("partial_fraction", 0.0),
            *lost,
            found["equal_rewards_fraction"],
        )
        cells.append(
            (
                printable(name),
                str(found["prompts"]),
                _with_interval(found["accuracy"], found["accuracy_interval"], found["prompts"]),
                f"{found['mean_reward']:.3f}",
                # a source whose prompts have more samples than others' has no figure for the fewest of all
                _with_interval(found["pass_at"][most], found.get("pass_at_interval", {}).get(most), found["prompts"])
                if most in found["pass_at"]
                else "-",
                f"{found['response_tokens']:.1f}",
                *(f"{share:.3f}" for share in shares),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def outcome_of(sample: Mapping[str, Any]) -> str:
    """A sample's outcome; told from its reward where the file does not say it."""
    return sample.get("outcome") or outcome_of_score(sample["reward"])


def _count(counts: dict[str, int], key: str, more: int = 1) -> None:
    counts[key] = counts.get(key, 0) + more


def _with_interval(share: float, interval: list[float] | None, prompts: int) -> str:
    # summaries of earlier versions have no interval of pass@k
    missing = "(one prompt)" if prompts == 1 else ""
    between = missing if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{share:.3f} {between:14}"


def _as_list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
