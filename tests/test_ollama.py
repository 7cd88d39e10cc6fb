"""The Modelfile: a Go template that lays out conversations as the model's own chat template does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, LLAMA2, byte_level_tokenizer, sentencepiece_tokenizer

from lite_dil.errors import UserError
from lite_dil.ollama import _conversations, _renderer, probe, write_modelfile

LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ s }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are \"\"\"Tiny\"\"\" {{ '{{' }}."
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
TEMPLATES = {
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
    layout, render = probe(tokenizer), _renderer(tokenizer)
    for talk in _conversations(name not in NO_SYSTEM):
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) if name != "llama 3" else None
        assert layout.render(talk) == render(talk, True)
        if text is not None:  # the runtime puts the BOS token there
            assert (tokenizer.bos_token if bos and text.startswith(tokenizer.bos_token) else "") + layout.render(talk) == text
    assert (layout.system is None and layout.in_last is None) == (name in NO_SYSTEM)
