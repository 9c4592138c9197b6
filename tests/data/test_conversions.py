"""The commands that refusals name: each is run as it stands, and what it makes is a policy."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from safetensors.torch import load_file

from cropi_tools.data.conversions import by_peft, by_transformers
from cropi_tools.data.policies import check_tokenizer, policy_files
from cropi_tools.runtime.errors import InputError


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        policy_files(path)
    return str(refused.value)


def run_named_command(path: Path, cwd: Path) -> dict[str, torch.Tensor]:
    """The weights that the command makes which the refusal of `path` names."""
    command = re.search(r": (python -c .*)$", refusal(path))
    assert command is not None
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command.group(1), shell=True, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    policy_files(cwd / "NEW")
    check_tokenizer(cwd / "NEW")
    return load_file(cwd / "NEW" / "model.safetensors")


AWKWARD = ("plain", "a b", "it's", 'a "b"', "$HOME", "`x`", "a\\b", "näh!")


@pytest.mark.parametrize("name", AWKWARD)
def test_commands_are_one_line_of_shell_with_a_python_program_in_it(name: str) -> None:
    for line in (by_transformers(name, ["x.bin"]), by_transformers(name, ["x.gguf"], "v1"), by_peft(name)):
        python, flag, program = shlex.split(line)
        assert (python, flag) == ("python", "-c")
        compile(program, "program", "exec")
        assert repr(name) in program
        said = subprocess.run(["bash", "-c", f'python() {{ printf %s "$2"; }}; {line}'], capture_output=True, text=True)
        assert said.stdout == program


def test_what_is_refused_with_a_command(policy_folder: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "m.Q4.gguf").write_bytes(b"GGUF")
    (gguf / "m.Q8.gguf").write_bytes(b"GGUF")
    for path in (gguf, gguf / "m.Q4.gguf"):
        assert f"from_pretrained('{gguf}', gguf_file='m.Q4.gguf', **c)" in refusal(path)
    # beside whole weights neither is in the way
    for name in ("m.gguf", "pytorch_model.bin"):
        beside = shutil.copytree(policy_folder, tmp_path / name)
        (beside / name).write_bytes(b"x")
        assert policy_files(beside)


@pytest.fixture
def adapter(policy_folder: Path, tmp_path: Path) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """An adapter's folder, and the weights it makes of the policy's."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's own
        adapted: Any = get_peft_model(
            tiny_policy.model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        adapted.peft_config["default"].base_model_name_or_path = str(policy_folder)
        adapted.save_pretrained(tmp_path / "adapter")
        yield tmp_path / "adapter", dict(adapted.merge_and_unload().state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [False, True], ids=["base's tokenizer", "its own tokenizer"])
def test_an_adapter_is_merged(tokenizer: bool, adapter: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, merged = adapter
    if tokenizer:
        tiny_policy.tokenizer().save_pretrained(folder)
    made = run_named_command(folder, tmp_path)
    assert made.keys() <= merged.keys()
    assert all(torch.allclose(made[name], merged[name], atol=1e-6) for name in made)
    start = tiny_policy.model().state_dict()
    assert not torch.allclose(
        made["model.layers.0.self_attn.q_proj.weight"], start["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.slow
def test_pickled_weights_are_saved_anew(policy_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(policy_folder, tmp_path / "pickled")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    made = run_named_command(folder, tmp_path)
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[name], weights[name]) for name in made)


@pytest.mark.slow
def test_a_gguf_file_is_unpacked(tmp_path: Path) -> None:
    """A Llama of a few weights with a vocabulary of single bytes, written by the package of the format, where it is installed."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    tokens = [*(chr(33 + n) for n in range(89)), "ab", "<s>", "</s>"]
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(90)
    writer.add_eos_token_id(91)
    torch.manual_seed(0)
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    stored = {f"{name}.weight": torch.randn(shape).numpy() for name, shape in shapes.items()}
    for name, values in stored.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = run_named_command(tmp_path / "m.gguf", tmp_path)
    assert torch.equal(made["model.layers.0.mlp.up_proj.weight"], torch.from_numpy(stored["blk.0.ffn_up.weight"]))
    assert torch.equal(made["model.embed_tokens.weight"], torch.from_numpy(stored["token_embd.weight"]))
