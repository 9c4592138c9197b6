"""Prompts that are generated: families of reasoning-gym, and recipes that list several of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi_tools.data import fields
from cropi_tools.data.fields import check_fields
from cropi_tools.data.jsonl import Record, read_jsonl, shown
from cropi_tools.prompts.duplicates import Exclusion
from cropi_tools.prompts.families import check_scorable, family_maker, near, plain, shape
from cropi_tools.runtime.errors import InputError, UsageError

OVERSAMPLING = 20  # items tried for each record wanted, before a family counts as exhausted
SEED_DISTANCE = 1_000_003  # reasoning-gym's item i of seed s is item i-1 of seed s+1: our seeds are this far apart

_RECIPE_KEYS = tuple(fields.RECIPE)


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
        check_fields(line, fields.RECIPE, where)
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
    yield from ((dataset, _item(dataset, index)) for index in range(size))
    dataset = make(size * OVERSAMPLING)
    yield from ((dataset, _item(dataset, index)) for index in range(size, size * OVERSAMPLING))


def _item(dataset: Any, index: int) -> dict[str, Any]:
    """An item of a family; UsageError where its generator fails, which it does on settings that it did not refuse."""
    try:
        item: dict[str, Any] = dataset[index]
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        AssertionError,
        RecursionError,
    ) as error:
        raise UsageError(
            f"reasoning-gym cannot make item {index} at these settings ({type(error).__name__}: {error})"
        ) from None
    return item
