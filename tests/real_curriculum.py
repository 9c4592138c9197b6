"""A curriculum of the real commands on a random policy: so little work that each takes little more than its start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from curriculum_runs import ROOT, Curriculum, write_config
from tiny_policy import prompts


def real_curriculum(folder: Path, policy: Path, **values: object) -> Curriculum:
    """24 prompts of which a quarter is selected, and a verifier whose rewards differ within most groups."""
    for name, count, start in (("pool", 24, 0), ("valid", 4, 100), ("test", 4, 200)):
        lines = [json.dumps(record) + "\n" for record in prompts(count, start)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    settings: dict[str, object] = {
        "MODEL": policy,
        "ARMS": "cropi",
        "RATIO": 0.25,
        "SAMPLES": 4,
        "VALID_SAMPLES": 4,
        "MAX_TOKENS": 6,
        "VERIFIER": f"{ROOT / 'tests' / 'parity.py'}:reward",
        "STORE_OPTIONS": "--dim 256",
        "TRAIN_OPTIONS": "--batch 4 --learning-rate 1e-3 --save-every 1",
        **values,
    }
    return Curriculum(write_config(folder, **settings), Path(sys.executable).parent.parent)


def manifest(output: Path) -> dict[str, Any]:
    path = output / "manifest.json" if output.is_dir() else output.with_name(output.name + ".manifest.json")
    return json.loads(path.read_text())


def scores(path: Path) -> dict[str, float | None]:
    """The score of each prompt towards the target; None without a gradient."""
    records = map(json.loads, path.read_text().splitlines())
    return {record["id"]: (record["scores"] or {}).get("target") for record in records}


def policy_bytes(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("policy/model.safetensors"))}
