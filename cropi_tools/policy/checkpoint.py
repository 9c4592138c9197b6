"""Whether a policy's weights are all in its files, and nothing else is: the library fills in what is missing with random numbers.

Files first (whole, no tensor twice), then names and shapes as the library found them, less what the family itself declares as tied or
ignorable, and at last the values.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from cropi_tools.data.policies import WEIGHTS_INDEX, weight_files, weight_map
from cropi_tools.policy.loading_errors import CONFIG, opening, quantization_of, read_config
from cropi_tools.runtime.errors import InputError

# nothing in a policy's folder is run, nothing is fetched, nothing is asked
OFFLINE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_EITHER = ("xlm", "xlnet")  # families without `is_decoder`
_NUMBERS = ("F64", "F32", "F16", "BF16")
_WRAPPERS = ("_orig_mod.", "base_model.model.", "module.", "_fsdp_wrapped_module.", "_forward_module.")
_HEADS = ("score.", "classifier.", "v_head.", "value_head.", "qa_outputs.", "reward_head.")
_EXPERT = re.compile(r"^(.*\bexperts\.)(\d+)\.(.+)$")
# causal masks that old versions of the library kept as tensors; not every family declares them
_MASK = re.compile(r"\b(attn|attention|self_attn)\.(masked_)?bias$")


class Stored(NamedTuple):
    """One tensor in a policy's files, unread. dtype: as the file has it, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Every tensor in the policy's weight files by name, from their headers alone.

    InputError: a file is cut short or broken, a tensor is in two of them, or the index names one that is not where it says.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        with opening(str(folder), path.name), safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if name in found:
                    raise InputError(
                        f"{path}: holds {name}, and so does {found[name].file.name}; fetch or save the weights again"
                    )
                part = tensors.get_slice(name)
                found[name] = Stored(path, part.get_dtype(), tuple(part.get_shape()))
    index = Path(folder) / WEIGHTS_INDEX
    if index.exists():
        for name, shard in sorted(weight_map(index).items()):
            if name not in found or found[name].file.name != shard:
                raise InputError(
                    f"{index}: says that {name} is in {shard}, where it is not; fetch or save the weights again"
                )
    return found


