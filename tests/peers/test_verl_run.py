"""verl itself trains: `verl.trainer.main_ppo` on a CPU, stopped in the middle, gone on with, brought back, and compared with our own update.

Everything is verl's but the device (`verl_on_cpu/cpu_platform.py`) and the sampler, transformers in the place of vLLM (`cpu_rollout.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from safetensors.torch import load_file
from training_runs import add_gradient, options_of

from cropi_tools.data.policies import tokenizer_digest
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.policy.prompts import prompt_token_ids
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.loss_settings import LossSettings
from cropi_tools.training.update import Updater

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
# the rate is low enough that no token's KL comes near VERL_LIMIT, where verl's stays and has no gradient
STEPS, BATCH, SAMPLES, LIMIT, TEMPERATURE, RATE = 4, 4, 3, 8, 0.9, 1e-4
VERL_LIMIT = 10.0
LINE = f"""
    --steps {STEPS} --batch {BATCH} -n {SAMPLES} --max-tokens {LIMIT} --temperature {TEMPERATURE} --learning-rate {RATE} --warmup 2
    --aggregation constant --advantage centered --clip 0.2,0.28 --kl 0.1 --entropy 0.01 --dtype float32
    --eval-every 2 --save-every 1 --checkpoints 9 --engine verl
""".split()
# what a machine without GPU, and with few cores, needs besides
HERE_ALONE = [
    "trainer.device=cpu",
    "trainer.n_gpus_per_node=1",
    "actor_rollout_ref.model.external_lib=cpu_rollout",
    "actor_rollout_ref.actor.use_torch_compile=false",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "data.dataloader_num_workers=0",
    "ray_kwargs.ray_init.num_cpus=32",
    "+ray_kwargs.ray_init.num_gpus=1",
    "+ray_kwargs.ray_init.include_dashboard=false",
]
VERIFIER = """
import time

def reward(data_source, solution_str, ground_truth, extra_info=None):
    time.sleep(0.01)  # so that many are graded at once
    return sum(map(ord, solution_str)) % 97 / 96
