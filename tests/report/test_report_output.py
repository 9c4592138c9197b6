"""What is written: tables, JSON, page and picture; same data, same bytes; the page is self-contained."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic_run as synthetic

from cropi_tools.report.page import page
from cropi_tools.report.plots import curves
from cropi_tools.report.run import compare_runs, run_input
from cropi_tools.report.tables import as_json, print_tables
from cropi_tools.runtime.errors import InputError


def written(folder: Path, target: Path) -> tuple[bytes, bytes, str]:
    comparison = compare_runs([folder])
    stream = io.StringIO()
    print_tables(comparison, stream)
    (target / "report.html").write_text(page(comparison))
    (target / "curves.png").write_bytes(curves(comparison))
    return (target / "report.html").read_bytes(), (target / "curves.png").read_bytes(), stream.getvalue()


def cells(text: str, arm: str) -> list[list[str]]:
    """The rows of an arm, in the order of the tables."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip().startswith(arm + " ")]


def test_table_figures_by_hand(whole_run: Path) -> None:
    stream = io.StringIO()
    print_tables(compare_runs([whole_run]), stream)
    accuracy, speed, cost = cells(stream.getvalue(), "CROPI")
    assert accuracy == ["CROPI", "40", "3", "61.9", "81.9", "71.9 ± 2.2", "+24.2 [+22.4, +26.0]", "< 0.001"]
    assert speed[:5] == ["CROPI", "17", "2.03x", "[1.94, 2.15] (75 %)", "1.95 to 2.17"]
    assert (speed[5], speed[7]) == ("0.79x", "1.25x")
    null = cells(stream.getvalue(), "null:")[0]
    # full's seeds rise equally from .40, .41 and .38 and need 34.2, 31.7 and 39.2 steps
    assert null[:3] == ["null: full, seed against seed", "1.00x", "0.81 to 1.24"]
    assert "chosen after the fact" in stream.getvalue()
    assert cost == ["CROPI", "30 s", "64 s", "150 s", "24 s", "244 s", "49k", "20k", "12k"]
    assert cells(stream.getvalue(), "start") == [["start", "0", "29.7", "49.7", "39.7"]]
    assert "in 2.03 times fewer steps" in stream.getvalue()
    assert "1.26 times more device time and 1.25 times fewer tokens" in stream.getvalue()


def test_json_has_the_same_figures(whole_run: Path) -> None:
    figures = json.loads(json.dumps(as_json(compare_runs([whole_run])), allow_nan=False))
    cropi = figures["arms"]["cropi"]
    assert cropi["target"]["mean"] == pytest.approx(0.718667, abs=1e-6)
    assert cropi["difference"]["interval"] == pytest.approx([0.224087, 0.259913], abs=1e-6)
    assert cropi["speed"]["steps"]["ratio"] == pytest.approx(35 / 17.25)
    assert cropi["speed"]["steps"]["null"]["pairs"] == 6
    assert figures["arms"]["random"]["speed"]["steps"]["open"] == ["low"]
    assert figures["arms"]["random"]["speed"]["steps"]["in_words"] == "not reached"
    assert cropi["cost"]["mean_of_one_seed"]["total"]["seconds"] == 244
    assert list(figures["arms"]) == ["random", "full", "cropi"]


def test_same_data_same_bytes(whole_run: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first, second = written(whole_run, tmp_path / "one"), written(whole_run, tmp_path / "two")
    assert first == second
    assert first[1].startswith(b"\x89PNG")
    assert b"tEXt" not in first[1]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["curves.png", "report.html"]


def test_page_needs_nothing_from_outside_and_escapes(run_folder: Path, tmp_path: Path) -> None:
    synthetic.write_run(run_folder, arms=["random", "cropi"], seeds=["1"])
    (run_folder / "cropi").rename(run_folder / "<b>&")
    page = written(run_folder, tmp_path)[0].decode()
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    opened: list[str] = []
    references: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            references.extend(value or "" for name, value in attributes if name in ("src", "href", "srcset"))
            if tag not in ("meta", "img", "source", "br"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(page)
    assert opened == []
    assert len(references) == 6
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert "url(" not in page


@pytest.mark.parametrize("seeds", [["1"], ["1", "2"]])
def test_run_in_its_first_steps_is_shown(run_folder: Path, tmp_path: Path, seeds: list[str]) -> None:
    for seed in seeds:
        synthetic.write_stage(run_folder / "random" / seed / "1", "random", seed, 1, steps=0)
    synthetic.write_selected(run_folder / "cropi/1/1", "cropi", 1)
    page, _, text = written(run_folder, tmp_path)
    assert "cropi: no evaluation yet." in text
    assert "random, seed 1: stage 1 is unfinished (step 0); counted." in page.decode()
    assert cells(text, "random*")[0][:2] == ["random*", "0"]


def test_logs_without_costs_still_give_curves(run_folder: Path, tmp_path: Path) -> None:
    synthetic.write_run(run_folder, seeds=["1"])
    for path in [*run_folder.rglob("timings.jsonl"), *run_folder.rglob("metrics.jsonl")]:
        path.unlink()
    page, png, text = written(run_folder, tmp_path)
    assert "what selection costs is not recorded" in text
    assert page.decode().count("<picture>") == 2  # steps, selections
    assert png.startswith(b"\x89PNG")


def test_twice_the_same_name(whole_run: Path) -> None:
    with pytest.raises(InputError, match=r"demo: two run folders of this name"):
        compare_runs([whole_run, whole_run])


def test_a_run_as_input_changes_with_its_logs_alone(run_folder: Path) -> None:
    synthetic.write_run(run_folder, seeds=["1"])
    before = run_input(run_folder)
    (run_folder / "cropi" / "1" / "1" / "policy" / "model.safetensors").write_bytes(b"weights")
    assert run_input(run_folder) == before
    with open(run_folder / "cropi" / "1" / "1" / "policy" / "evaluations.jsonl", "a") as stream:
        stream.write("\n")
    assert run_input(run_folder) != before
