"""Policies as folders: Hugging Face layout, and one hash that tells two policies apart.

Weights are large: a file's hash is taken from the policy's own manifest, or from a cache in the user's cache folder, while the
file's size and modification time are unchanged; otherwise it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cropi_tools.data.conversions import ADAPTER_CONFIG, GGUF, by_peft, by_transformers
from cropi_tools.data.jsonl import is_stream
from cropi_tools.data.manifest import (
    FOLDER_MANIFEST,
    MANIFEST_ENDING,
    Input,
    file_digest,
    folder_digest,
    read_manifest,
    write_json,
)
from cropi_tools.data.metadata import NUMBER, TEXT, Each, Kind, Listed, checked, fault, read_json
from cropi_tools.runtime.errors import InputError

_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_TOKENIZER_STEMS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")
_VOCABULARY_STEMS = ("tokenizer", "vocab", "merges", "tekken")
_VOCABULARY_SUFFIXES = (".model", ".tiktoken", ".bpe", ".vocab")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_MISTRAL_WEIGHTS = "consolidated"  # the same weights under Mistral's own names, which nothing here reads
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", GGUF, ".h5", ".msgpack", ".distcp", ".ckpt")
# for the hub: every file that may be the policy's, and of those the ones that are not
POLICY_PATTERNS = (
    *(f"*{ending}" for ending in (".safetensors", *_SUFFIXES, *_VOCABULARY_SUFFIXES)),
    *(f"{stem}*" for stem in _TOKENIZER_STEMS),
)
UNREAD_PATTERNS = ("*/*", f"{_MISTRAL_WEIGHTS}*", *(f"*{ending}" for ending in _OTHER_WEIGHTS))
OPTIMIZER_STATE = "state/optimizer.safetensors"
TRAINING_OPTIONS = "training.json"
METRIC = "adam 2"  # the rule of gradients/preconditioner.py; another rule, another number
_BESIDE_OUTPUTS = (MANIFEST_ENDING, ".part.json")
_AGAIN = "fetch or copy it again"
_LARGEST_INDEX = 1 << 28  # bytes; a name and a file for every tensor
_NOT_POLICY = (FOLDER_MANIFEST, "progress.json", TRAINING_OPTIONS)


def policy_files(folder: str | Path) -> list[Path]:
    """The files that make up a policy: weights, configuration, tokenizer. InputError: the folder is not one whole policy."""
    return sorted([*_model_files(folder), *weight_files(folder)])


def has_weights(folder: str | Path) -> bool:
    """Whether a model folder holds weights that can be loaded."""
    _model_files(folder)
    return any((Path(folder) / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX))


def weight_files(folder: str | Path) -> list[Path]:
    """The files whose tensors are the policy's weights: model.safetensors, or the shards that its index names. What is hashed is what is loaded.

    InputError: there are none, some are absent, or files lie there that may be meant as well: transformers and vLLM choose differently.
    """
    root = Path(folder)
    found = {path.name for path in root.glob("*.safetensors")}
    index = root / WEIGHTS_INDEX
    if not index.exists() and WEIGHTS not in found:
        raise InputError(_no_weights(root, sorted(found)))
    named = set(weight_map(index).values()) if index.exists() else {WEIGHTS}
    if WEIGHTS in found | named and named != {WEIGHTS}:
        raise InputError(
            f"{folder}: holds {WEIGHTS} and {WEIGHTS_INDEX}, two sets of weights; remove the one that is not meant"
        )
    absent = sorted(named - found)
    if absent:
        raise InputError(
            f"{folder}: has no {absent[0]}{_more(absent)}, which {WEIGHTS_INDEX} names; fetch or copy it again"
        )
    strange = sorted(name for name in found - named if not name.startswith(_MISTRAL_WEIGHTS))
    if strange:
        raise InputError(
            f"{folder}: {strange[0]}{_more(strange)} lies beside {WEIGHTS if named == {WEIGHTS} else WEIGHTS_INDEX} and is no part of "
            "those weights; move it out of the folder"
        )
    return [_plain(root / name) for name in sorted(named)]


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor as an index of sharded weights has it. InputError: it is none, or names no file of the folder."""
    try:
        found = read_json(index, _AGAIN, _LARGEST_INDEX)
    except FileNotFoundError:
        raise InputError(f"{index}: is a link to nothing; {_AGAIN}") from None
    shape = {"weight_map": Each(Kind("a .safetensors file of the folder", _is_shard))}
    named: dict[str, str] = checked(found, shape, f"{index}: is not an index of sharded weights", _AGAIN)["weight_map"]
    if not named:
        raise InputError(f"{index}: names no file as a shard; expected .safetensors files")
    return named


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and "/" not in name and "\0" not in name and name.endswith(".safetensors")


