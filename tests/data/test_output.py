"""What the contract suite cannot see from outside: the rights of finished files."""

from __future__ import annotations

import os
from pathlib import Path

from cropi_tools.data.manifest import Fingerprint
from cropi_tools.data.output import Output


def test_outputs_have_the_rights_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for folder in (False, True):
            output = Output(tmp_path / f"result-{folder}", Fingerprint("cropi-test", {}, {}), {}, folder=folder)
            assert output.open()
            made = output.part / "weights" if folder else output.part
            made.write_bytes(b"1")
            made.chmod(0o600)
            output.finish(rows=1)
            final = output.path / "weights" if folder else output.path
            assert final.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)