def load_whole(folder: str, **placement: Any) -> Any:
    """The causal language model of a folder, with every weight the checkpoint's and every tensor of the checkpoint in it.

    placement: `dtype` or `device_map`. InputError: it does not open, or a tensor is missing, left over, of another shape or no number.
    """
    stored = stored_tensors(folder)
    found: Any
    with opening(folder, CONFIG), _without_bar():
        config: Any = AutoConfig.from_pretrained(folder, **OFFLINE)
        _refuse(folder, config, stored)
        try:
            found = AutoModelForCausalLM.from_pretrained(
                folder,
                **placement,
                **OFFLINE,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
        except RuntimeError:
            # what the library says of experts that it cannot stack names none of them
            _check_experts(folder, stored)
            raise
    model, info = found
    _check_names(folder, model, stored, info)
    _check_formats(folder, model, stored)
    _check_tied(folder, model, stored)
    return model


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Without the library's progress bar: what reads headers alone has none to show, and the commands have their own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_weights(folder: str) -> None:
    """`load_whole` for programs that load by themselves: names and shapes are checked, no weight is read. InputError: as there.

    Left alone where the weights are quantized: each program names those in its own way.
    """
    if quantization_of(read_config(folder)):
        stored_tensors(folder)
        return
    # a device map needs the library accelerate
    load_whole(folder, **({"device_map": "meta"} if importlib.util.find_spec("accelerate") else {"dtype": "auto"}))


@torch.no_grad()
def check_finite(folder: str, model: Any) -> None:
    """InputError: a weight is NaN or infinite. Reads each once where it is now, with no copy: a sum is not finite unless all its terms are."""
    formats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    weights = [(name, tensor) for name, tensor in model.state_dict().items() if tensor.dtype in formats]
    sums = [tensor.sum() for _, tensor in weights]
    for (name, tensor), total in zip(weights, sums, strict=True):
        # a sum may also overflow, the more easily in 16 bits, which are much faster than a sum in 32
        if not torch.isfinite(total) and not torch.isfinite(tensor).all():
            named = next(_stored_not_finite(folder), name)
            raise InputError(f"{folder}: {named} is not finite (NaN or infinity); take an earlier checkpoint")


def _stored_not_finite(folder: str) -> Iterator[str]:
    """Names, as files have them, of tensors with values that are not finite."""
    for name, found in stored_tensors(folder).items():
        if found.dtype in _NUMBERS:
            with safe_open(found.file, framework="pt") as tensors:
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    yield name


@torch.no_grad()
def check_causal(folder: str, model: Any) -> None:
    """InputError: an encoder, which the library opens as a causal language model too: a token sees those after it.

    Tried out on a few tokens, where config.json does not say that the model is a decoder, as it does in families that can be either.
    """
    if getattr(model.config, "is_decoder", model.config.model_type not in _EITHER):
        return
    with opening(folder, CONFIG):
        ids = torch.arange(4, device=next(model.parameters()).device)[None]
        other = ids.clone()
        other[0, -1] += 1
        first, second = (model(input_ids=tokens, use_cache=False).logits[0, :-1] for tokens in (ids, other))
    if not torch.allclose(first, second, atol=1e-4):
        raise InputError(
            f"{folder}/{CONFIG}: is of a model whose tokens see those after them ({model.config.model_type}); take a causal language model"
        )


def _refuse(folder: str, config: Any, stored: Mapping[str, Stored]) -> None:
    """InputError: the configuration asks for what is never done here, contradicts the weights, or is of a model that does not continue text."""
    where = f"{folder}/{CONFIG}"
    quantization = quantization_of(read_config(folder))
    if quantization and all(found.dtype in _NUMBERS for found in stored.values()):
        raise InputError(
            f"{where}: says that the weights are quantized ({quantization}), but they are stored as plain numbers; "
            "remove quantization_config if they are the policy's"
        )
    if getattr(config, "transformers_weights", None) is not None:
        raise InputError(
            f"{where}: names other files as the weights (transformers_weights); remove it and call them model.safetensors"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{where}: is of an encoder-decoder model ({config.model_type}); take a causal language model")
    attention = read_config(folder).get("attn_implementation") or read_config(folder).get("_attn_implementation")
    if isinstance(attention, str) and "/" in attention:
        raise InputError(
            f"{where}: attn_implementation {attention} is code from a hub, which is never run here; remove that line"
        )


def _check_names(folder: str, model: Any, stored: Mapping[str, Stored], info: Mapping[str, Any]) -> None:
    """InputError: tensors that the model has and the files lack, the other way round, or of different shapes."""
    tied = getattr(model, "all_tied_weights_keys", {})
    # of two that are tied and both missing, the one that is stored
    lacking = sorted(name for name in info["missing_keys"] if tied.get(name) not in info["missing_keys"])
    missing = [name for lost in lacking for name in _stored_names(model, lost) if name not in stored]
    strange = sorted(name for name in info["unexpected_keys"] if not _is_mask(name, stored.get(name)))
    if info["mismatched_keys"]:
        _check_experts(folder, stored)
    for found in sorted(info["mismatched_keys"]):
        name, *shapes = found
        sizes = f" ({list(shapes[0])}, the model's is {list(shapes[1])})" if len(shapes) == 2 else ""
        raise InputError(
            f"{folder}: {_stored_names(model, name)[0]} has another shape than config.json says{sizes}; "
            "take weights and configuration of one policy"
        )
    for message in info["error_msgs"]:
        raise InputError(f"{folder}: its weights do not fit config.json ({message.strip().splitlines()[0]})")
    parts = [f"lack {_named(missing)}"] if missing else []
    parts += [f"have {_named(strange)}, which the model does not"] if strange else []
    if parts:
        quantization = quantization_of(read_config(folder))
        cure = f"they are quantized ({quantization}): take plain weights" if quantization else _cure(missing, strange)
        raise InputError(f"{folder}: its weights {' and '.join(parts)}; {cure}")


def _stored_names(model: Any, name: str) -> list[str]:
    """What files call the tensor `name` of the model: families rename them, and stack experts. The name itself where nothing tells."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        empty = torch.empty_like(model.get_parameter_or_buffer(name), device="meta")
        return sorted(revert_weight_conversion(model, {name: empty})) or [name]
    except Exception:  # only a message is at stake; older versions of the library have no such function
        return [name]


def _check_experts(folder: str, stored: Mapping[str, Stored]) -> None:
    """InputError: of the experts of a layer some lack a tensor that others have, or have it in another shape."""
    layers: dict[str, dict[str, dict[str, Stored]]] = {}
    for name, found in stored.items():
        match = _EXPERT.match(name)
        if match:
            layer, expert, part = match.groups()
            layers.setdefault(layer, {}).setdefault(part, {})[expert] = found
    for layer, parts in sorted(layers.items()):
        experts = sorted({expert for has in parts.values() for expert in has}, key=int)
        for part, has in sorted(parts.items()):
            lost = [f"{layer}{expert}.{part}" for expert in experts if expert not in has]
            if lost:
                raise InputError(f"{folder}: its weights lack {_named(lost)}; fetch or save the whole checkpoint again")
            shapes = [has[expert].shape for expert in experts]
            usual = max(shapes, key=shapes.count)
            for expert, shape in zip(experts, shapes, strict=True):
                if shape != usual:
                    raise InputError(
                        f"{folder}: {layer}{expert}.{part} has the shape {list(shape)}, other experts {list(usual)}; "
                        "fetch or save the whole checkpoint again"
                    )


def _named(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _cure(missing: Iterable[str], strange: Iterable[str]) -> str:
    """What to do about tensors that are missing or left over."""
    for name in strange:
        prefix = next((prefix for prefix in _WRAPPERS if name.startswith(prefix) or f".{prefix}" in name), None)
        if prefix:
            return f"save the policy without its wrapper ({prefix.rstrip('.')})"
        if "lora_" in name:
            return "merge the adapter into the weights and save them again"
        if name.startswith(_HEADS):
            return "it is a classifier's or a value model's checkpoint; take the policy's"
    if any(name.startswith(("lm_head.", "embed_out.")) for name in missing):
        return "take the whole checkpoint, or set tie_word_embeddings in config.json if the embedding is the head"
    return "fetch or save the whole checkpoint again"


def _is_mask(name: str, stored: Stored | None) -> bool:
    """Whether a tensor left over is a causal mask [1, 1, length, length], or the number that stood for minus infinity."""
    return stored is not None and bool(_MASK.search(name)) and (stored.shape[:2] == (1, 1) or stored.shape == ())


def _check_formats(folder: str, model: Any, stored: Mapping[str, Stored]) -> None:
    """InputError: a parameter is stored as no floating-point number, and nothing says how it is to be read."""
    if getattr(model, "hf_quantizer", None) is not None:
        return
    parameters = {name for name, _ in model.named_parameters()}
    for name, found in stored.items():
        if found.dtype not in _NUMBERS and (name in parameters or name.endswith(".weight")):
            raise InputError(
                f"{folder}: {name} is stored as {found.dtype}, but config.json has no quantization_config that says how to read it; "
                "take the policy's plain weights"
            )


def _check_tied(folder: str, model: Any, stored: Mapping[str, Stored]) -> None:
    """InputError: weights that config.json ties are stored twice and differ; programs disagree on which of them counts."""
    declared = getattr(model, "get_expanded_tied_weights_keys", None)
    if declared is None:  # versions of the library before 5 tie them whatever is stored
        pairs: dict[str, str] = {}
    else:
        pairs = declared(all_submodels=True)
    kept = getattr(model, "all_tied_weights_keys", pairs)
    for target, source in pairs.items():
        if target not in kept or (_on_meta(model) and _differ(stored, target, source)):
            raise InputError(
                f"{folder}: config.json ties {target} to {source} (tie_word_embeddings), but the weights have both and they differ; "
                "set tie_word_embeddings to false in config.json, or remove the tensor that is not meant"
            )


def _on_meta(model: Any) -> bool:
    return next(model.parameters()).is_meta


def _differ(stored: Mapping[str, Stored], one: str, other: str) -> bool:
    """Whether two stored tensors differ; False where one of them is not stored."""
    if one not in stored or other not in stored:
        return False
    values = []
    for name in (one, other):
        with safe_open(stored[name].file, framework="pt") as tensors:
            values.append(tensors.get_tensor(name))
    return values[0].shape != values[1].shape or not torch.equal(values[0], values[1])
