"""How threads should wait for each other on a CPU: training passes a second of a command alone, and of two at once.

Between two products torch's threads wait for each other. Threads that spin answer at once and take the processor from whoever else wants it;
threads that sleep must be woken, which takes long on virtual machines. Each row is a setting of GNU OpenMP's environment, in processes of their
own, with as many threads as the machine has; two at once have as many each, so they have to share.

* library: nothing is set. * sleep: OMP_WAIT_POLICY=PASSIVE. * spin N: GOMP_SPINCOUNT=N, sleeping after N turns.
* one thread: the same with a thread a process, for which no setting matters.

The goal: the worst case of the commands' own setting (`cropi_tools/cli/common.py`) is no worse than the library's and that of sleeping. A case
is a policy, alone or two at once; a setting's value there is its passes a second divided by the most that any of the three makes.

    python benchmarks/waiting.py             # three to seven minutes
    python benchmarks/waiting.py --small     # shows that it runs, and no more
    python benchmarks/waiting.py --json      # one object a goal
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from goals import Goal, print_json, print_lines, processor

SPINS = (100, 1000, 10000)
OURS = "spin 1000"
LAYERS = {"tiny": (128, 3, 384), "6.6M": (384, 4, 1024)}
GOAL = 1.0
SETTINGS: dict[str, dict[str, str]] = {
    "library": {},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in SPINS},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
WORK = """
import sys, time, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
width, layers, inner, seconds = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
torch.manual_seed(0)
policy = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128))
tokens = torch.randint(96, (16, 48))
def one():
    policy(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    policy.zero_grad()
one(), one()
print("ready", flush=True)
sys.stdin.readline()
begun, count = time.monotonic(), 0
while (spent := time.monotonic() - begun) < seconds:
    one()
    count += 1
print(count / spent)
"""


def passes(setting: str, shape: str, at_once: int, seconds: float) -> float:
    """Passes a second of so many processes together."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", WORK, *map(str, LAYERS[shape]), str(seconds)]
    started = [
        subprocess.Popen(
            command, env={**known, **SETTINGS[setting]}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(at_once)
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    rounds, seconds = (1, 0.3) if options.small else (2, 3.0)
    lines = [f"{processor()}: passes a second"]
    # the worst over the cases of what each comes to, divided by the best of the three there
    worst = dict.fromkeys(("library", "sleep", OURS), 1.0)
    for shape in list(LAYERS)[: 1 if options.small else None]:
        for at_once in (1, 2):
            found = dict.fromkeys(SETTINGS, 0.0)
            for _ in range(rounds):
                for setting in SETTINGS:
                    found[setting] = max(found[setting], passes(setting, shape, at_once, seconds))
            words = f"{shape}, {'alone' if at_once == 1 else 'two at once'}"
            lines.append(f"{words}: " + ", ".join(f"{setting} {value:.1f}" for setting, value in found.items()))
            best = max(found[name] for name in worst)
            worst = {name: min(value, found[name] / best) for name, value in worst.items()}
    lines.append("worst case: " + ", ".join(f"{name} {value:.2f}" for name, value in worst.items()))
    peer = max(("library", "sleep"), key=worst.__getitem__)
    goals = [Goal("waiting, worst case", worst[OURS] / worst[peer], GOAL, peer)]
    if options.json:
        print_json(goals, processor())
    else:
        print("\n".join(lines))
        print_lines(goals)


if __name__ == "__main__":
    main()
