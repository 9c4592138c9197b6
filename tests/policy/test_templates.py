"""What a chat template can ask for beside the record, and how it can fail: the tokens must be the same on any day and any machine."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.data.dates import DEFAULT_DATE, asks_for_date, parse_date
from cropi_tools.policy.prompts import depends_on_date, encoded_prompt, prompt_token_ids
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.runtime.errors import InputError, UsageError

# as published, cut down to what matters
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}'
    "Today Date {{ date_string }} {{ messages[0].content }}"
)
GRANITE = "{%- set system = 'Todays Date ' ~ strftime_now('%B %d, %Y') ~ ' ' %}{{ system }}{{ messages[0].content }}"
MACRO = "{%- macro today() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ today() }}{{ messages[0].content }}"
RECORD: dict[str, Any] = {"id": "p", "prompt": "1+2="}


def templated(template: str) -> Any:
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read(template: str, date: str = DEFAULT_DATE, **fields: Any) -> str:
    tokenizer = templated(template)
    ids = prompt_token_ids(tokenizer, {**RECORD, **fields}, date)
    return tokenizer.decode(ids)


@pytest.fixture(params=["UTC", "Asia/Tokyo", "America/Lima"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Machines elsewhere."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, "Today Date 26 Jul 2024 1+2="),
        (GRANITE, "Todays Date July 26, 2024 1+2="),
        (MACRO, "2024-07-261+2="),
        ("{{ strftime_now('%Y%m%d %H%M%S') }}", "20240726 000000"),
        ("{{ strftime_now('%s') }}", "1721952000"),
        ("{{ strftime_now('%H %j %A %a %p') }}", "00 208 Friday Fri AM"),
        ("{{ strftime_now('%Z') }}", "UTC"),
        ("{{ strftime_now('%%s') | replace('%', '-') }}", "-s"),
    ],
)
def test_the_date_is_the_same_every_day_everywhere(template: str, expected: str, zone: None) -> None:
    assert read(template) == expected


def test_it_is_the_date_that_was_asked_for() -> None:
    assert read(LLAMA, "2031-01-02") == "Today Date 02 Jan 2031 1+2="
    assert read(GRANITE, "1999-12-31") == "Todays Date December 31, 1999 1+2="


def test_a_prompt_may_have_a_date_of_its_own() -> None:
    own = {"chat_template_kwargs": {"date_string": "1 May 2020"}}
    assert read(LLAMA, "2031-01-02", **own) == "Today Date 1 May 2020 1+2="
    tokenizer = templated(LLAMA)
    assert depends_on_date(tokenizer, RECORD)
    assert not depends_on_date(tokenizer, {**RECORD, **own})
    assert not depends_on_date(templated("{{ messages[0].content }}"), RECORD)
    assert not depends_on_date(tiny_policy.tokenizer(), RECORD)


@pytest.mark.parametrize(
    "template",
    ["{{ range(90000) | random }}", "{{ lipsum(n=1, html=false) | replace('.', '') | replace('\n', ' ') }}"],
)
def test_random_choices_follow_from_the_prompt(template: str) -> None:
    before = random.getstate()
    once = read(template)
    assert random.getstate() == before
    random.seed(5)
    assert read(template) == once
    assert read(template, id="q") != once


# what a template can raise, and what must be said of it
FAILURES: dict[str, tuple[str, str]] = {
    "TypeError": ("{{ 1 + messages }}", "TypeError: unsupported operand"),
    "content is a list": ("{{ messages[0].content.items() }}", "UndefinedError: "),
    "UndefinedError": ("{{ nothing.more }}", "UndefinedError: 'nothing' is undefined"),
    "raise_exception": ("{{ raise_exception('only users') }}", "(only users)"),
    "syntax": ("{% if %}", "TemplateSyntaxError: Expected an expression"),
    "no such filter": ("{{ messages | shout }}", "TemplateAssertionError: No filter named"),
    "ZeroDivisionError": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "OverflowError": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: "),
    "KeyError": ("{{ '%(a)s' % {} }}", "KeyError: 'a'"),
    "IndexError": ("{{ messages.pop(7) }}", "SecurityError: "),
    "RecursionError": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: "),
    "ValueError": ("{{ 'a' | int(base=99) ~ '%q' % 1 }}", "unsupported format character"),
    "AttributeError": ("{{ ''.join(1) }}", "TypeError: "),
    "strftime_now of nothing": ("{{ strftime_now(none) }}", "TypeError: "),
    "several lines": ("{{ raise_exception('one\ntwo') }}", "(one)"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_template_that_fails_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    template, said = FAILURES[name]
    tiny_policy.save(tmp_path / "P0")
    templated(template).save_pretrained(tmp_path / "P0")
    tokens = load_tokens(str(tmp_path / "P0"))
    with pytest.raises(InputError) as failed:
        encoded_prompt(tokens, {**RECORD, "id": "p77"})
    told = str(failed.value)
    assert "\n" not in told
    assert told.startswith("prompt 'p77': the policy's chat template refuses its messages (")
    assert said in told
    assert told.endswith(f"template of {tmp_path / 'P0'}")


@pytest.mark.parametrize("text", ["tomorrow", "", "2024-13-01", "2024-02-30", "20240726", "2024-W30-5", "26.07.2024"])
def test_what_is_no_date_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected a date as YYYY-MM-DD"):
        parse_date(text)
    assert parse_date("2024-7-5") == "2024-07-05"


def dated(folder: Path) -> Path:
    tiny_policy.save(folder)
    templated(LLAMA).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/default.jinja"]
)
def test_where_a_template_that_asks_may_stand(place: str, policy_folder: Path, tmp_path: Path) -> None:
    assert not asks_for_date(policy_folder)
    path = tmp_path / "P0" / place
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"chat_template": LLAMA}) if path.suffix == ".json" else LLAMA)
    assert asks_for_date(tmp_path / "P0")


@pytest.mark.slow
def test_the_date_decides_what_a_command_makes(tmp_path: Path, run: Callable[..., Any]) -> None:
    """Rollouts, a policy trained with another date than it is sampled with, and a policy whose template asks for none."""
    dated(tmp_path / "P0")
    tiny_policy.save(tmp_path / "plain")
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(2))
    words = (
        "cropi-rollout",
        "--model",
        "P0",
        "p.jsonl",
        "-n",
        2,
        "--max-tokens",
        4,
        "--verifier",
        "exact",
        "--device",
        "cpu",
    )
    run(*words, "-o", "r.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    tokens = load_tokens(str(tmp_path / "P0"))
    expected = [encoded_prompt(tokens, record) for record in tiny_policy.prompts(2)]
    assert [row["prompt_token_ids"] for row in rows] == expected
    assert "2024" in tokens.tokenizer.decode(expected[0])
    assert (
        json.loads((tmp_path / "r.jsonl.manifest.json").read_text())["fingerprint"]["options"]["date"] == DEFAULT_DATE
    )
    run(*words, "-o", "r.jsonl", "--date", DEFAULT_DATE)
    other = run(*words, "-o", "r.jsonl", "--date", "2025-01-01", code=1)
    assert "date 2024-07-26, now 2025-01-01" in other.stderr

    train = ("cropi-train", "p.jsonl", "--steps", 1, "--batch", 2, "-n", 2, "--max-tokens", 4, "--verifier", "exact")
    done = run(*train, "--model", "P0", "-o", "P1", "--date", "2025-01-01", "--device", "cpu")
    assert "warning" not in done.stderr
    assert json.loads((tmp_path / "P1" / "training.json").read_text())["date"] == "2025-01-01"
    said = run(*[word if word != "P0" else "P1" for word in words], "-o", "r1.jsonl").stderr
    assert "warning: P1: its prompts had the date 2025-01-01, here they have 2024-07-26; give --date 2025-01-01" in said

    verl = run(
        "cropi-train",
        *train[1:],
        "--model",
        "P0",
        "--engine",
        "verl",
        "--verl-option",
        "trainer.n_gpus_per_node=1",
        "--dry-run",
        "-o",
        "P2",
        code=1,
    )
    assert "asks for the date, and verl would tell it today's" in verl.stderr

    plain = [word if word != "P0" else "plain" for word in words]
    run(*plain, "-o", "r2.jsonl")
    assert "up to date" in run(*plain, "-o", "r2.jsonl", "--date", "2025-01-01").stderr
