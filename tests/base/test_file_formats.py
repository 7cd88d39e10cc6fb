"""Files carry the number of their format: none is format 1, and a version too old for a file says so in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import config
from reported import make_run

from lite_dil.base.errors import UserError
from lite_dil.base.formats import CACHE, KEY, RUN, check_format
from lite_dil.cli.main import main
from lite_dil.config.options import read_yaml
from lite_dil.reports.record import FACTS, read_facts, read_record
from lite_dil.runs.folder import RunFolder
from lite_dil.runs.progress import Progress, read_progress
from lite_dil.training.reference_cache import ReferenceCache


@pytest.mark.parametrize("content", [{}, {KEY: 1}, {KEY: 2}])
def test_what_is_known_is_read(content: dict[str, Any]) -> None:
    check_format(content, 2, "x")


def test_a_newer_file_is_one_line_with_the_fix() -> None:
    with pytest.raises(UserError) as told:
        check_format({KEY: 3}, 2, Path("runs/x"))
    assert re.fullmatch(r"runs/x .*\b3\b.*\b2\b.*; update lite-dil", str(told.value))


@pytest.mark.parametrize("number", ["two", 0, -1, 1.5, None])
def test_what_is_no_number_of_a_format(number: object) -> None:
    with pytest.raises(UserError, match="x: format"):
        check_format({KEY: number}, 2, "x")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    make_run(folder.path)
    with folder.alone():
        folder.create(config().as_dict())
    folder.save_checkpoint(Progress(step=2, window={"loss": [1.0, 2.0]}), lambda path: None, None)
    return folder


def test_a_run_writes_its_format_first_and_reads_files_without(run: RunFolder) -> None:
    path, checkpoint = run.path / "config.yaml", run.checkpoints / "step-2"
    written = yaml.safe_load(path.read_text())
    assert next(iter(written.items())) == (KEY, RUN)
    assert next(iter(json.loads((checkpoint / "progress.json").read_text()).items())) == (KEY, RUN)
    options, progress = read_yaml(path), read_progress(checkpoint)
    assert KEY not in options and replace(progress, metrics=[]) == Progress(step=2, window={"loss": [1.0, 2.0]})
    del written[KEY]
    path.write_text(yaml.safe_dump(written))
    old = json.loads((checkpoint / "progress.json").read_text())
    del old[KEY]
    (checkpoint / "progress.json").write_text(json.dumps(old))
    assert (read_yaml(path), read_progress(checkpoint)) == (options, progress)
    assert KEY not in json.loads((run.path / FACTS).read_text()) and read_record(run.path).facts["steps"] == 20


def read_of(name: str) -> Callable[[RunFolder], object]:
    return {
        "config.yaml": lambda run: read_yaml(run.path / "config.yaml"),
        "report.json": lambda run: read_facts(run.path),
        "checkpoints/step-2/progress.json": lambda run: read_progress(run.checkpoints / "step-2"),
    }[name]


@pytest.mark.parametrize("name", ["config.yaml", "report.json", "checkpoints/step-2/progress.json"])
def test_a_file_of_a_newer_run_is_not_read(run: RunFolder, name: str) -> None:
    content = yaml.safe_load((run.path / name).read_text()) | {KEY: RUN + 1, "a_new_option": 5}
    (run.path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{run.path}.* \(format {RUN + 1}"):
        read_of(name)(run)


def test_a_newer_run_is_not_resumed(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((run.path / "config.yaml").read_text()) | {KEY: RUN + 1, "a_new_option": 5}
    (run.path / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", "--resume", str(run.path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"lite-dil: {run.path} ") and f"format {RUN + 1}" in told


def test_a_cache_names_its_format_beside_it(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, {"weights": "some"})
    assert cache.path is not None
    beside = cache.path.with_suffix(".json")
    assert json.loads(beside.read_text()) == {KEY: CACHE, "weights": "some"}
    beside.write_text('{"weights": "some"}')  # as an older version wrote it, which stays
    assert ReferenceCache(tmp_path, {"weights": "some"}).path == cache.path
    assert beside.read_text() == '{"weights": "some"}'
    beside.write_text("{")
    ReferenceCache(tmp_path, {"weights": "some"})
    assert json.loads(beside.read_text())[KEY] == CACHE


def test_a_cache_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, {"weights": "some"})
    assert cache.path is not None
    cache.path.with_suffix(".json").write_text(json.dumps({KEY: CACHE + 1}))
    cache.path.write_bytes(b"records of another length")
    with pytest.raises(UserError, match=rf"{cache.path} .*format {CACHE + 1}"):
        ReferenceCache(tmp_path, {"weights": "some"})
    assert cache.path.read_bytes() == b"records of another length"
