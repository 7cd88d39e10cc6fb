"""Chat templates of strangers: rendered as transformers does, and stopped where they would stall or fill the memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_templates import KINDS, tokenizer_of
from transformers.utils.chat_template_utils import render_jinja_template

from lite_dil.base.errors import UserError
from lite_dil.cli.main import main
from lite_dil.data import template_costs, templates
from lite_dil.data.rendering import Rendering

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}}]
USER, SAYS = {"role": "user", "content": "Is it wärm? 🙂"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nNo."}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Bonn", "days": [1, 2]}}}
TALKS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be short."}, USER, SAYS, USER],
    [USER, {"role": "assistant", "content": "No.", "reasoning": "hm", "name": None}],
    [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "3"},
        {"role": "assistant", "content": "Three."},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "Is it?"}]}],
    [USER, SAYS] * 20,
]


def given() -> dict[str, str]:
    """Templates of some 60 models, as TRL has them, and the tests' own."""
    found = {name: kind.template for name, kind in KINDS.items()}
    if sys.version_info >= (3, 11):  # TRL is not installed below it
        import trl

        found |= {path.stem: path.read_text("utf-8") for path in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
        assert len(found) > 60
    return found


def test_every_template_prints_what_transformers_prints() -> None:
    printed = 0
    for name, template in given().items():
        for messages in TALKS:
            for tools, prompt, more in [(None, True, {}), (TOOLS, False, {"enable_thinking": False})]:
                variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": prompt, "tools": tools, **more}
                texts = []
                for theirs in (True, False):
                    try:
                        if theirs:
                            text = render_jinja_template([messages], chat_template=template, **variables)[0][0]
                        else:
                            text = templates.render(template, messages, variables)
                    except templates.REFUSALS as error:
                        text = repr(error)
                    texts.append(text)
                if "strftime_now" not in template:
                    assert texts[0] == texts[1], (name, messages)
                printed += USER["content"][:4] in texts[1]
    assert printed > len(given()) * 5


# A number that means one: each of these would take minutes or gigabytes.
N = 10**9
DOUBLED = "{%% set ns = namespace(x='aaaaaaaa', l=[1], d={}, t=(1,)) %%}{%% for i in range(99) %%}{%% set %s %%}{%% endfor %%}"
COSTS = {
    "power": "{{ 2 ** (10**9) }}",
    "product": f"{{{{ 'a' * {N} }}}}",
    "product the other way": f"{{{{ {N} * 'a' }}}}",
    "list": f"{{{{ ([1] * {N}) | length }}}}",
    "text in loops": "{% for a in range(99999) %}{% for b in range(99999) %}" + "a" * 99 + "{% endfor %}{% endfor %}{{ 0 }}",
    "macros": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested brackets": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "concatenation": DOUBLED % "ns.x = ns.x ~ ns.x",
    "sum": DOUBLED % "ns.x = ns.x + ns.x",
    "replacement": DOUBLED % "ns.x = ns.x | replace('a', 'aa')",
    "replacement by method": DOUBLED % "ns.x = ns.x.replace('a', ns.x)",
    "join": DOUBLED % "ns.x = [ns.x, ns.x] | join(ns.x)",
    "join by method": DOUBLED % "ns.x = ns.x.join([ns.x, ns.x])",
    "join of letters": DOUBLED % "ns.x = ns.x.join(ns.x)",
    "list of lists": DOUBLED % "ns.l = [ns.l, ns.l]" + "{{ ns.l }}",
    "dict of dicts": DOUBLED % "ns.d = dict(a=ns.d, b=ns.d)" + "{{ ns.d | tojson }}",
    "tuple of tuples": DOUBLED % "ns.t = (ns.t, ns.t)" + "{{ ns.t }}",
    "block": "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 99,
    "block of a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLED % "ns.x = f(ns.x)",
    "width": f"{{{{ '%{N}d' % 1 }}}}",
    "width from a value": f"{{{{ '%*d' % ({N}, 1) }}}}",
    "width of a format": f"{{{{ '{{:{{}}}}'.format(1, {N}) }}}}",
    "width by a filter": f"{{{{ '%{N}d' | format(1) }}}}",
    "ljust": f"{{{{ 'a'.ljust({N}) }}}}",
    "indent": f"{{{{ ['a\na'] | map('indent', {N}) | list }}}}",
    "batch": f"{{{{ [1] | batch({N}, 'a') | list }}}}",
    "round": f"{{{{ 1 | round({N}, 'ceil') }}}}",
    "json": f"{{{{ [[1]] | tojson(indent={N}) }}}}",
    "division": "{{ (('f' * 9999999) | int(base=16)) // 3 }}",
    "one text many times": "{{ range(99999) | map(attribute='z', default='a' * 9999999) | join | length }}",
    "slices": "{% set x = 'a' * 60000000 %}" + "{% set y = x[1:] %}" * 500,
    "search": "{% set x = 'a' * 20000000 %}{{ x.rfind('b' + 'a' * 10000000) }}",
    "long text": "a" * 200_000,
}


@pytest.mark.parametrize("case", COSTS)
def test_a_template_that_would_fill_the_memory_is_stopped(case: str) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template, tokenizer.name_or_path = COSTS[case], "models/strange"
    with pytest.raises(
        UserError, match=r"^models/strange: its chat template(, line \d,)? (makes|asks|calls|needs|has) .*; correct"
    ):
        Rendering(tokenizer).prompt([USER])


@pytest.mark.parametrize(
    "template",
    [
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% set y = a == b %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set a = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_takes_long_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_costs, "MOST_SECONDS", 0.1)
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = "{{ messages[0].content }}\n" + template
    with pytest.raises(UserError, match=r"line 2, takes more than 0\.1 seconds"):
        Rendering(tokenizer).prompt([USER])


def test_a_long_conversation_may_take_more() -> None:
    """128 MB, though a template may make 64 of a short one."""
    text = templates.render("{% for m in messages %}{{ m.content + '!' }}{% endfor %}", [{"content": "a" * 2**27}], {})
    assert len(text) == 2**27 + 1


@pytest.mark.parametrize(
    "template",
    [
        *(
            "{{ ''.__class__.__mro__ }}",
            "{{ '\\t'.expandtabs(9) }}",
            "{{ ('\\t' | attr('expandtabs'))(9) }}",
            "{{ 'a' | urlize }}",
        ),
        *(
            "{% include '/etc/passwd' %}",
            "{{ namespace(__class__=1) }}",
            "{{ raise_exception('no') }}",
            "{{ [].append(1) }}",
            "{{ 'abc' | truncate(0) }}",
        ),
    ],
)
def test_what_a_template_may_not_do_refuses_the_row(template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "vocab_size": 512}', encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"prompt": [USER], "chosen": [SAYS], "rejected": [{**SAYS, "content": "Yes."}]}), encoding="utf-8"
    )
    assert main(["data", str(rows), "--model", str(tmp_path / "model")]) == 2
    assert "line 1: the model's chat template refuses these messages: " in capsys.readouterr().out
