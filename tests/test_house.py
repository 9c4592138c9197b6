"""The plan of the house, held to what the sources do: which room may import which, how long a file is, where the map has it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cropi_tools"

LONGEST = 410  # lines

BELOW: dict[str, set[str]] = {
    # what every running command shares, and what lies on disk
    "runtime": set(),
    "data": {"runtime"},
    "options": {"data", "runtime"},
    "intervals": set(),
    "objective": set(),
    # shared by several commands
    "policy": {"data", "runtime"},
    "rewards": {"data", "runtime"},
    "engines": {"policy", "data", "runtime"},
    # a room a command
    "prompts": {"rewards", "data", "options", "runtime"},
    "rollouts": {"engines", "rewards", "policy", "data", "intervals", "options", "runtime"},
    "features": {"policy", "data", "options", "runtime"},
    "sketches": {"data", "options", "runtime"},
    "gradients": {"sketches", "objective", "policy", "data", "options", "runtime"},
    "selection": {"data", "options", "runtime"},
    "scores": {"selection", "sketches", "rewards", "data", "options", "runtime"},
    # an update tells its prompts' gradients apart by the rules of `gradients`, with --against
    "training": {
        *{"rollouts", "gradients", "sketches", "engines", "rewards", "objective", "policy"},
        *{"data", "options", "runtime"},
    },
    "verl_backend": {"training", "prompts", "rollouts", "rewards", "policy", "data", "options", "runtime"},
    "report": {"data", "intervals", "options", "runtime"},
}
"""Which rooms a room may import. `cli` may import all of them, and nothing imports it."""


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cropi_tools":
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module + "." + alias.name for alias in node.names]
            # `from cropi_tools import runtime` imports a room; `from cropi_tools.data import store` a file of one
            found |= {name if is_module(name) else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "cropi_tools"}
    return found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_in_the_table() -> None:
    rooms = {room(module_of(path)) for path in FILES} - {"", "cli"}
    assert rooms == set(BELOW)


def test_imports_run_one_way() -> None:
    wrong = []
    for path in FILES:
        here = room(module_of(path))
        there = {room(name) for name in imported(path)} - {"", here}
        allowed = set(BELOW) if here == "cli" else BELOW.get(here, set())
        wrong += [f"{module_of(path)} imports {name}" for name in sorted(there - allowed) if here]
    assert wrong == []


def test_the_table_has_no_circle() -> None:
    left = {name: set(below) for name, below in BELOW.items()}
    while left:
        free = {name for name, below in left.items() if not below}
        assert free, f"a circle among {', '.join(sorted(left))}"
        left = {name: below - free for name, below in left.items() if name not in free}


def test_no_circle_between_files() -> None:
    arrows = {module_of(path): imported(path) - {module_of(path)} for path in FILES}
    known = set(arrows)
    left = {name: (found & known) - {"cropi_tools"} for name, found in arrows.items()}
    while left:
        free = {name for name, found in left.items() if not found}
        assert free, f"a circle among {', '.join(sorted(left))}"
        left = {name: found - free for name, found in left.items() if name not in free}


def test_no_file_is_long() -> None:
    lengths = {module_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_the_map_has_every_file_once() -> None:
    """In docs/architecture.md, in the section that lists the files, each room under a heading of its own."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    plan = text.partition("\n## The map\n")[2].partition("\n## ")[0]
    listed = Counter[str]()
    for heading, block in re.findall(r"^### `(\S+?)/?`[^\n]*\n(.*?)(?=^### |\Z)", plan, re.M | re.S):
        names = re.findall(r"^\| `(\w+\.py)` \|", block, re.M)
        assert names, heading
        listed.update(name if heading == "cropi_tools" else f"{heading}/{name}" for name in names)
    # an `__init__.py` is a room's docstring, but for that of `runtime`
    there = {
        str(path.relative_to(PACKAGE)) for path in FILES if path.name != "__init__.py" or path.parent.name == "runtime"
    }
    assert sorted(set(listed) ^ there) == []
    assert [name for name, count in listed.items() if count > 1] == []
