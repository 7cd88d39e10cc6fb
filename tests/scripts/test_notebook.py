"""scripts/colab.ipynb: kept free of outputs, and executed as it stands, but for its settings, on a tiny model."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

import lite_dil

PATH = Path(__file__).parent.parent.parent / "scripts" / "colab.ipynb"


def notebook() -> Any:
    return nbformat.read(PATH, as_version=4)


def settings(cells: Any) -> Any:
    (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def execute(place: Path, before: str, after: str, **values: object) -> tuple[str, str]:
    """Run a copy of the notebook in the folder `place` with other settings; return all that it printed.

    Then run the cells from the one that loads the model once more, between two others; return also what these printed.
    """
    book = notebook()
    cell = settings(book.cells)
    targets = [target for node in ast.parse(cell.source).body for target in node.targets]  # type: ignore[attr-defined]
    assert set(values) <= {name.id for target in targets for name in getattr(target, "elts", [target])}
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell.source += "\nimport undrawn\nundrawn.undraw()"
    code, number = [cell for cell in book.cells if cell.cell_type == "code"], len(book.cells)
    (load,) = (place for place, cell in enumerate(code) if "dil.load(" in cell.source)
    book.cells += [nbformat.v4.new_code_cell(source) for source in (before, *(cell.source for cell in code[load:]), after)]
    with pytest.MonkeyPatch.context() as patch:
        folders = Path(lite_dil.__file__).parent.parent, Path(__file__).parents[1]
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        NotebookClient(book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    return printed(book.cells[:number]), printed(book.cells[number:])


def printed(cells: Any) -> str:
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return "".join(o.text if o.output_type == "stream" else o.data.get("text/html", "") for o in outputs)


def test_it_is_valid_and_free_of_outputs() -> None:
    nbformat.validate(notebook())
    text = PATH.read_text(encoding="utf-8")
    raw = json.loads(text)
    for cell in raw["cells"]:
        assert set(cell) <= {"cell_type", "id", "metadata", "source", "execution_count", "outputs"}
        assert set(cell["metadata"]) <= {"tags"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse("".join(cell["source"]))  # no magic, which would not stop at an error
    assert set(raw["metadata"]) == {"accelerator", "colab", "kernelspec", "language_info"}
    assert raw["metadata"]["language_info"] == {"name": "python"}, "nothing of the machine that it was written on"
    assert text == json.dumps(raw, indent=1, ensure_ascii=False) + "\n"


def test_it_is_short_and_every_cell_is_introduced() -> None:
    kinds = [cell.cell_type for cell in notebook().cells]
    assert kinds.count("code") == 11
    assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")


def test_each_step_says_how_long_it_takes() -> None:
    steps = [cell.source for cell in notebook().cells if cell.cell_type == "markdown" and cell.source.startswith("## ")][1:]
    assert len(steps) == 10
    for text in steps:
        assert re.search(r"\*[A-Z][^*]*(second|minute|long as)[^*]*\.\*$", text), text


def test_it_runs_and_runs_again(tiny: str, tmp_path: Path) -> None:
    questions = ["What is the capital of France?"]
    values: dict[str, object] = {"MODEL": tiny, "OUTPUT": "drive/run", "MAX_STEPS": 2, "SAVE_STEPS": 1, "QUESTIONS": questions}
    values |= {"READ": {"max_rows": 6}, "LOAD": {"lora_r": 4, "max_length": 128}, "TRAIN": {"report_samples": 0}}
    note = "files = [path.read_bytes() for path in sorted(Path(OUTPUT).glob('adapter/*'))]"
    first, second = execute(
        tmp_path, f"FORMAT = 'merged'; {note}; old_files = files", f"{note}; print('same:', files == old_files)", **values
    )
    run = tmp_path / "drive" / "run"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert "It fits" in first and "short-answers" in first and "\x1b" not in first
    assert (run / "report.html").is_file() and "<iframe srcdoc=" in first and "&lt;!doctype html" in first.lower()
    assert '<progress value="2" max="2"' in first and "trained by" not in first and "finished" in first
    assert (run / "checkpoints" / "step-2").is_dir()
    home = run / "export" / "ollama"
    assert list(home.glob("*.gguf")) and (home / "Modelfile").is_file()

    assert "the run is finished: step 2 of 2" in second and "same: True" in second
    answers = [[line for line in text.splitlines() if line.startswith(("  before:", "  after:"))] for text in (first, second)]
    assert answers[0] == answers[1] and len(answers[0]) == 2 * len(questions)
    assert (run / "export" / "merged" / "model.safetensors").is_file()


def code(mark: str) -> str:
    """Return the code of the cell that holds `mark`."""
    (cell,) = (cell.source for cell in notebook().cells if cell.cell_type == "code" and mark in cell.source)
    return cell


@pytest.mark.parametrize("form", ["adapter", "ollama"])
def test_an_export_is_made_anew_beside_the_run(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the run as it is now, and never in the place of its own adapter."""
    monkeypatch.chdir(tmp_path)
    made, adapter = tmp_path / f"tuned-{form}" / "file", tmp_path / "run" / "adapter" / "weights"
    for path, text in ((made, "of before"), (adapter, "trained")):
        path.parent.mkdir(parents=True)
        path.write_text(text)

    def export(folder: Path, format: str) -> None:
        assert not made.parent.exists() and folder == made.parent.relative_to(tmp_path)
        made.parent.mkdir()
        made.write_text(f"trained, as {format}")

    for times in (1, 2):
        cell = {"Path": Path, "shutil": shutil, "OUTPUT": "run", "FORMAT": form, "run": SimpleNamespace(export=export)}
        exec(code("run.export("), cell)
        copy = tmp_path / "run" / "export" / form / "file"
        assert copy.read_text() == f"trained, as {form}", times
        copy.write_text("of before")
    assert adapter.read_text() == "trained"


