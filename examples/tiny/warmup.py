"""Make the starting policy of the tiny test bed: a small Qwen2, trained from scratch on short tasks and typical
mistakes.

    python examples/tiny/warmup.py warmup.jsonl -o START

First supervised steps on prompts with their answers, then fewer steps in which half of the answers are the task's
typical mistake. A policy that has learned plausible mistakes is what reinforcement learning can improve within minutes:
without the second part it gains too little in so few steps to compare ways of selecting prompts. Whoever
shows results of this test bed should say so.

The result is a Hugging Face folder with a tokenizer of single bytes and no chat template. The same line with the same
number of threads gives the same weights. Killed, it starts again from the beginning (it takes about two minutes).
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from cropi_tools import runtime
from cropi_tools.data.jsonl import read_jsonl
from cropi_tools.data.manifest import Fingerprint, file_input
from cropi_tools.data.output import Output
from cropi_tools.runtime.errors import CropiError, InputError

PAD, END = "<|endoftext|>", "<|im_end|>"
CONTEXT = 64  # tokens of prompt and response together
BATCH = 192
LEARNING_RATE = 3e-3
WARMING_STEPS = 50  # the learning rate rises linearly over these


class Examples(NamedTuple):
    """Right-padded token ids (rows, length), and for each row where its answer starts and where its end token
    stands."""

    tokens: np.ndarray
    answer_start: np.ndarray
    end: np.ndarray


def make_tokenizer(context: int = CONTEXT) -> PreTrainedTokenizerFast:
    """One token a byte: every text can be written and read back. context: the most tokens of a prompt with its response.

    Bytes rather than a list of characters, because transformers opens the tokenizer of any Qwen2 model as a byte-level
    one.
    """
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        pad_token=PAD,
        eos_token=END,
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 3, inner: int = 384
) -> Qwen2ForCausalLM:
    """A Qwen2, as it is of about 0.6 million parameters. inner: the width of the feed-forward layers."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            initializer_range=0.06,  # about 1/sqrt(width) learns several times faster here than the default of 0.02
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def typical_mistake(source: str, prompt: str, answer: str, chance: random.Random) -> str:
    """A wrong answer of the kind the task invites: a slip of one, a forgotten carry, the operand itself.

    `prompt` has the form of families.jsonl: a letter, the operands, `=`. InputError: a source without known mistakes.
    """
    body = prompt[1:-1]
    match source:
        case "sum":
            return str(int(answer) + chance.choice([-10, -1, 1, 10]))
        case "product":
            return str(int(answer) + chance.choice([-1, 1]) * max(1, int(body.split("*")[0])))
        case "gcd":
            first, second = map(int, body.split(","))
            return str(chance.choice([min(first, second), abs(first - second), 1 if answer != "1" else 2]))
        case "lcm":
            first, second = map(int, body.split(","))
            return str(first * second if str(first * second) != answer else max(first, second))
        case "reverse":
            if chance.random() < 0.5:
                return body
            place = chance.randrange(len(answer) - 1)
            return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]
        case "sequence":
            return chance.choice([body.split(",")[-2], str(int(answer) + chance.choice([-1, 1]))])
        case "equation":
            return str(int(answer) + chance.choice([-1, 1, 2]))
        case "bits" | "binary":
            return str(int(answer) + chance.choice([-1, 1]))
        case "base":
            return chance.choice([body.split(":")[1], answer[::-1]])
    raise InputError(
        f"source {source!r}: no typical mistake is known; add one to typical_mistake in {Path(__file__).name}"
    )


def read_pairs(path: str) -> list[tuple[str, str, str]]:
    """(source, prompt, answer) of every record. InputError: a record too long for the policy."""
    found = []
    for number, record in read_jsonl(path):
        prompt, answer = record["prompt"], record["answer"]
        if len((prompt + answer).encode()) >= CONTEXT:
            raise InputError(f"{path}:{number}: longer than {CONTEXT} bytes; shape the prompt with a template")
        found.append((record["source"], prompt, answer))
    if not found:
        raise InputError(f"{path}: holds no records")
    return found


