"""Opening policies: whole ones of every family open unchanged; in broken ones nothing is made up, and one line names what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import broken_policies
import pytest
import tiny_families
import tiny_policy
import torch
from broken_policies import Breakage
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from cropi_tools.data.policies import policy_files, policy_input
from cropi_tools.policy.checkpoint import check_weights
from cropi_tools.policy.loading import load_policy, save_policy
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.runtime.errors import InputError

Run = Callable[..., subprocess.CompletedProcess[str]]
# of every kind one: tied and untied, fused and not, a head by another name, stacked experts, recurrent
FAST = ("llama_untied", "gemma2", "gpt2", "gpt_neox", "phi3", "opt", "mixtral", "deepseek_v3", "mamba")
FAMILIES = tiny_families.DENSE + tiny_families.EXPERTS + tiny_families.RECURRENT
SWEEP = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]
BREAKAGES = broken_policies.CONFIG + broken_policies.GENERATION + broken_policies.TOKENIZER + broken_policies.WEIGHTS


def refusal(folder: Path) -> str:
    """The one line that refuses a folder; nothing of it was run."""
    with pytest.raises(InputError) as caught:
        load_policy(str(folder), "cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert not (folder / "MARK").exists()
    return message


@pytest.mark.parametrize("family", SWEEP)
def test_a_whole_policy_opens_with_the_weights_it_was_saved_with(family: str, tmp_path: Path) -> None:
    folder = tiny_families.save(family, tmp_path / "P")
    weights = tiny_families.model(family).state_dict()
    for opened in (folder, tmp_path / "again", tmp_path / "shards"):
        if opened.name == "shards":
            broken_policies.shard(shutil.copytree(folder, opened))
        loaded = load_policy(str(opened), "cpu")
        found = loaded.model.state_dict()
        assert found.keys() == weights.keys()
        assert [name for name in weights if not torch.equal(weights[name], found[name])] == []
        check_weights(str(opened))
        if opened == folder:
            save_policy(loaded, tmp_path / "again")


@pytest.mark.parametrize("family", SWEEP)
def test_a_tensor_that_is_missing_left_over_misshapen_or_not_finite_is_named(family: str, tmp_path: Path) -> None:
    folder = tiny_families.save(family, tmp_path / "P")
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    experts = [name for name in names if ".experts." in name]
    # the head of GPT-NeoX is embed_out in its file
    shown = {"embed_out.weight": "lm_head.weight"}

    def refused(tensors: dict[str, torch.Tensor], name: str, also: bool = False) -> None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        message = refusal(folder)
        assert name in message or shown.get(name, name) in message
        if also:  # what can be told without reading a weight
            with pytest.raises(InputError):
                check_weights(str(folder))

    for name in {names[0], names[len(names) // 2], names[-1], *experts[:1], *experts[-1:]}:
        refused({key: value for key, value in whole.items() if key != name}, name, also=True)
        refused({**whole, name: whole[name].new_zeros(3, 5)}, name, also=True)
        value = whole[name].clone()
        value.view(-1)[-1] = float("nan")
        refused({**whole, name: value}, name)
    refused({**whole, "score.weight": torch.zeros(2, 32)}, "score.weight", also=True)
    refused({f"_orig_mod.{name}": value for name, value in whole.items()}, "_orig_mod.", also=True)


@pytest.mark.filterwarnings("ignore")  # what libraries say of such files
@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name)
def test_a_broken_policy_is_refused_in_one_line(breakage: Breakage, policy_folder: Path, tmp_path: Path) -> None:
    folder = broken_policies.broken(tmp_path / "P", policy_folder, breakage)
    assert breakage.named in refusal(folder)


def test_a_panic_in_rust_leaves_nothing_on_stderr(
    policy_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (panics,) = [breakage for breakage in broken_policies.TOKENIZER if "panics" in breakage.name]
    with pytest.raises(InputError, match="charsmap"):
        load_tokens(str(broken_policies.broken(tmp_path / "P", policy_folder, panics)))
    assert capfd.readouterr().err == ""


def test_a_head_that_config_json_ties_may_be_stored_where_it_is_the_embedding(
    policy_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(policy_folder, tmp_path / "P")
    whole = load_file(folder / "model.safetensors")
    embedding = whole["model.embed_tokens.weight"]
    save_file({**whole, "lm_head.weight": embedding.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_policy(str(folder), "cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_weights(str(folder))
    save_file({**whole, "lm_head.weight": embedding + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    for check in (lambda: load_policy(str(folder), "cpu"), lambda: check_weights(str(folder))):
        with pytest.raises(InputError, match=r"ties lm_head.weight to model.embed_tokens.weight"):
            check()


@pytest.mark.parametrize(
    ("family", "leftover"),
    [
        ("llama_untied", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}),
        ("gptj", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
        ("gptj", {"transformer.h.0.attn.masked_bias": torch.tensor(-1e9)}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}),
        ("deepseek_v3", {"model.layers.61.eh_proj.weight": torch.ones(2, 2)}),
        ("glm4_moe", {"model.layers.46.eh_proj.weight": torch.ones(2, 2)}),
    ],
)
def test_what_a_family_leaves_behind_is_no_fault(
    family: str, leftover: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = tiny_families.save(family, tmp_path / "P")
    whole = load_file(folder / "model.safetensors")
    save_file({**whole, **leftover}, folder / "model.safetensors", metadata={"format": "pt"})
    load_policy(str(folder), "cpu")


def test_the_name_of_a_mask_alone_makes_none(tmp_path: Path) -> None:
    folder = tiny_families.save("gptj", tmp_path / "P")
    whole = load_file(folder / "model.safetensors")
    save_file({**whole, "transformer.h.0.attn.bias": torch.ones(4)}, folder / "model.safetensors")
    assert "transformer.h.0.attn.bias" in refusal(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "xlm-roberta"])
def test_an_encoder_is_no_policy(family: str, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_config(tiny_families.config(family))
    model.save_pretrained(tmp_path / "P")
    tiny_policy.tokenizer().save_pretrained(tmp_path / "P")
    assert "tokens see those after them" in refusal(tmp_path / "P")


def test_the_hash_is_of_what_is_loaded(policy_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(policy_folder, tmp_path / "P")
    assert policy_input(folder).sha256 == policy_input(policy_folder).sha256
    # not loaded, not hashed
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert policy_input(folder).sha256 == policy_input(policy_folder).sha256
    assert [path.name for path in policy_files(folder) if path.suffix == ".safetensors"] == ["model.safetensors"]
    load_policy(str(folder), "cpu")
    broken_policies.shard(folder)
    assert {path.name for path in policy_files(folder)} >= {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    before = policy_input(folder).sha256
    last = sorted(folder.glob("model-*"))[-2]
    save_file({name: value * 2 for name, value in load_file(last).items()}, last, metadata={"format": "pt"})
    assert policy_input(folder).sha256 != before


def test_code_beside_a_known_family_is_left_alone(policy_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(policy_folder, tmp_path / "P")
    (folder / "own.py").write_text(f"open({str(folder / 'MARK')!r}, 'w')\n")
    for name, entry in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, "auto_map": {entry: "own.X", "AutoConfig": "own.C"}}))
    load_policy(str(folder), "cpu")
    assert not (folder / "MARK").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["code of its own", "compiled", "flash_attention_2"])
def test_every_command_refuses_in_one_line_and_asks_nothing(
    name: str, run: Run, policy_folder: Path, tmp_path: Path
) -> None:
    (breakage,) = [one for one in BREAKAGES if one.name == name]
    folder = broken_policies.broken(tmp_path / "P", policy_folder, breakage)
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(2))
    run(
        "cropi-rollout",
        "--model",
        policy_folder,
        "p.jsonl",
        "-n",
        "2",
        "--max-tokens",
        "4",
        "-o",
        "r.jsonl",
        "--verifier",
        "exact",
    )
    lines: list[tuple[object, ...]] = [
        ("cropi-rollout", "--model", folder, "p.jsonl", "--max-tokens", "4", "-o", "x.jsonl"),
        ("cropi-grad", "--model", folder, "r.jsonl", "-o", "x.zarr"),
        ("cropi-train", "--model", folder, "p.jsonl", "--steps", "1", "--max-tokens", "4", "-o", "x"),
    ]
    if "tokenizer" not in name:
        lines += [
            ("cropi-grad", "--model", policy_folder, "--behavior", folder, "r.jsonl", "--mean", "-o", "x.safetensors"),
            (
                "cropi-train",
                "--model",
                policy_folder,
                "--reference",
                folder,
                "p.jsonl",
                "--steps",
                "1",
                "--max-tokens",
                "4",
                "--kl",
                "0.1",
                "-o",
                "x",
            ),
        ]
    for line in lines:
        done = run(*line, code=1, stdin="y\ny\ny\n")
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert str(folder) in done.stderr
        assert breakage.named in done.stderr
        assert not (folder / "MARK").exists()
        assert not (tmp_path / "x").exists()
