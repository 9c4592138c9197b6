"""Where prompts come from: families of reasoning-gym, recipes that list several of them, and files in our form, in
verl's or in the authors' (JSONL or parquet). Everything becomes a record of `prompts.jsonl`: `{"id", "prompt",
"answer", "source"}`, and where needed `"verifier"` and `"extra"`.

Questions are kept apart by their normalised text, so that a test set never shares one with a training set.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi_tools.data.errors import InputError, UsageError
from cropi_tools.data.families import check_scorable, family_maker, near, plain, shape
from cropi_tools.data.jsonl import Record, is_stream, read_jsonl, shown

OVERSAMPLING = 20  # items tried for each record wanted, before a family counts as exhausted
SEED_DISTANCE = 1_000_003  # reasoning-gym's item i of seed s is item i-1 of seed s+1: our seeds are this far apart

_RECIPE_KEYS = ("family", "name", "source", "size", "set", "template", "answer_template")
# ---------------------------------------------------------------------------------------------- keeping questions apart


def normalise_question(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The text by which two prompts count as the same question: NFKC, case folded, white space collapsed; messages are
    joined."""
    text = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Exclusion:
    """Lets each question through once, and none of the given ones; counts `kept`, `excluded` and `duplicates`."""

    def __init__(self, questions: Iterable[str] = ()) -> None:
        """`questions` are normalised, as `questions` and `normalise_question` give them."""
        self._forbidden = frozenset(questions)
        self._met: set[str] = set()
        self.kept = 0
        self.excluded = 0
        self.duplicates = 0

    def admits(self, record: Record) -> bool:
        """Whether the record's question is new and allowed; counts it."""
        question = normalise_question(record["prompt"])
        if question in self._forbidden:
            self.excluded += 1
        elif question in self._met:
            self.duplicates += 1
        else:
            self._met.add(question)
            self.kept += 1
            return True
        return False

    def filter(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records that are admitted, in order."""
        return (record for record in records if self.admits(record))


def questions(path: str | Path) -> Iterator[str]:
    """The normalised questions of a file in any form that `jsonl_prompts` reads; only the prompt is needed."""
    for where, row in _rows(path):
        yield normalise_question(_prompt(row, where))


# ------------------------------------------------------------------------------------------------------- reasoning-gym


def reasoning_gym_prompts(
    family: str,
    size: int,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    template: str | None = None,
    answer_template: str | None = None,
    source: str | None = None,
    name: str | None = None,
    exclusion: Exclusion | None = None,
) -> Iterator[Record]:
    """Yield `size` prompts of a reasoning-gym family, each question once; fewer if the family runs out of new ones.

    `settings` are fields of the family's configuration, as text (`"min_value": "3"`, tuples comma separated) or as JSON
    values. The same arguments give the same records; different seeds give different items. Ids are
    `{name}-{seed}-{index}`, where `name` is by default the source and the source the family. Without templates the
    record keeps the whole entry, for reasoning-gym's own scorer. With one, question and answer are shaped (see
    `shape`), and the answer is compared exactly.

    Up to OVERSAMPLING items are tried per record wanted. UsageError: unknown family, setting, value, template field or
    conversion.
    """
    make = family_maker(family, settings or {}, _start(seed))
    exclusion = exclusion or Exclusion()
    source = source or family
    name = name or source
    shaped = template is not None or answer_template is not None
    kept = 0
    for index, (dataset, entry) in enumerate(_items(make, size)):
        if index == 0 and not shaped:
            check_scorable(family, dataset, entry)
        question, answer = str(entry["question"]), "" if entry["answer"] is None else str(entry["answer"])
        record: Record = {"id": f"{name}-{seed}-{index}", "prompt": question, "answer": answer, "source": source}
        if shaped:
            fields = {**entry["metadata"], "question": question, "answer": answer}
            record["prompt"] = shape(template or "{question}", fields)
            record["answer"] = shape(answer_template or "{answer}", fields)
            record |= {"verifier": "exact", "extra": {"reasoning_gym": {"dataset": family}}}
        else:
            kept_entry = {"dataset": family, "entry": plain(entry)}
            record |= {"verifier": "reasoning-gym", "extra": {"reasoning_gym": kept_entry}}
        if exclusion.admits(record):
            kept += 1
            yield record
            if kept == size:
                return


def recipe_prompts(
    path: str | Path,
    seed: int,
    size: int | None = None,
    only: Collection[str] = (),
    exclusion: Exclusion | None = None,
) -> Iterator[Record]:
    """Yield the prompts of every line of a recipe, in its order.

    A recipe is JSONL, one family and level a line: `{"family", "name", "source", "size", "set": {...}, "template",
    "answer_template"}`; only `family` is needed. `name` (default: the source) starts the ids and occurs once in a file.
    `size` as an argument replaces that of every line; `only` keeps the lines with one of these names or sources.
    InputError names the line.
    """
    exclusion = exclusion or Exclusion()
    lines = list(_recipe_lines(path))
    known = {line[key] for _, line in lines for key in ("name", "source")}
    for wanted in only:
        if wanted not in known:
            raise UsageError(f"{shown(path)} has no source {wanted!r}{near(wanted, known)}")
    for number, line in lines:
        if only and not {line["name"], line["source"]} & set(only):
            continue
        count = line["size"] if size is None else size
        if count is None:
            raise InputError(f"{shown(path)}:{number}: no 'size'; add it, or give one with --size")
        options = {key: line[key] for key in ("template", "answer_template", "source", "name")}
        options |= {"settings": line["set"], "exclusion": exclusion}
        try:
            yield from reasoning_gym_prompts(line["family"], count, seed, **options)
        except UsageError as error:
            raise InputError(f"{shown(path)}:{number}: {error}") from None


def _recipe_lines(path: str | Path) -> Iterator[tuple[int, Record]]:
    names: dict[str, int] = {}
    for number, line in read_jsonl(path):
        where = f"{shown(path)}:{number}"
        for key in line:
            if key not in _RECIPE_KEYS:
                raise InputError(f"{where}: unknown key {key!r}{near(key, _RECIPE_KEYS)}")
        if "family" not in line:
            raise InputError(f"{where}: no 'family'; name a family of reasoning-gym")
        for key in ("family", "name", "source", "template", "answer_template"):
            if not isinstance(line.get(key, ""), str):
                raise InputError(f"{where}: {key!r} must be a text, found {line[key]!r}")
        if not isinstance(line.get("set", {}), dict):
            raise InputError(f"{where}: 'set' must be an object of settings")
        wanted = line.get("size")
        if wanted is not None and (type(wanted) is not int or wanted < 1):
            raise InputError(f"{where}: 'size' must be a whole number above 0, found {wanted!r}")
        source = line.get("source") or line["family"]
        name = line.get("name") or source
        if name in names:
            raise InputError(f"{where}: the name {name!r} stands on line {names[name]} too; names must differ")
        names[name] = number
        yield number, {**dict.fromkeys(_RECIPE_KEYS), "set": {}, **line, "source": source, "name": name}


def _start(seed: int) -> int:
    if seed < 0:
        raise UsageError(f"--seed {seed}: must not be negative")
    return seed * SEED_DISTANCE % 2**31


def _items(make: Callable[[int], Any], size: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The family's items with the dataset that made them: `size` of them, then, from a larger dataset, up to
    OVERSAMPLING times."""
    dataset = make(size)
    yield from ((dataset, dataset[index]) for index in range(size))
    dataset = make(size * OVERSAMPLING)
    yield from ((dataset, dataset[index]) for index in range(size, size * OVERSAMPLING))


