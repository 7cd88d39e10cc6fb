"""The one module that writes files: what it leaves where it is stopped, and that no other module opens a file for writing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lite_dil
import lite_dil.backends
from lite_dil.base import files
from lite_dil.base.disk import DiskFailed

ROOTS = {"lite_dil": Path(lite_dil.__file__).parent, "backends": Path(lite_dil.backends.__file__).parent}
# Where a file is written without `lite_dil.base.files`: (file, what is called), and why it must be so.
EXCEPTIONS = {
    ("lite_dil/base/files.py", "*"): "it is that module",
    ("lite_dil/cli/main.py", "os.open"): "/dev/null takes the place of an output that nobody reads",
    # Libraries that write several files of their own format into a folder, which is put in its place by `base.files`.
    ("lite_dil/models/find.py", "save_pretrained"): "transformers writes the embedded model",
    ("backends/torch/twin.py", "save_pretrained"): "transformers names a checkpoint's weights",
    ("backends/torch/state.py", "save_pretrained"): "PEFT writes its adapter_config.json",
    ("backends/torch/state.py", "save_file"): "safetensors writes an adapter",
    ("backends/torch/score_head.py", "save_file"): "safetensors writes a head",
    ("backends/mlx/export.py", "save_model"): "mlx-lm writes its model",
    ("backends/mlx/export.py", "save_config"): "mlx-lm writes its model",
    ("lite_dil/export/gguf.py", "GGUFWriter"): "gguf writes its file, under the name of `files.replacing`",
    ("backends/mlx/state.py", "save_safetensors"): "MLX writes into a file that `files.create` opened",
    ("lite_dil/reports/charts.py", "savefig"): "matplotlib draws into memory",
    ("lite_dil/evaluation/comparison/page.py", "savefig"): "matplotlib draws into memory",
    ("lite_dil/reports/trackers.py", "SummaryWriter"): "TensorBoard's log is its own, and grows",
}
# Methods of pathlib.Path, and functions of libraries that open their own files.
WRITES = {
    *("write_text", "write_bytes", "mkdir", "unlink", "rename", "rmdir", "touch", "chmod", "symlink_to", "hardlink_to"),
    *("save_pretrained", "save_model", "save_config", "savetxt", "GGUFWriter", "SummaryWriter", "save_file"),
    *("savefig", "tofile", "save_safetensors"),
}
MODULES = {
    "os": {
        "open",
        "replace",
        "rename",
        "remove",
        "unlink",
        "mkdir",
        "makedirs",
        "rmdir",
        "truncate",
        "link",
        "symlink",
        "chmod",
    },
    "shutil": {"rmtree", "copy", "copy2", "copyfile", "copyfileobj", "copytree", "move", "make_archive"},
    "tempfile": {"mkdtemp", "mkstemp", "TemporaryFile", "NamedTemporaryFile", "TemporaryDirectory", "SpooledTemporaryFile"},
}


def writes(tree: ast.AST) -> Iterator[str]:
    """What is called in a module that writes a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name in MODULES[node.module or ""])
        if not isinstance(node, ast.Call):
            continue
        called, constants = node.func, [a.value for a in node.args if isinstance(a, ast.Constant)]
        modes = [k.value for k in node.keywords if k.arg == "mode"]
        if isinstance(called, ast.Name):
            if called.id in WRITES:
                yield called.id
            modes += node.args[1:2]
            if called.id == "open" and any(not isinstance(m, ast.Constant) or _writing(m.value) for m in modes):
                yield "open"
        elif isinstance(called, ast.Attribute):
            owner = called.value.id if isinstance(called.value, ast.Name) else ""
            if called.attr in MODULES.get(owner, ()):
                yield f"{owner}.{called.attr}"
            elif called.attr in WRITES:
                yield called.attr
            elif called.attr == "open" and any(_writing(c) for c in [*constants, *(getattr(m, "value", "w") for m in modes)]):
                yield "open"
            elif called.attr == "replace" and len(node.args) == 1 and not node.keywords:  # of a path: text takes two
                yield "replace"


def _writing(mode: object) -> bool:
    return isinstance(mode, str) and len(mode) <= 4 and bool(set("wax+") & set(mode))


def test_no_other_module_writes_files() -> None:
    found = set()
    for name, root in ROOTS.items():
        for path in root.rglob("*.py"):
            place = f"{name}/{path.relative_to(root).as_posix()}"
            found |= {
                (place, "*" if place == "lite_dil/base/files.py" else what) for what in writes(ast.parse(path.read_text()))
            }
    assert found == EXCEPTIONS.keys()


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("open(path, 'w')", ["open"]),
        ("open(path, mode=mode)", ["open"]),
        ("path.open('rb+')", ["open"]),
        ("path.open(mode='xb')", ["open"]),
        ("path.with_name('x').write_text('y')", ["write_text"]),
        ("made.replace(target)", ["replace"]),
        ("from shutil import rmtree", ["shutil.rmtree"]),
        ("import os\nos.replace(a, b)", ["os.replace"]),
        ("open(path)\npath.open('rb')\n'a'.replace('b', 'c')\nshutil.which('x')\nCheckpoint.open(folder, name)", []),
    ],
)
def test_the_test_above_sees(code: str, what: list[str]) -> None:
    assert list(writes(ast.parse(code))) == what


