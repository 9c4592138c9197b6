"""The rules of curriculum.mk, with commands that only keep books: what is asked of whom and what is not asked again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from curriculum_runs import ROOT, BookkeptCurriculum, results

BY_PASS_RATE = ("learnability", "hardest", "pass-rate")


@pytest.fixture
def two_stages(tmp_path: Path) -> BookkeptCurriculum:
    return BookkeptCurriculum(tmp_path, STAGES=2)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_shows_every_command_and_writes_nothing(two_stages: BookkeptCurriculum) -> None:
    shown = two_stages.make("-n").stdout
    assert len(re.findall(r"^cropi-rollout", shown, re.M)) == 2
    assert len(re.findall(r"^cropi-grad .*--mean", shown, re.M)) == 2
    assert len(re.findall(r"^cropi-grad .*--against target=", shown, re.M)) == 2
    assert len(re.findall(r"^cropi-score", shown, re.M)) == 2
    assert len(re.findall(r"^cropi-select", shown, re.M)) == 4
    assert len(re.findall(r"^cropi-train", shown, re.M)) == 4
    assert not two_stages.run.exists()
    assert not two_stages.asked()
    assert not two_stages.nothing_left()
    assert not two_stages.run.exists()


def test_a_second_make_does_nothing(two_stages: BookkeptCurriculum) -> None:
    two_stages.make()
    assert len(two_stages.worked()) == 2 + 2 + 2 + 2 + 4 + 4
    before = times(two_stages.run)
    assert two_stages.nothing_left()
    two_stages.make()
    assert two_stages.asked() == []
    assert times(two_stages.run) == before


def test_weights_pass_from_stage_to_stage(two_stages: BookkeptCurriculum) -> None:
    two_stages.make("STAGES=3")
    models: dict[str, str] = {}
    for entry in two_stages.asked():
        if "--model" in entry["words"]:
            output = Path(entry["output"])
            models[str(output.relative_to(two_stages.run))] = entry["words"][entry["words"].index("--model") + 1]
    start, run = str(two_stages.folder / "P0"), two_stages.run
    assert models["start/train.rollouts.jsonl"] == models["start/valid-target.rollouts.jsonl"] == start
    assert models["start/grads.zarr"] == models["start/valid-target.mean.safetensors"] == start
    for arm in ("random", "cropi"):
        assert models[f"{arm}/1/1/policy"] == start
        assert models[f"{arm}/1/2/policy"] == str(run / arm / "1/1/policy")
        assert models[f"{arm}/1/3/policy"] == str(run / arm / "1/2/policy")
    for output in ("grads.zarr", "valid-target.mean.safetensors"):
        assert models[f"cropi/1/3/{output}"] == str(run / "cropi/1/2/policy")


def test_more_stages_add_only_the_new_ones(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, SEEDS="1 2")
    curriculum.make()
    curriculum.asked()
    before = times(curriculum.run)
    curriculum.make("STAGES=2")
    made = curriculum.worked()
    assert made
    assert all(re.match(r"(random|cropi)/[12]/2/", name) for name in made)
    assert {name: time for name, time in times(curriculum.run).items() if name in before} == before
    assert curriculum.nothing_left("STAGES=2")
    assert curriculum.nothing_left()


def test_arms_share_the_start_and_their_seeds(tmp_path: Path) -> None:
    arms = "cropi full random static shuffled learnability pass-rate"
    curriculum = BookkeptCurriculum(tmp_path, ARMS=arms, SEEDS="1 2", STAGES=2)
    curriculum.make("-j4")
    asked = [entry for entry in curriculum.asked() if entry["outcome"] == "made"]
    assert curriculum.nothing_left()
    assert sum("cropi-rollout" in entry["words"] for entry in asked) == 2
    scores, rollouts, rules, seeds, selecting = {}, {}, {}, {}, {}
    for entry in asked:
        words, cell = entry["words"], str(Path(entry["output"]).parent.relative_to(curriculum.run))
        if words[0] == "cropi-select":
            files = [Path(word) for word in words if word.endswith("scores.jsonl")]
            scores[cell] = [str(path.relative_to(curriculum.run)) for path in files]
            given = [Path(words[place + 1]) for place, word in enumerate(words) if word == "--rollouts"]
            rollouts[cell] = [str(path.relative_to(curriculum.run)) for path in given]
            rules[cell] = words[words.index("--by") + 1]
            selecting[cell] = words[words.index("--seed") + 1]
        if words[0] == "cropi-train" or (words[0] == "cropi-select" and not cell.startswith("shuffled")):
            seeds.setdefault(cell, set()).add(words[words.index("--seed") + 1])
    assert len(scores) == 7 * 2 * 2
    for cell, found in scores.items():
        arm, _, stage = cell.split("/")
        of_its_own = arm in ("cropi", "shuffled") and stage == "2"
        scoreless = arm in ("full", "random", *BY_PASS_RATE)
        assert found == ([] if scoreless else [f"{cell if of_its_own else 'start'}/scores.jsonl"]), cell
        assert rollouts[cell] == (["start/train.rollouts.jsonl"] if arm in BY_PASS_RATE else []), cell
        assert rules[cell] == ("influence" if arm in ("cropi", "static") else arm)
    # paired arms: a seed and stage has one seed whatever the arm, and no other cell has it
    by_place = {cell.split("/", 1)[1]: set[str]() for cell in seeds}
    for cell, found_seeds in seeds.items():
        by_place[cell.split("/", 1)[1]] |= found_seeds
    assert all(len(found_seeds) == 1 for found_seeds in by_place.values())
    assert len(set.union(*by_place.values())) == len(by_place) == 4
    # one permutation a seed: shuffled keeps at all stages the seed that its first selection shares with the other arms
    for seed in ("1", "2"):
        assert selecting[f"shuffled/{seed}/1"] == selecting[f"shuffled/{seed}/2"] == selecting[f"cropi/{seed}/1"]
    assert selecting["shuffled/1/1"] != selecting["shuffled/2/1"]


def test_pass_rates_need_no_gradients_and_no_target(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, ARMS=" ".join(BY_PASS_RATE), STAGES=2, VALID="", GPUS=2)
    curriculum.make()
    asked = [entry for entry in curriculum.asked() if entry["outcome"] == "made"]
    assert {entry["words"][0] for entry in asked} == {"cropi-rollout", "cropi-select", "cropi-train"}
    selecting = next(entry["words"] for entry in asked if entry["words"][0] == "cropi-select")
    assert selecting.count("--rollouts") == 2  # every shard


def test_a_changed_value_is_refused_and_force_replaces_what_it_touches(two_stages: BookkeptCurriculum) -> None:
    two_stages.make()
    two_stages.asked()
    before = results(two_stages.run)
    shown = two_stages.make("-n", "STEPS=3").stdout
    assert "cropi-train --steps 3" in shown
    assert "cropi-rollout" not in shown
    assert two_stages.nothing_left()
    refusal = two_stages.make("STEPS=3", code=2)
    assert "exists, something differs" in refusal.stderr
    assert [entry["outcome"] for entry in two_stages.asked()] == ["refused"]
    assert results(two_stages.run) == before
    assert not two_stages.nothing_left("STEPS=3")
    two_stages.make("STEPS=3", "FORCE=--force")
    made = two_stages.worked()
    assert "random/1/1/policy" in made
    assert "cropi/1/2/grads.zarr" in made
    assert not [name for name in made if name.startswith("start/") or name.endswith("/1/1/selected.jsonl")]
    assert two_stages.nothing_left("STEPS=3")
    # the same as if it had been so from the start
    fresh = two_stages.folder / "fresh"
    fresh.mkdir()
    other = BookkeptCurriculum(fresh, STAGES=2)
    other.config.write_text(two_stages.config.read_text().replace(str(two_stages.run), str(other.run)))
    other.make("STEPS=3")
    assert results(other.run) == results(two_stages.run)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("MAX_TOKENS=9", "start/train.rollouts.jsonl"),
        ("VALID_SAMPLES=9", "start/valid-target.rollouts.jsonl"),
        ("GRAD_OPTIONS=--weighting none", "start/valid-target.mean.safetensors"),
        ("STORE_OPTIONS=--dim 128", "start/grads.zarr"),
        ("RATIO=0.5", "cropi/1/1/selected.jsonl"),
        ("TRAIN_OPTIONS=--kl 0.1", "cropi/1/1/policy"),
        ("VERIFIER=exact", "start/train.rollouts.jsonl"),
    ],
)
def test_every_value_reaches_the_steps_it_is_about(tmp_path: Path, change: str, first: str) -> None:
    curriculum = BookkeptCurriculum(tmp_path, ARMS="cropi")
    curriculum.make()
    curriculum.asked()
    curriculum.make("-k", change, code=2)
    assert curriculum.with_outcome("refused")[0] == first
    curriculum.make(change, "FORCE=--force")
    assert curriculum.nothing_left(change)


@pytest.mark.parametrize(
    ("values", "names"), [({}, []), ({"VERIFIER": ""}, []), ({"VERIFIER": "a/mine.py:f"}, ["a/mine.py:f"])]
)
def test_a_verifier_is_named_only_where_one_is_set(tmp_path: Path, values: dict[str, str], names: list[str]) -> None:
    """Without one, prompts' own verifiers decide."""
    shown = BookkeptCurriculum(tmp_path, STAGES=2, REFRESH="zero-advantage", **values).make("-n").stdout
    lines = re.findall(r"^cropi-(?:rollout|train) .*", shown, re.M)
    assert len(lines) == 3 + 4
    assert [re.findall(r"--verifier (\S+)", line) for line in lines] == [names] * len(lines)


