"""What a kill or a power cut between two writes leaves, as scripts/soak found it, and how the next start puts it right."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pairs
from trainings import export, metrics, run

from lite_dil.base import files
from lite_dil.base.disk import DiskFailed
from lite_dil.base.jsonl import JSONLines
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.reports import pairs
from lite_dil.runs.folder import Progress, RunFolder
from lite_dil.training import reference_cache
from lite_dil.training.passes import Passes
from lite_dil.training.reference_cache import ReferenceCache


class Power(Exception):
    """The power fails here."""


def fail(*args: object, **more: object) -> None:
    raise Power


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was synced, in order."""
    done: list[Path] = []
    fsync = os.fsync

    def noted(file: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    return done


@pytest.fixture
def flags(tiny: str, tmp_path: Path) -> list[str]:
    place = tmp_path / "data"
    place.mkdir()
    write_pairs(place / "pairs.jsonl", 8)
    write_pairs(place / "held_out.jsonl", 3)
    flags = ["--model", tiny, "--data", str(place / "pairs.jsonl"), "--eval-data", str(place / "held_out.jsonl")]
    flags += ["--dtype", "float32", "--backend", "cpu", "--lora-r", "2", "--report-samples", "0", "--max-steps", "3"]
    return [*flags, "--save-steps", "1", "--save-total-limit", "1", "--reference-cache", str(tmp_path / "cache")]


def test_old_checkpoints_of_a_run_that_was_killed_before_it_removed_them(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(flags, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-3"
    shutil.copytree(last, last.with_name("step-2"))
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "step 4/3" not in capsys.readouterr().out
    assert [path.name for path in last.parent.iterdir()] == ["step-3"]


def test_held_out_pairs_are_those_of_the_last_evaluation(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between an evaluation's line and its pairs: the next start has both, of the same step."""
    run([*flags, "--eval-steps", "2"], tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("lite_dil.evaluation.pairs.write_pairs", lambda path, found: found.step == 3 and fail())
        with pytest.raises(Power):
            main(["train", *flags, "--eval-steps", "2", "--output-dir", str(tmp_path / "run")])
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    found, whole = (json.loads((tmp_path / name / pairs.PAIRS).read_text()) for name in ("run", "whole"))
    assert found == whole and found["step"] == 3


def test_a_checkpoint_is_named_on_the_disk_up_to_the_first_new_folder(tmp_path: Path, synced: list[Path]) -> None:
    folder = RunFolder(tmp_path / "new" / "run")
    folder.create({})
    folder.log({"step": 1})
    synced.clear()
    folder.save_checkpoint(Progress(1), lambda _: None, None)
    run = tmp_path / "new" / "run"
    assert {run / "metrics.jsonl", run, run / "checkpoints"} <= set(synced)
    synced.clear()
    files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path / "a", tmp_path]
    files.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_the_older_checkpoint_stays_if_the_new_one_is_not_read_back_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    run.create({})
    run.save_checkpoint(Progress(1), lambda folder: files.write(folder / "weights", "abc"), 1)
    replace = files.replace_folder

    def badly(target: Path, fill: Callable[[Path], None]) -> None:
        replace(target, fill)
        (target / "weights").write_text("abd")  # what a failing disk gives back

    with monkeypatch.context() as patch:
        patch.setattr("lite_dil.runs.folder.replace_folder", badly)
        with pytest.raises(DiskFailed, match=r"step-2.*read back, weights is not what was written"):
            run.save_checkpoint(Progress(2), lambda folder: files.write(folder / "weights", "abc"), 1)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-1", "step-2"]
    run.save_checkpoint(Progress(3), lambda folder: files.write(folder / "weights", "abc"), 1)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-3"]


def test_the_name_of_a_new_file_of_rows_is_on_the_disk(tmp_path: Path, synced: list[Path]) -> None:
    file = JSONLines(tmp_path / "rows.jsonl", "rows")
    file.add({"a": 1})
    assert synced == [tmp_path / "rows.jsonl", tmp_path]
    file.add({"a": 2})
    assert synced[2:] == [tmp_path / "rows.jsonl"]


def test_the_cache_is_on_the_disk_before_a_checkpoint_relies_on_it(
    flags: list[str], tmp_path: Path, synced: list[Path]
) -> None:
    """Computed again in other batches, the reference's log-probs differ in the last bits, and so would the resumed run."""
    run(flags, tmp_path / "run")
    names = [path.name.partition(".")[2] for path in synced]
    order = [name for name in names if name in ("logps", "step-1.partial", "step-2.partial", "step-3.partial")]
    assert order[:2] == ["logps", "step-1.partial"]


def test_the_cache_is_on_the_disk_every_half_minute(
    tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(reference_cache.time, "monotonic", lambda: now[0])
    cache = ReferenceCache(tmp_path, {"weights": "some"})
    assert cache.path is not None

    def add(number: int) -> None:
        batch = Batch([np.array([number])], [np.array([1, 2])], np.array([0]), np.array([1]))
        cache.add(batch, np.array([-1.0], np.float32))

    for second in (1, 29):
        now[0] = second
        add(second)
    assert cache.path not in synced
    now[0] = 30
    add(30)
    assert synced.count(cache.path) == 1
    cache.sync()
    assert synced.count(cache.path) == 1  # nothing is new
    add(31)
    cache.sync()
    assert synced.count(cache.path) == 2


def test_a_cache_that_cannot_be_synced_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, said = ReferenceCache(tmp_path, {"weights": "some"}), list[str]()
    passes = Passes(None, "sum", cache, said.append)  # type: ignore[arg-type]
    batch = Batch([np.array([3])], [np.array([1, 2])], np.array([0]), np.array([1]))
    passes.remember(batch, np.array([-1.0], np.float32))

    def broken(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    passes.sync()
    passes.sync()
    assert len(said) == 1 and "cannot be written (Input/output error)" in said[0] and "kept in memory" in said[0]


def test_an_export_is_on_the_disk_before_it_has_its_name(
    flags: list[str], tmp_path: Path, synced: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, trained = tmp_path / "out", tmp_path / "run"
    run(flags, trained)
    synced.clear()
    export(trained, out, "--format", "adapter", "--no-check")
    names = [path.name for path in synced]
    assert {path.name for path in out.iterdir()} <= set(names[:-1]) and synced[-1] == tmp_path
    # Killed between its end and the removal of its work folder.
    left = tmp_path / f".out.123456789-{files.HOST}.01234567.partial"
    left.mkdir()
    argv = ["export", "--adapter", str(trained), "--output", str(out), "--format", "adapter", "--no-check"]
    assert main(argv) == 2 and "already exists" in capsys.readouterr().err
    assert not left.exists()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_folder_that_cannot_be_synced_is_said(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def broken(file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).is_dir():
            raise OSError(error, os.strerror(error))
        fsync(file)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(DiskFailed, match=os.strerror(error)):
        files.replace_file(tmp_path / "a", b"x")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EINVAL, "not here")))
    files.sync(tmp_path)  # a network drive that does not offer it