def test_on_colab_the_run_is_on_the_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cell is run twice."""
    mounted: list[str] = []
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace(colab=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=SimpleNamespace(mount=mounted.append)))
    cell: dict[str, Any] = {"sys": sys, "Path": Path, "OUTPUT": "lite-dil/run", "LOGIN": False}
    for _ in range(2):
        exec(code("drive.mount("), cell)
        assert cell["OUTPUT"] == Path("/content/drive/MyDrive/lite-dil/run")
    assert mounted == ["/content/drive"] * 2


def install(monkeypatch: pytest.MonkeyPatch, source: str = "", upload: str = "") -> list[tuple[str, ...]]:
    """Run the cell that installs where nothing but torch is installed; return the commands it runs."""
    there = {"torch": "2.9.0+cu126"}
    found = lambda name: (SimpleNamespace(version=there[name]) for _ in [0] if name in there)  # noqa: E731
    monkeypatch.setattr("importlib.metadata.distributions", found)
    if upload:
        files = SimpleNamespace(upload=lambda: Path(upload).touch())
        monkeypatch.setitem(sys.modules, "google", SimpleNamespace(colab=SimpleNamespace()))
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(files=files))
    ran: list[tuple[str, ...]] = []

    def command(*words: str) -> None:
        ran.append(words)
        there["lite-dil"] = "1.2.3"

    exec(code("def beside("), {"sys": sys, "SOURCE": source, "command": command})
    return ran


@pytest.mark.parametrize(
    ("source", "file", "place"),
    [
        ("https://example.com/x", "", "git+https://example.com/x"),
        ("git+ssh://git@example.com/x", "", "git+ssh://git@example.com/x"),
        ("https://example.com/x/archive/main.zip", "", "https://example.com/x/archive/main.zip"),
        ("elsewhere", "elsewhere/pyproject.toml", "{here}/elsewhere"),
        ("", "lite-dil/lite_dil/__init__.py", "{here}/lite-dil"),
        ("", "../lite_dil/__init__.py", "{above}"),  # the notebook is in a clone's scripts/
        ("", "lite_dil-0.1.0-py3-none-any.whl", "{here}/lite_dil-0.1.0-py3-none-any.whl"),
        ("", "lite-dil-main.zip", "{here}/lite-dil-main.zip"),
    ],
)
def test_it_is_installed_from_where_it_is(
    source: str, file: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its place, so that no package index is asked for its name; torch is kept."""
    here = tmp_path / "clone" / "empty"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    if file:
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).touch()
    ((*pip, package),) = install(monkeypatch, source)
    assert tuple(pip) == (sys.executable, "-m", "pip", "install", "--quiet", "--constraint", "keep.txt")
    requirement = Requirement(package)
    assert requirement.name == "lite-dil" and requirement.extras == {"cuda", "gguf", "hub"}
    assert requirement.url == place.format(here=here.as_uri(), above=here.parent.as_uri())
    assert (here / "keep.txt").read_text() == "torch==2.9.0+cu126"


def test_without_it_an_upload_is_asked_for_and_else_one_line_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("", "nowhere"):
        with pytest.raises(RuntimeError, match=r"^lite-dil was not found: set SOURCE") as told:
            install(monkeypatch, source)
        assert "\n" not in str(told.value)
    ((*_, package),) = install(monkeypatch, upload="lite_dil-1.2.3-py3-none-any.whl")
    assert Requirement(package).url == (tmp_path / "lite_dil-1.2.3-py3-none-any.whl").as_uri()


def test_a_command_that_fails_stops_it(capfd: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(code("def command("), names)
    with pytest.raises(RuntimeError, match="ended with code 2: the reason is above"):
        names["lite_dil"]("train", loss="lsi", resume=True)
    assert "lite-dil: " in capfd.readouterr().out
    names["command"](sys.executable, "-c", "raise SystemExit(1)", may_fail=True)
