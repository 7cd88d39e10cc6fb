"""A model folder whose tokenizer or config is damaged, or was written to do harm: one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs

from lite_dil.cli.main import main


def changed(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | values)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", lambda text: text[:1000]),
        ("tokenizer.json", lambda text: ""),
        ("tokenizer.json", changed(model={"type": "BPE", "vocab": {"a": -1}, "merges": []})),
        ("tokenizer.json", changed(added_tokens=[{"content": "a"}])),
        ("tokenizer.json", changed(truncation=True)),
        ("tokenizer_config.json", changed(tokenizer_class=["x"])),
        ("tokenizer_config.json", changed(pad_token=5)),
        ("tokenizer_config.json", changed(eos_token={})),
        ("config.json", changed(num_attention_heads="two")),
        ("config.json", changed(hidden_act=None)),
        ("config.json", changed(vocab_size=[512])),
    ],
)
@pytest.mark.parametrize("backend", ["", "cpu", "mlx"])
def test_a_damaged_model_folder_is_one_message(
    file: str, change: Callable[[str], str], backend: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, model := tmp_path / "model")
    (model / file).write_text(change((model / file).read_text(encoding="utf-8")), encoding="utf-8")
    write_pairs(pairs := tmp_path / "pairs.jsonl")
    flags = ["--data", str(pairs), "--model", str(model)]
    if not backend:
        code = main(["data", str(pairs), "--model", str(model)])
    else:
        code = main(["train", *flags, "--backend", backend, "--output-dir", str(tmp_path / "run"), "--max-steps", "1"])
    assert code == 2 and not (tmp_path / "run").exists()
    said = capsys.readouterr().err
    assert f"--model {model}" in said and len(said.splitlines()) < 6
