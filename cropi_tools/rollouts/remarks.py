"""What is off in rollouts, in the words of somebody who has looked at them: told before hours are spent on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.rewards.verifiers import DEFAULT
from cropi_tools.rollouts.look import Look, cut
from cropi_tools.rollouts.metrics import outcome_of
from cropi_tools.rollouts.writing import FEW

_MOST = 0.5  # of the responses: from here on they are what a person sees
_HARDLY_ANY = 0.1  # right, of those that a verifier compares to the letter
_SENTENCE = 6  # words
_BRIEF = 160  # characters of a text in a line

Sample = Mapping[str, Any]


def warn_of(summary: Mapping[str, Any], look: Look, verifier: str | None) -> None:
    """One warning for each thing that is off, with a response beside its reference.

    summary: of `Tallies`. verifier: the one chosen for all; None: each record's own.
    """
    for sentence in remarks(summary, look.records, verifier):
        runtime.warn(sentence)


def remarks(summary: Mapping[str, Any], records: Sequence[Record], verifier: str | None) -> Iterator[str]:
    """The sentences; none where all is as it should be, or the responses are too few to tell."""
    samples = summary["samples"]
    if samples < FEW:
        return
    outcomes = summary["outcomes"]
    right, partial = outcomes.get("correct", 0), outcomes.get("partial", 0)
    causes = [cause for cause in (_misfit(records, verifier), _cut_off(summary), _unread(summary)) if cause is not None]
    if not right and not partial:
        advice = (
            "take easier prompts, or worked examples (cropi-prompts --messages); --show 3 prints what the policy wrote"
        )
        why, like = causes[0] if causes else (advice, _any)
        yield f"none of the {samples} responses is right: {why}{_such_as(records, like)}"
        return
    if right == samples:
        yield f"all {samples} responses are right: there is nothing to learn from these prompts{_such_as(records, _any)}"
        return
    for why, like in causes:
        yield f"{why}{_such_as(records, like)}"
    if summary["equal_rewards_fraction"] == 1 and samples > summary["prompts"]:
        yield (
            f"in none of the {summary['prompts']} prompts do responses differ in reward, so none has a gradient; take more samples (-n) or "
            f"prompts of another difficulty{_such_as(records, _any)}"
        )


Cause = tuple[str, Callable[[Sample], bool]]
"""What is the matter, and which samples show it."""


def _cut_off(summary: Mapping[str, Any]) -> Cause | None:
    share = summary["truncated_fraction"]
    if share < _MOST:
        return None
    return f"{share:.0%} of the responses are cut off; raise --max-tokens, or ask for short answers", _is_cut_off


def _unread(summary: Mapping[str, Any]) -> Cause | None:
    share = summary["outcomes"].get("unparsed", 0) / summary["samples"]
    if share < _MOST:
        return None
    return (
        f"in {share:.0%} of the responses the verifier finds no answer; ask for a form that it reads (cropi-prompts --system, --messages), "
        "or choose another with --verifier",
        lambda sample: outcome_of(sample) == "unparsed",
    )


def _misfit(records: Sequence[Record], verifier: str | None) -> Cause | None:
    """Whether the answers are compared in a way that they are not written for."""
    exact = [record for record in records if (verifier or record.get("verifier") or DEFAULT) == "exact"]
    graded = [(record, sample) for record in exact for sample in record["samples"]]
    wrong = [(record, sample) for record, sample in graded if outcome_of(sample) == "wrong"]
    if not graded or len(graded) - len(wrong) > _HARDLY_ANY * len(graded):
        return None
    sentences = sum(len(_reference(record).split()) >= _SENTENCE for record in exact)
    if sentences >= _MOST * len(exact):
        return (
            "the verifier exact wants the reference to the letter, and references are sentences here; choose another with --verifier",
            _any,
        )
    holding = sum(_holds(record, sample) for record, sample in wrong)
    if holding < _MOST * len(wrong):
        return None
    return (
        f"the verifier exact wants the answer to the letter, and {holding} of {len(wrong)} wrong responses looked at hold it among other "
        "words; choose another with --verifier (maths reads answers in sentences), or ask for <answer> tags",
        _any,
    )


def _holds(record: Record, sample: Sample) -> bool:
    reference = _reference(record).strip()
    return bool(reference) and re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", sample.get("text") or "") is not None


def _reference(record: Record) -> str:
    return str(record.get("answer") or "")


def _such_as(records: Sequence[Record], like: Callable[[Sample], bool]) -> str:
    """One response beside its reference."""
    for record in records:
        for sample in record["samples"]:
            if like(sample):
                text, answer = cut(str(sample.get("text") or ""), _BRIEF), cut(_reference(record), _BRIEF)
                return f'; such as prompt \'{record["id"]}\': response "{text}", reference "{answer}"'
    return ""


def _any(sample: Sample) -> bool:
    return True


def _is_cut_off(sample: Sample) -> bool:
    return sample.get("finish_reason") == "length"
