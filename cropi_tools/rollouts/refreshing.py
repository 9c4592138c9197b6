"""Which prompts of a rollouts file to sample again from the current policy.

Rollouts are sampled once and reused in every stage. A prompt whose samples all failed, or all succeeded, under the old policy has no gradient
and so is never selected again, though the current policy may be able to learn from it; one from whose samples the policy has drifted far has an
estimate of little worth. Sampling those again, and keeping the rest, locks out no prompt for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cropi_tools.data import fields
from cropi_tools.data.digest_set import Seen
from cropi_tools.data.fields import check_fields
from cropi_tools.data.jsonl import Record, read_jsonl
from cropi_tools.data.records import STORE_INDEX, read_rollouts
from cropi_tools.runtime.errors import InputError, UsageError

LOW_ESS = 0.1  # the effective sample size, a share of the weights, where --where low-ess names no other
FEWEST_WEIGHTS = 2  # or as many of the weights, if that is more: over eight responses no share is below 1/8
OF_REWARDS = "zero-advantage"
OF_INDEX = ("empty", "zero-gradient")
STATUSES = (OF_REWARDS, *OF_INDEX, "low-ess", "all")


class Wish(NamedTuple):
    """What `--where` asks for: statuses, and the effective sample size (a share of the weights) below which a prompt counts as drifted.

    at_least: a prompt with the effective sample size of fewer than FEWEST_WEIGHTS weights counts as well.
    """

    statuses: frozenset[str]
    least_ess: float | None
    at_least: bool = False

    @property
    def needs_index(self) -> bool:
        """Whether it takes the index of a gradient store to tell."""
        return self.least_ess is not None or bool(self.statuses & set(OF_INDEX))

    def drifted(self, ess: float, weights: int | None) -> bool:
        """Whether a prompt of this effective sample size over so many weights counts as drifted; a single weight cannot tell."""
        if self.least_ess is None:
            return False
        least = max(self.least_ess, FEWEST_WEIGHTS / weights) if self.at_least and weights else self.least_ess
        return ess < min(least, 1.0)


class Again(NamedTuple):
    """What sampling again needs besides the options: the digest of the policy that does, and the index files of the stores of --index."""

    policy_digest: str
    indexes: Sequence[str]


def parse_wish(texts: Sequence[str]) -> Wish:
    """`zero-advantage`, `low-ess`, `low-ess=0.2`, ... as a wish. UsageError: no such status, or a share that is not above 0 and up to 1."""
    statuses, least, at_least = set(), None, False
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in STATUSES or (equals and name != "low-ess"):
            raise UsageError(f"expected {', '.join(STATUSES)}, or low-ess=SHARE")
        if name != "low-ess":
            statuses.add(name)
            continue
        try:
            share = float(value) if equals else LOW_ESS
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            raise UsageError("expected a share of the weights above 0 and up to 1, such as low-ess=0.2")
        least, at_least = max(share, least or 0.0), at_least or not equals
    return Wish(frozenset(statuses), least, at_least)


def index_files(where: Sequence[str], stores: Sequence[str]) -> list[str]:
    """The index of each gradient store. UsageError: the wish takes none, or one that is not given. InputError: a store has none."""
    wish = parse_wish(where)
    if wish.needs_index and not stores:
        raise UsageError(f"--where {' '.join(where)} takes the gradients to tell: give their store with --index")
    if stores and not wish.needs_index:
        raise UsageError(f"--where {' '.join(where)} is told from the rewards alone; leave --index out")
    found = [str(Path(store) / STORE_INDEX) for store in stores]
    for path in found:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; --index takes a store of cropi-grad")
    return found


def wanted_ids(indexes: Sequence[str], wish: Wish) -> tuple[set[str], Seen]:
    """Ids of the prompts that the stores' indexes show to be what is wished for, and all ids there.

    InputError: a line is not of an index, or no prompt's effective sample size could be as low as is asked.
    """
    found: set[str] = set()
    known = Seen()
    most = 0  # weights of a prompt: its effective sample size is 1 / weights or more
    for path in indexes:
        for number, line in read_jsonl(path):
            # not all that a store needs: importing what opens one takes seconds, and these are all that is read here
            check_fields(line, fields.STORE, f"{path}:{number}")
            if "id" not in line or "status" not in line:
                raise InputError(f"{path}:{number}: no 'id' and 'status'; expected the index of a gradient store")
            known.add(line["id"])
            ess, weights = line.get("effective_sample_size"), line.get("weight_count")
            most = max(most, weights or 0)
            if line["status"] in wish.statuses or (ess is not None and wish.drifted(ess, weights)):
                found.add(line["id"])
    if most > 1 and wish.least_ess is not None and not wish.at_least and wish.least_ess <= 1 / most:
        raise InputError(
            f"{indexes[0]}: low-ess={wish.least_ess:g} can never be met: the effective sample size of {most} weights is {1 / most:.4g} or more "
            f"(the weightings trajectory and sequence have one weight a response); ask for a larger share, or for low-ess alone"
        )
    return found, known


def marked(
    paths: Sequence[str], wish: Wish, listed: set[str], vocabulary: int | None = None
) -> Iterator[tuple[Record, bool]]:
    """Each rollout's record and whether to sample it again; token ids must lie below `vocabulary`."""
    for rollout in read_rollouts(paths, vocabulary):
        rewards = rollout.rewards
        flat = OF_REWARDS in wish.statuses and (len(rewards) < 2 or min(rewards) == max(rewards))
        yield rollout.record, flat or "all" in wish.statuses or rollout.id in listed
