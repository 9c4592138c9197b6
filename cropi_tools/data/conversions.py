"""Commands, for messages, that make a policy folder of what is none: weights in another format, or an adapter.

Each is one line for a shell, to be run as it stands: it writes the folder NEW.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
GGUF = ".gguf"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def by_transformers(source: str, weights: Sequence[str], revision: str | None = None) -> str:
    """Saves again, with its tokenizer, a folder or hub model whose weights are the files `weights`, not as .safetensors.

    Of several GGUF files, which are the same weights in several precisions, the first is taken. They need the package gguf.
    """
    options = [repr(source), *([f"revision={revision!r}"] if revision else [])]
    gguf = [name for name in weights if name.endswith(GGUF)]
    if not gguf:
        given = ", ".join(options)
        return _python(
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f"[one.from_pretrained({given}).save_pretrained('NEW') for one in (M, T)]"
        )
    given = ", ".join([*options, f"gguf_file={gguf[0]!r}"])
    # version 5.20 or so of the library keeps the weights packed unless told, and in any case believes that they are
    return _python(
        "import transformers as t; "
        "c = dict(quantization_config=t.GgufConfig(dequantize=True)) if hasattr(t, 'GgufConfig') else {}; "
        f"m = t.AutoModelForCausalLM.from_pretrained({given}, **c); m.hf_quantizer = None; vars(m.config).pop('quantization_config', None); "
        f"m.save_pretrained('NEW'); t.AutoTokenizer.from_pretrained({given}).save_pretrained('NEW')"
    )


def by_peft(folder: str) -> str:
    """Merges an adapter into the weights that its settings name, and saves them with the tokenizer: the adapter's own if it has one."""
    base = _base_of(folder)
    tokenizer = base if base is not None and not (Path(folder) / _TOKENIZER_CONFIG).exists() else folder
    return _python(
        "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
        f"M.from_pretrained({folder!r}).merge_and_unload().save_pretrained('NEW'); T.from_pretrained({tokenizer!r}).save_pretrained('NEW')"
    )


def _base_of(folder: str) -> str | None:
    """The policy that an adapter says it is of."""
    try:
        base = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return base if isinstance(base, str) and base else None


def _python(program: str) -> str:
    """The program as a shell's line: in double quotes, which read well around Python's single ones, unless something in it means more there."""
    quoted = shlex.quote(program) if any(mark in program for mark in '"$`!\\') else f'"{program}"'
    return f"python -c {quoted}"
