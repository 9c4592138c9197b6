"""What a person looks at in rollouts: the first prompts as the policy sees them, with responses and what these earned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record, is_stream
from cropi_tools.data.records import read_rollouts
from cropi_tools.rollouts.grading import Row
from cropi_tools.rollouts.metrics import outcome_of

LOOKED_AT = 64  # prompts
_LONGEST_TEXT, _MOST_LINES = 2000, 40  # of a text that is shown
_MARGIN = "  | "


class Look:
    """The first rollout records, each with the few samples that a person would look at; without log-probabilities, which are long.

    show: how many of them are to be printed.
    """

    def __init__(self, show: int = 0) -> None:
        self.show = show
        self._records: dict[str, Record] = {}

    @property
    def records(self) -> list[Record]:
        """What was kept, in order."""
        return list(self._records.values())

    def add(self, record: Record) -> None:
        """Keep a record, if there is room and it is new."""
        if len(self._records) < max(LOOKED_AT, self.show) and record["id"] not in self._records:
            self._records[record["id"]] = {**record, "samples": _few(record["samples"])}

    def passing(self, groups: Iterator[list[Row]]) -> Iterator[list[Row]]:
        """The groups as they are, looked at as they come by."""
        for rows in groups:
            for row in rows:
                self.add(row.record)
            yield rows

    def read(self, output: str, samples: int) -> None:
        """Look at a finished output of so many samples from its beginning; of a stream there is nothing but what came by."""
        if samples and not is_stream(output):
            for rollout in islice(read_rollouts([output]), max(LOOKED_AT, self.show)):
                self.add(rollout.record)

    def tell(self, tokenizer: Any) -> None:
        """The first `show` prompts with a right and a wrong response each, or with one where all earned the same, on stderr."""
        shown = self.records[: self.show]
        for number, record in enumerate(shown, 1):
            runtime.notify(f"-- prompt {number} of {len(shown)}: '{record['id']}' (source {record['source']})")
            _print_text(tokenizer.decode(record["prompt_token_ids"]))
            runtime.notify(f"reference: {cut(str(record.get('answer')), 400)}")
            for sample in _ends(record["samples"]):
                how = "cut off at --max-tokens, " if sample.get("finish_reason") == "length" else ""
                runtime.notify(
                    f"response: {outcome_of(sample)}, reward {sample['reward']:g}, {how}{len(sample['token_ids'])} tokens"
                )
                _print_text(tokenizer.decode(sample["token_ids"]))


def cut(text: str, longest: int) -> str:
    """A text without its middle where it is longer; the end is where answers stand."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} [... {len(text) - longest // 2 * 2:,} characters ...] {text[-(longest // 2) :]}"


def _print_text(text: str) -> None:
    """A text with its line breaks, each line behind a margin, so that none can pass for one of ours."""
    lines = cut(text, _LONGEST_TEXT).split("\n")
    if len(lines) > _MOST_LINES:
        half = _MOST_LINES // 2
        lines = [*lines[:half], f"[... {len(lines) - 2 * half} lines ...]", *lines[-half:]]
    for line in lines:
        runtime.notify(_MARGIN + line.replace("\t", "    "))


def _few(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the highest and the lowest reward, one that was cut off, one without an answer: each once, in order."""
    kinds: Iterable[Iterable[int]] = (
        [max(range(len(samples)), key=lambda k: samples[k]["reward"])],
        [min(range(len(samples)), key=lambda k: samples[k]["reward"])],
        (k for k, sample in enumerate(samples) if sample.get("finish_reason") == "length"),
        (k for k, sample in enumerate(samples) if outcome_of(sample) == "unparsed"),
    )
    chosen = {place for places in kinds for place in islice(places, 1)}
    return [{name: value for name, value in samples[k].items() if name != "logprobs"} for k in sorted(chosen)]


def _ends(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    best = max(samples, key=lambda sample: sample["reward"])
    worst = min(samples, key=lambda sample: sample["reward"])
    return [best] if best["reward"] == worst["reward"] else [best, worst]
