"""What may stand where an output goes: foreign files are refused, with --force too, and never touched."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cropi_tools.data import output as output_module
from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.data.manifest import Fingerprint, Input, file_input
from cropi_tools.data.output import Output
from cropi_tools.data.policies import policy_input
from cropi_tools.runtime.errors import InputError, UsageError


def output(path: Path, folder: bool = False, inputs: dict[str, Input] | None = None, **options: Any) -> Output:
    force = options.pop("force", False)
    return Output(path, Fingerprint("cropi-test", options, {}), inputs or {}, folder=folder, force=force)


def made(path: Path, folder: bool = False, **options: Any) -> Output:
    """A finished output."""
    one = output(path, folder, **options)
    assert one.open()
    (one.part / "weights.bin" if folder else one.part).write_text("mine")
    one.finish(rows=1)
    return one


def contents(root: Path) -> dict[str, bytes | str]:
    """All files below a folder, links by their target."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def place(text: str = "", target: str | None = None, folder: bool = False) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        if target is not None:
            path.symlink_to(target)
        elif folder:
            path.mkdir()
            (path / "theirs.txt").write_text(text)
        else:
            path.write_text(text)

    return act


# name of what is there before, how it came there, whether the output is a folder, what the refusal says
FOREIGN: list[tuple[str, Callable[[Path], None], bool, str]] = [
    ("x", place("theirs", folder=True), True, "no command here wrote"),
    ("x", place("theirs", folder=True), False, "is a folder"),
    ("x", place("theirs"), True, "is a file"),
    ("x", place(target="nowhere"), True, "is a link"),
    ("x", place(target="."), True, "is a link"),
    ("x", os.mkfifo, False, "is a pipe"),
    ("x.part", place("theirs"), False, "is not unfinished work"),
    ("x.part", place("theirs"), True, "is not unfinished work"),
    ("x.part", place("theirs", folder=True), False, "is not unfinished work"),
    ("x.part", place("theirs", folder=True), True, "is not unfinished work"),
    ("x.part", place(target="other"), False, "is a link"),
    ("x.part.lock", place("theirs"), False, "not a lock file"),
    ("x.part.lock", place(target="other"), True, "not a lock file"),
    ("x.part.lock", place("theirs", folder=True), False, "not a lock file"),
    ("x.part.lock", os.mkfifo, False, "not a lock file"),
    ("x.part.json", place("theirs"), False, "broken"),
    ("x.manifest.json", place('{"name": "a web app"}'), False, "no manifest of these tools"),
    ("x.manifest.json", place("[1]"), False, "no manifest of these tools"),
    ("x.manifest.json", place("theirs"), False, "no manifest of these tools"),
    ("x.manifest.json", place(target="other"), False, "the manifest goes there"),
]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("name", "put", "folder", "said"), FOREIGN, ids=lambda value: getattr(value, "__name__", value)
)
def test_foreign_things_are_refused_and_left(
    tmp_path: Path, name: str, put: Callable[[Path], None], folder: bool, said: str, force: bool
) -> None:
    (tmp_path / "other").write_text("theirs too")
    put(tmp_path / name)
    before = contents(tmp_path)
    if not force and folder and said == "no command here wrote":
        said = "was not written by this command"
    with pytest.raises(InputError, match=said) as refused:
        output(tmp_path / "x", folder, force=force).open()
    assert "\n" not in str(refused.value)
    assert contents(tmp_path) == before
    assert (tmp_path / name).is_symlink() or (tmp_path / name).exists()


def test_a_device_is_refused_without_advice_to_force_it() -> None:
    for force in (False, True):
        with pytest.raises(InputError, match="is a device; choose another output name") as refused:
            output(Path("/dev/null"), force=force).open()
        assert "--force" not in str(refused.value)


