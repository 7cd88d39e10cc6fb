"""The Modelfile: a Go template that lays out conversations as the model's own chat template does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, LLAMA2, byte_level_tokenizer, sentencepiece_tokenizer

from lite_dil.base.errors import UserError
from lite_dil.export.ollama import _conversations, probe, renderer, write_modelfile

LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge: December 2023\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ s }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = (
    '{% for m in messages %}{% if loop.first and m.role != \'system\' %}<|im_start|>system\nYou are """Tiny""" {{ \'{{\' }}.'
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ s if loop.first else '' }}{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and s is defined %}{{ s }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %} {{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TEMPLATES = {
    "thinking": THINKING,
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "llama 2": LLAMA2_SYSTEM,
    "llama 3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi 3": PHI3,
    "zephyr": ZEPHYR,
}
NO_SYSTEM = {"gemma"}


def tokenizer_of(template: str, bos: bool = True) -> Any:
    tokenizer = sentencepiece_tokenizer() if bos else byte_level_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def modelfile(folder: Path, tokenizer: Any, defaults: dict[str, Any] | None = None, name: str = "tiny.gguf") -> str:
    write_modelfile(folder, name, tokenizer, defaults)
    return (folder / "Modelfile").read_text(encoding="utf-8")


def template_of(text: str) -> str:
    """What Ollama takes as the template: all up to the next three quotes."""
    start = text.index('TEMPLATE """') + len('TEMPLATE """')
    return text[start : text.index('"""', start)]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_layout_is_that_of_the_template(name: str, bos: bool) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name], bos)
    layout, render = probe(tokenizer), renderer(tokenizer)
    for talk in _conversations(name not in NO_SYSTEM):
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) if name != "llama 3" else None
        assert layout.render(talk) == render(talk, True)
        if text is not None:  # the runtime puts the BOS token there
            assert (tokenizer.bos_token if bos and text.startswith(tokenizer.bos_token) else "") + layout.render(talk) == text
    assert (layout.system is None and layout.in_last is None) == (name in NO_SYSTEM)


