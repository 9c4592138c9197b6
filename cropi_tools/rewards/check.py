"""Validating a verifier before any sampling, and the fingerprint by which a changed one is noticed."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import version
from typing import Any

from cropi_tools import runtime
from cropi_tools.data import fields
from cropi_tools.data.fields import check_fields
from cropi_tools.data.jsonl import bounded_lines, open_binary, parse_line, shown
from cropi_tools.rewards.functions import split_name
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rewards.verifiers import BUILT_IN, DEFAULT, PARTIAL, allow_files, same_verifier, verifier_of
from cropi_tools.runtime.errors import InputError, UsageError

_LIBRARIES = {
    "maths": {"math-verify": "math_verify", "latex2sympy2_extended": "latex2sympy2_extended", "sympy": "sympy"},
    "choice": {},
    "exact": {},
    "reasoning-gym": {"reasoning-gym": "reasoning_gym"},
}

_NAMED = {"verifier": fields.PROMPT["verifier"]}
_RULES = {"maths": 3, "choice": 2, "exact": 2, "reasoning-gym": 2}
"""Raised with every change of our own code that may change a grade."""


def checked_verifiers(
    paths: Sequence[str], chosen: str | None, allowed: Iterable[str], partial_credit: bool
) -> dict[str, Any]:
    """Check, before any work, what will grade the records of these files; a line says whose own verifiers a chosen one overrides.

    chosen: the value of --verifier, None where it was not given. allowed: the files of --allow-verifier. Returns what decides the grades, for
    the fingerprint of the work. Raises what `check_verifier`, `check_own_verifiers` and `check_partial_credit` raise.
    """
    allow_files(allowed)
    general = DEFAULT if chosen is None else chosen
    check_verifier(general)
    own = check_own_verifiers(paths, chosen)
    check_partial_credit(partial_credit, {general, *own})
    return {"verifier": verifier_fingerprint(general), "own_verifiers": own, "partial_credit": partial_credit}


def check_verifier(name: str) -> None:
    """Raise now what would otherwise stop a run after hours of sampling.

    A file is imported in a process of its own, so that its imports and side effects stay out of this one (a tenth of a
    second, plus what the file imports). Raises UsageError if no verifier has that form of name; InputError, with the
    remedy, if a library is not installed, or the file is missing, cannot be imported, or lacks the function.
    """
    if name in BUILT_IN:
        for distribution, module in _LIBRARIES[name].items():
            if importlib.util.find_spec(module) is None:
                raise InputError(f"the verifier {name!r} needs {distribution}: pip install {distribution}")
        return
    path, _ = split_name(name, BUILT_IN)
    if not path.is_file():
        raise InputError(f"verifier {name}: there is no file {path}: check the path")
    with VerifierPool(name, workers=1, stoppable=True) as pool:
        pool.load(name)


def check_own_verifiers(paths: Sequence[str], chosen: str | None) -> dict[str, str]:
    """The verifiers that records of these files name for themselves and that grade them, each checked once, with their fingerprints.

    chosen: what grades all records in place of their own, or None. A line says how many others it overrides, which are not looked at, or,
    where records name several verifiers or only some name one, how many do. Raises InputError, naming file and line, where a record's own
    cannot be used, or is a program that the command line does not allow.
    """
    found: dict[str, str] = {}
    records = overridden = named = 0
    for path in paths:
        with open_binary(path) as stream:
            for number, line in bounded_lines(stream, path):
                records += 1
                # most lines need no second parsing
                record = parse_line(line, path, number) if b'"verifier"' in line else {}
                name = record.get("verifier")
                named += bool(name)
                if not name or (isinstance(name, str) and name in found):
                    continue
                check_fields(record, _NAMED, f"{shown(path)}:{number}")
                try:
                    if chosen is not None and not same_verifier(name, chosen):
                        overridden += 1
                        continue
                    if chosen is None:
                        check_verifier(verifier_of(record, None))
                    found[name] = verifier_fingerprint(name if chosen is None else chosen)
                except (InputError, UsageError) as error:
                    raise InputError(f"{shown(path)}:{number}: {error}") from None
    if overridden:
        runtime.notify(f"--verifier {chosen} overrides the verifiers of {overridden} of {records} records")
    elif chosen is None and (0 < named < records or len(found) > 1):
        others = f", the others by {DEFAULT}" if named < records else ""
        runtime.notify(
            f"{named} of {records} records are graded by the verifiers that they name ({', '.join(found)}){others}"
        )
    return found


def check_partial_credit(wanted: bool, names: Collection[str]) -> None:
    """Raise UsageError if partial credit is wanted of verifiers that give none, or always give theirs."""
    if wanted and PARTIAL.isdisjoint(names):
        raise UsageError(
            f"--partial-credit: {', '.join(sorted(set(names)))} grades no answer in part ({', '.join(sorted(PARTIAL))} does; a function"
            " of your own keeps its scores anyway); leave it out"
        )


def verifier_fingerprint(name: str) -> str:
    """A text that changes whenever the verifier may grade differently.

    For a built-in verifier its name, the number of its rules and the versions of its libraries; for a user's function its name and the SHA-256
    of its file (not of what the file imports). Raises UsageError for an unknown name, InputError if the file is
    missing.
    """
    if name in BUILT_IN:
        libraries = (f"{distribution}={version(distribution)}" for distribution in _LIBRARIES[name])
        return " ".join([name, f"rules={_RULES[name]}", *libraries])
    path, function = split_name(name, BUILT_IN)
    if not path.is_file():
        raise InputError(f"verifier {name}: there is no file {path}: check the path")
    return f"{path.name}:{function} sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"
