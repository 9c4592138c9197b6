"""A function of the user's own as a verifier: `path/file.py:function`, with verl's signature or with TRL's.

verl: `f(data_source, solution_str, ground_truth, extra_info)`, any of them or `**kwargs`; returns a number, or a mapping
with one as its "score". The arguments are the record's `source`, the response, the record's `answer` and `extra`.

TRL: `f(completions, prompts, **columns)`; returns a list with a number for each completion. The completions are texts, or
`[{"role": "assistant", "content": text}]` where the prompt is a list of messages, as in TRL. Columns are the record's keys
and those of its `extra`, each a list; `solution`, as TRL's own rewards call it, is the answer where the record has no such
key. What only TRL's trainer knows (`trainer_state`, `completion_ids`, `log_metric`) is not passed. Each call holds one
response, since each must be able to fail and to time out by itself.

Which of the two it is follows from the names of its parameters. Either may be a coroutine function.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from cropi_tools.data.fields import LARGEST_NUMBER, is_reward
from cropi_tools.data.records import ROLLOUT_FIELDS
from cropi_tools.rewards.grades import Grade, Record, prompt_name, scored
from cropi_tools.runtime.errors import InputError, UsageError

NOT_COLUMNS = frozenset({"prompt", "extra", *ROLLOUT_FIELDS})
"""Keys of a record that are no columns of the data set: TRL passes the prompt by another name, the rest is of rollouts."""

_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_FORMS = "verl's f(data_source, solution_str, ground_truth, extra_info) or TRL's f(completions, prompts, **columns)"


def split_name(name: str, built_in: tuple[str, ...] = ()) -> tuple[Path, str]:
    """`path/file.py:function` as its two parts. Raises UsageError, which lists `built_in`, for a name without that form."""
    path, colon, function = name.rpartition(":")
    if name.endswith(".py"):
        raise UsageError(f"verifier {name}: which function of it? Name it after a colon, as in {name}:reward")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        raise UsageError(
            f"there is no verifier {name!r}: give one of {', '.join(built_in)}, or path/file.py:function for one of"
            " your own"
        )
    return Path(path), function


def load_function(name: str) -> Callable[[Record, str], Grade]:
    """Import the file and wrap its function. What the file, or the function, raises is the user's to see: InputError."""
    path, function_name = split_name(name)
    function = getattr(_imported(name, path), function_name, None)
    if not callable(function):
        raise InputError(f"verifier {name}: {path} has no function {function_name!r}: check the name after the colon")
    call = _call_as_trl if _signature(name, function) == "trl" else _call_as_verl

    def verify(record: Record, response: str) -> Grade:
        try:
            score = call(function, record, response)
        except MemoryError:  # of the worker's limit: counted, with reward 0
            return Grade(0.0, "error")
        except (Exception, SystemExit) as error:
            raise InputError(f"verifier {name}, {prompt_name(record)}: {_described(error)}") from error
        return scored(_number(score, name, record))

    return verify


def _imported(name: str, path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"verifier {name}: there is no file {path}: check the path")
    module_name = f"cropi_verifier_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up there
    sys.path.append(
        str(path.parent.resolve())
    )  # for what lies beside it; last, so that it stands in for no module of others
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"verifier {name}: the file cannot be imported: {_described(error)}") from error
    return module


def _signature(name: str, function: Callable[..., Any]) -> Literal["verl", "trl"]:
    """Whose signature a function has. Raises InputError if its parameters tell neither, or both."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"verifier {name}: its parameters cannot be read: {error}: write a plain function") from error
    names = {parameter.name for parameter in parameters}
    trl, verl = "completions" in names, not names.isdisjoint(_VERL)
    if trl and verl:
        raise InputError(f"verifier {name}: its parameters {', '.join(names)} mix two forms: write {_FORMS}")
    if trl:
        return "trl"
    if verl or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return "verl"
    given = f"its parameters are {', '.join(names)}" if names else "it has no parameters"
    raise InputError(f"verifier {name}: {given}: write {_FORMS}")


def _call_as_verl(function: Callable[..., Any], record: Record, response: str) -> Any:
    values = (record.get("source"), response, record.get("answer"), record.get("extra") or {})
    return _finished(function(**_accepted(function, dict(zip(_VERL, values, strict=True)))))


def _call_as_trl(function: Callable[..., Any], record: Record, response: str) -> Any:
    prompt = record.get("prompt")
    conversation = isinstance(prompt, list)
    columns = {"solution": record.get("answer"), **(record.get("extra") or {})}
    columns |= {key: value for key, value in record.items() if key not in NOT_COLUMNS}
    completion = [{"role": "assistant", "content": response}] if conversation else response
    arguments = {key: [value] for key, value in {**columns, "prompts": prompt, "completions": completion}.items()}
    found = _finished(function(**_accepted(function, arguments)))
    if not isinstance(found, Iterable) or isinstance(found, str | bytes | Mapping):
        raise ValueError(f"it returned {_shortened(found)}: return a list with a number for each completion")
    rewards = list(found)
    if len(rewards) != 1:
        raise ValueError(f"it returned {len(rewards)} rewards for one completion: return one for each")
    if rewards[0] is None:
        raise ValueError(
            "it returned None, TRL's word for a reward that does not apply: return a number for each prompt that it is"
            " to verify, and name another verifier for the rest (the key 'verifier' of a record)"
        )
    return rewards[0]


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes. Raises ValueError if it needs others."""
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if needed and parameter.name not in arguments:
            raise ValueError(
                f"it needs {parameter.name!r}, which the prompt's record does not have: add that key, or give the parameter"
                " a default"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    names = {parameter.name for parameter in parameters}
    return {key: value for key, value in arguments.items() if key in names}


def _finished(result: Any) -> Any:
    """The value itself, or what a coroutine comes to."""
    if not inspect.isawaitable(result):
        return result

    async def wait(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    return asyncio.run(wait(result))


def _number(value: Any, name: str, record: Record) -> float:
    """A finite number from what a function returned: a number, a bool, or a mapping with "score"."""
    score: Any = value.get("score") if isinstance(value, Mapping) else value
    if getattr(score, "ndim", None) == 0 and hasattr(score, "item"):
        score = score.item()  # a scalar of numpy or torch
    try:
        number = float(score) if isinstance(score, numbers.Real) else math.nan
    except OverflowError:
        number = math.nan
    if not is_reward(number):
        raise InputError(
            f"verifier {name}, {prompt_name(record)}: it returned {_shortened(value)}: return a finite number of at most {LARGEST_NUMBER:g}"
            " either way, or a dict with one as its 'score'"
        )
    return number


def _shortened(value: Any) -> str:
    """One line about a value, for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _described(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
