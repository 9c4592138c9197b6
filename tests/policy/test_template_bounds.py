"""Chat templates that would go on for ever or fill the memory: each is told in one line, soon; ordinary ones render as without bounds."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from cropi_tools.policy import template_sandbox
from cropi_tools.policy.prompts import prompt_token_ids
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.runtime.errors import InputError

RECORD: dict[str, Any] = {"id": "p", "prompt": "1+2="}
TIME, MEMORY, LENGTH, NUMBERS = "did not end within", "GiB of memory", "writes more than", "computes with whole numbers"
REFUSED = "refuses its messages"

BOMBS: dict[str, tuple[str, str]] = {
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", REFUSED),
    "nested ranges": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "nested ranges that write": ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", ""),
    "lazy filters": ("{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}", TIME),
    "no end of words": ("{{ lipsum(n=10**9) }}", TIME),
    "multiplied text": ("{{ 'x' * 10**10 }}", MEMORY),
    "multiplied list": ("{{ ([1] * 10**10) | length }}", MEMORY),
    "center": ("{{ 'a'.center(10**10) }}", MEMORY),
    "center as a filter": ("{{ 'a' | center(10**10) }}", MEMORY),
    "ljust": ("{{ 'a'.ljust(10**10) }}", MEMORY),
    "rjust": ("{{ 'a'.rjust(10**10) }}", MEMORY),
    "zfill": ("{{ 'a'.zfill(10**10) }}", MEMORY),
    "expandtabs": ("{{ ('\t' * 1000).expandtabs(10**8) }}", MEMORY),
    "percent": ("{{ '%10000000000d' % 1 }}", MEMORY),
    "percent and star": ("{{ '%*d' % (10**10, 1) }}", MEMORY),
    "format": ("{{ '{:>10000000000}'.format(1) }}", MEMORY),
    "format as a filter": ("{{ '%10000000000d' | format(1) }}", MEMORY),
    "batch": ("{{ [1] | batch(10**10, 1) | list | length }}", MEMORY),
    "replace": (
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('x', 'xxxxxxxxx') %}{% endfor %}",
        MEMORY,
    ),
    "doubling by +": (
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        MEMORY,
    ),
    "doubling by ~": (
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        MEMORY,
    ),
    "doubling by set": (
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        LENGTH,
    ),
    "doubling of lists": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        MEMORY,
    ),
    "lists within lists": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "",
    ),
    "a macro without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", REFUSED),
    "a loop without end": ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", REFUSED),
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
        TIME,
    ),
    "an include": ("{% include 'itself' %}", REFUSED),
    "a power": ("{{ (10**1000) ** (10**1000) }}", NUMBERS),
    "squares of squares": (
        "{% set ns = namespace(x=10) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        NUMBERS,
    ),
    "rounding": ("{{ 5 | round(10**9, 'ceil') }}", NUMBERS),
    "hexadecimal": ("{{ ('f' * 10**6) | int(base=16) % 7 }}", NUMBERS),
}

ORDINARY = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + '\n' }}{% endfor %}",
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "{{ bos_token ~ m.content * 2 }}{% endfor %}{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ 2 ** -1 }}{{ '%05.1f' % 2.25 }}{{ -7 % 3 }}",
    "{% macro turn(m) %}{{ m.role }}: {{ m | tojson }}{% endmacro %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{{ turn(m) }}{% endfor %}{{ ns.n }}",
    "{{ 2.345 | round(2) }}{{ 7 | round(-1) }}{{ '42' | int }}{{ 'ff' | int(base=16) }}{{ 'x' | int(5) }}{{ [1, 2] | join('-') | center(9) }}",
    "{% set text %}{% for i in range(5) %}{{ i }}{% endfor %}{% endset %}{{ text | indent(2) }}{{ messages[0].content.split('+') }}",
)


def rendered(template: str, **fields: Any) -> list[int]:
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = template
    return prompt_token_ids(tokenizer, {**RECORD, **fields}, folder="P0")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that are reached soon."""
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.5)
    monkeypatch.setattr(template_sandbox, "MEMORY", 2**26)
    monkeypatch.setattr(template_sandbox, "LONGEST", 2**20)
    chat_template_utils._compile_jinja_template.cache_clear()


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_beyond_its_bounds_is_told_in_one_line(name: str, narrow: None) -> None:
    template, said = BOMBS[name]
    limits, began = resource.getrlimit(resource.RLIMIT_DATA), time.monotonic()
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(InputError) as failed:
        rendered(template)
    assert time.monotonic() - began < 5
    told = str(failed.value)
    assert "\n" not in told
    assert said in told
    assert told.startswith("prompt 'p': the ")
    assert "P0" in told
    # everything is put back
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL)[1] == timer[1]


def test_what_depends_on_the_prompt_is_bounded_at_every_prompt(narrow: None) -> None:
    template = "{% if messages[0].content == 'boom' %}{{ 'x' * 10**10 }}{% endif %}{{ messages[0].content }}"
    assert rendered(template)
    with pytest.raises(InputError, match="memory"):
        rendered(template, prompt="boom")
    assert rendered(template)


@pytest.mark.parametrize("template", ORDINARY)
def test_ordinary_templates_render_as_without_bounds(template: str) -> None:
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": " 1+2= "}, {"role": "assistant", "content": "é"}]
    library: Any = chat_template_utils
    made = []
    for environment in (template_sandbox.BoundedEnvironment, ImmutableSandboxedEnvironment):
        library._compile_jinja_template.cache_clear()
        library.ImmutableSandboxedEnvironment = environment
        made.append(tokenizer.apply_chat_template(messages, tokenize=False))
        library.ImmutableSandboxedEnvironment = template_sandbox.BoundedEnvironment
    library._compile_jinja_template.cache_clear()
    assert made[0] == made[1] != ""


def test_the_library_compiles_with_the_bounds() -> None:
    """Its name for the sandbox is ours to replace."""
    assert rendered("{{ messages[0].content }}")
    compiled: Any = chat_template_utils._compile_jinja_template("{{ messages[0].content }}")
    assert isinstance(compiled.environment, template_sandbox.BoundedEnvironment)


def test_a_policy_whose_template_does_not_end_opens_with_one_line(tmp_path: Path, narrow: None) -> None:
    tiny_policy.save(tmp_path / "P0")
    path = tmp_path / "P0" / "tokenizer_config.json"
    template = BOMBS["nested ranges"][0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with pytest.raises(InputError, match=r"^the chat template of .*P0 did not end within"):
        load_tokens(str(tmp_path / "P0"))