# --------------------------------------------------------------------------------------------------------------- files


def jsonl_prompts(path: str | Path, source: str | None = None) -> Iterator[Record]:
    """Yield the prompts of a file: our form, verl's rows or the authors', JSONL (`.gz`, `.zst`, `-`) or parquet.

    `source` replaces the rows' own; without either it is the file's stem. Ids that are absent are made of stem and row.
    InputError names file, line (or row) and field.
    """
    file_stem = "stdin" if is_stream(path) else Path(path).name.split(".")[0]
    for index, (where, row) in enumerate(_rows(path)):
        verl = "reward_model" in row or "data_source" in row
        record = _from_verl(row, where) if verl else _from_ours(row, where)
        record_id = record["id"] if record["id"] is not None else index
        if isinstance(record_id, int):
            record_id = f"{file_stem}-{record_id}"
        record |= {"id": str(record_id), "source": source or record["source"] or file_stem}
        yield {key: value for key, value in record.items() if value not in (None, {})}


def to_verl(record: Record) -> Record:
    """A prompt as verl's row. `extra_info.index` is our id; what verl has no place for stands in `extra_info` as text,
    so that rows of different sources make one parquet table. `jsonl_prompts` reads it back."""
    prompt = record["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    extra_info = {
        "split": "train",
        "index": record["id"],
        "verifier": record.get("verifier") or "",
        "extra": json.dumps(record.get("extra") or {}, ensure_ascii=False),
    }
    return {
        "data_source": record["source"],
        "prompt": messages,
        "ability": "reasoning",
        "reward_model": {"style": "rule", "ground_truth": record["answer"]},
        "extra_info": extra_info,
    }


def _rows(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Each row with its place in words, for messages."""
    if is_stream(path) or Path(path).suffix != ".parquet":
        for number, row in read_jsonl(path):
            yield f"{shown(path)}:{number}", row
        return
    import pyarrow
    from pyarrow import parquet

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    numbers = itertools.count(1)
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path}: row {next(numbers)}", plain(row)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def _from_ours(row: Record, where: str) -> Record:
    return {
        "id": row.get("id"),
        "prompt": _prompt(row, where),
        "answer": _answer(row, "answer", where),
        "source": row.get("source"),
        "verifier": row.get("verifier"),
        "extra": row.get("extra"),
    }


def _from_verl(row: Record, where: str) -> Record:
    reward = row.get("reward_model")
    if not isinstance(reward, dict):
        raise InputError(f"{where}: no 'reward_model'; a verl row holds the answer in reward_model.ground_truth")
    rest = dict(row.get("extra_info") or {})
    ours = rest.pop("extra", None)
    return {
        "id": rest.pop("index", None),
        "prompt": _prompt(row, where),
        "answer": _answer(reward, "ground_truth", where, "reward_model."),
        "source": row.get("data_source"),
        "verifier": rest.pop("verifier", None) or None,
        "extra": json.loads(ours) if isinstance(ours, str) else rest,
    }


def _prompt(row: Record, where: str) -> str | list[Record]:
    prompt = row.get("prompt")
    if prompt is None:
        raise InputError(f"{where}: no 'prompt'; a row needs a text or a list of messages there")
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return prompt
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: 'prompt' must be a text or messages with role and content, and not empty")
    return prompt


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str) and "role" in value


def _answer(row: Record, key: str, where: str, prefix: str = "") -> str:
    answer = row.get(key)
    if answer is None:
        raise InputError(f"{where}: no '{prefix}{key}'; a row needs its answer there, as text or number")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise InputError(f"{where}: '{prefix}{key}' must be a text or a number, found {type(answer).__name__}")
    return str(answer)