def test_what_is_carried_from_stage_to_stage(tmp_path: Path) -> None:
    """The first stage begins with a policy that has no optimizer state; to change the value asks all stages again."""
    curriculum = BookkeptCurriculum(tmp_path, STAGES=2, ARMS="random", SEEDS="1")
    curriculum.make("CARRY=full")
    lines = [entry["words"] for entry in curriculum.asked() if "--steps" in entry["words"]]
    told = {(words[words.index("-o") + 1].split("/")[-2], "--carry" in words) for words in lines}
    assert told == {("1", False), ("2", True)}
    assert curriculum.nothing_left("CARRY=full")
    assert not curriculum.nothing_left()


def test_a_value_written_differently_is_asked_about_once(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    curriculum.make()
    curriculum.asked()
    (curriculum.folder / "pool.jsonl").touch()
    assert not curriculum.nothing_left()
    curriculum.make()
    assert {entry["outcome"] for entry in curriculum.asked()} == {"up to date"}
    assert curriculum.nothing_left()


def test_quotes_in_a_value_are_remembered(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, TRAIN_OPTIONS="--clip '0.2,0.28'")
    curriculum.make()
    assert "--clip '0.2,0.28'" in (curriculum.run / "settings/training").read_text()
    assert curriculum.nothing_left()


# -- shards


def test_shards_run_at_once_one_per_gpu(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, GPUS=2, STAGES=2, ARMS="cropi")
    curriculum.tell("hold", "--shard 1/2 -o .*train.rollouts")
    process = curriculum.start()
    # the second part is done while the first still works
    until((curriculum.run / "start/train.rollouts.2-of-2.jsonl.manifest.json").exists)
    assert process.poll() is None
    curriculum.untell("hold")
    assert process.wait(30) == 0, curriculum.said()
    sharded = [entry for entry in curriculum.asked() if "--shard" in entry["words"] and entry["outcome"] == "made"]
    assert len(sharded) == 2 * 3
    for entry in sharded:
        part = entry["words"][entry["words"].index("--shard") + 1]
        assert entry["cuda"] == {"1/2": "0", "2/2": "1"}[part]
        assert f".{part[0]}-of-2." in entry["output"]
    for cell in ("start", "cropi/1/2"):
        for part in (1, 2):
            assert (curriculum.run / cell / f"grads.{part}-of-2.zarr/manifest.json").exists()
    assert curriculum.nothing_left()


def test_the_gpus_given_are_the_gpus_used(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, GPUS=2)
    shown = curriculum.make("-n", CUDA_VISIBLE_DEVICES="5,7").stdout
    assert set(re.findall(r"CUDA_VISIBLE_DEVICES=(\S*) \S+ .*--shard (\S+)", shown)) == {("5", "1/2"), ("7", "2/2")}
    refusal = curriculum.make("-n", CUDA_VISIBLE_DEVICES="5", code=2)
    assert "names fewer devices than GPUS=2" in refusal.stderr


def test_a_shard_that_fails_fails_the_step_and_costs_no_other(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, GPUS=3, ARMS="cropi")
    curriculum.tell("fail", "cropi-grad .*--shard 1/3")
    failed = curriculum.make(code=2)
    assert "told to fail" in failed.stderr
    outcomes = {(entry["output"].rpartition("/")[2], entry["outcome"]) for entry in curriculum.asked()}
    assert ("grads.2-of-3.zarr", "made") in outcomes
    assert ("grads.3-of-3.zarr", "made") in outcomes
    assert not any(name == "scores.jsonl" for name, _ in outcomes)
    curriculum.untell("fail")
    curriculum.make()
    outcomes = {(entry["output"].rpartition("/")[2], entry["outcome"]) for entry in curriculum.asked()}
    assert ("grads.1-of-3.zarr", "made") in outcomes
    assert {("grads.2-of-3.zarr", "up to date"), ("grads.3-of-3.zarr", "up to date")} <= outcomes
    assert curriculum.nothing_left()


@pytest.mark.parametrize("failing", ["1/2", "2/2"])
def test_a_step_is_as_old_as_its_oldest_part(tmp_path: Path, failing: str) -> None:
    curriculum = BookkeptCurriculum(tmp_path, GPUS=2, ARMS="cropi")
    curriculum.make()
    change = ("STORE_OPTIONS=--dim 128", "FORCE=--force")
    shown = curriculum.make("-n", *change).stdout
    for command in ("cropi-grad .*--dim 128", "cropi-score", "cropi-select", "cropi-train"):
        assert re.search(command, shown), command
    assert "cropi-rollout" not in shown
    # one part is replaced, the other stays what it was: neither a rerun nor what follows may take them together
    curriculum.tell("fail", f"cropi-grad .*--shard {failing}")
    curriculum.make(*change, code=2)
    curriculum.untell("fail")
    curriculum.asked()
    assert not curriculum.nothing_left(*change)
    curriculum.make(*change)
    made = curriculum.worked()
    assert f"start/grads.{failing[0]}-of-2.zarr" in made
    assert {"start/scores.jsonl", "cropi/1/1/policy"} <= set(made)
    assert curriculum.nothing_left(*change)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stop_in_the_middle_of_shards_and_a_rerun(tmp_path: Path, number: signal.Signals) -> None:
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    whole = BookkeptCurriculum(unbroken, GPUS=2, ARMS="cropi")
    whole.make()
    broken = tmp_path / "broken"
    broken.mkdir()
    curriculum = BookkeptCurriculum(broken, GPUS=2, ARMS="cropi")
    curriculum.tell("hold", "cropi-grad .*--shard 1/2")
    process = curriculum.start()
    until((curriculum.run / "start/grads.2-of-2.zarr/manifest.json").exists)
    until((curriculum.run / "start/grads.1-of-2.zarr.part").exists)
    time.sleep(0.1)
    if number == signal.SIGTERM:
        process.terminate()
    else:
        os.killpg(process.pid, number)
    assert process.wait(20) != 0
    assert "Deleting" not in curriculum.said()
    if number != signal.SIGKILL:
        # make ended after its shards did
        assert curriculum.asked()[-1]["outcome"] == "stopped by SIGTERM"
    curriculum.asked()
    curriculum.untell("hold")
    curriculum.make()
    outcomes = [entry["outcome"] for entry in curriculum.asked()]
    assert outcomes.count("resumed") == 1
    assert outcomes.count("up to date") == 1
    assert results(curriculum.run) == results(whole.run)
    assert curriculum.nothing_left()


def test_a_stop_reaches_a_command_of_one_process(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    curriculum.tell("hold", "cropi-train")
    process = curriculum.start()
    until(lambda: any(curriculum.run.rglob("policy.part")))
    time.sleep(0.1)
    process.terminate()
    assert process.wait(20) != 0
    assert curriculum.asked()[-1]["outcome"] == "stopped by SIGTERM"
    curriculum.untell("hold")
    curriculum.make()
    assert "resumed" in [entry["outcome"] for entry in curriculum.asked()]
    assert curriculum.nothing_left()


# -- what is said when something is missing


def test_a_config_without_a_needed_value_is_refused_in_one_line(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    curriculum.config.write_text(re.sub(r"^RUN .*\n", "", curriculum.config.read_text(), flags=re.M))
    refusal = subprocess.run(curriculum.words("curriculum"), env=curriculum.variables, capture_output=True, text=True)
    assert refusal.returncode == 2
    assert "config.mk does not set RUN" in refusal.stderr


def test_no_config_says_what_to_give() -> None:
    refusal = subprocess.run(["make", "-C", str(ROOT), "curriculum", "CONFIG="], capture_output=True, text=True)
    assert refusal.returncode == 2
    assert "CONFIG=FILE" in refusal.stderr


def test_refresh_samples_some_prompts_of_the_stage_before_anew(tmp_path: Path) -> None:
    """Each later stage of cropi from the rollouts and the store of the stage before it, with the policy that its gradients are of."""
    curriculum = BookkeptCurriculum(tmp_path, STAGES=3, REFRESH="zero-advantage low-ess=0.2")
    curriculum.make()
    words = {entry["output"]: entry["words"] for entry in curriculum.asked()}
    run = curriculum.run

    def after(line: list[str], option: str) -> list[str]:
        return [line[place + 1] for place, word in enumerate(line) if word == option]

    for stage, before in ((2, run / "start"), (3, run / "cropi/1/2")):
        cell = run / f"cropi/1/{stage}"
        line = words[str(cell / "train.rollouts.jsonl")]
        assert after(line, "--refresh") == [str(before / "train.rollouts.jsonl")]
        assert after(line, "--index") == [str(before / "grads.zarr")]
        assert after(line, "--where") == ["zero-advantage", "low-ess=0.2"]
        policy = [str(run / f"cropi/1/{stage - 1}/policy")]
        assert after(line, "--model") == policy == after(words[str(cell / "grads.zarr")], "--model")
        assert str(cell / "train.rollouts.jsonl") in words[str(cell / "grads.zarr")]
    assert str(run / "start/train.rollouts.jsonl") in words[str(run / "start/grads.zarr")]
    assert sum(line[0] == "cropi-rollout" for line in words.values()) == 4
    assert curriculum.nothing_left()
    # the old rollouts have changed: what was made of them is made anew, and only that
    curriculum.make("REFRESH=zero-advantage", "FORCE=--force")
    again = [entry for entry in curriculum.asked() if entry["outcome"] == "made"]
    assert {Path(entry["output"]).name for entry in again} >= {"train.rollouts.jsonl", "grads.zarr", "policy"}
    assert all("cropi/1/2" in entry["output"] or "cropi/1/3" in entry["output"] for entry in again)
    assert not any("--index" in entry["words"] for entry in again)


def test_refresh_in_shards(tmp_path: Path) -> None:
    """Every shard reads all of the stage before and writes its own part."""
    curriculum = BookkeptCurriculum(tmp_path, STAGES=2, GPUS=2, REFRESH="zero-advantage", ARMS="cropi")
    curriculum.make()
    made = [entry["words"] for entry in curriculum.asked() if entry["outcome"] == "made"]
    lines = [line for line in made if "--refresh" in line]
    assert [line[line.index("--shard") + 1] for line in sorted(lines, key=str)] == ["1/2", "2/2"]
    for line in lines:
        for part in ("1-of-2", "2-of-2"):
            assert str(curriculum.run / f"start/train.rollouts.{part}.jsonl") in line
    assert curriculum.nothing_left()


def test_taking_refresh_out_is_noticed(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, STAGES=2, ARMS="cropi", REFRESH="zero-advantage")
    curriculum.make()
    curriculum.asked()
    assert not curriculum.nothing_left("REFRESH=")
    curriculum.make("REFRESH=", "FORCE=--force")
    made = [entry["words"] for entry in curriculum.asked() if entry["outcome"] == "made"]
    (stage_two,) = [words for words in made if words[0] == "cropi-grad" and "cropi/1/2/grads.zarr" in " ".join(words)]
    assert str(curriculum.run / "start/train.rollouts.jsonl") in stage_two


def test_refresh_and_a_recomputed_behavior_policy_exclude_each_other(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, STAGES=2, REFRESH="zero-advantage", GRAD_OPTIONS="--behavior P0")
    assert "leave one of them out" in curriculum.make("-n", code=2).stderr


PROBING = {"PROBE": "0.1", "SHORTLIST": "1.5", "RATIO": "0.2", "STAGES": 2, "ARMS": "cropi complete"}


def test_a_stage_probes_predicts_confirms_and_selects(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, **PROBING)
    curriculum.make("-j2")
    asked = {
        str(Path(entry["output"]).relative_to(curriculum.run)): entry["words"]
        for entry in curriculum.asked()
        if entry["outcome"] == "made"
    }
    assert curriculum.nothing_left()
    run = str(curriculum.run)
    start, first = str(curriculum.folder / "P0"), f"{run}/cropi/1/1/policy"
    features = f"{run}/start/features.safetensors"
    assert asked["start/features.safetensors"][:3] == ["cropi-embed", "--model", start]
    for stage, policy in (("1", start), ("2", first)):
        cell = f"cropi/1/{stage}"
        here = f"{run}/{cell}"
        probe = asked[f"{cell}/probe.jsonl"]
        assert " ".join(probe).startswith(
            f"cropi-select --prompts {curriculum.folder}/pool.jsonl --by random --per-source --ratio 0.1"
        )
        for part in ("probe", "shortlist"):
            assert asked[f"{cell}/{part}.rollouts.jsonl"][:4] == [
                "cropi-rollout",
                "--model",
                policy,
                f"{here}/{part}.jsonl",
            ]
            gradients = asked[f"{cell}/{part}.grads.zarr"]
            assert gradients[:4] == ["cropi-grad", "--model", policy, f"{here}/{part}.rollouts.jsonl"]
            means = f"{run}/start" if stage == "1" else here
            assert f"target={means}/valid-target.mean.safetensors" in gradients
        old = [] if stage == "1" else ["--old", f"{run}/cropi/1/1/scores.jsonl"]
        predicting = [
            "cropi-score",
            "--predict",
            f"{curriculum.folder}/pool.jsonl",
            "--features",
            features,
            "--if-weak",
            "warn",
        ]
        stores = [f"{here}/{part}.grads.zarr" for part in ("probe", "shortlist")]
        assert asked[f"{cell}/predicted.jsonl"] == [*predicting, stores[0], *old, "-o", f"{here}/predicted.jsonl"]
        assert asked[f"{cell}/scores.jsonl"] == [*predicting, *stores, *old, "-o", f"{here}/scores.jsonl"]
        shortlist = " ".join(asked[f"{cell}/shortlist.jsonl"])
        assert f"--among predicted --ratio 0.3 {here}/predicted.jsonl" in shortlist
        selected = asked[f"{cell}/selected.jsonl"]
        assert f"{here}/scores.jsonl" in selected
        assert "--among" not in selected
    # the whole pool is sampled for the other arm alone
    assert f"{run}/complete/1/2/scores.jsonl" in asked["complete/1/2/selected.jsonl"]
    assert f"{run}/start/scores.jsonl" in asked["complete/1/1/selected.jsonl"]


def test_probing_alone_samples_no_whole_pool_and_can_do_without_a_shortlist(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, **{**PROBING, "SHORTLIST": "0", "ARMS": "cropi"})
    curriculum.make()
    asked = [entry for entry in curriculum.asked() if entry["outcome"] == "made"]
    made = {str(Path(entry["output"]).relative_to(curriculum.run)) for entry in asked}
    assert not {
        name for name in made if "shortlist" in name or name.startswith(("start/train", "start/grads", "start/scores"))
    }
    selecting = [entry["words"] for entry in asked if entry["output"].endswith("selected.jsonl")]
    assert all(" ".join(words).find("--among all") > 0 for words in selecting)
    assert curriculum.nothing_left()


@pytest.mark.parametrize(
    ("change", "touched", "left"),
    [
        ("PROBE=0.2", "probe.jsonl", "start/features"),
        ("SHORTLIST=1", "shortlist.jsonl", "probe.jsonl"),
        ("SAMPLES=4", "probe.rollouts.jsonl", "start/features"),
        ("STORE_OPTIONS=--dim 64", "probe.grads.zarr", "cropi/1/1/probe.rollouts.jsonl"),
    ],
)
def test_a_changed_value_of_probing_is_asked_again(tmp_path: Path, change: str, touched: str, left: str) -> None:
    curriculum = BookkeptCurriculum(tmp_path, **{**PROBING, "ARMS": "cropi"})
    curriculum.make()
    curriculum.asked()
    curriculum.make(change, code=2)
    assert any(name.endswith(touched) for name in curriculum.with_outcome("refused"))
    curriculum.make(change, "FORCE=--force")
    made = curriculum.worked()
    assert any(name.endswith(touched) for name in made)
    assert not any(name.endswith(left) or name.startswith(left) for name in made)


def test_probing_in_shards(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, **{**PROBING, "GPUS": 2, "ARMS": "cropi"})
    curriculum.make("-j2")
    made = curriculum.worked()
    assert {"cropi/1/2/shortlist.rollouts.1-of-2.jsonl", "cropi/1/2/probe.grads.2-of-2.zarr"} <= set(made)
    assert curriculum.nothing_left()


def test_probing_and_refreshing_exclude_each_other(tmp_path: Path) -> None:
    done = BookkeptCurriculum(tmp_path, **PROBING, REFRESH="zero-advantage").make(code=2)
    assert done.stderr.count("\n") == 1
    assert "leave one of them out" in done.stderr


def test_targets_can_be_sampled_again_by_every_policy(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, FRESH_VALID="1", STAGES=2, ARMS="cropi random")
    curriculum.make()
    asked = {str(Path(entry["output"]).relative_to(curriculum.run)): entry["words"] for entry in curriculum.asked()}
    policy = f"{curriculum.run}/cropi/1/1/policy"
    assert asked["cropi/1/2/valid-target.rollouts.jsonl"][:3] == ["cropi-rollout", "--model", policy]
    assert f"{curriculum.run}/cropi/1/2/valid-target.rollouts.jsonl" in asked["cropi/1/2/valid-target.mean.safetensors"]
    assert f"{curriculum.run}/start/valid-target.rollouts.jsonl" in asked["start/valid-target.mean.safetensors"]
    assert curriculum.nothing_left()


def test_an_audit_is_of_the_start_alone_and_asks_nothing_of_a_run_without(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path, STAGES=2, GPUS=2)
    plain = curriculum.make("-n").stdout
    assert "halves" not in plain
    assert "--suspects" not in plain
    curriculum.make("AUDIT=1")
    asked = curriculum.asked()
    halved = {
        Path(entry["output"]).relative_to(curriculum.run).as_posix() for entry in asked if "--halves" in entry["words"]
    }
    assert halved == {"start/valid-target.mean.safetensors", "start/grads.1-of-2.zarr", "start/grads.2-of-2.zarr"}
    (listed,) = [entry["words"] for entry in asked if "--suspects" in entry["words"] and entry["outcome"] == "made"]
    start = curriculum.run / "start"
    assert listed == [
        *("cropi-score", f"{start}/grads.1-of-2.zarr", f"{start}/grads.2-of-2.zarr"),
        *("--suspects", f"{start}/train.rollouts.1-of-2.jsonl", "--suspects", f"{start}/train.rollouts.2-of-2.jsonl"),
        *("-o", f"{start}/suspects.jsonl"),
    ]
    assert curriculum.nothing_left("AUDIT=1")
    # without it the start's gradients were made otherwise, and say so
    assert not curriculum.nothing_left()
    curriculum.make(code=2)
    assert curriculum.with_outcome("refused")


def test_an_audit_of_a_run_that_is_there_is_refused(tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    curriculum.make()
    assert not (curriculum.run / "settings/audit").exists()
    curriculum.asked()
    curriculum.make("AUDIT=1", code=2)
    assert curriculum.with_outcome("refused") == ["start/valid-target.mean.safetensors"]
    assert "AUDIT=2: expected 1" in curriculum.make("AUDIT=2", code=2).stderr
    assert "set VALID" in curriculum.make("AUDIT=1", "VALID=", "ARMS=random", code=2).stderr
