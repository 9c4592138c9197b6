"""Ways in which a policy folder breaks, each made in a copy of a whole one, with the file that an error must name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], None]


class Breakage(NamedTuple):
    """named: what the error must hold: a file's or a tensor's name, or a word of the remedy."""

    name: str
    change: Change
    named: str


def _edit(file: str, **entries: Any) -> Change:
    """Set entries of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        path = folder / file
        found = json.loads(path.read_text()) if path.exists() else {}
        for key, value in entries.items():
            if value is None:
                found.pop(key, None)
            else:
                found[key] = value
        path.write_text(json.dumps(found))

    return change


def _write(file: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def _remove(*files: str) -> Change:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def _cut(file: str, share: float) -> Change:
    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return change


def _tokenizer(**entries: Any) -> Change:
    return _edit("tokenizer.json", **entries)


def _quantized(**settings: Any) -> Change:
    """Integers beside the weights, and a config.json that says how to read them."""

    def change(folder: Path) -> None:
        _weights(lambda found: {**found, "model.layers.0.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32)})(
            folder
        )
        _edit("config.json", quantization_config=settings)(folder)

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Change the tensors of model.safetensors."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def shard(folder: Path, parts: int = 2) -> dict[str, str]:
    """Turn model.safetensors into shards with an index; returns the index's map."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = {key: found[key] for key in sorted(found)[part::parts]}
        save_file(mine, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(mine, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def _sharded(change: Change) -> Change:
    def apply(folder: Path) -> None:
        shard(folder)
        change(folder)

    return apply


def _index(change: Callable[[dict[str, str]], dict[str, str]]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "weight_map": change(found["weight_map"])}))

    return apply


def _twice(folder: Path) -> None:
    """The last tensor of the first shard into the second as well."""
    first, second = sorted(folder.glob("model-*.safetensors"))
    name = max(load_file(first))
    save_file({**load_file(second), name: load_file(first)[name] + 1}, second, metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _pickled_beside_other(folder: Path) -> None:
    _pickled(folder)
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}, folder / "adapter_model.safetensors")


def _adapter_alone(folder: Path) -> None:
    _adapter(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()


def _value(number: float) -> Change:
    def change(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found["model.layers.1.mlp.up_proj.weight"].view(-1)[5] = number
        return found

    return _weights(change)


def _own_code(folder: Path) -> None:
    """A family of its own whose code, were it run, would leave a mark."""
    mark = f"import pathlib\npathlib.Path({str(folder / 'MARK')!r}).write_text('run')\n"
    (folder / "own.py").write_text(mark)
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    _edit("config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=names)(folder)


def _own_tokenizer(folder: Path) -> None:
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'MARK')!r}).write_text('run')\n")
    _edit("tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.T", None]})(folder)
    (folder / "tokenizer.json").unlink()


def _own_generation(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'MARK')!r}).write_text('run')\ndef generate(*a, **k): pass\n"
    )


_PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
_GGUF = b"GGUF\x03\x00\x00\x00" + b"\x00" * 64

CONFIG = [
    Breakage("config.json is empty", _write("config.json", ""), "config.json"),
    Breakage("config.json is cut", _cut("config.json", 0.5), "config.json"),
    Breakage("config.json is a list", _write("config.json", "[1]"), "config.json"),
    Breakage("config.json is a number", _write("config.json", "7"), "config.json"),
    Breakage("config.json is null", _write("config.json", "null"), "config.json"),
    Breakage("config.json is no UTF-8", _write("config.json", b"\xff\xfe{}"), "config.json"),
    Breakage("config.json is {}", _write("config.json", "{}"), "config.json"),
    Breakage("no config.json", _remove("config.json"), "config.json"),
    Breakage("unknown model_type", _edit("config.json", model_type="nobodys"), "config.json"),
    Breakage("model_type is a number", _edit("config.json", model_type=7), "config.json"),
    Breakage("model_type is a list", _edit("config.json", model_type=["qwen2"]), "config.json"),
    Breakage("no model_type", _edit("config.json", model_type=None), "config.json"),
    Breakage("another family", _edit("config.json", model_type="gpt2"), "transformer.h.0."),
    Breakage("a vision model", _edit("config.json", model_type="vit"), "config.json"),
    Breakage("an encoder-decoder", _edit("config.json", model_type="t5"), "encoder-decoder"),
    Breakage("another encoder-decoder", _edit("config.json", model_type="bart"), "encoder-decoder"),
    Breakage("a speech model", _edit("config.json", model_type="whisper"), "encoder-decoder"),
    Breakage("an encoder", _edit("config.json", model_type="bert"), "bert.embeddings"),
    Breakage("dtype nonsense", _edit("config.json", dtype="float99"), "config.json"),
    Breakage("torch_dtype nonsense", _edit("config.json", dtype=None, torch_dtype="linear"), "config.json"),
    Breakage("layers as a text", _edit("config.json", num_hidden_layers="two"), "config.json"),
    Breakage("layers as digits in a text", _edit("config.json", num_hidden_layers="2"), "config.json"),
    Breakage("negative layers", _edit("config.json", num_hidden_layers=-1), "config.json"),
    Breakage("more layers than stored", _edit("config.json", num_hidden_layers=3, layer_types=None), "model.layers.2."),
    Breakage(
        "fewer layers than stored", _edit("config.json", num_hidden_layers=1, layer_types=None), "model.layers.1."
    ),
    Breakage("heads that do not divide", _edit("config.json", num_attention_heads=5), "k_proj"),
    Breakage("no heads", _edit("config.json", num_attention_heads=0), "config.json"),
    Breakage("hidden_size is a list", _edit("config.json", hidden_size=[32]), "config.json"),
    Breakage("another hidden_size", _edit("config.json", hidden_size=64), "config.json"),
    Breakage("another vocabulary", _edit("config.json", vocab_size=72), "embed_tokens"),
    Breakage("a vocabulary of none", _edit("config.json", vocab_size=0), "config.json"),
    Breakage("unknown activation", _edit("config.json", hidden_act="magic"), "config.json"),
    Breakage("rope nonsense", _edit("config.json", rope_parameters={"rope_type": "spiral"}), "config.json"),
    Breakage("rope is a text", _edit("config.json", rope_parameters="long"), "config.json"),
    Breakage("layer_types nonsense", _edit("config.json", layer_types=["full", "empty"]), "config.json"),
    Breakage("too few layer_types", _edit("config.json", layer_types=["full_attention"]), "config.json"),
    Breakage("flash_attention_2", _edit("config.json", attn_implementation="flash_attention_2"), "attn_implementation"),
    Breakage(
        "flash_attention_3", _edit("config.json", _attn_implementation="flash_attention_3"), "attn_implementation"
    ),
    Breakage("unknown attention", _edit("config.json", attn_implementation="magic"), "attn_implementation"),
    Breakage(
        "attention from a hub", _edit("config.json", attn_implementation="kernels-community/x"), "attn_implementation"
    ),
    Breakage("gptq", _quantized(quant_method="gptq", bits=4, group_size=128), "quantized (gptq)"),
    Breakage("awq", _quantized(quant_method="awq", bits=4, group_size=128), "quantized (awq)"),
    Breakage("bitsandbytes", _quantized(quant_method="bitsandbytes", load_in_4bit=True), "quantized (bitsandbytes)"),
    Breakage("compressed-tensors", _quantized(quant_method="compressed-tensors", format="pack"), "quantized"),
    Breakage("fp8", _quantized(quant_method="fp8", weight_block_size=[128, 128]), "quantized (fp8)"),
    Breakage("mxfp4", _quantized(quant_method="mxfp4"), "quantized (mxfp4)"),
    Breakage("hqq", _quantized(quant_method="hqq"), "quantized (hqq)"),
    Breakage("torchao", _quantized(quant_method="torchao", quant_type="int8"), "quantized (torchao)"),
    Breakage("an unknown quantization", _quantized(quant_method="mine"), "quantized (mine)"),
    Breakage("a quantization without a method", _quantized(bits=4), "quantized"),
    Breakage("a quantization that is a text", _edit("config.json", quantization_config="4bit"), "quantized"),
    Breakage(
        "other weights named", _edit("config.json", transformers_weights="other.safetensors"), "transformers_weights"
    ),
    Breakage("code of its own", _own_code, "auto_map"),
]
GENERATION = [
    Breakage("generation_config.json is empty", _write("generation_config.json", ""), "generation_config.json"),
    Breakage("generation_config.json is cut", _cut("generation_config.json", 0.5), "generation_config.json"),
    Breakage("generation_config.json is a list", _write("generation_config.json", "[]"), "generation_config.json"),
]
TOKENIZER = [
    Breakage("tokenizer.json is empty", _write("tokenizer.json", ""), "tokenizer.json"),
    Breakage("tokenizer.json is cut", _cut("tokenizer.json", 0.7), "tokenizer.json"),
    Breakage("tokenizer.json is {}", _write("tokenizer.json", "{}"), "tokenizer.json"),
    Breakage("tokenizer.json is a list", _write("tokenizer.json", "[]"), "tokenizer.json"),
    Breakage("tokenizer.json is a pointer", _write("tokenizer.json", "version https://git-lfs"), "tokenizer.json"),
    Breakage("no model in the tokenizer", _tokenizer(model=None), "tokenizer.json"),
    Breakage("an unknown model in the tokenizer", _tokenizer(model={"type": "Magic"}), "tokenizer.json"),
    Breakage("an unknown pre-tokenizer", _tokenizer(pre_tokenizer={"type": "Magic"}), "tokenizer.json"),
    Breakage("a normalizer that panics", _tokenizer(normalizer=_PRECOMPILED), "tokenizer.json"),
    Breakage("tokenizer_config.json is cut", _cut("tokenizer_config.json", 0.5), "tokenizer_config.json"),
    Breakage("tokenizer_config.json is a list", _write("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    Breakage("eos_token is a list", _edit("tokenizer_config.json", eos_token=["a"]), "tokenizer"),
    Breakage("no tokenizer", _remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    Breakage("a tokenizer of its own", _own_tokenizer, "tokenizer"),
]
_FIRST, _INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
_KEY = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = [
    Breakage("no weights", _remove("model.safetensors"), "holds no .safetensors weights"),
    Breakage("weights of nothing", _write("model.safetensors", ""), "model.safetensors"),
    Breakage("weights cut in the header", _cut("model.safetensors", 0.001), "model.safetensors"),
    Breakage("weights cut in the values", _cut("model.safetensors", 0.9), "model.safetensors"),
    Breakage("weights are a pointer", _write("model.safetensors", "version https://git-lfs"), "model.safetensors"),
    Breakage("an impossible header", _write("model.safetensors", b"\xff" * 64), "model.safetensors"),
    Breakage("no tensors", _weights(lambda found: {}), "model.embed_tokens.weight"),
    Breakage("a tensor is missing", _weights(lambda found: {k: v for k, v in found.items() if k != _KEY}), _KEY),
    Breakage("a tensor of another shape", _weights(lambda found: {**found, _KEY: torch.zeros(3, 5)}), _KEY),
    Breakage("a transposed tensor", _weights(lambda found: {**found, _KEY: found[_KEY].T.contiguous()}), _KEY),
    Breakage("a tensor left over", _weights(lambda found: {**found, "extra.weight": torch.zeros(2)}), "extra.weight"),
    Breakage("compiled", _weights(lambda found: {f"_orig_mod.{k}": v for k, v in found.items()}), "_orig_mod"),
    Breakage(
        "wrapped", _weights(lambda found: {f"base_model.model.{k}": v for k, v in found.items()}), "base_model.model"
    ),
    Breakage("in parallel", _weights(lambda found: {f"module.{k}": v for k, v in found.items()}), "module"),
    Breakage("a classifier", _weights(lambda found: {**found, "score.weight": torch.zeros(2, 32)}), "classifier"),
    Breakage("an adapter not merged", _weights(lambda found: {**found, "a.lora_A.weight": torch.zeros(2)}), "merge"),
    Breakage("integers", _weights(lambda found: {**found, _KEY: found[_KEY].to(torch.int8)}), _KEY),
    Breakage("eight bits", _weights(lambda found: {**found, _KEY: found[_KEY].to(torch.float8_e4m3fn)}), _KEY),
    Breakage("untied without a head", _edit("config.json", tie_word_embeddings=False), "lm_head.weight"),
    Breakage(
        "tied, with another head", _weights(lambda f: {**f, "lm_head.weight": torch.ones(71, 32)}), "lm_head.weight"
    ),
    Breakage("not a number", _value(float("nan")), "model.layers.1.mlp.up_proj.weight"),
    Breakage("infinite", _value(float("-inf")), "model.layers.1.mlp.up_proj.weight"),
    Breakage("pickled", _pickled, "pytorch_model.bin"),
    Breakage("pickled, beside others", _pickled_beside_other, "other.safetensors"),
    Breakage(
        "a GGUF file",
        lambda folder: (_remove("model.safetensors")(folder), _write("m.gguf", _GGUF)(folder))[0],
        "m.gguf",
    ),
    Breakage(
        "a stray file",
        lambda folder: save_file({"x": torch.zeros(1)}, folder / "other.safetensors"),
        "other.safetensors",
    ),
    Breakage("an adapter beside weights", _adapter, "adapter"),
    Breakage("an adapter alone", _adapter_alone, "merge"),
    Breakage("a shard is absent", _sharded(_remove(_FIRST)), _FIRST),
    Breakage("a shard is cut", _sharded(_cut(_FIRST, 0.9)), _FIRST),
    Breakage(
        "a shard beyond the index",
        _sharded(lambda folder: save_file({"x": torch.zeros(1)}, folder / "model-00003-of-00002.safetensors")),
        "model-00003",
    ),
    Breakage("a tensor in two shards", _sharded(_twice), "and so does"),
    Breakage("an index that is cut", _sharded(_cut(_INDEX, 0.5)), _INDEX),
    Breakage("an index without a map", _sharded(_write(_INDEX, "{}")), _INDEX),
    Breakage("an index that is a list", _sharded(_write(_INDEX, "[]")), _INDEX),
    Breakage("an empty map", _sharded(_index(lambda found: {})), _INDEX),
    Breakage("a map to numbers", _sharded(_index(lambda found: dict.fromkeys(found, 1))), _INDEX),
    Breakage("a map elsewhere", _sharded(_index(lambda found: dict.fromkeys(found, "../x.safetensors"))), _INDEX),
    Breakage("a map to the wrong shard", _sharded(_index(lambda f: {**f, min(f): f[sorted(f)[1]]})), _INDEX),
    Breakage("a map to a tensor that is not there", _sharded(_index(lambda f: {**f, "x": _FIRST})), _INDEX),
    Breakage(
        "shards and one file", _sharded(lambda f: save_file({"x": torch.zeros(1)}, f / "model.safetensors")), "two sets"
    ),
]


def broken(folder: Path, whole: Path, breakage: Breakage) -> Path:
    """A copy of a policy, broken."""
    shutil.copytree(whole, folder)
    breakage.change(folder)
    return folder
