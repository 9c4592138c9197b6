"""Everything on a real chat model, SmolLM2-135M-Instruct: 30 layers, a vocabulary of 49152, tied embeddings, its own chat template.

What the tiny policies cannot show: whether numbers are still right where sums have thousands of terms and responses are language. The
README's lines, which are the whole chain of commands on this model, are run by test_docs.py.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import in_process
import naive_policy
import pytest
import smollm2
import torch
import transformers
from safetensors.torch import load_file
from smollm2 import END, TEMPERATURE

from cropi_tools.data.records import Rollout, Sample, read_rollouts
from cropi_tools.engines.protocol import Request, Sampling, sample_seed
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.gradients.accumulator import Direction, Measure, inner_product, squared_norm
from cropi_tools.gradients.jvp import ForwardMode
from cropi_tools.gradients.per_sample import FastGradients
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.sketches.projection import Sketcher
from cropi_tools.sketches.spec import Layout, ProjectionSpec

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real model"), pytest.mark.timeout(600)]

SAMPLES, MAX_TOKENS, DIM = 3, 20, 4096
SETTINGS = GradientSettings(policy_temperature=TEMPERATURE)
RATE = 1e-5
# a checksum of the text that is graded: unequal rewards wherever responses differ, and they tell what the verifier saw
VERIFIER = """
import zlib
def reward(data_source, solution_str, ground_truth, extra_info):
    return zlib.crc32(solution_str.encode()) / 2**32
"""

Gradient = dict[str, torch.Tensor]


def checksum(text: str) -> float:
    return zlib.crc32(text.encode()) / 2**32


class Given(Direction):
    """A direction in memory instead of a file."""

    def __init__(self, tensors: Gradient) -> None:
        self._tensors = tensors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with prompts and a verifier; policies of half a gigabyte do not stay in it."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in smollm2.prompts()))
    (folder / "checksum.py").write_text(VERIFIER)
    yield folder
    shutil.rmtree(folder)


def command(place: Path, line: str, *more: object) -> str:
    """Run a command line here; what it says on stderr."""
    ended = in_process.call([*line.split(), *map(str, more)], place)
    assert (ended.code, ended.trace) == (0, ""), ended.stderr
    return ended.stderr


SHAPE = f"-n {SAMPLES} --max-tokens {MAX_TOKENS} --temperature {TEMPERATURE} --verifier checksum.py:reward"


@pytest.fixture(scope="module")
def rollouts(real_policy: Path, place: Path) -> list[Rollout]:
    """What cropi-rollout makes of the prompts."""
    command(place, f"cropi-rollout {SHAPE} --quiet prompts.jsonl -o rollouts.jsonl --model", real_policy)
    return list(read_rollouts([str(place / "rollouts.jsonl")]))


@pytest.fixture(scope="module")
def policy(real_policy: Path) -> Policy:
    return load_policy(str(real_policy), "cpu", "float32")


@pytest.fixture(scope="module")
def plain(real_policy: Path) -> Any:
    """The model as the library alone opens it."""
    return transformers.AutoModelForCausalLM.from_pretrained(real_policy, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def twin(policy: Policy) -> Any:
    """The model in float64, a gigabyte."""
    return naive_policy.double_copy(policy.model)


def test_prompts_are_those_of_its_chat_template(rollouts: list[Rollout], policy: Policy) -> None:
    for rollout, question in zip(rollouts, smollm2.QUESTIONS, strict=True):
        text = smollm2.rendered(question)
        assert policy.tokenizer.decode(rollout.prompt_token_ids) == text
        assert rollout.prompt_token_ids == policy.tokenizer(text, add_special_tokens=False).input_ids


def test_responses_keep_the_end_token_and_the_reward_sees_none_of_it(rollouts: list[Rollout], policy: Policy) -> None:
    assert policy.end_token_ids == [END]
    samples = [sample for rollout in rollouts for sample in rollout.record["samples"]]
    stopped = [sample for sample in samples if sample["finish_reason"] == "stop"]
    assert len(stopped) > len(samples) / 2
    for sample in samples:
        ids = sample["token_ids"]
        assert len(sample["logprobs"]) == len(ids) <= MAX_TOKENS
        assert (ids[-1] == END) == (sample in stopped)
        assert END not in ids[:-1]
        assert sample["text"] == policy.tokenizer.decode(ids[: len(ids) - (sample in stopped)])
        assert "<|" not in sample["text"]
        assert sample["reward"] == pytest.approx(checksum(sample["text"]), rel=1e-12)


def test_logprobs_are_those_of_one_fresh_pass(rollouts: list[Rollout], plain: Any) -> None:
    """Of the library's own model, one sequence at a time, without packing and without a cache."""
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    worst, at_one = 0.0, 0.0
    with torch.no_grad():
        for rollout in rollouts:
            for sample in rollout.samples:
                sequence = torch.tensor([rollout.prompt_token_ids + sample.token_ids])
                logits = plain(input_ids=sequence, use_cache=False).logits[0, len(rollout.prompt_token_ids) - 1 : -1]
                assert logits.shape == (len(sample.token_ids), 49152)
                own = torch.tensor(sample.token_ids)[:, None]
                told = torch.tensor(sample.logprobs)
                tempered, untempered = (
                    torch.log_softmax(logits / heat, -1).gather(1, own)[:, 0] for heat in (TEMPERATURE, 1.0)
                )
                worst = max(worst, float((tempered - told).abs().max()))
                at_one = max(at_one, float((untempered - told).abs().max()))
    assert worst < 1e-4
    assert at_one > 0.1


