"""Python files that a model's folder brings: run only with --trust-remote-code, whatever is typed and whatever a file says."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers.dynamic_module_utils
import warm
import yaml

import lite_dil as dil
from lite_dil.cli.main import main
from lite_dil.config.options import read_yaml

_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

from mlx_lm.models.llama import Model, ModelArgs
"""


class Folder:
    """A model whose tokenizer, class or MLX module is in the folder's own file; `ran` once that file was run."""

    def __init__(self, path: Path, tiny: str, what: str) -> None:
        self.path, self._marker = path, path.parent / "ran"
        shutil.copytree(tiny, path)
        (path / "own.py").write_text(_CODE.format(marker=str(self._marker)))
        if what == "tokenizer":
            self._change(
                "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}
            )
        elif what == "model":
            names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
            self._change("config.json", model_type="own", auto_map=names)
        else:
            self._change("config.json", model_file="own.py")

    def _change(self, name: str, **changes: Any) -> None:
        content = json.loads((self.path / name).read_text()) | changes
        (self.path / name).write_text(json.dumps(content))

    @property
    def ran(self) -> bool:
        return self._marker.exists()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"{n} and", "chosen": f" {n} is it", "rejected": f" {n} was"} for n in range(4)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


def train(folder: Folder, rows: Path, run: Path, backend: str, *more: str) -> int:
    names = ("--model", str(folder.path), "--backend", backend, "--max-steps", "1", "--report-samples", "0")
    return main(["train", str(rows), *names, "--output-dir", str(run), *more])


@pytest.mark.parametrize(("what", "backend"), [("tokenizer", "cpu"), ("model", "cpu"), ("module", "mlx")])
def test_it_runs_with_the_flag_alone(
    what: str,
    backend: str,
    tiny: str,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Folder(tmp_path / "model", tiny, what)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    assert train(folder, rows, tmp_path / "run", backend) == 2
    said = capsys.readouterr().err
    assert "--trust-remote-code" in said and len(said.strip().splitlines()) == 1, said
    assert not folder.ran

    config = tmp_path / "config.yaml"
    config.write_text("trust_remote_code: true\n")
    assert train(folder, rows, tmp_path / "run", backend, "--config", str(config)) == 2
    assert "on the command line" in capsys.readouterr().err and not folder.ran

    assert train(folder, rows, tmp_path / "run", backend, "--trust-remote-code") == 0
    assert folder.ran and "--trust-remote-code: Python files" in capsys.readouterr().err
    saved = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["trust_remote_code"] is True
    assert read_yaml(saved)["trust_remote_code"] is False

    # The run's record of it grants nothing.
    folder._marker.unlink()
    shutil.rmtree(tmp_path / "modules", ignore_errors=True)
    generate = ["generate", str(rows), "--adapter", str(tmp_path / "run"), "--output", str(tmp_path / "out.jsonl")]
    assert main(generate) == 2
    assert "--trust-remote-code" in capsys.readouterr().err and not folder.ran
    if what == "tokenizer":
        with pytest.raises(dil.UserError, match="--trust-remote-code"):
            dil.load(folder.path, backend="cpu")
        assert not folder.ran


def test_it_is_not_asked_for_on_a_terminal(tiny: str, rows: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "model", tiny, "tokenizer")
    process, terminal = warm.on_terminal(["data", str(rows), "--model", str(folder.path)])
    os.write(terminal, b"y\n" * 9)
    assert process.wait() == 2
    assert not folder.ran
    said = os.read(terminal, 65536).decode()
    assert "--trust-remote-code" in said and "[y/N]" not in said
    os.close(terminal)


def test_every_loader_is_told() -> None:
    root = Path(dil.__file__).parent
    untold = []
    for path in (*root.rglob("*.py"), *(root.parent / "backends").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            loads = (name.endswith(("from_pretrained", "from_config")) and name.startswith("Auto")) or name == "load_model"
            if loads and not {"trust_remote_code", "options"} & set(re.findall(r"\w+", ast.unparse(call))):
                untold.append(f"{path.name}:{call.lineno} {name}")
    assert not untold
