"""Write the `--help` of every command into its page in docs/commands/, between the two markers; `make docs` runs it.

python docs/update_help.py            rewrite the pages
python docs/update_help.py --check    exit 1 if a page differs
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGES = Path(__file__).parent / "commands"
START, END = "<!-- help -->\n```text\n", "```\n<!-- end of help -->\n"


def help_text(command: str) -> str:
    """What the command prints, at a fixed width and without colors."""
    environment = {**os.environ, "TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1"}
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        environment.pop(name, None)
    program = Path(sys.executable).parent / command
    said = subprocess.run([str(program), "--help"], env=environment, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in said.stdout.strip("\n").splitlines()) + "\n"


def updated(page: Path) -> str:
    """The page with the present help in it."""
    before, rest = page.read_text().split(START)
    after = rest.split(END)[1]
    return before + START + help_text(page.stem) + END + after


def main() -> int:
    stale = []
    for page in sorted(PAGES.glob("cropi-*.md")):
        text = updated(page)
        if text != page.read_text():
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(text)
    print(f"help pages {'differ' if '--check' in sys.argv else 'rewritten'}: {', '.join(stale) or 'none'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
