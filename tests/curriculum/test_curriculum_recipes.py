"""The recipes of the paper's settings: what they ask for, without a network or data, and what they will take by arithmetic."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from curriculum_runs import NOT_INHERITED, ROOT
from in_process import call

from cropi_tools import runtime
from cropi_tools.cli.entry import entry
from cropi_tools.rewards.verifiers import grade
from cropi_tools.verl_backend.config import refuse_what_verl_cannot


class Recipe(NamedTuple):
    """What a recipe has of its own."""

    model: str
    max_tokens: int
    asks: str
    engine: str
    reference: str
    eval_temperature: float


RECIPES = {
    "qwen2.5-1.5b-math": Recipe("Qwen/Qwen2.5-1.5B-Instruct", 2048, "system", "vllm", "start", 0.0),
    "qwen2.5-7b-math": Recipe("Qwen/Qwen2.5-7B-Instruct", 4096, "system", "verl", "stage", 0.0),
    "r1-distill-1.5b-math": Recipe("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 8192, "template", "vllm", "start", 0.6),
}
# the paper's, for all of its models
SAMPLING = {"temperature": 0.5, "verifier": "maths", "engine": "vllm"}
INFLUENCE = {
    **{"weighting": "token", "weight_clip": None, "ppo_clip": None, "self_normalize": False, "aggregation": "sequence"},
    **{"advantage": "group", "policy_temperature": 1.0, "method": "auto", "checkpoint_activations": True},
}
TRAINING = {
    **{
        "preset": "paper",
        "batch": 128,
        "samples": 8,
        "temperature": 1.0,
        "learning_rate": 1e-6,
        "schedule": "constant",
    },
    **{"kl": 0.001, "entropy": 0.001, "clip": (0.2, 0.2), "aggregation": "token", "advantage": "group"},
    **{"weight_decay": 0.01, "max_gradient_norm": 1.0, "minibatch": 0, "steps": 100, "carry": "weights"},
}
TESTS = ["gsm8k", "math", "gaokao2023en", "amc23", "olympiadbench", "aime24"]
SHORT = ("STAGES=2", "SEEDS=1", "ARMS=cropi random")
SETS = {  # of each data set on the hub: its name, split, question and answer
    "test.gsm8k": ("hf:openai/gsm8k:main", "test", "question", "answer"),
    "test.math": ("hf:HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "test.gaokao2023en": ("hf:MARIO-Math-Reasoning/Gaokao2023-Math-En", "train", "question", "answer"),
    "test.amc23": ("hf:math-ai/amc23", "test", "question", "answer"),
    "test.olympiadbench": ("hf:Hothan/OlympiadBench:OE_TO_maths_en_COMP", "train", "question", "final_answer"),
    "test.aime24": ("hf:HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "gsm8k": ("hf:openai/gsm8k:main", "train", "question", "answer"),
    "math": ("hf:DigitalLearningGmbH/MATH-lighteval", "train", "problem", "solution"),
    "deepscaler": ("hf:agentica-org/DeepScaleR-Preview-Dataset", "train", "problem", "answer"),
}


def config_of(recipe: str) -> Path:
    return ROOT / "examples" / recipe / "config.mk"


@cache
def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in (*NOT_INHERITED, "DATA", "ENGINE")}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@cache
def shown(recipe: str, *given: str) -> str:
    """What `make -n` shows of a recipe whose run was never begun."""
    words = ["make", "-C", str(ROOT), "--no-print-directory", "-n", "curriculum", f"CONFIG={config_of(recipe)}"]
    done = subprocess.run(
        [*words, "RUN=/nowhere/run", *given], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def lines_of(text: str, command: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(command + " ")]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command makes of a line: the record of its options, ranges and contradictions checked."""
    monkeypatch.setattr(runtime, "install_signal_handlers", lambda: None)

    def parse(line: str) -> Any:
        words = shlex.split(line)
        made: list[Any] = []

        def keep(options: Any) -> None:
            """Keep them."""
            made.append(options)

        monkeypatch.setattr(sys, "argv", words)
        main = importlib.import_module(f"cropi_tools.cli.{words[0].removeprefix('cropi-')}").main
        with pytest.raises(SystemExit) as ended:
            entry(main.record, keep, name=words[0], example=words[0])()
        assert not ended.value.code, line
        return made[0]

    return parse


def has(options: Any, values: dict[str, Any]) -> None:
    assert {name: getattr(options, name) for name in values} == values


