"""What programs that run an export feed the model and where they end its answers, against what training did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer
from gguf import GGUFReader
from test_gguf import READERS, read_by
from tokenizers import processors
from trainings import export
from transformers import AutoTokenizer, GenerationConfig

from lite_dil.base.errors import UserError
from lite_dil.cli.main import main
from lite_dil.export import gguf_reading, gguf_vocabulary, merge
from lite_dil.models.find import load_tokenizer

Trainer = Callable[..., Path]
ASK = [{"role": "user", "content": "how do you make tea"}]
# The base ends in <|endoftext|>, 0, which its tokenizer also puts in front of a text. ChatML prints neither, and ends a
# turn in <|im_end|>, 2.
EOS, END = 0, 2
COSTLY = "{{ 'a' * 2 ** 27 }}"


@pytest.fixture(scope="session")
def other_end(tiny: str, shared: Any) -> str:
    def make(folder: Path) -> None:
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        tokenizer = byte_level_tokenizer()
        tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOS)]
        )
        tokenizer.save_pretrained(folder)
        for file in ("config.json", "generation_config.json"):
            content = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(content | {"eos_token_id": EOS, "pad_token_id": EOS}))

    return str(shared("other-end", make))


@pytest.fixture(scope="session")
def prompt(other_end: str) -> list[int]:
    """As transformers lays it out."""
    tokenizer = AutoTokenizer.from_pretrained(other_end)
    assert tokenizer("a").input_ids[0] == EOS
    found = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    assert found[0] == 1
    return list(found)


def test_transformers_and_mlx_lm_end_where_training_did(
    other_end: str, prompt: list[int], trained: Trainer, tmp_path: Path
) -> None:
    from lite_dil.backends.mlx import export as mlx_export
    from lite_dil.backends.torch import export as torch_export

    run = trained("--model", other_end, "--backend", "cpu")
    for format, library in (("merged", torch_export), ("mlx", mlx_export)):
        report = export(run, tmp_path / format, "--format", format)
        assert report["check"]["ok"] and report["check"]["faults"] == []
        assert GenerationConfig.from_pretrained(tmp_path / format).eos_token_id == [EOS, END]
        assert json.loads((tmp_path / format / "config.json").read_text())["eos_token_id"] == [EOS, END]
        with library.exported(tmp_path / format) as made:
            assert made.end_ids() == {EOS, END} and made.prompt(ASK) == prompt
            for token, ends in ((EOS, True), (END, True), (7, False)):
                assert made.ends_after(prompt, [9, 9, 9, 9, token]) == ends
            assert not made.ends_after(prompt, [9, END, 9, 9, END]), "before the last"
            tokenizer = made.tokenizer._tokenizer if format == "mlx" else made.tokenizer
            tokenizer.chat_template = COSTLY
            with pytest.raises(UserError, match="its chat template, line 1, makes more than 64 MB of text"):
                made.prompt(ASK)


@pytest.mark.parametrize("reader", READERS)
def test_llama_cpp_and_ollama_end_where_training_did(
    reader: str, other_end: str, prompt: list[int], trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_by(reader, monkeypatch)
    run = trained("--model", other_end, "--backend", "cpu")
    report = export(run, tmp_path / "out", "--format", "ollama", "--outtype", "f32")
    assert report["check"]["ok"] and report["check"]["faults"] == []
    file = tmp_path / "out" / "out.gguf"
    fields = {key: field.contents() for key, field in GGUFReader(file).fields.items()}
    assert fields["tokenizer.ggml.eos_token_id"] == EOS and fields["tokenizer.ggml.eot_token_id"] == END
    assert fields["tokenizer.ggml.eos_token_ids"] == [EOS, END] and fields["tokenizer.ggml.add_bos_token"] is False
    assert 'PARAMETER stop "<|im_end|>"\n' in (tmp_path / "out" / "Modelfile").read_text()
    with gguf_reading.opened(file, 64, load_tokenizer(other_end), print) as made:
        assert {EOS, END} <= made.end_ids() and made.prompt(ASK) == prompt
        for token, ends in ((EOS, True), (END, True), (7, False)):
            assert made.ends_after(prompt, [9, 9, 9, 9, token]) in (ends, None)
        fields = made.fields if reader == "transformers" else made.file.metadata
        fields["tokenizer.chat_template"] = COSTLY
        with pytest.raises(UserError, match="its chat template, line 1, makes more than 64 MB of text"):
            made.prompt(ASK)


def test_an_export_that_does_not_stop_or_is_fed_otherwise_is_refused(
    other_end: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = trained("--model", other_end, "--backend", "cpu")

    def refused(*flags: str) -> str:
        assert main(["export", "--adapter", str(run), "--output", str(tmp_path / "out"), *flags]) == 1
        report = json.loads((tmp_path / "out.refused" / "export.json").read_text())
        assert not report["check"]["ok"] and report["check"]["mean"] < 1e-2 and len(report["check"]["faults"]) == 1
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(merge, "_write_ends", lambda *_: None)
        assert "ended responses in '<|im_end|>', at which transformers does not stop" in refused("--format", "merged")
        assert "at which mlx-lm does not stop" in refused("--format", "mlx")
    monkeypatch.setattr(gguf_vocabulary, "puts_bos", lambda _: True)
    assert "feeds '<|endoftext|><|im_start|>user" in refused("--format", "gguf", "--outtype", "f32")


def test_a_template_has_the_arguments_of_training(tiny: str, tmp_path: Path) -> None:
    """Set in the exported template, whatever a program says; transformers renders both."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
        "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{{ names }}{{ nothing is none }}"
    )
    (model / "chat_template.jinja").write_text(template)
    arguments = {"enable_thinking": False, "names": ["a", {"b": None}], "nothing": None}
    checkpoint = merge.Checkpoint.open(model, "x")
    (tmp_path / "out").mkdir()
    merge.write(tmp_path / "out", [], checkpoint, None, [END], arguments)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    expected = before.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True, **arguments)
    assert expected.endswith("assistant\n['a', {'b': None}]True")
    for given in ({}, {"enable_thinking": True}):
        assert after.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True, **given) == expected
