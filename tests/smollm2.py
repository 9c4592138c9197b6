"""SmolLM2-135M-Instruct for the tests, made once by examples/smollm2-135m/model.py and kept where `make real` keeps it too."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "examples" / "smollm2-135m" / "model.py"
FOLDER = ROOT / "runs" / "smollm2-135m" / "P0"
END = 2  # <|im_end|>
TEMPERATURE = 0.7  # at 1 this model is incoherent

SYSTEM = "Solve the task in one short line and end with: The answer is X."
EXAMPLE = ("What is 12 + 7?", "12 + 7 = 19. The answer is 19.")
QUESTIONS = {
    "What is 8 - 2?": "6",
    "What is 3 * 14?": "42",
    "What is the least common multiple of 6,10?": "30",
    'How many times does the letter "e" appear in the text: "selected tree"?': "5",
}


def folder() -> Path:
    """The policy folder. RuntimeError: it cannot be made, with what its program said."""
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with (FOLDER.parent / "P0.lock").open("w") as lock:  # pytest's workers want it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([sys.executable, PROGRAM, "-o", FOLDER], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no SmolLM2-135M-Instruct to test with: {PROGRAM.name} says: {done.stderr[-2000:].strip()}")
    return FOLDER


def prompts(questions: Sequence[str] = tuple(QUESTIONS)) -> list[dict[str, Any]]:
    """Records of some questions, each as a conversation with one worked example: about 75 tokens."""
    return [
        {
            "id": f"q{number}",
            "source": "sums" if "*" in question or "-" in question else "others",
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": EXAMPLE[0]},
                {"role": "assistant", "content": EXAMPLE[1]},
                {"role": "user", "content": question},
            ],
            "answer": QUESTIONS[question],
        }
        for number, question in enumerate(questions)
    ]


def rendered(question: str) -> str:
    """The text of a prompt as the model's chat template has it, written out by hand."""
    turns = [("system", SYSTEM), ("user", EXAMPLE[0]), ("assistant", EXAMPLE[1]), ("user", question)]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
