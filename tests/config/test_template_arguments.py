"""--chat-template-kwargs: read, refused, kept in a run's config, followed by what uses the run, and written for others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import byte_level_tokenizer

from lite_dil.base.errors import UserError
from lite_dil.config import adapter_source
from lite_dil.config.options import build, read_yaml
from lite_dil.config.resume import check_same_run
from lite_dil.data.arguments import parse_arguments, read_arguments, with_arguments
from lite_dil.data.files import RowError
from lite_dil.data.prompts import Prompt, key_of
from lite_dil.reports.card_use import how_to_use

OFF = '{"enable_thinking": false}'
USER = {"role": "user", "content": "tea"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "is a list; expected a JSON object such as"),
        ('"on"', "is text; expected a JSON object"),
        ("enable_thinking=false", "not valid JSON"),
        ('{"a": NaN}', "NaN and Infinity are not JSON"),
        ('{"messages": []}', "messages cannot be set"),
        ('{"tokenize": true, "add_generation_prompt": false}', "add_generation_prompt, tokenize cannot be set"),
        ('{"a b": 1}', "'a b' is not a name"),
        ('{"none": 1}', "'none' is not a name"),
    ],
)
def test_what_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"--chat-template-kwargs.*{re.escape(problem)}"):
        build({"chat_template_kwargs": text}, {})
    with pytest.raises(RowError, match=f"field 'chat_template_kwargs'.*{re.escape(problem)}"):
        read_arguments({"chat_template_kwargs": text})


def test_a_rows_own_may_be_an_object_or_its_text() -> None:
    for value in ({"a": 1}, '{"a": 1}'):
        assert read_arguments({"chat_template_kwargs": value}) == {"a": 1}
    for value in (None, "", {}, "{}"):
        assert read_arguments({"chat_template_kwargs": value}) is None


def test_a_file_of_options_and_resuming(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("chat_template_kwargs:\n  enable_thinking: false\n  effort: low\n")
    config = build({}, read_yaml(path))
    assert config.chat_template_kwargs == '{"effort": "low", "enable_thinking": false}'
    saved = config.as_dict()
    check_same_run(build({"chat_template_kwargs": '{"enable_thinking":false, "effort":"low"}'}, {}), saved, "run")
    with pytest.raises(
        UserError, match=r"--chat-template-kwargs is \{\"effort\": \"high\"\}, but the run has \{\"effort\": \"low\""
    ):
        check_same_run(build({"chat_template_kwargs": '{"effort": "high"}'}, {}), saved, "run")
    assert build({"chat_template_kwargs": "{}"}, {}).chat_template_kwargs is None
    del saved["chat_template_kwargs"]  # a run of before goes on
    check_same_run(build({}, {}), saved, "run")


@pytest.mark.parametrize("given", [{}, {"backend": "cpu", "dtype": "float32"}])
def test_what_uses_a_run_feeds_what_it_was_trained_on(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"chat_template_kwargs": OFF, "backend": "mlx", "model": "m"}))
    assert adapter_source.find(str(tmp_path), given).options.chat_template_kwargs == OFF
    own = adapter_source.find(str(tmp_path), given | {"chat_template_kwargs": '{"enable_thinking": true}'})
    assert own.options.chat_template_kwargs == '{"enable_thinking": true}'


def test_prompts_are_told_apart_by_their_arguments() -> None:
    plain, off = Prompt([USER], ""), Prompt([USER], "", arguments=json.loads(OFF))
    assert plain.key != off.key == key_of(off.row(completion="a drink"))
    assert off.row()["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in plain.row()


def test_a_template_with_its_arguments() -> None:
    """An exported template prints what was trained on, whatever a caller sets."""
    values = {"flag": False, "nothing": None, "text": 'a "b"\n{{ é🙂 }}', "many": [1, 2.5, {"k": None, "t": True}]}
    template = (
        "\n  {% if true %}{{ [flag, nothing, text, many] }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    told = tokenizer.apply_chat_template([USER], tokenize=False, **values)
    tokenizer.chat_template = with_arguments(template, values)
    assert tokenizer.apply_chat_template([USER], tokenize=False) == told
    assert tokenizer.apply_chat_template([USER], tokenize=False, flag=True) == told
    assert with_arguments(template, {}) == template


@pytest.mark.parametrize("kind", ["peft", "mlx-lm", "merged"])
def test_the_cards_code_has_them(kind: str, tmp_path: Path) -> None:
    options = {"chat_template_kwargs": OFF, "backend": "cpu"}
    assert "add_generation_prompt=True, enable_thinking=False" in how_to_use(kind, tmp_path, "owner/base", options, {})
    assert parse_arguments(None) == {}
