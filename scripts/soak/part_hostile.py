"""Rows, templates, options, names, run folders, adapters and models that strangers made, as hypothesis draws them.

Each case must be taken, or refused in one message: no traceback, nothing run, nothing written outside its folder, nothing
printed that a terminal obeys, nothing that takes ten seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from soak import hostile_inputs as inputs
from soak.hostile_templates import TEMPLATES
from soak.hostile_watch import watched
from soak.row import Row
from soak.tiny_world import make_model, write_rows

from lite_dil.cli.main import main
from lite_dil.config.options import read_yaml
from lite_dil.data import template_costs
from lite_dil.data.reader import read_rows
from lite_dil.data.rendering import Rendering

PURE, LOADED = 10_000, 300
TARGETS = (
    *("files of rows", "chat templates", "options in YAML", "names", "run folders, listed"),
    *("files of rows, by the command", "options in YAML, by the command", "run folders, resumed", "adapters"),
    *("model configs, planned", "model configs, loaded"),
)
_SHORT = {PURE: 150, LOADED: 4}
# A template's ten seconds would make most of this part's time.
_TEMPLATE_SECONDS = 0.5


class _Target(NamedTuple):
    """What is drawn, what is done with it, and how often."""

    drawn: st.SearchStrategy[Any]
    case: Callable[[Any], Any]
    examples: int


def pieces(*, short: bool) -> list[str]:
    """Return the targets' names."""
    return list(TARGETS)


@contextlib.contextmanager
def opened(output: Path, *, short: bool) -> Iterator[Callable[[str], Iterator[Row]]]:
    """Give a function that yields the row of a target. The same cases are drawn every time."""
    environment = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ["XDG_CACHE_HOME"] = os.environ["LITE_DIL_CACHE"] = str(output / "cache")
    before, template_costs.MOST_SECONDS = template_costs.MOST_SECONDS, _TEMPLATE_SECONDS
    here = Path.cwd()
    (deep := output / "a" / "b" / "c" / "d" / "e").mkdir(parents=True)
    os.chdir(deep)  # names without a folder are looked for here; five times ".." is the output
    try:
        targets = _targets(output)

        def take(name: str) -> Iterator[Row]:
            target = targets[name]
            yield _tried(name, target, output, _SHORT[target.examples] if short else target.examples)

        yield take
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
        template_costs.MOST_SECONDS = before


def _tried(what: str, target: _Target, folder: Path, examples: int) -> Row:
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    start = time.process_time()

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)
    @given(target.drawn)
    def run(drawn: Any) -> None:
        try:
            outcomes[watched(lambda: target.case(drawn), folder)] += 1
        except Exception:
            outcomes["failed"] += 1
            raise

    try:
        run()
    except Exception as error:  # whatever a case raises that is no message is what this looks for
        failures += map(_told, getattr(error, "exceptions", [error]))  # several are a group
    return Row("hostile", what, outcomes, failures, time.process_time() - start)


def _told(error: BaseException) -> str:
    """Return an error in a line, with where it was raised and the smallest case that raises it."""
    trace, place = error.__traceback__, ""
    while trace:
        if "lite_dil" in (name := trace.tb_frame.f_code.co_filename) or "backends" in name:
            place = f"{Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    example = " ".join(getattr(error, "__notes__", [""])[0].split())
    return f"{type(error).__name__} at {place}: {str(error)[:300]!r}; {example[:500]!r}"


