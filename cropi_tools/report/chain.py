"""Policies that cropi-train made one from another, by hand, as a run of one arm and one seed: each policy is a stage.

Which was trained from which, and on what, their manifests say. What was selected, and what selecting cost, stands in the files and manifests
that these name, as far as they are there and are still those that were read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cropi_tools.data import fields
from cropi_tools.data.jsonl import read_jsonl
from cropi_tools.data.manifest import FOLDER_MANIFEST, file_digest, manifest_path
from cropi_tools.data.policies import TRAINING_OPTIONS
from cropi_tools.report.pool import Selection, selection_of
from cropi_tools.report.reading import Arm, Manifest, Place, Run, manifest_of, read_stages
from cropi_tools.report.records import checked
from cropi_tools.runtime.errors import InputError

_NOT_OF_SELECTING = ("cropi-train", "cropi-prompts")
_OF_VALIDATION = ("mean ", "validation set ")  # how the inputs of cropi-grad and cropi-score are named that are no pool


def is_policy(folder: Path) -> bool:
    """Whether the folder is a policy of cropi-train, or one that is being trained."""
    return (_training(folder) / TRAINING_OPTIONS).exists()


def _training(folder: Path) -> Path:
    return Place(folder, None, ()).training


def read_chain(folders: Sequence[Path]) -> Run:
    """The chain of these policies, named after its last. InputError: they are not one chain, or a file is broken."""
    root = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    manifests = {
        folder: manifest_of(folder / FOLDER_MANIFEST, root) if (folder / FOLDER_MANIFEST).exists() else None
        for folder in folders
    }
    chain = _in_order(manifests)
    places = []
    for folder in chain:
        made = manifests[folder]
        selecting = [] if made is None else list(_selecting(made, root, set()))
        places.append(Place(folder, None if made is None else _selection(made), selecting))
    name = chain[-1].name
    seeds = [str(made.options["seed"]) for made in manifests.values() if made is not None and "seed" in made.options]
    seed = read_stages(seeds[0] if len(set(seeds)) == 1 else "1", places, root)
    return Run(name, root, (), (Arm(name, (seed,)),))


def _in_order(manifests: Mapping[Path, Manifest | None]) -> list[Path]:
    """The policies, each after the one that it was trained from; one that is not finished comes last. InputError: there are several ways."""
    finished = [folder for folder, made in manifests.items() if made is not None]
    trained_from = {folder: _parent(manifests[folder], finished) for folder in finished}
    chain: list[Path] = []
    while len(chain) < len(finished):
        last = chain[-1] if chain else None
        following = [folder for folder in finished if trained_from[folder] == last and folder not in chain]
        if len(following) != 1:
            left = next(folder for folder in finished if folder not in chain)
            raise InputError(_no_chain(last, following, left))
        chain += following
    unfinished = [folder for folder in manifests if folder not in finished]
    if len(unfinished) > 1:
        raise InputError(f"{unfinished[1]}: is unfinished, and so is {unfinished[0]}; give the policies of one chain")
    return chain + unfinished


def _no_chain(last: Path | None, following: Sequence[Path], left: Path) -> str:
    """Why a chain cannot be continued after `last` with exactly one policy."""
    remedy = "give the policies of one chain, all of them"
    if not following:
        return f"{left}: was trained from itself or from a policy after it, by its manifest; {remedy}"
    both = f"{following[0]} and {following[1]}"
    if last is None:
        return f"{both}: neither was trained from another one that is given; {remedy}"
    return f"{both}: were both trained from {last}; {remedy}"


def _parent(made: Manifest | None, folders: Sequence[Path]) -> Path | None:
    """The given policy that another was trained from. A path that leads nowhere from here is known by its name, if one alone has it."""
    before = Path(made.inputs.get("policy", "") if made is not None else "")
    if before.is_dir():
        return next((folder for folder in folders if folder.resolve() == before.resolve()), None)
    alike = [folder for folder in folders if folder.name == before.name]
    return alike[0] if len(alike) == 1 else None


def _selection(made: Manifest) -> Selection | None:
    """What a policy was trained on; None where a file of it is not there any more, or another one."""
    paths = {Path(path): made.input_digests[name] for name, path in made.inputs.items() if name.startswith("prompts")}
    if not paths or not all(path.is_file() and file_digest(path) == digest for path, digest in paths.items()):
        return None
    lines = (record for path in paths for record in checked(path, read_jsonl(path), fields.SELECTED))
    return selection_of(lines, {})


def _selecting(made: Manifest, root: Path, counted: set[str]) -> Iterator[Manifest]:
    """The manifests of all that a policy's prompts were selected from, each once: `counted` are those that were met."""
    for name, place in made.inputs.items():
        path = manifest_path(Path(place)) if place else Path()
        if not path.is_file():
            continue
        found = manifest_of(path, root)
        # a file may have been replaced by that of a later stage; of folders only their manifests are hashed
        still = Path(place).is_dir() or made.input_digests[name] in found.digests
        if found.command in _NOT_OF_SELECTING or found.path in counted or not still:
            continue
        counted.add(found.path)
        found = replace(found, of_validation=made.of_validation or name.startswith(_OF_VALIDATION))
        yield found
        yield from _selecting(found, root, counted)
