"""Names of arms, sets and sources that are formulas, markup, control characters or very long: drawn and printed as they are."""

from __future__ import annotations

import io
import shutil
import warnings
from pathlib import Path

import matplotlib.text
import pytest
import synthetic_run as synthetic

from cropi_tools.report.page import page
from cropi_tools.report.plots import curves
from cropi_tools.report.run import compare_runs
from cropi_tools.report.tables import print_tables

NAMES = {
    "formula": "$\\frac{$",
    "dollars": "a$b$c",
    "lower": "_arm_",
    "upper": "x^2_{",
    "backslash": "\\alpha\\",
    "percent": "100%s{0}",
    "markup": "[red]x[link=y]",
    "markup that closes": "x[bold]",
    "html": "<script>&amp;",
    "emoji": "😀漢字",
    "long": "w" * 200,
    "controls": "\x1b[31mred\x1b]0;t\x07\r\nx\u202e\u2028\x9b",
    "space": " ",
    "dots": "x..",
    "not UTF-8": b"\xff\xfe".decode("utf-8", "surrogateescape"),
}


QUICK = ("formula", "controls")  # the others take seconds each, as slow tests


def named_run(folder: Path, name: str, set_name: str) -> Path:
    """A run of two arms, one of that name; a set and a source have one too."""
    synthetic.write_run(folder, ("random",), ("1", "2"))
    shutil.copytree(folder / "random", folder / name)
    for path in [*folder.rglob("evaluations.jsonl"), *folder.rglob("selected.jsonl")]:
        lines = path.read_text(encoding="utf-8")
        escaped = "".join(f"\\u{ord(one):04x}" if ord(one) < 0x10000 else one for one in set_name)
        path.write_text(lines.replace('"gcd"', f'"{escaped}"'), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in NAMES]
)
def test_names_are_shown_as_they_are(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = NAMES[kind]
    set_name = name.encode(errors="replace").decode() + "[/]/"
    drawn: list[str] = []
    original = matplotlib.text.Text.draw

    def draw(self: matplotlib.text.Text, *arguments: object, **options: object) -> None:
        drawn.append(self.get_text())
        original(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(matplotlib.text.Text, "draw", draw)
    comparison = compare_runs([named_run(tmp_path / "run", name, set_name)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert curves(comparison, ["steps"]).startswith(b"\x89PNG")
        whole = page(comparison).encode()
    assert b"<script>&amp;" not in whole
    shown = name if name.isprintable() else name.encode("unicode_escape", "surrogatepass").decode()
    assert any(text == shown or (text.endswith("…") and shown.startswith(text[:-1])) for text in drawn), drawn
    for terminal in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign,misc]
        print_tables(comparison, stream)
        told = stream.getvalue()
        if not terminal:
            assert all(one.isprintable() for one in told.replace("\n", ""))
            assert shown in told
            assert "[/]/" in told