@pytest.mark.parametrize("name", RECIPES)
def test_every_line_is_one_that_the_command_takes_and_has_the_values_of_the_paper(name: str, parsed: Any) -> None:
    recipe, text = RECIPES[name], shown(name, *SHORT)
    rollouts = {Path(line.output).name: line for line in map(parsed, lines_of(text, "cropi-rollout"))}
    assert {output: line.samples for output, line in rollouts.items()} == {
        "train.rollouts.jsonl": 8,
        "valid-gsm8k.rollouts.jsonl": 32,
        "valid-math.rollouts.jsonl": 32,
    }
    for line in rollouts.values():
        has(line, {**SAMPLING, "model": recipe.model, "max_tokens": recipe.max_tokens})
    gradients = [parsed(line) for line in lines_of(text, "cropi-grad")]
    # two targets and the pool, by the starting policy and by that of stage 2
    assert len(gradients) == 6
    for line in gradients:
        has(line, {**INFLUENCE, "behavior": recipe.model})
        if not line.mean:
            has(line, {"dim": 32768})
            assert dict(line.against).keys() == {"gsm8k", "math"}
    chosen = [parsed(line) for line in lines_of(text, "cropi-select")]
    assert [(line.by, line.ratio) for line in chosen] == [("influence", "0.1")] * 2 + [("random", "0.1")] * 2
    assert len([parsed(line) for line in lines_of(text, "cropi-score")]) == 2
    trained = [parsed(line) for line in lines_of(text, "cropi-train")]
    assert [line.model for line in trained[::2]] == [recipe.model] * 2
    for line in trained:
        has(line, {**TRAINING, "max_tokens": recipe.max_tokens, "verifier": "maths", "engine": recipe.engine})
        has(line, {"reference": recipe.reference, "eval_every": 20, "eval_temperature": recipe.eval_temperature})
        assert list(line.sets) == TESTS
        if line.engine == "verl":
            refuse_what_verl_cannot(line)
    commands = set(re.findall(r"^(cropi-\w+)", text, re.M))
    assert commands == {f"cropi-{one}" for one in ("prompts", "rollout", "grad", "score", "select", "train")}


@pytest.mark.parametrize("name", RECIPES)
def test_data_comes_by_name_with_test_questions_and_validation_kept_out(name: str, parsed: Any) -> None:
    made = {Path(line.output).name: line for line in map(parsed, lines_of(shown(name, *SHORT), "cropi-prompts"))}
    tests, valid = (
        [f"/nowhere/run/data/{kind}.{one}.jsonl" for one in of] for kind, of in (("test", TESTS), ("valid", TESTS[:2]))
    )
    parts = {f"pool.{one}.jsonl": (one, None, [*tests, *valid]) for one in ("gsm8k", "math", "deepscaler")}
    expected = {
        **{f"test.{one}.jsonl": (f"test.{one}", None, []) for one in TESTS},
        **{f"valid.{one}.jsonl": (one, 100, tests) for one in TESTS[:2]},
        **parts,
    }
    for output, (one, size, apart) in expected.items():
        source, split, question, answer = SETS[one]
        line = made.pop(output)
        assert (line.sources, line.split, line.size, list(line.exclude)) == ((source,), split, size, apart)
        assert line.mapping == (f"prompt={question},answer={answer}",)
        asked = getattr(line, RECIPES[name].asks)
        assert asked.endswith(r"Please reason step by step, and put your final answer within \boxed{}.")
        assert (line.system is None) == ("{prompt}" in asked)
    (whole,) = made.values()
    assert whole.sources == tuple(f"/nowhere/run/data/{part}" for part in parts)
    assert whole.output == "/nowhere/run/data/pool.jsonl"


def test_files_of_ones_own_take_the_place_of_what_comes_by_name(tmp_path: Path) -> None:
    mine = {name: tmp_path / f"{name}.jsonl" for name in ("pool", "valid", "test")}
    for path in mine.values():
        path.touch()
    given = (f"VALID_FILE.math={mine['valid']}", f"TEST_FILE.aime24={mine['test']}")
    text = shown("qwen2.5-1.5b-math", *SHORT, *given)
    assert "aime_2024" not in text
    assert "valid.math" not in text
    assert all(
        f"--exclude {mine[kind]}" in line
        for kind in ("valid", "test")
        for line in lines_of(text, "cropi-prompts")
        if "/pool." in line and "hf:" in line
    )
    text = shown("qwen2.5-1.5b-math", *SHORT, f"POOL={mine['pool']}")
    assert f"--prompts {mine['pool']} --ratio 0.1" in text
    assert "DeepScaleR" not in text