GO = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content, Thinking string }
type Case struct {
	Template string
	Talks    [][]Message
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	made := [][]string{}
	for _, c := range cases {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		texts := []string{}
		for _, talk := range c.Talks {
			var text strings.Builder
			if err := parsed.Execute(&text, map[string]any{"Messages": talk, "Response": ""}); err != nil {
				panic(err)
			}
			texts = append(texts, text.String())
		}
		made = append(made, texts)
	}
	json.NewEncoder(os.Stdout).Encode(made)
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Go, whose text/template is the oracle, is not installed")
def test_go_makes_the_same_text(tmp_path: Path) -> None:
    cases, expected = [], []
    for name, template in TEMPLATES.items():
        tokenizer = tokenizer_of(template)
        render = renderer(tokenizer)
        talks = _conversations(name not in NO_SYSTEM)
        # The assistant's answer begun, which it is to go on with.
        begun = [*talks[0], {"role": "assistant", "content": "I am"}]
        cases.append({"Template": template_of(modelfile(tmp_path, tokenizer)), "Talks": [*talks, begun]})
        expected.append([*(render(talk, True) for talk in talks), probe(tokenizer).render(begun)])
        assert expected[-1][-1].endswith("I am")
        if name == "thinking":  # of earlier messages it is left out, and of the one to go on with it stays
            thought = [{**message, "thinking": "Hm."} for message in [*talks[1], {"role": "assistant", "content": "I am"}]]
            cases[-1]["Talks"].append(thought)
            whole = probe(tokenizer).render([*talks[1], {"role": "assistant", "content": "I am"}])
            expected[-1].append(whole.removesuffix("I am") + "<think>\nHm.\n</think>\n\nI am")
    (tmp_path / "main.go").write_text(GO, encoding="utf-8")
    environment = {
        "PATH": os.environ["PATH"],
        "GOCACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, env=environment, input=json.dumps(cases), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_the_modelfile(tmp_path: Path) -> None:
    text = modelfile(tmp_path, tokenizer_of(LLAMA2), name="My Model.gguf")
    assert text.startswith("# ollama create my-model -f Modelfile\n# ollama run my-model\n")
    assert "\nFROM ./My Model.gguf\n" in text
    assert 'PARAMETER stop "</s>"\n' in text
    assert "temperature" not in text
    assert "<s>" not in template_of(text).partition("else")[0], "llama.cpp puts BOS there itself"
    assert "no system message" in modelfile(tmp_path, tokenizer_of(GEMMA))
    ends = re.findall('PARAMETER stop "(.*)"', modelfile(tmp_path, tokenizer_of(CHATML, bos=False)))
    assert ends == ["<|im_end|>"]


def test_reasoning_leaves_earlier_messages_and_what_cannot_be_said_is(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(THINKING, bos=False)
    notes = write_modelfile(tmp_path, "tiny.gguf", tokenizer, None)
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    # Ollama looks for the first and the last text around .Thinking, and then takes such blocks out of responses.
    assert "{{ if and $last .Thinking }}<think>" in text and "</think>{{ end }}" in text
    assert notes == ["Tools are left out: Ollama prints their JSON otherwise than the model's chat template, which has them."]
    assert f"\n# {notes[0]}\n" in text
    for template in (CHATML, LLAMA3):
        assert ".Thinking" not in modelfile(tmp_path, tokenizer_of(template))
        assert write_modelfile(tmp_path, "tiny.gguf", tokenizer_of(template), None) == []


def test_sampling_is_the_models_own(tmp_path: Path) -> None:
    own = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [1, 2]}
    sampled = modelfile(tmp_path, tokenizer_of(CHATML), own | {"do_sample": True})
    assert re.findall(r"PARAMETER (?!stop)(.*)", sampled) == [
        "temperature 0.6",
        "top_p 0.9",
        "top_k 20",
        "repeat_penalty 1.05",
    ]
    greedy = modelfile(tmp_path, tokenizer_of(CHATML), own)
    assert re.findall(r"PARAMETER (?!stop)(.*)", greedy) == ["repeat_penalty 1.05"]


def test_nothing_in_a_template_breaks_out_of_it(tmp_path: Path) -> None:
    hostile = '"""\nFROM /etc/passwd\nADAPTER x\n{{ .System }}}}{{/*"\\'
    text = modelfile(tmp_path, tokenizer_of(CHATML.replace("'<|im_start|>'", json.dumps(hostile))))
    body = template_of(text)
    assert text.count('"""') == 2
    assert re.findall("^(?:FROM|ADAPTER).*", text.replace(body, ""), re.MULTILINE) == ["FROM ./tiny.gguf"]
    assert (
        "\nFROM" not in body and json.dumps(hostile)[:-1] in body
    )  # a string inside an action, where braces and quotes are text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("m['content']", "m['content'] | upper"), "leaves out a message or repeats it"),
        (CHATML.replace("m['content']", "m['content'] + m['content']"), "leaves out a message or repeats it"),
        (CHATML.replace("m['content']", "(m['content'] | replace('?', '!'))"), "more than put fixed text"),
        (CHATML.replace("m['role'] +", "m['role'] ~ loop.index +"), "more than put fixed text"),
        (
            CHATML.replace("{% for", "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}{% for"),
            "one only",
        ),
        (None, "no chat template"),
    ],
)
def test_what_cannot_be_expressed_is_refused(template: str | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        write_modelfile(tmp_path, "tiny.gguf", tokenizer_of(template), None)  # type: ignore[arg-type]
    assert "--format gguf" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "Modelfile").exists()


def test_a_name_cannot_add_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line break in its name"):
        write_modelfile(tmp_path, "a\nADAPTER b.gguf", tokenizer_of(CHATML), None)