@pytest.mark.parametrize("name", [".", "..", "/", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="is no name"):
        output(Path(name))


def test_an_empty_folder_and_a_named_file_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("theirs")
    made(tmp_path / "empty", folder=True, force=True)
    made(tmp_path / "file", force=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_replaced_only_while_nothing_else_lies_in_it(tmp_path: Path) -> None:
    made(tmp_path / "P1", folder=True)
    (tmp_path / "P1" / "notes.txt").write_text("theirs")
    with pytest.raises(InputError, match=r"holds notes\.txt, which its command did not write"):
        output(tmp_path / "P1", folder=True, force=True).open()
    (tmp_path / "P1" / "notes.txt").unlink()
    made(tmp_path / "P1", folder=True, force=True)


def test_folders_made_before_entries_were_kept_can_be_replaced(tmp_path: Path) -> None:
    one = made(tmp_path / "P1", folder=True)
    manifest = one.path / "manifest.json"
    kept = json.loads(manifest.read_text())
    del kept["entries"]
    manifest.write_text(json.dumps(kept))
    made(tmp_path / "P1", folder=True, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("through_link", [False, True])
def test_an_output_never_holds_an_input(tmp_path: Path, force: bool, through_link: bool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "raw.jsonl").write_text("{}\n")
    given = tmp_path / "data" / "raw.jsonl"
    if through_link:
        (tmp_path / "link").symlink_to("data")
        given = tmp_path / "link" / "raw.jsonl"
    before = contents(tmp_path)
    with pytest.raises(InputError, match="an input of this command"):
        output(tmp_path / "data", True, {"raw": file_input(given)}, force=force).open()
    assert contents(tmp_path) == before


def test_an_output_inside_a_policy_does_not_change_it(tmp_path: Path, policy_folder: Path) -> None:
    """JSON beside the weights would count as the policy's; a file of tensors might be loaded as its weights, and is refused."""
    folder = tmp_path / "P0"
    shutil.copytree(policy_folder, folder)
    inputs = {"policy": policy_input(folder)}
    for name in ("r.jsonl", "r.txt", "r.json"):
        one = output(folder / name, inputs=inputs)
        assert one.open()
        one.part.write_text("{}")
        assert policy_input(folder) == inputs["policy"]
        one.finish(rows=1)
        assert policy_input(folder) == inputs["policy"]
    (folder / "vocab.json").write_text("{}")
    assert policy_input(folder) != inputs["policy"]
    with pytest.raises(InputError, match="would lie among the weights"):
        output(folder / "mean.safetensors", inputs=inputs).open()
    made(tmp_path / "mean.safetensors", inputs=inputs)


def test_names_near_the_limit_of_the_file_system(tmp_path: Path) -> None:
    limit = os.pathconf(tmp_path, "PC_NAME_MAX") - len(".manifest.json.tmp")
    for name in ("a" * limit, "é" * (limit // 2)):
        made(tmp_path / name)
        made(tmp_path / ("b" + name[1:]), folder=True)
    for name in ("a" * (limit + 1), "é" * (limit // 2 + 1), "a" * 255, "a" * 300):
        with pytest.raises(InputError):
            output(tmp_path / name).open()
    assert len(list(tmp_path.iterdir())) == 2 * 2 + 2  # folders hold their manifests


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_interrupted_anywhere_in_the_end_the_next_try_completes_it(
    tmp_path: Path, folder: bool, stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every rename and removal of `finish`, for outputs that never commit (select, report) and with an older result in the way."""
    for old in (False, True):
        for point in range(12):
            target = tmp_path / f"{old}-{point}"
            if old:
                made(target, folder, version=1)
            one = output(target, folder, version=2, force=old)
            assert one.open()
            (one.part / "weights.bin" if folder else one.part).write_text("new")
            with monkeypatch.context() as patch:
                left = [point]

                def counted(own: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
                    def act(*arguments: Any, **options: Any) -> Any:
                        left[0] -= 1
                        if left[0] == -1:
                            raise stop
                        return own(*arguments, **options)

                    return act

                for name in ("replace", "rename", "unlink"):
                    patch.setattr(os, name, counted(getattr(os, name)))
                patch.setattr("cropi_tools.data.output.write_json", counted(output_module.write_json))
                try:
                    one.finish(rows=1)
                    ended = True
                except stop:
                    ended = False
            one._leave()
            again = output(target, folder, version=2, force=old)
            if again.open():
                (again.part / "weights.bin" if folder else again.part).write_text("new")
                again.finish(rows=1)
            assert (target / "weights.bin" if folder else target).read_text() == "new"
            assert not output(target, folder, version=2).open()
            assert not list(tmp_path.glob("*.part*"))
            if ended:
                break
        else:
            pytest.fail("more changes than points")


def test_torn_temporary_files_are_no_part_of_a_folder(tmp_path: Path) -> None:
    one = output(tmp_path / "P1", folder=True)
    assert one.open()
    (one.part / "weights.bin").write_text("mine")
    for name in ("manifest.json.tmp", "pending.jsonl.tmp", "progress.json.tmp"):
        (one.part / name).write_text("torn")
    (one.part / "checkpoint-000001.tmp").mkdir()
    (one.part / "checkpoint-000001.tmp" / "weights.bin").write_text("torn")
    one.finish(rows=1)
    assert sorted(path.name for path in one.path.iterdir()) == ["manifest.json", "weights.bin"]
    assert not output(tmp_path / "P1", folder=True).open()


def test_dropping_unfinished_work_can_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill in the middle of it, what is left does not count as committed."""
    one = output(tmp_path / "P1", folder=True, version=1)
    assert one.open()
    for name in ("a", "b", "c"):
        (one.part / name).write_text("1")
    one.commit({"rows": 3})
    one._release_lock()

    def killed(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        other = output(tmp_path / "P1", folder=True, version=2, force=True)
        with pytest.raises(KeyboardInterrupt):
            other.open()
    other._lock.close()  # type: ignore[union-attr]
    again = output(tmp_path / "P1", folder=True, version=1)
    assert again.open()
    assert again.state == {}
    assert [path.name for path in again.part.iterdir()] == ["progress.json"]


@pytest.mark.parametrize("left", [[], ["progress.json.tmp"]])
def test_a_kill_before_the_first_word(tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "P1.part").mkdir()
    for name in left:
        (tmp_path / "P1.part" / name).write_text("{")
    made(tmp_path / "P1", folder=True)
    assert sorted(path.name for path in (tmp_path / "P1").iterdir()) == ["manifest.json", "weights.bin"]


def test_a_commit_that_counts_more_than_is_there(tmp_path: Path) -> None:
    """A file cut short is not filled up with zeros."""
    path = tmp_path / "x.jsonl"
    one = JsonLinesOutput(str(path), Fingerprint("cropi-test", {}, {}), {})
    assert one.open()
    one.append([{"id": "a"}, {"id": "b"}])
    one.commit()
    assert one._file is not None
    one._stream.close()  # type: ignore[union-attr]
    one._file._release_lock()
    part = tmp_path / "x.jsonl.part"
    part.write_bytes(part.read_bytes()[:5])
    with pytest.raises(InputError, match=r"x\.jsonl\.part: has 5 bytes, 24 were saved"):
        JsonLinesOutput(str(path), Fingerprint("cropi-test", {}, {}), {}).open()
    assert part.read_bytes() == b'{"id"'


def test_the_lock_that_counts_is_the_one_of_the_name(tmp_path: Path) -> None:
    """One process waits between opening and locking while another finishes and a third begins: two must not work at once."""
    path = tmp_path / "x"
    first = output(path)
    assert first.open()
    inside: list[str] = []
    real = fcntl.flock
    opened = threading.Event()

    def slow(lock: Any, kind: int) -> None:
        if threading.current_thread() is late:
            opened.set()
            time.sleep(0.2)  # the first ends meanwhile, and the third takes its place
        real(lock, kind)

    def begin() -> None:
        try:
            output(path).open()
            inside.append("late")
        except InputError as error:
            inside.append(str(error))

    late = threading.Thread(target=begin)
    fcntl.flock = slow  # type: ignore[assignment]
    try:
        late.start()
        opened.wait()
        first._leave()
        third = output(path)
        assert third.open()
        late.join()
    finally:
        fcntl.flock = real
    assert inside == [f"{path}: another process is writing it; wait for it or stop it"]
    third._leave()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("kind", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_finished_output_that_cannot_be_written_is_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, kind: int
) -> None:
    made(tmp_path / "x", folder)

    def refuse(path: Path) -> None:
        raise OSError(kind, os.strerror(kind), str(path))

    monkeypatch.setattr(output_module, "open_lock", refuse)
    assert not output(tmp_path / "x", folder).open()
    with pytest.raises(InputError, match="version None, now 2; --force"):
        output(tmp_path / "x", folder, version=2).open()
    with pytest.raises(InputError, match=f"cannot be written to .{os.strerror(kind)}") as refused:
        output(tmp_path / "y", folder).open()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_system_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    made(tmp_path / "x", folder)
    assert not output(tmp_path / "x", folder).open()
