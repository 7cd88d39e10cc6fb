"""scripts/colab.ipynb: kept free of outputs, and executed as it stands, but for its settings, on a tiny model."""

from __future__ import annotations

import ast
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement

import lite_dil
from lite_dil.cli.main import main
from lite_dil.models.find import EMBEDDED_MODEL

PATH = Path(__file__).parent.parent.parent / "scripts" / "colab.ipynb"


def notebook() -> Any:
    return nbformat.read(PATH, as_version=4)


def settings(cells: Any) -> Any:
    (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def execute(place: Path, source: str = "lite-dil", **values: object) -> str:
    """Run the notebook in the folder `place` with other settings; return all that it printed."""
    book = notebook()
    cell = settings(book.cells)
    names = [node.targets[0].id for node in ast.parse(cell.source).body]  # type: ignore[attr-defined]
    assert set(values) <= set(names)
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(lite_dil.__file__).parent.parent)
    try:
        NotebookClient(book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
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


def execute_here(place: Path, monkeypatch: pytest.MonkeyPatch, **values: object) -> dict[str, Any]:
    """Run the notebook as `execute` does, but in this process, which has imported what it needs; return its names."""

    def command(*words: str, may_fail: bool = False, **options: object) -> None:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        if words != ("--version",):  # which ends the process
            assert main([*words, *flags]) == 0 or may_fail

    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    for cell in notebook().cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            names |= values if "MODEL = " in cell.source else {}
            names |= {"lite_dil": command} if "def lite_dil(" in cell.source else {}
    return names


def test_it_runs_and_runs_again(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = ["What is the capital of France?", "Is bread good?"]
    values: dict[str, object] = {"MODEL": tiny, "OUTPUT": "drive/run", "MAX_STEPS": 2, "SAVE_STEPS": 1, "QUESTIONS": questions}
    values |= {"READ": {"max_rows": 6}, "LOAD": {"lora_r": 4}, "TRAIN": {"report_samples": 2}}
    first = execute(tmp_path, **values)
    run = tmp_path / "drive" / "run"
    made = [run / "adapter" / "adapter_model.safetensors", run / "metrics.jsonl"]
    before = [path.read_bytes() for path in made]
    assert json.loads(made[1].read_text().splitlines()[-1])["step"] == 2
    assert "It fits" in first and "short-answers" in first and "\x1b" not in first
    assert (run / "report.html").is_file() and "<iframe srcdoc=" in first and "&lt;!doctype html" in first.lower()
    assert first.count("before: ") == first.count("after:  ") == len(questions)
    assert '<progress value="2" max="2"' in first and "trained by" not in first and "finished" in first
    assert (run / "checkpoints" / "step-2").is_dir()
    home = run / "export" / "ollama"
    assert list(home.glob("*.gguf")) and (home / "Modelfile").is_file()

    names = execute_here(tmp_path, monkeypatch, **values, FORMAT="merged")
    assert not names["run"].stopped and [path.read_bytes() for path in made] == before
    second = capsys.readouterr().out
    assert [line for line in second.splitlines() if "before:" in line or "after:" in line] == [
        line for line in first.splitlines() if line.startswith(("  before:", "  after:"))
    ]
    assert (run / "export" / "merged" / "model.safetensors").is_file()


def test_what_it_installs_is_there() -> None:
    (cell,) = (cell.source for cell in notebook().cells if "extras = " in cell.source)
    project = (PATH.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for extra in cell.partition('extras = "[')[2].partition("]")[0].split(","):
        assert f"\n{extra} = [" in project


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
        exec(code("google.colab"), cell)
        assert cell["OUTPUT"] == Path("/content/drive/MyDrive/lite-dil/run")
    assert mounted == ["/content/drive"] * 2


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("lite-dil", "lite-dil[cuda,gguf,hub]"),
        ("git+https://example.com/x", "lite-dil[cuda,gguf,hub] @ git+https://example.com/x"),
        ("/content/lite-dil", "/content/lite-dil[cuda,gguf,hub]"),
    ],
)
def test_what_is_missing_is_installed_and_torch_is_kept(
    source: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lite_dil" else object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"torch": "2.9.0+cu126"}[name])
    ran: list[tuple[str, ...]] = []
    exec(
        code("extras = "),
        {
            "sys": sys,
            "SOURCE": source,
            "command": lambda *words: ran.append(words),
            "lite_dil": lambda *words: ran.append(words),
        },
    )
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--constraint", "keep.txt", package)
    assert ran == [pip, ("--version",)]
    assert (tmp_path / "keep.txt").read_text() == "torch==2.9.0+cu126"
    Requirement(package.removeprefix("/content/"))


def test_a_command_that_fails_stops_it(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="code 2"):
        execute(tmp_path, MODEL=EMBEDDED_MODEL, DATA="none.jsonl", OUTPUT="run")
    assert not (tmp_path / "run").exists()