def left(folder: Path) -> list[str]:
    """What is in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.replace_file(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            files.replace_file(path, b"new")
    assert left(tmp_path) == ["a.json"] and path.read_bytes() == "ü\n".encode()
    files.replace_file(path, b"new")
    assert left(tmp_path) == ["a.json"] and path.read_bytes() == b"new"
    with pytest.raises(DiskFailed, match=r"none/a: .*\(No such file or directory\)"):
        files.replace_file(tmp_path / "none" / "a", "")


def test_what_a_program_makes_takes_the_place_in_the_end(tmp_path: Path) -> None:
    def half(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "a") as part:
        half(part)
    assert left(tmp_path) == []
    with files.replacing(tmp_path / "a") as part:
        part.write_text("whole")
    assert left(tmp_path) == ["a"]


def test_a_work_folder_is_gone_in_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"

    def stopped(work: Path) -> None:
        assert work.parent == target.parent and work.name.startswith(f".out.{os.getpid()}-{files.HOST}.")
        files.write(work / "made", "x")
        files.move(work / "made", target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), files.work_folder(target) as work:
        stopped(work)
    assert left(target.parent) == ["out"]
    with pytest.raises(DiskFailed, match=r"^--output: .*--output$"):
        files.work_folder(target / "below a file", "--output", "--output").__enter__()


def test_removing_and_copying(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    files.make_folder(folder / "below")
    files.write(folder / "below" / "a", b"1")
    link.symlink_to(folder)
    files.copy(folder, tmp_path / "copy")
    files.remove(link)  # the link alone
    assert left(tmp_path) == ["copy", "folder"]
    files.remove(folder)
    files.remove(folder)  # what is gone already
    files.copy(tmp_path / "copy" / "below" / "a", tmp_path / "b")
    assert left(tmp_path) == ["b", "copy"] and (tmp_path / "b").read_bytes() == b"1"


def test_files_that_grow(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with files.appending(path) as file:
        files.append(file, b"12345")
    files.cut(path, 2)
    with files.appending(path, read=True) as file:
        files.append(file, b"6")
        file.seek(0)
        assert file.read() == b"126"
    with files.scratch_file(tmp_path / "scratch") as scratch:
        scratch.write(b"x")
        assert left(tmp_path / "scratch") == []


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    mine = f"{killed.pid}-{files.HOST}"
    left, folder = (tmp_path / f".model.gguf.{mine}{end}.partial" for end in ("", ".01234567"))
    alive, other = (tmp_path / f".model.gguf.{name}.partial" for name in (f"{os.getppid()}-{files.HOST}.0", f"json.{mine}"))
    # Of another computer that shares the folder: its numbers of processes say nothing here.
    elsewhere, old = (tmp_path / f".model.gguf.{killed.pid}-{computer}.01.partial" for computer in ("another", "third"))
    for path in (left, alive, other, elsewhere, old):
        path.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    (folder / "below").mkdir(parents=True)
    files.replace_file(tmp_path / "model.gguf", b"x")
    stay = [alive.name, other.name, elsewhere.name, "model.gguf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)


def test_a_file_is_written_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's folder may hold links under the names that are written next."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "01234567")
    link = tmp_path / f".a.{os.getpid()}-{files.HOST}.01234567.partial"
    link.symlink_to(victim)
    with pytest.raises(DiskFailed, match="File exists"):
        files.replace_file(tmp_path / "a", b"x")
    assert victim.read_text() == "mine"
    for name in (".folder.partial", ".folder.old"):
        (tmp_path / name).symlink_to(tmp_path)
    files.replace_folder(tmp_path / "folder", lambda folder: (folder / "made").touch())
    assert victim.read_text() == "mine" and (tmp_path / "folder" / "made").exists() and not (tmp_path / "made").exists()


def test_what_is_renamed_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def name_of(file: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{file}")).name

    monkeypatch.setattr(os, "fsync", lambda file: (done.append(f"sync {name_of(file)}"), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("rename"), replace(old, new))[1])
    monkeypatch.setattr(Path, "rename", lambda old, new: (done.append("rename"), rename(old, new))[1])
    monkeypatch.setattr("secrets.token_hex", lambda _: "r")
    files.replace_file(tmp_path / "a", b"x")
    assert done == [f"sync .a.{os.getpid()}-{files.HOST}.r.partial", "rename", f"sync {tmp_path.name}"]
    done.clear()

    def fill(folder: Path) -> None:
        (folder / "below").mkdir()
        (folder / "below" / "b").touch()

    files.replace_folder(tmp_path / "folder", fill)
    assert sorted(done[:3]) == ["sync .folder.partial", "sync b", "sync below"] and done[3:] == [
        "rename",
        f"sync {tmp_path.name}",
    ]


def test_a_folder_whose_replacing_was_killed_is_not_lost(tmp_path: Path) -> None:
    """Between the renames only the old one is left, under a hidden name; a next try that fails must not remove it."""
    (tmp_path / ".adapter.old").mkdir()
    (tmp_path / ".adapter.old" / "weights").write_text("w")

    def fails(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFailed):
        files.replace_folder(tmp_path / "adapter", fails)
    assert (tmp_path / "adapter" / "weights").read_text() == "w"