def _no_weights(root: Path, others: list[str]) -> str:
    """What to say of a folder without weights that can be loaded."""
    if others:
        return f"{root}: holds {others[0]}{_more(others)} but no {WEIGHTS} and no {WEIGHTS_INDEX}; rename it if these are the weights"
    strange = other_weights(path.name for path in root.iterdir())
    if not strange:
        return f"{root}: holds no .safetensors weights; fetch or copy {WEIGHTS}"
    return (
        f"{root}: holds its weights as {strange[0]}, not as .safetensors; this makes a folder of them: "
        f"{by_transformers(str(root), strange)}"
    )


def other_weights(names: Iterable[str]) -> list[str]:
    """Those of the names that are weights in a format that is not read here."""
    return sorted(name for name in names if name.endswith(_OTHER_WEIGHTS))


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _model_files(folder: str | Path) -> list[Path]:
    """The files of a model folder beside its weights. InputError: it is none, or an adapter makes it two policies."""
    root = Path(folder)
    if root.is_file() and root.name.endswith(GGUF):
        raise InputError(
            f"{folder}: is a GGUF file; this makes a policy folder of it: {by_transformers(str(root.parent), [root.name])}"
        )
    if root.is_file():
        raise InputError(f"{folder}: is a file; expected a Hugging Face model folder with .safetensors weights")
    if not root.is_dir():
        raise InputError(f"{folder}: no such policy folder, and no name of the hub's, ORG/NAME[@REVISION]")
    if (root / ADAPTER_CONFIG).exists():
        if any((root / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX)):
            raise InputError(f"{folder}: has weights and an adapter; move the adapter out of the folder, or merge it")
        raise InputError(f"{folder}: holds an adapter alone; this makes a policy folder of it: {by_peft(str(folder))}")
    if not (root / "config.json").exists() and any(path.name.endswith(GGUF) for path in root.iterdir()):
        raise InputError(_no_weights(root, []))
    if not (root / "config.json").exists():
        raise InputError(f"{folder}: holds no config.json; expected a Hugging Face model folder")
    names = {path.name for path in root.iterdir() if path.suffix in _SUFFIXES} - {*_NOT_POLICY}
    # outputs of commands that were put here are not the policy's
    made = {name for name in names if name.endswith(_BESIDE_OUTPUTS)}
    made |= {name.removesuffix(MANIFEST_ENDING) for name in made}
    return [_plain(root / name) for name in sorted(names - made)]