def _targets(folder: Path) -> dict[str, _Target]:
    model, data, run = folder / "model", folder / "rows.jsonl", folder / "run"
    make_model(model)
    write_rows(data, 8)
    (model / "strange.py").write_text("raise SystemExit('run')\n", encoding="utf-8")  # what auto_map names below
    (folder / "prompts.jsonl").write_text('{"prompt": "Is it?"}\n', encoding="utf-8")
    _quietly("train", "--model", model, "--data", data, "--output-dir", run, "--max-steps", 1, *_TINY)
    cases = _Cases(folder)
    config, adapter = (
        json.loads(path.read_text("utf-8")) for path in (model / "config.json", run / "adapter/adapter_config.json")
    )
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    configs = inputs.objects(config | {"auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}})
    settled = st.sampled_from([*_RUN_FILES, *_RUN_FILES[:3]]).flatmap(
        lambda name: st.tuples(st.just(name), cases.damaged((run / name).read_bytes(), name.endswith(".json")))
    )
    return dict(
        zip(
            TARGETS,
            [
                _Target(inputs.files_of_rows(), cases.rows, PURE),
                _Target(TEMPLATES, cases.template, PURE),
                _Target(inputs.YAML, cases.options, PURE),
                _Target(st.tuples(inputs.NAMES, st.integers(0, 9)), cases.name, PURE),
                _Target(settled, cases.listed, PURE),
                _Target(inputs.files_of_rows(), cases.data, LOADED),
                _Target(inputs.YAML, cases.planned_by, LOADED),
                _Target(settled, cases.resumed, LOADED),
                _Target(st.tuples(inputs.objects(adapter), inputs.broken(weights)), cases.adapter, LOADED),
                _Target(configs, cases.planned, LOADED),
                _Target(configs, cases.loaded, LOADED),
            ],
            strict=True,
        )
    )


_TINY = ("--backend", "cpu", "--report-samples", "0", "--batch-size", "2", "--dtype", "float32")
_RUN_FILES = (
    *("config.yaml", "metrics.jsonl", "report.json", "checkpoints/step-1/progress.json", "checkpoints/step-1/digests.json"),
    *("adapter/adapter_config.json", "adapter/digests.json"),
)


def _quietly(*argv: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main([str(word) for word in argv])
    assert code == 0


class _Cases:
    """What is done with each thing that is drawn, below one folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder, self.model, self.pairs, self.run = folder, folder / "model", folder / "rows.jsonl", folder / "run"
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.copy = folder / "copy"

    def command(self, *argv: object) -> int:
        """Run a command line."""
        return main([str(word) for word in argv])

    def rows(self, drawn: tuple[str, bytes]) -> None:
        """Read a file as training does."""
        name, content = drawn
        (path := self.folder / f"drawn-{name}").write_bytes(content)
        read_rows(str(path))

    def data(self, drawn: tuple[str, bytes]) -> int:
        """Show a file as `lite-dil data` does."""
        name, content = drawn
        (path := self.folder / f"drawn-{name}").write_bytes(content)
        return self.command("data", path, "--model", self.model)

    def template(self, text: str) -> None:
        """Render a conversation."""
        from lite_dil.base.errors import UserError
        from lite_dil.data.files import RowError

        self.tokenizer.chat_template = text
        try:
            Rendering(self.tokenizer).prompt([{"role": "user", "content": "Is it?"}])
        except RowError as error:
            raise UserError(str(error)) from None

    def options(self, text: str) -> None:
        """Read a file of options."""
        path = self.folder / "options.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        read_yaml(path)

    def planned_by(self, text: str) -> int:
        """Plan with a file of options."""
        path = self.folder / "options.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return self.command("plan", "--config", path, "--model", self.model, "--data", self.pairs, "--backend", "cpu")

    def name(self, drawn: tuple[str, int]) -> int:
        """Give a name to a command that takes one."""
        name, command = drawn
        commands = (
            ("data", name, "--model", self.model),
            ("data", self.pairs, "--model", name),
            ("data", self.pairs, "--model", self.model, "--columns", name, "--eval-data", name),
            ("train", "--data", self.pairs, "--model", self.model, "--resume", name),
            ("train", "--data", name, "--model", self.model, "--output-dir", self.run),
            ("train", "--data", self.pairs, "--model", self.model, "--output-dir", self.pairs, "--init-adapter", name),
            ("runs", name),
            ("plan", "--config", name),
            ("generate", name, "--adapter", name, "--output", self.run),
            ("export", "--adapter", self.run, "--format", name, "--output", name),
        )
        return self.command(*commands[command])

    def listed(self, drawn: tuple[str, bytes]) -> int:
        """List a run of which a file was changed."""
        path, content = self.run / drawn[0], drawn[1]
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            return self.command("runs", self.folder)
        finally:
            path.write_bytes(before)

    def resumed(self, drawn: tuple[str, bytes]) -> int:
        """Resume a copy of a run in which a file was changed."""
        shutil.rmtree(copy := self.folder / "copied", ignore_errors=True)
        shutil.copytree(self.run, copy)
        (copy / drawn[0]).write_bytes(drawn[1])
        return self.command("train", "--resume", copy)

    def adapter(self, drawn: tuple[dict[str, Any], bytes]) -> int:
        """Generate with an adapter."""
        config, weights = drawn
        shutil.rmtree(self.copy, ignore_errors=True)
        self.copy.mkdir()
        (self.copy / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        (self.copy / "adapter_model.safetensors").write_bytes(weights)
        (answers := self.folder / "answers.jsonl").unlink(missing_ok=True)
        flags = ("--adapter", self.copy, "--model", self.model, "--backend", "cpu", "--max-new-tokens", 1)
        return self.command("generate", self.folder / "prompts.jsonl", *flags, "--output", answers)

    def planned(self, config: dict[str, Any]) -> int:
        """Plan with a model's config alone."""
        return self.command("plan", "--model", self._with(config), "--data", self.pairs, "--backend", "cpu")

    def loaded(self, config: dict[str, Any]) -> int:
        """Generate with the model."""
        (answers := self.folder / "answers.jsonl").unlink(missing_ok=True)
        flags = ("--model", self._with(config), "--backend", "cpu", "--max-new-tokens", 1)
        return self.command("generate", self.folder / "prompts.jsonl", *flags, "--output", answers)

    def _with(self, config: dict[str, Any]) -> Path:
        """Return a model's folder with another config.json."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.model, self.copy)
        (self.copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return self.copy

    @staticmethod
    def damaged(content: bytes, is_json: bool) -> st.SearchStrategy[bytes]:
        """Draw another content of a run's file: its bytes broken or, of JSON, its values changed."""
        bytes_broken = inputs.broken(content)
        if not is_json:
            return bytes_broken
        return bytes_broken | inputs.objects(json.loads(content)).map(lambda value: json.dumps(value).encode())
