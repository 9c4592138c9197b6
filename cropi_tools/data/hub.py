"""Policies by name: a model of the Hugging Face hub, downloaded once into the hub library's usual cache, is the folder of its snapshot.

A name that the cache holds means the revision it holds: nothing is asked, so every command of a pipeline sees the same policy, with and
without a network. `hf download NAME` brings the cache up to date; NAME@REVISION says which revision is meant.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.conversions import by_transformers
from cropi_tools.data.policies import OPTIMIZER_STATE, POLICY_PATTERNS, UNREAD_PATTERNS, other_weights
from cropi_tools.runtime.errors import InputError, first_line
from cropi_tools.runtime.signals import ending_the_process

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(\w[\w./+-]*))?", re.ASCII)
_WEIGHTS = "*.safetensors"
_SECONDS = 10.0  # until the hub's first answer
_LONGEST = 200  # characters of a library's message


class _Wish(NamedTuple):
    """What to fetch: the name as the user gave it, its parts, and the patterns of files for the library."""

    name: str
    repository: str
    revision: str | None
    chosen: Mapping[str, Any]


class _Copy(NamedTuple):
    """A snapshot in the cache. unknown: nothing says whether it is whole (older versions of the library, or other programs, made it)."""

    folder: str
    state: Literal["whole", "begun", "unknown"]


def policy_folder(name: str, weights: bool = True, optimizer: bool = False) -> str:
    """The folder that an option means which takes a policy: what stands there, else the snapshot of the hub's model ORG/NAME[@REVISION].

    weights: False where the tokenizer is enough. optimizer: also what cropi-train left of its optimizer. A text that is neither a path that
    exists nor such a name is handed back, for its reader to refuse. InputError: the hub has no such model or revision, or not for this
    user, or cannot be reached and the cache has no whole copy; the model has no weights that are read here.
    """
    match = None if os.path.lexists(name) else _NAME.fullmatch(name)
    if match is None:
        return name
    repository, revision = match.groups()
    ignored = [*UNREAD_PATTERNS, *([] if weights else [_WEIGHTS])]
    chosen = {"allow_patterns": POLICY_PATTERNS, "ignore_patterns": ignored}
    folder = _snapshot(_Wish(name, repository, revision, chosen), weights)
    if optimizer:
        # of the same commit, whatever the name may mean by now
        _snapshot(_Wish(name, repository, os.path.basename(folder), {"allow_patterns": [OPTIMIZER_STATE]}), False)
    return folder


def _snapshot(wish: _Wish, weights: bool) -> str:
    """The folder of a snapshot with the files wished for: from the cache if it holds them all, else downloaded."""
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it warns of every try
    copy = _in_cache(wish)
    if copy and copy.state == "whole":
        return copy.folder
    # what was begun is completed as the revision that it is of
    revision = os.path.basename(copy.folder) if copy else wish.revision
    try:
        model = HfApi().model_info(wish.repository, revision=revision, files_metadata=True, timeout=_SECONDS)
    except (OSError, ValueError, errors.HTTPError) as error:
        if copy and copy.state == "unknown":
            return copy.folder
        raise InputError(_why_not(wish, error, copy)) from None
    files = {file.rfilename: file.size or 0 for file in model.siblings or []}
    if weights:
        _check_weights(wish, files)
    runtime.notify(f"{wish.name}: downloading revision {str(model.sha)[:12]} into the cache of huggingface_hub")
    try:
        with ending_the_process(f"{wish.name}: stopped; the same command resumes the download"):
            return snapshot_download(wish.repository, revision=revision, tqdm_class=_bar(), **wish.chosen)
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        raise InputError(
            f"{wish.name}: the download broke off ({_brief_line(error)}); the same command resumes it"
        ) from None


def _in_cache(wish: _Wish) -> _Copy | None:
    """The snapshot in the cache, if there is one. Asks no network."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(wish.repository, revision=wish.revision, local_files_only=True, **wish.chosen)
    except errors.LocalEntryNotFoundError as error:
        begun = getattr(error, "snapshot_path", None)
        return _Copy(begun, "begun") if begun else None
    except errors.HFValidationError as error:
        raise InputError(f"{wish.name}: no such folder, and no name of a model ({_brief_line(error)})") from None
    return _Copy(folder, "whole" if _is_listed(wish.repository, os.path.basename(folder)) else "unknown")


def _is_listed(repository: str, commit: str) -> bool:
    """Whether the cache lists the files of a commit, so that the library has compared them with those that are there."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # versions before 2 keep no list
        return False
    try:
        get_cached_repo_tree(repository, revision=commit)
    except CachedRepoTreeNotFoundError:
        return False
    return True


def _check_weights(wish: _Wish, files: Mapping[str, int]) -> None:
    """InputError: the model has no weights that are read here; said before anything is downloaded."""
    if any("/" not in file and file.endswith(_WEIGHTS[1:]) for file in files):
        return
    others = other_weights(file for file in files if "/" not in file)
    if not others:
        raise InputError(f"{wish.name}: the hub's model holds no .safetensors weights; take another model")
    raise InputError(
        f"{wish.name}: the hub's model holds its weights as {others[0]}, not as .safetensors; "
        f"this makes a folder of them: {by_transformers(wish.repository, others, wish.revision)}"
    )


def _why_not(wish: _Wish, error: Exception, copy: _Copy | None) -> str:
    """Why a model cannot be had, and what to do about it."""
    from huggingface_hub import constants, errors

    at = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"{wish.name}: the hub asks for consent; give it at {at}/{wish.repository}, then `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        if copy:
            return f"{wish.name}: the hub no longer has the revision whose download was begun; remove {copy.folder}"
        return (
            f"{wish.name}: the hub's model has no revision {wish.revision or 'main'}; {at}/{wish.repository} lists them"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{wish.name}: no such folder, and no model at {at} that this user may read; "
            "check the name, and for a private one `hf auth login`, or set HF_TOKEN"
        )
    held = (
        f"only a part of it in the cache {constants.HF_HUB_CACHE}"
        if copy
        else f"not in the cache {constants.HF_HUB_CACHE}"
    )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{wish.name}: no such folder, {held}, and HF_HUB_OFFLINE forbids to download it; unset that, or name a folder"
    return (
        f"{wish.name}: no such folder, {held}, and {at} does not answer as a hub ({_brief_line(error)}); "
        "try again, or download it where there is a network and name its folder"
    )


def _brief_line(error: BaseException) -> str:
    """What a library says, in at most one line."""
    said = first_line(error)
    return said if len(said) <= _LONGEST else said[: _LONGEST - 3] + "..."


def _bar() -> type:
    """The library's progress bars on a terminal; elsewhere, and with --quiet, none."""
    from tqdm.auto import tqdm

    hidden = runtime.is_quiet() or not sys.stderr.isatty()

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": hidden, "leave": False})

    return Bar