@pytest.mark.parametrize("name", RECIPES)
def test_slurm_gets_every_step(name: str) -> None:
    done = subprocess.run(
        [ROOT / "examples" / "slurm" / "submit.sh", config_of(name), "8", "-n", "RUN=/nowhere/run", *SHORT],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    steps = [shlex.split(line) for line in done.stdout.splitlines() if "submit-step.sh" in line]
    assert [(parts, words[0]) for _, parts, _, _, *words in steps].count(("8", "cropi-grad")) == 2
    assert {words[4] for words in steps} == {f"cropi-{one}" for one in ("rollout", "grad", "score", "select", "train")}
    # the data is made where the steps are submitted
    assert len(lines_of(done.stdout, "cropi-prompts")) == 12


# a question of each set, with its answer as the set writes it and as a response gives it; then a question that comes from elsewhere
ROWS: dict[str, tuple[Any, str]] = {
    "test.gsm8k": ("2+2 = <<2+2=4>>4 apples.\n#### 1,004", "1004"),
    "test.math": (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})"),
    "test.gaokao2023en": (r"$\frac{1}{2}$", "1/2"),
    "test.amc23": (27.0, "27"),
    "test.olympiadbench": ([r"$\frac{1}{n+1}$"], r"\frac{1}{n+1}"),
    "test.aime24": ("025", "25"),
    "gsm8k": ("He has <<5*5=25>>25.\n#### 25", "25"),
    "math": (r"So $x = \boxed{\frac{3}{4}}$, which is less than 1.", "3/4"),
    "deepscaler": (r"-\dfrac{2}{3}", r"-\frac{2}{3}"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a recipe, made by its rules of files that look like the sets of the hub: 120 questions and those of all test sets each."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "run" / "data").mkdir(parents=True)
    given = []
    asked = {name: f"What does {name} ask?" for name in SETS if name.startswith("test.")}
    for name, (_, _, question, answer) in SETS.items():
        questions = [asked[name]] if name in asked else [*asked.values(), *(f"{name}, number {i}?" for i in range(120))]
        # the last set has a question of the one before it, too
        questions += ["math, number 7?"] if name == "deepscaler" else []
        rows = [{question: text, answer: ROWS[name][0], "level": 3} for text in questions]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given.append(f"HUB.{name}={folder / name}.jsonl")
    # the lines in make's order, each in this process: as the rules have them, without the start of twelve programs
    for line in lines_of(shown("r1-distill-1.5b-math", *SHORT, f"RUN={folder / 'run'}", *given), "cropi-prompts"):
        ended = call(shlex.split(line), folder)
        assert (ended.code, ended.trace) == (0, ""), ended.stderr
    return folder / "run" / "data"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_rules_make_a_pool_without_test_and_validation_questions(data: Path) -> None:
    files = {path.name.removesuffix(".jsonl"): read(path) for path in data.glob("*.jsonl")}
    questions = {name: {record["prompt"] for record in records} for name, records in files.items()}
    apart = {name: found for name, found in questions.items() if not name.startswith("pool")}
    assert {name: len(found) for name, found in apart.items()} == {
        **{f"test.{name}": 1 for name in TESTS},
        **{"valid.gsm8k": 100, "valid.math": 100},
    }
    # 20 of the first two sets are left, and of the third all but the question of the second
    counts = [sum(record["source"] == source for record in files["pool"]) for source in ("gsm8k", "math", "deepscaler")]
    assert counts == [20, 20, 120]
    everything = [question for name in (*apart, "pool") for question in questions[name]]
    assert len(everything) == len(set(everything))
    assert all(
        question.endswith(r"? Please reason step by step, and put your final answer within \boxed{}.")
        for question in everything
    )


def test_references_are_read_as_the_sets_write_them(data: Path) -> None:
    for name, (_, given) in ROWS.items():
        record = read(data / f"{name if name.startswith('test.') else f'pool.{name}'}.jsonl")[0]
        for answer, reward in ((given, 1.0), ("17", 0.0)):
            assert grade(record, rf"Then \boxed{{{answer}}}.").reward == reward, name


# ------------------------------------------------------------------------------------------------------------------ cost


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_cost", ROOT / "examples" / "paper_cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cost_by_hand(script: ModuleType) -> None:
    counts = script.Counts(
        **{
            "parameters": 10,
            "arms": ["cropi", "random"],
            "seeds": 2,
            "stages": 3,
            "steps": 4,
            "batch": 5,
            "samples": 2,
        },
        **{
            "valid_samples": 3,
            "pool": 100,
            "valid": 6,
            "prompt_tokens": 7,
            "tokens": 50,
            "live": 0.5,
            "in_update": 0.5,
        },
        **{"tests": 8, "evaluations": 2, "passes": 8, "update": 6},
    )
    # (100 x 2 + 6 x 3) responses of 50 tokens
    assert script.sampling(counts) == script.Work(generated=10_900)
    # half of 100 prompts of 7 + 2 x 50 tokens, and 6 of 7 + 3 x 50; 8 operations a parameter
    assert script.scoring(counts) == script.Work(scored=6_292, flops=503_360)
    # 4 x 5 prompts, twice, and 2 evaluations of 8; half of the prompts are trained; 6 operations a parameter
    assert script.training(counts) == script.Work(generated=2_800, trained=1_070, flops=64_200)
    found = dict(script.rows(counts))
    assert found["start, once for all arms"] == script.Work(10_900, 0, 6_292, 503_360)
    assert found["cropi, a seed"] == script.Work(8_400, 3_210, 12_584, 1_199_320)
    assert found["random, a seed"] == script.Work(8_400, 3_210, 0, 192_600)
    assert found["all, 2 seeds"] == script.Work(44_500, 12_840, 31_460, 3_287_200)
    assert dict(script.rows(counts._replace(arms=["full", "random"])))["start, once for all arms"] == script.Work()
    # 44,500 tokens at one a second are 12.4 hours, and 3,287,200 operations at 100 a second 9.1
    lines = script.table(list(found.items()), 10, tokens_per_second=1, flops=100)
    assert lines[-1].split()[-3:] == ["12.4", "9.1", "21.5"]
    assert lines[-1].split()[-5:-3] == ["8.90e+05", "3.29e+06"]


ASSUMED = ("--pool", "1000", "--prompt-tokens", "100", "--tokens", "400", "--live", "0.5")


@pytest.mark.parametrize(
    ("name", "trained", "operations"), [("qwen2.5-1.5b-math", 0.5, 10), ("qwen2.5-7b-math", 1, 10)]
)
def test_cost_reads_the_recipe(
    name: str, trained: float, operations: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two operations forward, four backward, two of activations computed again, two of the reference. verl trains on all groups."""
    monkeypatch.setattr(sys, "argv", ["paper_cost.py"])
    values = script.values_of(str(config_of(name)), SHORT)
    asked = type("Asked", (), {"pool": 1000, "prompt_tokens": 100, "tokens": 400, "live": 0.5, "eval_prompts": 10})
    counts = script.counts_of(values, asked)
    assert counts[1:6] == (["cropi", "random"], 1, 2, 100, 128)
    assert (counts.samples, counts.valid, counts.valid_samples, counts.in_update) == (8, 200, 32, trained)
    assert (counts.passes, counts.update, counts.evaluations, counts.tests) == (operations, operations, 6, 10)


def test_cost_has_no_hours_without_a_rate_and_says_what_is_missing() -> None:
    def cost(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, ROOT / "examples" / "paper_cost.py", *words]
        return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60)

    config = config_of("r1-distill-1.5b-math")
    plain = cost(config, "STAGES=2", *ASSUMED)
    assert plain.returncode == 0, plain.stderr
    assert "hours" not in plain.stdout
    assert "together" not in cost(config, *ASSUMED, "--flops", "4e14").stdout
    for words, said in (
        ((config, *ASSUMED[:-2]), "--live"),
        ((config, *ASSUMED, "--live", "2"), "--live 2: must be 0 to 1"),
        ((config, *ASSUMED, "--flops", "0"), "--flops: must be above 0"),
        ((ROOT / "examples" / "tiny" / "config.mk", *ASSUMED), "does not set PARAMETERS"),
    ):
        done = cost(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr


PAGES = ("examples/paper.md", "examples/qwen2.5-7b-math/README.md", "examples/r1-distill-1.5b-math/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_what_the_script_prints(page: str) -> None:
    text = (ROOT / page).read_text()
    (line, table) = re.findall(r"^    \$ python ((?:.*\\\n)*.*)\n((?:    .*\n)+)", text, re.M)[0]
    words = [sys.executable, *shlex.split(line.replace("\\\n", ""))]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert [row.split() for row in table.splitlines()] == [row.split() for row in done.stdout.splitlines()]