def test_the_librarys_own_decoding_draws_the_same_tokens(rollouts: list[Rollout], policy: Policy) -> None:
    requests = [Request(r.prompt_token_ids, sample_seed(0, r.id, k)) for r in rollouts[:1] for k in range(SAMPLES)]
    engine = TransformersEngine(policy, loop=False)
    sampling = Sampling(MAX_TOKENS, TEMPERATURE)
    assert TransformersEngine(policy).settings(sampling)["decoder"] == "loop"
    assert engine.settings(sampling)["decoder"] != "loop"
    known = [sample for rollout in rollouts[:1] for sample in rollout.samples]
    for found, sample in zip(engine.sample(requests, sampling), known, strict=True):
        assert found.token_ids == sample.token_ids
        assert found.logprobs == pytest.approx(sample.logprobs, abs=1e-4)


class Exact(NamedTuple):
    """Two prompts, and the gradient of each by float64 automatic differentiation, rounded to float32."""

    rollouts: list[Rollout]
    gradients: list[Gradient]

    @property
    def tasks(self) -> list[GradientTask]:
        tasks = [prepare(rollout, SETTINGS) for rollout in self.rollouts]
        return [task for task in tasks if isinstance(task, GradientTask)]

    def mean(self) -> Given:
        first, second = self.gradients
        return Given({name: (first[name] + second[name]) / 2 for name in first})


def rounded(gradient: Gradient) -> Gradient:
    return {name: tensor.float() for name, tensor in gradient.items()}


@pytest.fixture(scope="module")
def exact(rollouts: list[Rollout], twin: Any) -> Exact:
    two = rollouts[:2]
    gradients = [rounded(naive_policy.gradient(twin, rollout, TEMPERATURE)) for rollout in two]
    twin.zero_grad(set_to_none=True)
    return Exact(two, gradients)


def dot(one: Gradient, other: Gradient) -> float:
    return math.fsum(inner_product(one[name], other[name]) for name in one)


def norm(gradient: Gradient) -> float:
    return math.sqrt(math.fsum(map(squared_norm, gradient.values())))


@pytest.mark.parametrize("way", [ReferenceGradients, FastGradients])
def test_gradients_are_those_of_float64(way: Any, exact: Exact, policy: Policy) -> None:
    """Every coordinate, and what is taken from them: norm, inner product with a mean, sketch."""
    path, tasks, mean = way(policy, SETTINGS), exact.tasks, exact.mean()
    layout = Layout.of(path.parameters)
    assert layout.size == sum(tensor.numel() for tensor in exact.gradients[0].values()) == 134_515_008
    spec = ProjectionSpec.create("countsketch", layout, DIM)
    measure = Measure(layout, spec, {"mean": mean}, torch.device("cpu"))
    errors = [0.0, 0.0]
    found = []
    batches = [(tasks, [0, 1])] if way is FastGradients else [([task], [number]) for number, task in enumerate(tasks)]
    for batch, numbers in batches:
        measure.begin(len(batch))

        def consume(name: str, gradients: torch.Tensor, numbers: list[int] = numbers) -> None:
            for number, gradient in zip(numbers, gradients, strict=True):
                errors[number] += squared_norm(gradient - exact.gradients[number][name])
            measure.add(name, gradients)

        assert [told.status for told in path.compute(batch, consume)] == ["ok"] * len(batch)
        found += measure.finish()
    for error, one, gradient in zip(errors, found, exact.gradients, strict=True):
        length = norm(gradient)
        assert math.sqrt(error) < 1e-4 * length
        assert math.sqrt(one.square) == pytest.approx(length, rel=5e-5)
        assert one.inner["mean"] == pytest.approx(dot(gradient, mean._tensors), abs=5e-5 * length * norm(mean._tensors))
        sketcher = Sketcher(spec, layout)
        sketcher.begin()
        for name, tensor in gradient.items():
            sketcher.add(name, tensor)
        expected = torch.as_tensor(sketcher.finish())
        assert (torch.as_tensor(one.sketch) - expected).norm() < 1e-4 * expected.norm()
        # five standard deviations of a sketch's squared length
        assert float(expected.norm()) ** 2 == pytest.approx(length**2, rel=5 * (2 / DIM) ** 0.5)


