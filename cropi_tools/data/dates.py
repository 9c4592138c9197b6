"""The date that chat templates are told, in place of today's.

Some templates (Llama 3, Granite) write the date into every prompt, so that the same command would give other tokens tomorrow, and a
resumed file would mix the tokens of two days. Here the date is an option, the same for every command unless it is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cropi_tools.runtime.errors import UsageError

DEFAULT_DATE = "2024-07-26"
"""What Llama's own template falls back to where it cannot ask for the date."""

CLOCK = "strftime_now"
"""The function by which a template asks for the date; transformers gives it that of the machine."""

_TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")


def parse_date(text: str) -> str:
    """`YYYY-MM-DD` as it stands in fingerprints. UsageError, without the option's name: it is no date of this form."""
    import datetime

    try:
        date = datetime.datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise UsageError(f"expected a date as YYYY-MM-DD, such as {DEFAULT_DATE}") from None
    return date.isoformat()


def asks_for_date(folder: str | Path) -> bool:
    """Whether a template of the policy folder can ask for the date."""
    root = Path(folder)
    files = [root / name for name in _TEMPLATE_FILES] + sorted(root.glob("additional_chat_templates/*.jinja"))
    return any(path.is_file() and CLOCK.encode() in path.read_bytes() for path in files)


def other_dates(paths: Iterable[str | Path], date: str) -> dict[str, str]:
    """The date of each input (a trained policy, a file of rollouts) whose manifest says that its prompts had another one than `date`."""
    # imported here: the commands' help needs this module's constant alone
    from cropi_tools.data.jsonl import is_stream
    from cropi_tools.data.manifest import read_manifest

    found = {}
    for path in paths:
        manifest = None if is_stream(path) else read_manifest(path)
        recorded = (manifest or {}).get("fingerprint", {}).get("options", {}).get("date")
        if recorded not in (None, date):
            found[str(path)] = recorded
    return found