"""


def earned(text: str) -> float:
    """As VERIFIER: hardly ever the same for two responses, so that no group is without advantage."""
    return sum(map(ord, text)) % 97 / 96


@pytest.fixture
def policy(tmp_path: Path, chat_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny policy with the tokens that verl wants of a Qwen: a line break and the end of a turn."""
    template = load_tokens(str(chat_policy)).tokenizer.chat_template
    monkeypatch.setattr(tiny_policy, "CHARACTERS", tiny_policy.CHARACTERS + "ĊĠ")
    monkeypatch.setattr(tiny_policy, "END", "<|im_end|>")
    folder = tiny_policy.save(tmp_path / "P0")
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = template.replace("<|end|>", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def python(tmp_path: Path, peers: Path) -> Path:
    """The Python of an environment with verl, as --verl-python takes one."""
    program = tmp_path / "python"
    settings = {
        "PYTHONPATH": f"{peers}{os.pathsep}{HERE / 'verl_on_cpu'}",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # the engine that verl registers for GPUs
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    given = "".join(f"export {name}='{value}'\n" for name, value in settings.items())
    program.write_text(f'#!/bin/sh\n{given}exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


def started(words: list[str], folder: Path, rollouts: str) -> subprocess.Popen[str]:
    program = str(Path(sys.executable).parent / "cropi-train")
    with open(folder / f"{rollouts}.txt", "w") as told:
        return subprocess.Popen(
            [program, *words],
            cwd=folder,
            env={**os.environ, "CPU_ROLLOUTS": str(folder / rollouts)},
            stderr=told,
            text=True,
        )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def processes(rollouts: Path) -> Iterator[str]:
    """Those that were started for these rollouts."""
    for found in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"CPU_ROLLOUTS={rollouts}\0".encode() in found.read_bytes():
                yield (found.parent / "cmdline").read_text()
        except OSError:
            continue


def test_verl_trains_stops_goes_on_and_makes_our_steps(policy: Path, python: Path, tmp_path: Path) -> None:
    prompts, questions = tiny_policy.prompts(6), tiny_policy.prompts(3, start=50)
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", prompts)
    tiny_policy.write_jsonl(tmp_path / "t.jsonl", questions)
    (tmp_path / "mine.py").write_text(VERIFIER)
    verifying = ["--verifier", "mine.py:reward", "--eval", "train=t.jsonl", "--verl-python", str(python)]
    extra = [word for text in HERE_ALONE for word in ("--verl-option", text)]
    words = ["--model", "P0", "p.jsonl", *LINE, *verifying, *extra, "-o", "P1"]

    process = started(words, tmp_path, "first")
    work = tmp_path / "P1.part" / "verl"
    latest, logged = work / "checkpoints" / "latest_checkpointed_iteration.txt", work / "metrics.verl.jsonl"
    deadline = time.monotonic() + 400
    while not (logged.exists() and '"step":1,' in logged.read_text()):
        assert process.poll() is None, (tmp_path / "first.txt").read_text()[-8000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 143
    assert "stopped by SIGTERM" in (tmp_path / "first.txt").read_text()
    deadline = time.monotonic() + 20
    while list(processes(tmp_path / "first")):
        assert time.monotonic() < deadline, list(processes(tmp_path / "first"))
        time.sleep(0.2)
    came_to = int(latest.read_text())
    assert 1 <= came_to < STEPS
    saved = latest.parent / f"global_step_{came_to}" / "actor" / "huggingface"
    shutil.copytree(saved, tmp_path / "middle")

    process = started(words, tmp_path, "second")
    assert process.wait(400) == 0, (tmp_path / "second.txt").read_text()[-8000:]
    metrics = {line["step"]: line for line in lines(tmp_path / "P1" / "metrics.jsonl")}
    # verl writes a step's checkpoint before its line, and may have been stopped between the two
    assert {1, 2, 3, 4} - {came_to} <= metrics.keys() <= {1, 2, 3, 4}
    assert all(line["learning_rate"] == (RATE / 2 if step == 1 else RATE) for step, line in metrics.items())
    evaluations = lines(tmp_path / "P1" / "evaluations.jsonl")
    assert {(line["step"], line["set"], line["prompts"], line["samples"]) for line in evaluations} >= {
        (step, "train", 3, 1) for step in (0, 2, 4)
    }
    after = load_policy(str(tmp_path / "P1"), "cpu")
    assert after.model.config.dtype == torch.float32
    assert tokenizer_digest(tmp_path / "P1") == tokenizer_digest(policy)
    weights = [load_file(folder / "model.safetensors") for folder in (policy, tmp_path / "middle", tmp_path / "P1")]
    assert weights[0].keys() == weights[2].keys()
    for one, other in ((0, 1), (1, 2)):
        moved = max(float((weights[one][name] - weights[other][name]).abs().max()) for name in weights[0])
        assert RATE / 10 < moved < 5 * RATE

    seen = {name: lines(tmp_path / name) for name in ("first", "second")}
    asked = {tuple(line["prompt"]) for found in seen.values() for line in found}
    assert asked == {tuple(prompt_token_ids(after.tokenizer, record)) for record in (*prompts, *questions)}
    for line in (*seen["first"], *seen["second"]):
        told = line["parameters"]
        assert (told["top_p"], told["top_k"], told["repetition_penalty"]) == (1.0, -1, 1.0)
        assert told["temperature"] in (TEMPERATURE, 0)
    for step, start, name in ((1, policy, "first"), (came_to + 1, tmp_path / "middle", "second")):
        rollouts = [
            line for line in seen[name] if line["version"] == step - 1 and line["parameters"]["temperature"] > 0
        ]
        same_step(metrics[step], start, policy, rollouts)


def same_step(found: dict[str, Any], start: Path, first: Path, rollouts: list[dict[str, Any]]) -> None:
    """verl's figures of a step are those of our update of the same responses."""
    assert len(rollouts) == BATCH * SAMPLES
    mine, reference = load_policy(str(start), "cpu"), load_policy(str(first), "cpu")
    # verl leaves it at automatic differentiation, which has no gradient of the padding token's embedding; ours has one
    mine.model.get_input_embeddings().padding_idx = mine.tokenizer.pad_token_id
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for line in rollouts:
        text = mine.tokenizer.decode(line["tokens"], skip_special_tokens=True)
        sample = {"token_ids": line["tokens"], "logprobs": line["logprobs"], "finish_reason": "length", "text": text}
        groups.setdefault(tuple(line["prompt"]), []).append({**sample, "reward": earned(text)})
    records = [{"prompt_token_ids": list(prompt), "samples": samples} for prompt, samples in groups.items()]
    assert [len(samples) for samples in groups.values()] == [SAMPLES] * BATCH
    rewards = [sample["reward"] for samples in groups.values() for sample in samples]
    assert found["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    loss = LossSettings(TEMPERATURE, (0.2, 0.28), 0.1, 0.01, "constant", "centered", LIMIT)
    assert max(largest_kl(mine, reference, line) for line in rollouts) < VERL_LIMIT / 10
    figures = add_gradient(Updater(mine, reference, options_of(loss), Ranks()), records)
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for _, p in mine.trained if p.grad is not None]))
    assert found["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert found["loss"] == pytest.approx(figures["loss"], rel=1e-4, abs=1e-6)
    assert found["entropy"] == pytest.approx(figures["entropy"], rel=1e-4)
    assert found["kl"] == pytest.approx(figures["kl"], rel=1e-3, abs=1e-6)


@torch.inference_mode()
def largest_kl(mine: Policy, reference: Policy, line: dict[str, Any]) -> float:
    """Of a response's tokens, by the estimator that both sides use (Schulman's k3)."""
    ids = torch.tensor([line["prompt"] + line["tokens"]])
    places = slice(len(line["prompt"]) - 1, -1)
    own, of_reference = (
        torch.log_softmax(policy.model(input_ids=ids).logits[0, places] / TEMPERATURE, -1)
        .gather(1, torch.tensor(line["tokens"])[:, None])
        .flatten()
        for policy in (mine, reference)
    )
    gap = of_reference - own
    return float((gap.exp() - gap - 1).max())