def test_forward_mode_gives_the_products_of_float64(exact: Exact, policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    chance = Given({name: torch.randn(part.shape, generator=generator) for name, part in exact.gradients[0].items()})
    directions = {"mean": exact.mean(), "chance": chance}
    forward = ForwardMode(policy, SETTINGS, directions)
    assert forward.by_rules
    for found, gradient in zip(forward.compute(exact.tasks), exact.gradients, strict=True):
        for name, direction in directions.items():
            whole = norm(gradient) * norm(direction._tensors)
            # a direction drawn by chance has products of this size with everything
            small = whole / math.sqrt(134_515_008) if name == "chance" else whole
            product = dot(gradient, direction._tensors)
            assert abs(product) > 0.01 * small
            assert found.inner[name] == pytest.approx(product, abs=1e-4 * small)


class Trained(NamedTuple):
    """A step of cropi-train on two prompts: the policy's folder, what it logged, and the rollouts that it learned from."""

    folder: Path
    metrics: dict[str, Any]
    rollouts: list[Rollout]


@pytest.fixture(scope="module")
def trained(real_policy: Path, place: Path, policy: Policy) -> Trained:
    """One step, and its samples once more, by their seeds."""
    records = smollm2.prompts()[2:]
    (place / "two.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    line = (
        f"cropi-train {SHAPE} --steps 1 --batch 2 --learning-rate {RATE} --state drop --quiet two.jsonl -o P1 --model"
    )
    command(place, line, real_policy)
    (metrics,) = map(json.loads, (place / "P1" / "metrics.jsonl").read_text().splitlines())
    order = sorted(records, key=lambda record: sample_seed(0, "order", 0, record["id"]))
    made = []
    for number, record in enumerate(order):
        ids = policy.tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, return_dict=False)
        requests = [Request(ids, sample_seed(0, "train", number, record["id"], k)) for k in range(SAMPLES)]
        found = TransformersEngine(policy).sample(requests, Sampling(MAX_TOKENS, TEMPERATURE))
        texts = [policy.tokenizer.decode([token for token in one.token_ids if token != END]) for one in found]
        pairs = zip(found, texts, strict=True)
        samples = [Sample(one.token_ids, one.logprobs, checksum(text)) for one, text in pairs]
        made.append(Rollout(record["id"], record["source"], ids, samples, record))
    return Trained(place / "P1", metrics, made)


def test_what_a_training_step_logs(trained: Trained) -> None:
    said = trained.metrics
    samples = [sample for rollout in trained.rollouts for sample in rollout.samples]
    lengths = [len(sample.token_ids) for sample in samples]
    assert said["reward"] == pytest.approx(statistics.mean(sample.reward for sample in samples), rel=1e-6)
    assert said["response_tokens"] == pytest.approx(statistics.mean(lengths), rel=1e-6)
    assert said["tokens_trained"] == said["tokens_generated"] == sum(lengths)
    # every ratio is 1, so the loss is minus the advantages, each by its tokens
    advantages = [value for rollout in trained.rollouts for value in naive_policy.advantages(rollout.rewards)]
    expected = -sum(value * length for value, length in zip(advantages, lengths, strict=True)) / sum(lengths)
    assert said["loss"] == pytest.approx(expected, abs=1e-5)
    assert (said["clip_fraction"], said["kl"], said["zero_variance_fraction"]) == (0.0, 0.0, 0.0)
    assert said["behavior_gap"] < 1e-4
    assert 0 < said["entropy"] < math.log(49152) / 2


def test_a_training_step_follows_the_float64_gradient(trained: Trained, twin: Any, real_policy: Path) -> None:
    """AdamW's first step moves every coordinate by the learning rate, in the direction that raises the objective."""
    before, after = (load_file(folder / "model.safetensors") for folder in (real_policy, trained.folder))
    assert before.keys() == after.keys()
    tokens = [sum(len(sample.token_ids) for sample in rollout.samples) for rollout in trained.rollouts]
    total: Gradient = {}
    for rollout, own in zip(trained.rollouts, tokens, strict=True):
        for name, part in naive_policy.gradient(twin, rollout, TEMPERATURE, "none", "token").items():
            total[name] = total.get(name, 0) + part * (own / sum(tokens))
    twin.zero_grad(set_to_none=True)
    length = math.sqrt(math.fsum(map(squared_norm, total.values())))
    assert trained.metrics["gradient_norm"] == pytest.approx(length, rel=1e-4)
    clearly = so = 0
    for name, gradient in total.items():
        moved = after[name] - before[name]
        assert float(moved.abs().max()) < 1.1 * RATE
        told = gradient.abs() > 1e-5 * length
        clearly += int(told.sum())
        so += int(((moved[told] * gradient[told].sign() - RATE).abs() < 0.1 * RATE).sum())
    assert clearly > 1e6
    assert so > 0.999 * clearly


def test_the_trained_policy_is_one_that_transformers_opens(trained: Trained, plain: Any, policy: Policy) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.folder, dtype=torch.float32).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.folder)
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert load_policy(str(trained.folder), "cpu", "float32").end_token_ids == [END]
    # what was better than the others has become likelier, what was worse less likely
    with torch.no_grad():
        gains = [
            value * float((naive_policy.logprobs(model, *pair) - naive_policy.logprobs(plain, *pair)).mean())
            for rollout in trained.rollouts
            for value, pair in zip(
                naive_policy.advantages(rollout.rewards),
                [(rollout.prompt_token_ids, sample.token_ids) for sample in rollout.samples],
                strict=True,
            )
        ]
    assert sum(gains) > 0
