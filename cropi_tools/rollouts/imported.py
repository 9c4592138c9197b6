"""Rollouts that others kept as text (the authors' rows, verl's dumps) as records of ours, tokenized once.

Nothing is known of how the text was sampled: `logprobs` are null, so that gradients of it need `cropi-grad --behavior`. Whether
a response ended with an end token is not written either. With `longest`, the limit it was sampled under, a shorter response must
have: it gets the end token, and `finish_reason` `stop`; any other was cut off: `length`. Without, no token is added that may
not have been sampled, and `finish_reason` is `unknown`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cropi_tools.data.digest_set import Seen
from cropi_tools.data.external_rollouts import TextRollout, text_rollouts
from cropi_tools.data.jsonl import Record, shown
from cropi_tools.data.records import outcome_of_score, prompt_of, read_prompts
from cropi_tools.policy.prompts import check_size, check_vocabulary, encoded_prompt
from cropi_tools.policy.tokens import Tokens
from cropi_tools.runtime.errors import InputError


def imported_rollouts(
    paths: Sequence[str | Path],
    tokens: Tokens,
    prompts: Sequence[str | Path] | None = None,
    longest: int | None = None,
    repeated: Callable[[str], None] = lambda identity: None,
) -> Iterator[Record]:
    """Yield the rollouts of all files, in order, in our form.

    prompts: files that say what was asked. A verl dump has its prompts without special tokens, so each is found by what it
    becomes when it is rendered and decoded likewise. The authors' rows are found by id, then by prompt; without `prompts` a row is
    its own prompt. The record is then the prompt's, and responses and rewards alone come from the rollouts.

    A prompt that comes again (another step, another file) is left out, and `repeated` is told its id: the first met is kept, so name the files
    in the order in which they matter. `reward` and `outcome` are null where the file has no rewards, to be verified. Memory holds the records
    of the prompts that occur in verl's dumps, and one step of a dump. InputError: a dump without `prompts`, a prompt that is
    not among them or that two of them may be, malformed rows.
    """
    known = _Prompts(paths, tokens, prompts) if prompts else None
    met = Seen()
    for rollout in text_rollouts(paths):
        if known is not None:
            record = known.of(rollout)
        elif rollout.form == "verl-dump":
            raise InputError(
                f"{rollout.where}: a verl dump has no special tokens in its prompts; give what it was made from with --prompts FILE"
            )
        else:
            record = _own_record(rollout)
        if met.add(record["id"]):
            yield _imported(prompt_of(record), rollout, tokens, longest)
        else:
            repeated(record["id"])


def _imported(record: Record, rollout: TextRollout, tokens: Tokens, longest: int | None) -> Record:
    rewards: Sequence[float | None] = rollout.rewards or [None] * len(rollout.responses)
    samples = []
    for text, reward in zip(rollout.responses, rewards, strict=True):
        check_size(tokens, record["id"], len(text))
        ids, finish_reason = _response(text, tokens, longest)
        check_vocabulary(tokens, record["id"], ids)
        outcome = None if reward is None else outcome_of_score(reward)
        samples.append(
            {
                "token_ids": ids,
                "logprobs": None,
                "text": text,
                "finish_reason": finish_reason,
                "reward": reward,
                "outcome": outcome,
            }
        )
    return {**record, "prompt_token_ids": encoded_prompt(tokens, record), "samples": samples}


def _response(text: str, tokens: Tokens, longest: int | None) -> tuple[list[int], str]:
    ids = [int(token) for token in tokens.tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []
    if longest is None:
        return ids, "unknown"
    if len(ids) >= longest:
        return ids[:longest], "length"
    usual = tokens.tokenizer.eos_token_id if tokens.usual_end is None else tokens.usual_end
    return [*ids, usual if usual in tokens.end_token_ids else tokens.end_token_ids[0]], "stop"


def _own_record(rollout: TextRollout) -> Record:
    """The prompt of an authors' row, as `cropi-prompts` would have it."""
    row, where = rollout.row, rollout.where
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: 'prompt' must be a text that is not empty")
    if row.get("id") is None or row.get("answer") is None:
        raise InputError(f"{where}: no field '{'id' if row.get('id') is None else 'answer'}'")
    return {
        "id": str(row["id"]),
        "prompt": prompt,
        "answer": str(row["answer"]),
        "source": str(row.get("source") or "authors"),
    }


class _Prompts:
    """The prompts that rollouts answer, found by id, by text, or by what verl makes of them."""

    def __init__(self, paths: Sequence[str | Path], tokens: Tokens, prompts: Sequence[str | Path]) -> None:
        wanted = Seen()
        dumps = False
        for rollout in text_rollouts(paths):
            dumps = dumps or rollout.form == "verl-dump"
            for key in _keys(rollout):
                wanted.add(key)
        self._files = ", ".join(shown(path) for path in prompts)
        self._found: dict[str, Record | None] = {}
        for record in read_prompts(prompts):
            keys = [f"id {record['id']}", f"prompt {record['prompt']}"]
            if dumps:
                ids = encoded_prompt(tokens, record)
                keys.append(f"input {tokens.tokenizer.decode(ids, skip_special_tokens=True)}")
            for key in keys:
                if key in wanted:
                    # None: more than one prompt; ids are unique, so that is no matter for them
                    self._found[key] = None if key in self._found else record

    def of(self, rollout: TextRollout) -> Record:
        """The record of the prompt that was answered."""
        for key in _keys(rollout):
            if key in self._found:
                record = self._found[key]
                if record is None:
                    raise InputError(
                        f"{rollout.where}: several prompts of {self._files} read like this one; leave one of them"
                    )
                return record
        named: Any = rollout.row.get("id", rollout.prompt)
        raise InputError(
            f"{rollout.where}: no prompt of {self._files} is {str(named)[:60]!r}; give the file, template and policy it was made with "
            "(a tokenizer that does not give back its text finds none)"
        )


def _keys(rollout: TextRollout) -> list[str]:
    if rollout.form == "verl-dump":
        return [f"input {rollout.prompt}"]
    return [f"id {rollout.row.get('id')}", f"prompt {rollout.prompt}"]
