"""What --engine vllm says where vLLM is not installed, before anything slow is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "vllm" else find(name, *rest)
"""


def test_training_names_the_remedy_at_once(policy_folder: Path, tmp_path: Path) -> None:
    words = ["cropi-train", "--model", str(policy_folder), "x.jsonl", "--steps", "1", "--engine", "vllm", "-o", "P1"]
    script = (
        WITHOUT
        + f"import atexit; sys.argv = {words!r}\n"
        + "atexit.register(lambda: print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules]))\n"
        + "from cropi_tools.cli.train import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == "[]\n"
    (line,) = done.stderr.splitlines()
    assert "pip install 'cropi-tools[vllm]'" in line
    assert list(tmp_path.iterdir()) == []
