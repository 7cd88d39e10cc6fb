"""The API in a real notebook: the five lines of its page, what the objects show, and the progress below the cell."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import lite_dil
import lite_dil as dil

FIVE = """\
import lite_dil as dil
policy = dil.load(MODEL, backend="cpu", max_length=64)
pairs = dil.read("short-answers", max_rows=2)
small = {"batch_size": 1, "gradient_accumulation_steps": 1, "report_samples": 0, "output_dir": "run"}
run = dil.train(policy, pairs, loss="lsif", max_steps=2, eval_data=pairs, **small)
print(run.metrics[-1]["step"], policy.generate("Why?", max_new_tokens=2), policy.log_ratio("2 + 2?", "4."))
run.export("my-model", format="ollama", no_check=True)
"""
# In the same kernel; it waits after its first step for the stop button, which is pressed when it has made a file.
STOPPED = """\
import pathlib, time
class Wait(dil.Observer):
    def after_step(self, event):
        pathlib.Path("now").touch()
        while event.step == 1 and not event.stop():
            time.sleep(0.01)
small["output_dir"] = "other"
run = dil.train(policy.fresh(), pairs, max_steps=2, observers=[Wait()], **small)
print(run.stopped, len(run.metrics))
"""


def execute(place: Path, monkeypatch: pytest.MonkeyPatch, *cells: str) -> list[list[Any]]:
    """Run cells in a fresh kernel, which is interrupted when there is a file "now"; return the outputs of each."""
    for folder in (Path(__file__).parents[1], Path(lite_dil.__file__).parent.parent):
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(place)}})
    over = threading.Event()

    def press() -> None:
        while not over.wait(0.05):
            if (place / "now").exists():
                asyncio.run(client.km.interrupt_kernel())
                return

    watcher = threading.Thread(target=press)
    watcher.start()
    try:
        client.execute()
    finally:
        over.set()
        watcher.join()
    return [cell.outputs for cell in book.cells]


class Shown(HTMLParser):
    """Collects the text, and the tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", list[tuple[str, dict[str, str | None]]]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_five_lines_and_the_stop_button(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [
        f"import undrawn\nundrawn.undraw()\nMODEL = {tiny!r}\n{FIVE}",
        "policy",
        "run",
        STOPPED,
        "run = run.resume()\nprint(run.stopped, run.metrics[-1]['step'])",
    ]
    five, policy, run, stopped, resumed = execute(tmp_path, monkeypatch, *cells)
    assert {output.output_type for output in five} <= {"stream", "display_data", "execute_result"}
    printed = "".join(output.text for output in five if output.output_type == "stream")
    assert printed.startswith("2 ") and not [o for o in five if o.output_type == "stream" and o.name == "stderr"]
    (place,) = [output for output in five if output.output_type == "display_data"]  # one, updated in place
    shown = Shown(place.data["text/html"])
    assert ("progress", {"value": "2", "max": "2", "style": "width: 20em"}) in shown.tags
    assert "held out, step 2: loss" in shown.text and "adapter in run" in shown.text and "pairs/s" in shown.text
    said = Shown(policy[0].data["text/html"]).text
    assert tiny in said and "cpu (CPU" in said and "trained by run" in said and "rank 16" in said
    shown = Shown(run[0].data["text/html"])
    assert re.search(r"step2loss-0\.\d+", shown.text) and "finished" in shown.text
    assert ("a", {"href": "run/report.html", "target": "_blank"}) in shown.tags
    made = tmp_path / "my-model"
    assert list(made.glob("*.gguf")) and (made / "Modelfile").is_file()
    # The stop button: the cell returns a run that was saved, and that is finished later.
    assert "".join(o.text for o in stopped if o.output_type == "stream") == "True 1\n"
    assert "".join(o.text for o in resumed if o.output_type == "stream") == "False 2\n"
    assert (tmp_path / "other" / "adapter").is_dir()


def test_what_is_shown_is_escaped() -> None:
    from lite_dil.api.notebook import Notebook
    from lite_dil.base import html

    hostile = "<script>alert(1)</script>\x1b"
    display = Notebook()
    display._messages, display._status, display._doing = [hostile], hostile, hostile
    shown = Shown(display.html() + html.facts(hostile, {hostile: hostile, "file": html.Link(Path(hostile))}))
    assert "script" not in [tag for tag, _ in shown.tags] and "\x1b" not in shown.text
    assert shown.text.count("<script>") == 8


def test_a_plain_process_is_no_notebook() -> None:
    from lite_dil.api.notebook import display_of
    from lite_dil.api.telling import Logged

    assert type(display_of(None)) is Logged
    terminal = dil.Terminal()
    assert display_of(terminal) is terminal
