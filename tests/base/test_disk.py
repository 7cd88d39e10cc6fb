"""Disks that fail, by real limits of the system on real processes: one message, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import WORDS, write_pairs
from safetensors import SafetensorError

from lite_dil.base import disk
from lite_dil.base.disk import DiskFailed, failing, writing
from lite_dil.base.files import append
from lite_dil.cli.main import main
from lite_dil.runs.folder import RunFolder

pytest.importorskip("resource")
# No file may grow beyond so many bytes: what a disk with that much room does, without a disk. Python ignores the signal.
_LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
TOO_LARGE = os.strerror(errno.EFBIG)
FULL = os.strerror(errno.ENOSPC)


def limited(size: int, *argv: str, out: int | None = None, input: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process whose files may have `size` bytes."""
    return warm.run(*argv, code=_LIMITED.format(size) + warm.MAIN, out=out, input=input, env=os.environ | more)


def one_message(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert sum(line.startswith("lite-dil: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def one_training(tiny: str, folder: Path) -> list[str]:
    data = str(write_pairs(folder / "pairs.jsonl", 16))
    flags = [
        "train",
        "--model",
        tiny,
        "--data",
        data,
        "--output-dir",
        str(folder / "run"),
        "--dtype",
        "float32",
        "--lora-r",
        "4",
    ]
    return [*flags, "--report-samples", "0", "--batch-size", "4", "--reference-cache", "off"]


@pytest.fixture
def flags(tiny: str, tmp_path: Path) -> list[str]:
    return one_training(tiny, tmp_path)


@pytest.fixture(scope="module")
def adapter(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    assert main([*one_training(tiny, folder), "--backend", "cpu", "--max-steps", "1"]) == 0
    return str(folder / "run" / "adapter")


def left(folder: Path) -> list[str]:
    """What is in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("backend", "file"),
    [
        ("cpu", "adapters/policy/optimizer.pt"),
        ("cpu", "adapters/policy/adapter_model.safetensors"),
        ("mlx", "adapters/policy/optimizer.safetensors"),
        ("mlx", "adapters/policy/adapters.safetensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit(flags: list[str], tmp_path: Path, backend: str, file: str) -> None:
    run = tmp_path / "run"
    flags += ["--lora-r", "16"]  # so that its files are larger than the report
    assert main([*flags, "--backend", backend, "--save-steps", "1", "--max-steps", "2"]) == 0
    shutil.rmtree(run / "adapter")  # as if it had been stopped after its first step
    shutil.rmtree(run / "checkpoints" / "step-2")
    size = (run / "checkpoints" / "step-1" / file).stat().st_size
    goes_on = ["train", "--resume", str(run)]
    said = limited(size - 1000, *goes_on)
    one_message(said, f"{run}/checkpoints/step-2: cannot be written ({TOO_LARGE}); free space there")
    assert "step-1: " in said.stderr and f"--resume {run}" in said.stderr
    assert left(run / "checkpoints") == ["step-1"] and not (run / "adapter").exists()
    assert ">failed<" in (run / "report.html").read_text()
    assert main(goes_on) == 0
    assert left(run / "checkpoints") == ["step-1", "step-2"] and (run / "adapter").is_dir()


def test_metrics_that_do_not_fit(flags: list[str], tmp_path: Path) -> None:
    said = limited(4000, *flags, "--backend", "cpu", "--max-steps", "12", "--logging-steps", "1")
    run = tmp_path / "run"
    one_message(
        said, f"{run}/metrics.jsonl: cannot be written ({TOO_LARGE})", "No checkpoint was saved before", "--output-dir"
    )
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert lines and all(json.loads(line) and line.endswith("\n") for line in lines)  # no half line
    assert not list(run.rglob("*.partial"))


@needs_full
@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_a_reference_cache_that_does_not_fit_costs_no_training(flags: list[str], tmp_path: Path, backend: str) -> None:
    flags[flags.index("off")] = str(tmp_path / "cache")
    more = ["--backend", backend, "--max-steps", "3", "--save-steps", "100"]
    plain = tmp_path / "plain"
    assert main([*flags[:-2], *more, "--output-dir", str(plain), "--reference-cache", "off"]) == 0
    # The files of a run are larger than a cache of 16 answers, so the cache is at its limit before: on a disk of its own.
    (tmp_path / "cache").mkdir()
    done = warm.run(*flags, *more, code=_FULL_CACHE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"({FULL})") == done.stdout.count("--reference-cache") == 1
    same = [
        [json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (plain, tmp_path / "run")
    ]
    assert same[0] == same[1]


# Its file is a device that is always full from when it has been read.
_FULL_CACHE = """
import sys
from lite_dil.cli import main as cli
from lite_dil.recipes import session
opened = session.open_cache
def full(*args):
    cache = opened(*args)
    cache.path.symlink_to("/dev/full")
    return cache
session.open_cache = full
sys.exit(cli.main())
"""


def test_tokens_that_do_not_fit(flags: list[str], tmp_path: Path) -> None:
    command = ["data", flags[flags.index("--data") + 1], "--model", flags[flags.index("--model") + 1]]
    for argv in ([*flags, "--backend", "cpu"], command):
        one_message(
            limited(100, *argv, LITE_DIL_CACHE=str(tmp_path / "cache")),
            f"the data's tokens in {tmp_path}/cache: cannot be written ({TOO_LARGE}); free space there, or choose "
            "another place with LITE_DIL_CACHE",
        )
    assert left(tmp_path / "cache") == []


@needs_full
@pytest.mark.parametrize("command", ["train", "data", "plan", "generate"])
def test_a_standard_output_that_is_full(flags: list[str], tiny: str, command: str, tmp_path: Path) -> None:
    data = flags[flags.index("--data") + 1]
    (tmp_path / "prompts.txt").write_text("the red\n")
    argv = {
        "train": [*flags, "--backend", "cpu", "--max-steps", "1"],
        "data": ["data", data, "--model", tiny],
        "plan": ["plan", "--model", tiny, "--backend", "cpu", "--memory", "8"],
        "generate": ["generate", str(tmp_path / "prompts.txt"), "--model", tiny, "--backend", "cpu", "--output", "-"],
    }[command]
    with open("/dev/full", "w") as full:
        done = limited(10**9, *argv, *(["--max-new-tokens", "2"] if command == "generate" else []), out=full.fileno())
    one_message(done, f"standard output: cannot be written ({FULL})")


@pytest.mark.parametrize(("format", "size"), [("merged", 100), ("merged", 30_000), ("adapter", 10_000)])
def test_an_export_that_does_not_fit(adapter: str, tmp_path: Path, format: str, size: int) -> None:
    out = tmp_path / "out"
    done = limited(size, "export", "--adapter", adapter, "--format", format, "--output", str(out), "--no-check")
    one_message(
        done, f"--output {out}: cannot be written ({TOO_LARGE}); free space there, or choose another place with --output"
    )
    assert left(tmp_path) == []


@needs_full
def test_what_does_not_fit_beside_the_merged_folder(adapter: str, tmp_path: Path) -> None:
    from lite_dil.backends.mlx.export import write_model
    from lite_dil.export.gguf import convert

    merged, out = tmp_path / "merged", tmp_path / "out"
    assert main(["export", "--adapter", adapter, "--format", "merged", "--output", str(merged), "--no-check"]) == 0
    out.mkdir()
    (out / "model.safetensors").symlink_to("/dev/full")
    told = r"out: cannot be written \(Unable to write .* bytes to file\); check whether its disk"
    with pytest.raises(DiskFailed, match=told), failing(out):
        write_model(merged, out, None)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(DiskFailed, match=rf"out: .*\({TOO_LARGE}\)"), failing(out):
            convert(merged, out / "x.gguf", "f16", None, print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [name for name in left(out) if "gguf" in name]


def test_answers_that_do_not_fit(adapter: str, tmp_path: Path, tiny: str) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"the red house {word}\n" for word in ("a", "b", "c", "d")))
    argv = ["generate", str(tmp_path / "prompts.txt"), "--adapter", adapter, "--output", str(tmp_path / "a.jsonl")]
    argv += ["--max-new-tokens", "4", "--batch-size", "1", "--backend", "cpu"]
    done = limited(500, *argv)
    one_message(done, f"a.jsonl: cannot be written ({TOO_LARGE}); free space there", "the same command continues from it")
    rows = (tmp_path / "a.jsonl").read_bytes()
    assert 0 < rows.count(b"\n") < 4 and rows.endswith(b"\n")
    assert main(argv) == 0
    assert (tmp_path / "a.jsonl").read_bytes().startswith(b"{") and (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 4


def test_drawn_answers_that_do_not_fit(flags: list[str], tmp_path: Path) -> None:
    demonstrations = "".join(json.dumps({"prompt": f"the red {word}", "completion": " house"}) + "\n" for word in WORDS)
    Path(flags[flags.index("--data") + 1]).write_text(demonstrations)
    argv = [*flags, "--backend", "cpu", "--max-steps", "4", "--sample-rejected", "1", "--sample-max-tokens", "4"]
    done = limited(2000, *argv, "--sample-file", str(tmp_path / "s.jsonl"))
    one_message(done, f"s.jsonl: cannot be written ({TOO_LARGE})", "the same command continues from it")
    rows = (tmp_path / "s.jsonl").read_bytes().splitlines(keepends=True)
    assert rows and all(json.loads(row) and row.endswith(b"\n") for row in rows)


def test_a_chat_goes_on_after_a_save_that_does_not_fit(adapter: str, tmp_path: Path) -> None:
    argv = ["chat", "--adapter", adapter, "--backend", "cpu", "--max-new-tokens", "3000", "--temperature", "1"]
    said = f"the red\n/save {tmp_path}/x.jsonl\n/temperature 0.5\n"
    done = limited(10, *argv, input=said)
    assert done.returncode == 0, done.stderr
    both = done.stdout + done.stderr
    assert re.search(rf"x\.jsonl: .*\({TOO_LARGE}\)", both) and "temperature 0.5" in both and "Traceback" not in both
    assert (tmp_path / "x.jsonl").read_bytes() == b""


def test_labels_that_do_not_fit(adapter: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the red\n")
    argv = ["label", str(tmp_path / "prompts.txt"), "--adapter", adapter, "--backend", "cpu", "--max-new-tokens", "4"]
    done = limited(10, *argv, "--output", str(tmp_path / "l.jsonl"), input="1\n")
    one_message(done, f"l.jsonl: cannot be written ({TOO_LARGE})", "the same command continues from it")
    assert (tmp_path / "l.jsonl").read_bytes() == b""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    assert main([*flags, "--backend", "cpu", "--max-steps", "1"]) == 2
    assert re.search(r"config\.yaml: .*\(Permission denied\)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.ENOSPC, FULL),
            f"x: cannot be written ({FULL}); free space there, or choose another place with --output. Ok",
        ),
        (OSError(errno.EROFS, "ro"), "x: cannot be written (ro); make it writable, or"),
        (
            OSError(errno.ENOTCONN, "gone", "y"),
            "y: cannot be read or written (gone); check whether its disk is full, failing or disconnected, or",
        ),
        (PermissionError(errno.EACCES, "no", "y"), "y: cannot be read or written (no); make it writable"),
        (
            SafetensorError(f"Error while serializing: I/O error: No (os error {errno.ENOSPC})"),
            f"x: cannot be written ({FULL})",
        ),
        (OSError("4352 requested and 1700 written"), "x: cannot be written (4352 requested and 1700 written); check whether"),
    ],
)
def test_what_a_failing_disk_says(error: Exception, text: str) -> None:
    with pytest.raises(DiskFailed) as told, failing("x", "--output", "Ok"):
        raise error
    assert str(told.value).startswith(text)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "lite_dil/data/short_answers/train.jsonl"),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        OSError("no number"),
        RuntimeError("a bug"),
        PermissionError(errno.EPERM, "of a process"),
        SafetensorError("Error while deserializing header"),
    ],
)
def test_errors_of_the_program_stay_what_they_are(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("lite_dil.cli.main._run", work)
    with pytest.raises(type(error)) as told:
        main([])
    assert told.value is error


def test_a_bug_after_an_error_of_a_file_stays_one() -> None:
    """Only torch's own complaint of the file that a failed write left is taken for that failure."""

    def fail(kind: type[Exception]) -> None:
        try:
            raise OSError(errno.ENOSPC, FULL)
        except OSError:
            raise kind("another") from None

    with pytest.raises(DiskFailed), writing("x"):
        fail(RuntimeError)
    for block, kind in ((failing, RuntimeError), (writing, NotImplementedError)):
        with pytest.raises(kind), block("x"):
            fail(kind)


def test_without_an_output_nothing_more_is_written(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$0" -m lite_dil plan --model ./none >&-', sys.executable]
    plan = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    # As Python starts where there is none, without the seconds of the imports, which `train` says before.
    train = warm.run("train", "--model", "./none", code=f"import os, sys; os.close(1); sys.stdout = None; {warm.MAIN}")
    for done in (plan, train):
        assert done.returncode == 2 and "--model ./none" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.save_adapter(lambda path: (path / "first").touch())
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            folder.save_adapter(lambda path: (path / "second").touch())
    assert left(tmp_path) == ["adapter"] and left(folder.adapter) == ["digests.json", "first"]
    folder.save_adapter(lambda path: (path / "second").touch())
    assert left(tmp_path) == ["adapter"] and left(folder.adapter) == ["digests.json", "second"]


def test_a_file_that_is_nearly_full_takes_all_or_nothing(tmp_path: Path) -> None:
    code = _LIMITED.format(10) + (
        "from lite_dil.base.files import append\n"
        "with open(sys.argv[1], 'ab', buffering=0) as file:\n"
        "    append(file, b'1234567\\n')\n"
        "    try: append(file, b'abcdefg\\n')\n"
        "    except OSError as error: print(error.errno)\n"
    )
    done = warm.run(str(tmp_path / "a"), code=code)
    assert (done.stdout, done.stderr) == (f"{errno.EFBIG}\n", "")
    assert (tmp_path / "a").read_bytes() == b"1234567\n"
    with (tmp_path / "a").open("ab", buffering=0) as file:
        append(file, b"x", sync=True)
    assert (tmp_path / "a").read_bytes() == b"1234567\nx"


def test_a_folder_that_is_not_there_is_said_where_it_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskFailed, match=r"none/x: .*\(No such file or directory\)$"),
        writing(tmp_path / "none/x"),
    ):
        (tmp_path / "none" / "x").write_text("")
    assert disk.output_fails() is False
