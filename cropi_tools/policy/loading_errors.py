"""What a library raises while it opens a policy's files, as one line that names the file and the remedy.

A broken file, a package that is missing or a family nobody knows comes out of the libraries as any exception at all, from far below. So
around opening, and nowhere else, all of them are caught; a defect of ours elsewhere keeps its traceback.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cropi_tools.runtime.errors import CropiError, InputError, first_line

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LONGEST = 200  # characters of a library's message
_PANIC = "pyo3_runtime"  # where the exceptions of panics in Rust live; they derive from BaseException


@contextmanager
def opening(folder: str, *files: str) -> Iterator[None]:
    """Around a library's reading of `files` of a policy folder, the likeliest cause of trouble first.

    InputError: whatever was raised. It names the file that is not JSON, else the first of `files` that is there, else the folder.
    """
    try:
        yield
    except CropiError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != _PANIC:
            raise
        raise InputError(_message(folder, files, error)) from None


def read_config(folder: str) -> dict[str, Any]:
    """config.json as it stands, unchecked; empty where it cannot be read."""
    found = _json(Path(folder) / CONFIG)
    return found if isinstance(found, dict) else {}


def _message(folder: str, files: tuple[str, ...], error: BaseException) -> str:
    present = [name for name in files if (Path(folder) / name).exists()]
    for name in (name for name in present if name.endswith(".json")):
        found = _json(Path(folder) / name)
        if isinstance(found, ValueError):
            return f"{folder}/{name}: is not valid JSON ({first_line(found)}); fetch or copy it again"
        if not isinstance(found, dict):
            return f"{folder}/{name}: expected a JSON object; fetch or copy it again"
    cause = first_line(error)
    if CONFIG in present[1:] and _config_raises(folder, cause):
        present = [CONFIG]
    where = f"{folder}/{present[0]}" if present else folder
    said = cause if len(cause) <= _LONGEST else cause[: _LONGEST - 3] + "..."
    if isinstance(error, KeyError):
        said = f"no entry {said}"
    return f"{where}: does not open ({said}); {_remedy(read_config(folder), error)}"


def _config_raises(folder: str, cause: str) -> bool:
    """Whether config.json by itself is the cause: a tokenizer reads it too, to know its family."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what is asked is whether it is the same one
        return first_line(error) == cause
    return False


def _remedy(config: dict[str, Any], error: BaseException) -> str:
    """What to do, as far as the error and config.json tell."""
    text = first_line(error)
    if quantization_of(config):
        return f"its weights are quantized ({quantization_of(config)}): take the policy's plain weights, or install what that needs"
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "give --dtype bfloat16, or a --device with more memory"
    if "attn_implementation" in text or "flashattention" in text.lower():
        return "remove attn_implementation from config.json, or install what it needs"
    if config.get("auto_map") and ("custom code" in text or "model type" in text or "Unrecognized" in text):
        return "it needs code of its own (auto_map), which is never run here; take a policy of a family that transformers knows"
    if "configuration class" in text:
        return "take a causal language model"
    if "model type" in text or "Unrecognized model" in text:
        import transformers

        return f"transformers {transformers.__version__} does not know this family; a newer one may"
    if isinstance(error, ImportError):
        return "install the package"
    return "compare it with the original, or fetch the folder again"


def quantization_of(config: dict[str, Any]) -> str | None:
    """How config.json says that the weights are quantized; None where they are plain."""
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "quantization_config")) if isinstance(found, dict) else "quantization_config"


def _json(path: Path) -> Any:
    """What a JSON file holds, or the error that says it is not JSON (or UTF-8, or readable)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("it is nested too deep")
    except OSError as error:
        return ValueError(first_line(error))


@contextmanager
def without_panics() -> Iterator[None]:
    """Drop what was written to the process's stderr inside the block if an error ends it: Rust prints a panic there on its own.

    For blocks of a second at most: what is written is seen only after the block.
    """
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            if not failed:
                held.seek(0)
                with open(2, "wb", closefd=False) as stream:
                    stream.write(held.read())