def encode(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> Examples:
    """Prompt, answer and end token of every pair as one row."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([answer for _, answer in pairs])["input_ids"]
    rows = [prompt + answer + [tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = np.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id, np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return Examples(tokens, np.array([len(row) for row in prompts]), np.array([len(row) - 1 for row in rows]))


def batches(examples: Examples, batch: int, chance: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of one batch after another, each epoch in a new order, for ever."""
    count = len(examples.end)
    order = np.empty(0, np.int64)
    while True:
        while len(order) < batch:
            order = np.concatenate([order, chance.permutation(count)])
        yield order[:batch]
        order = order[batch:]


def answer_loss(model: Qwen2ForCausalLM, examples: Examples, rows: np.ndarray) -> torch.Tensor:
    """Summed cross-entropy of the answers and end tokens of these rows."""
    length = int(examples.end[rows].max()) + 1
    tokens = torch.from_numpy(examples.tokens[rows, :length])
    position = np.arange(1, length)
    wanted = (position >= examples.answer_start[rows, None]) & (position <= examples.end[rows, None])
    mask = torch.from_numpy(wanted)
    # padding stands to the right of every answer, where causal attention never looks: no attention mask is needed
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[mask])
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:][mask], reduction="sum")


def train(
    model: Qwen2ForCausalLM,
    phases: list[tuple[Examples, int]],
    seed: int,
    learning_rate: float = LEARNING_RATE,
    batch: int = BATCH,
) -> list[float]:
    """Train through the phases, (examples, steps) each; the learning rate falls linearly to 0 over all of them.

    batch: a multiple of 4. Returns the loss at each step, in nats a token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.01)
    model.train()
    losses: list[float] = []
    done, total = 0, sum(steps for _, steps in phases)
    chance = np.random.default_rng(seed)
    with runtime.progress("warm-up", total) as shown:
        for examples, steps in phases:
            for _, rows in zip(range(steps), batches(examples, batch, chance), strict=False):
                done += 1
                optimizer.param_groups[0]["lr"] = learning_rate * min(done / WARMING_STEPS, 1 - (done - 1) / total)
                rows = rows[np.argsort(examples.end[rows], kind="stable")]
                targets = float((examples.end[rows] - examples.answer_start[rows] + 1).sum())
                loss = 0.0
                for part in np.split(rows, 4):  # short rows are not padded to the longest
                    part_loss = answer_loss(model, examples, part) / targets
                    part_loss.backward()
                    loss += part_loss.item()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if not math.isfinite(loss):
                    raise CropiError(f"the loss is {loss} after {done} steps")
                losses.append(loss)
                shown.advance(note=f"loss {loss:.3f}")
    return losses


def save(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Output, examples: int, steps: int
) -> None:
    """Write the policy, with its manifest last."""
    model.eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(output.part)
    tokenizer.save_pretrained(output.part)
    output.finish(rows=examples, ledger={"device": "cpu", "steps": steps})
    runtime.notify(f"{output.path}: {model.num_parameters():,} parameters, {output.seconds():.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny test bed's starting policy from scratch.")
    parser.add_argument("prompts", metavar="PROMPTS", help="prompts with answers, by the recipe families.jsonl")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="the policy folder to write")
    parser.add_argument("--steps", type=int, default=650, help="steps on right answers (default 650)")
    parser.add_argument("--mistake-steps", type=int, default=180, help="then steps with half mistakes (default 180)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and mistakes (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; they decide the last bits (default 1)")
    parser.add_argument("--force", action="store_true", help="replace a policy made by other options")
    given = parser.parse_args()

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    options = {name: getattr(given, name) for name in ("steps", "mistake_steps", "seed", "threads")}
    inputs = {"prompts": file_input(given.prompts)}
    output = Output(given.output, Fingerprint.of("warmup", options, inputs), inputs, folder=True, force=given.force)
    if not output.open():
        runtime.notify(f"{given.output}: up to date")
        return

    tokenizer, chance = make_tokenizer(), random.Random(given.seed)
    model = make_model(tokenizer)
    pairs = read_pairs(given.prompts)
    right = [(prompt, answer) for _, prompt, answer in pairs]
    wrong = [(prompt, typical_mistake(source, prompt, answer, chance)) for source, prompt, answer in pairs]
    phases = [
        (encode(right, tokenizer), given.steps),
        (encode(right + wrong, tokenizer), given.mistake_steps),
    ]
    output.begin_work()
    train(model, phases, given.seed)

    save(model, tokenizer, output, len(pairs), given.steps + given.mistake_steps)


if __name__ == "__main__":
    try:
        main()
    except CropiError as error:
        print(f"warmup.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("warmup.py: interrupted; the same command starts again", file=sys.stderr)
        sys.exit(130)