def _plain(path: Path) -> Path:
    """The path of a file of a policy. InputError: it is a folder, a pipe or a link to nothing."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "no file"
        raise InputError(f"{path}: is {what}, expected a file of the policy; {_AGAIN}")
    return path


def policy_input(folder: str | Path) -> Input:
    """The policy as an input of a command: one hash over weights, configuration and tokenizer."""
    return Input(str(folder), folder_digest(_digests(Path(folder), policy_files(folder))))


def tokens_input(folder: str | Path) -> Input:
    """Tokenizer and configuration as an input of a command that samples from weights elsewhere (a server's)."""
    return Input(str(folder), folder_digest(_digests(Path(folder), _model_files(folder))))


def tokenizer_digest(folder: str | Path) -> str:
    """One hash over the tokenizer's files: rollouts may be used with any policy of the same tokenizer."""
    return folder_digest(_digests(Path(folder), tokenizer_files(folder)))


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files of a policy that belong to its tokenizer."""
    return [path for path in _model_files(folder) if path.name.startswith(_TOKENIZER_STEMS)]


def check_tokenizer(folder: str | Path) -> None:
    """InputError: the folder holds no vocabulary. For some families the library makes an empty tokenizer then, without a word."""
    settings = (
        "tokenizer_config.json",
        "special_tokens",
        "added_tokens",
        "chat_template",
        "config.json",
        "generation_config.json",
    )
    rest = [path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith(settings)]
    if not any(path.name.startswith(_VOCABULARY_STEMS) or path.suffix in _VOCABULARY_SUFFIXES for path in rest):
        raise InputError(
            f"{folder}: holds no tokenizer (such as tokenizer.json); copy the files of the policy that it was made from"
        )


def same_tokenizer(rollouts: str, folder: str) -> None:
    """InputError when a rollouts file says that another tokenizer than the policy's made its tokens; files without a manifest say nothing."""
    made_by = None if is_stream(rollouts) else (read_manifest(rollouts) or {}).get("facts", {}).get("tokenizer")
    if made_by is not None and made_by != tokenizer_digest(folder):
        raise InputError(
            f"{rollouts}: its tokens are of another tokenizer than the policy {folder}; sample with a policy of this family"
        )


def starting_policy(folder: str) -> str:
    """The policy at the beginning of a chain of cropi-train runs that ends with `folder`: the first that no manifest says was trained.

    InputError: a policy on the way is no longer where the manifest says, or is another one now.
    """
    manifest = read_manifest(folder) or {}
    seen = set()
    while manifest.get("command") == "cropi-train":
        if folder in seen:
            raise InputError(
                f"{folder}: was trained from itself, by its manifest; give --reference the starting policy"
            )
        seen.add(folder)
        before = manifest["inputs"]["policy"]
        there = before["path"] and Path(before["path"]).is_dir()
        if not there or policy_input(before["path"]).sha256 != before["sha256"]:
            raise InputError(
                f"{folder}: was trained from {before['path']}, which is not there or another policy now; "
                "give --reference the folder of the starting policy"
            )
        folder = before["path"]
        manifest = read_manifest(folder) or {}
    return folder


def _digests(folder: Path, files: list[Path]) -> dict[str, str]:
    recorded = (read_manifest(folder) or {}).get("outputs", {})
    cache_path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cropi-tools" / "digests.json"
    try:
        cached = checked(read_json(cache_path, ""), Each(TEXT), "", "")
    except (OSError, InputError):
        cached = {}
    found, fresh = {}, {}
    for path in files:
        stat = path.stat()
        known = recorded.get(path.name)
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if known and (known["bytes"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            found[path.name] = known["sha256"]
        elif key in cached:
            found[path.name] = cached[key]
        else:
            found[path.name] = file_digest(path)
            if stat.st_size > 1 << 24:
                fresh[key] = found[path.name]
    if fresh:
        _remember(cache_path, {**cached, **fresh})
    return found


def _remember(cache_path: Path, digests: dict[str, str]) -> None:
    """Keep hashes of large files; without a writable cache they are simply taken again."""
    try:
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_path, digests)
    except OSError:
        return


def optimizer_input(folder: str) -> Input:
    """The optimizer state that cropi-train left in a policy folder, as an input. InputError: there is none."""
    path = Path(folder) / OPTIMIZER_STATE
    if not path.is_file():
        raise InputError(
            f"{folder}: has no {OPTIMIZER_STATE}; cropi-train writes it with the policy, unless --state drop is given"
        )
    (digest,) = _digests(path.parent, [path]).values()
    return Input(folder, digest)


def adam_beta2(folder: str | Path) -> float | None:
    """Adam's beta2 as the training.json of a policy folder has it; None where it does not say."""
    try:
        found = read_json(Path(folder) / TRAINING_OPTIONS, "")
    except (OSError, InputError):
        return None
    if fault(found, {"betas": Listed(NUMBER, 2)}):
        return None
    beta2 = float(found["betas"][1])
    return beta2 if 0 <= beta2 < 1 else None


def metric_of(folder: str | Path, state: str) -> str:
    """What decides the metric of cropi-grad --preconditioner, for means and stores to have in common. state: hash of the optimizer state."""
    return f"{METRIC}, beta2 {adam_beta2(folder)}, {state}"
