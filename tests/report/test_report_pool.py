"""The pool beside what was selected from it: its mixture, and the prompts of the highest and the lowest scores."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import synthetic_run as synthetic

from cropi_tools.report.page import page
from cropi_tools.report.plots import pool_shares, selections
from cropi_tools.report.pool import read_texts
from cropi_tools.report.run import _texts, compare_runs, run_input
from cropi_tools.runtime.errors import InputError

SIZE = 16  # prompts, p0 to p15; p15 has no score
EVIL = "<script>alert(1)</script>\x1b[31m"


def write_pool(folder: Path, pool: Path) -> Path:
    """A run of one arm, scored on two sets of opposite order; p14 has a text that is markup, p0 one that is long."""
    synthetic.write_run(folder, arms=["cropi"], seeds=["1"])
    texts = {"p14": EVIL, "p0": "long " * 100}
    prompts: list[dict[str, Any]] = [
        {"id": f"p{n}", "prompt": texts.get(f"p{n}", f"text of {n}!"), "answer": "y", "source": "s"}
        for n in range(SIZE)
    ]
    prompts[1]["prompt"] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question one"}]
    synthetic.write_lines(pool, prompts)
    scores = [
        {
            "id": f"p{n}",
            "source": "gcd" if n < 4 else "reverse",
            "scores": None if n == SIZE - 1 else {"up": n / 100, "down": -n / 100},
            "pass_rate": 0.25,
            "status": "ok",
        }
        for n in range(SIZE)
    ]
    synthetic.write_lines(folder / "start/scores.jsonl", scores)
    for path in folder.rglob("selected.jsonl.manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["inputs"]["prompts"] = {"path": str(pool), "sha256": sha256(pool.read_bytes()).hexdigest()}
        path.write_text(json.dumps(manifest))
    return folder


def rows(text: str, name: str) -> list[list[str]]:
    table = re.search(rf"<summary>{name}</summary>(.*?)</details>", text, re.S)
    assert table is not None
    return [re.findall(r"<td>(.*?)</td>", row, re.S) for row in re.split("<tr[^>]*>", table[1])[2:]]


def test_the_pool_stands_beside_the_selections(run_folder: Path, tmp_path: Path) -> None:
    comparison = compare_runs([write_pool(run_folder, tmp_path / "pool.jsonl")])
    shares = pool_shares(comparison.runs[0])
    assert shares is not None
    assert shares.prompts == SIZE
    assert shares.sources == {"gcd": pytest.approx(0.25), "reverse": pytest.approx(0.75)}
    text = page(comparison)
    found = rows(text, "As a table")
    assert found[0] == ["pool", "", "16", "0.25", "–", "reverse 75.0 %, gcd 25.0 %"]
    assert found[1][-1] == "reverse 60.0 %, gcd 40.0 %"
    assert selections(comparison) != selections(compare_runs([without_scores(run_folder)]))


def without_scores(folder: Path) -> Path:
    (folder / "start/scores.jsonl").unlink()
    return folder


def test_the_ends_of_the_scores_with_their_texts(run_folder: Path, tmp_path: Path) -> None:
    comparison = compare_runs([write_pool(run_folder, tmp_path / "pool.jsonl")])
    text = page(comparison, _texts(comparison))
    up, down = rows(text, "up"), rows(text, "down")
    assert [row[0] for row in up] == ["1", "2", "3", "4", "5", "11", "12", "13", "14", "15"]
    assert [row[1] for row in up] == ["0.14", "0.13", "0.12", "0.11", "0.1", "0.04", "0.03", "0.02", "0.01", "0"]
    assert [row[4] for row in up] == [row[4] for row in down[::-1]]
    assert up[1][2:] == ["reverse", "0.25", "text of 13!"]
    assert up[-2][4] == "system: be brief / user: question one"
    assert up[-1][4].endswith("…")
    assert len(up[-1][4]) == 300
    assert up[0][4] == "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m"
    assert "<script" not in text


def test_a_pool_that_is_gone_or_changed_tells_no_texts(run_folder: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    comparison = compare_runs([write_pool(run_folder, pool)])
    assert len(_texts(comparison)[run_folder.name]) == 10
    pool.write_text(pool.read_text() + "\n")
    assert _texts(comparison) == {run_folder.name: {}}
    pool.unlink()
    assert _texts(comparison) == {run_folder.name: {}}
    text = page(comparison, _texts(comparison))
    assert rows(text, "up")[0][4] == "(p14)"
    assert "where the pool's file is" in text.replace("&#x27;", "'")
    assert read_texts({}, frozenset(("a",))) == {}


def test_few_scored_prompts_stand_at_one_end_only(run_folder: Path, tmp_path: Path) -> None:
    write_pool(run_folder, tmp_path / "pool.jsonl")
    path = run_folder / "start/scores.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    comparison = compare_runs([run_folder])
    assert comparison.runs[0].pool is not None
    ends = comparison.runs[0].pool.ends["up"]
    assert ([item.id for item in ends.top], [item.id for item in ends.bottom]) == (["p2"], ["p0"])


@pytest.mark.parametrize("score", [0.5, None, {"gcd": 0.5, "reverse": -0.25}])
def test_selections_of_any_version_are_read(score: Any, run_folder: Path) -> None:
    synthetic.write_run(run_folder, arms=["cropi"], seeds=["1"])
    for path in run_folder.rglob("selected.jsonl"):
        lines = [{**json.loads(line), "score": score} for line in path.read_text().splitlines()]
        synthetic.write_lines(path, lines)
    assert len(compare_runs([run_folder]).arms[0].arm.seeds[0].stages[0].selection.ids) == 10  # type: ignore[union-attr]


def suspect(number: int, **more: Any) -> dict[str, Any]:
    scores, deviations = {"up": -0.4, "down": 0.1}, {"up": 0.052, "down": 0.2}
    known = {"source": "gcd", "prompt": f"text {number}", "answer": 7, "usual_answer": "9" * 80, "pass_rate": 0.25}
    return {"id": f"p{number}", **known, "scores": scores, "deviations": deviations, **more}


def test_the_page_shows_the_first_prompts_that_pull_away(run_folder: Path, tmp_path: Path) -> None:
    write_pool(run_folder, tmp_path / "pool.jsonl")
    before = run_input(run_folder)
    assert "pull away" not in page(compare_runs([run_folder]))
    path = run_folder / "start/suspects.jsonl"
    synthetic.write_lines(path, [suspect(0, prompt=EVIL), *(suspect(n) for n in range(1, 30))])
    assert run_input(run_folder) != before
    text = page(compare_runs([run_folder]))
    found = rows(text, f"{run_folder.name}: 30 prompts, the first 20")
    assert found[1] == ["2", "-0.4 ± 0.052", "0.1 ± 0.2", "gcd", "0.25", "7", "9" * 59 + "…", "text 1"]
    assert len(found) == 20
    assert "<script" not in text
    path.write_text("")
    assert f"{run_folder.name}: none by more than noise." in page(compare_runs([run_folder]))


def test_what_is_no_list_of_suspects_is_refused(run_folder: Path, tmp_path: Path) -> None:
    write_pool(run_folder, tmp_path / "pool.jsonl")
    for wrong in ({"scores": None}, {"deviations": {"up": "x"}}, {"usual_answer": 3}):
        synthetic.write_lines(run_folder / "start/suspects.jsonl", [suspect(0, **wrong)])
        with pytest.raises(InputError, match=r"suspects\.jsonl:1"):
            compare_runs([run_folder])


def test_the_list_of_suspects_is_charged_to_no_arm(run_folder: Path, tmp_path: Path) -> None:
    write_pool(run_folder, tmp_path / "pool.jsonl")
    before = [arm.ledger for arm in compare_runs([run_folder]).arms]
    place = run_folder / "start/suspects.jsonl.manifest.json"
    synthetic.write_manifest(place, "cropi-score", {"seconds": 100.0})
    assert [arm.ledger for arm in compare_runs([run_folder]).arms] == before
