"""Small chat templates of the kinds that models of 2026 have, each with the tokens that it needs."""

from __future__ import annotations

from typing import NamedTuple

from conftest import CHATML, byte_level_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast


class Kind(NamedTuple):
    """A template.

    Attributes:
        header: what it prints in front of the last response, reasoning included.
        lead: what a response without reasoning begins with, behind the generation prompt.
        end: what ends that response; empty if it prints nothing.
        special, ordinary: further tokens.
        system: whether it takes a system message.
    """

    template: str
    header: str = "<|im_start|>assistant\n"
    lead: str = ""
    end: str = "<|im_end|>"
    special: tuple[str, ...] = ()
    ordinary: tuple[str, ...] = ()
    system: bool = True


_CALLS = (
    "{% for call in m.tool_calls or [] %}{% set f = call.function %}<tool_call>\n"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
_TOOLS = "{% if tools %}<|im_start|>system\nTools:{% for t in tools %} {{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"

# The block of reasoning is printed for the last response only; an empty one where there is none.
QWEN3 = (
    "{%- set last = namespace(user=-1) -%}{%- for m in messages if m.role == 'user' -%}{%- set last.user = "
    "messages.index(m) -%}{%- endfor -%}" + _TOOLS + "{%- for m in messages -%}{%- set c = m.content or '' -%}"
    "{%- set r = m.reasoning_content or '' -%}"
    "{%- if m.role == 'assistant' and not r and '</think>' in c -%}"
    "{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > last.user and (loop.last or r) -%}"
    "{{ '<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif -%}{{ c }}" + _CALLS + "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
    "{%- endif -%}"
)
# Opens a block for generation; leaves a response as it is, and the reasoning out of earlier ones.
THINK_OPEN = (
    "{%- for m in messages -%}{%- set c = m.content -%}"
    "{%- if '</think>' in c and not loop.last -%}{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"
)
# Like Qwen 3.5: opens a block for generation, and prints one with every response.
THINK_ALWAYS = (
    "{%- for m in messages -%}{%- set c = m.content | trim -%}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' -%}{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif -%}"
    "{{ c + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"
)
# Like Nemotron 3: the block is <think></think> where there is no reasoning.
NEMOTRON = (
    "{%- for m in messages -%}{%- set c = m.content -%}{%- if m.role == 'assistant' -%}"
    "{%- if m.reasoning_content -%}{%- set c = '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n' ~ c -%}"
    "{%- elif '<think>' not in c and '</think>' not in c -%}{%- set c = '<think></think>' ~ c -%}{%- endif -%}"
    "{%- set c = c | trim -%}{%- endif -%}{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}{%- endif -%}"
)
# Like R1's: takes the reasoning out of every response, and opens a block for generation.
R1 = (
    "{%- for m in messages -%}{%- set c = m.content -%}{%- if m.role == 'user' -%}{{ '<|User|>' + c }}"
    "{%- elif m.role == 'assistant' -%}{{ '<|Assistant|>' + c.split('</think>')[-1] }}"
    "{%- for call in m.tool_calls or [] -%}{{ '<|call|>' + call.function.name + call.function.arguments }}{%- endfor -%}"
    "{{ '<|eos|>' }}{%- else -%}{{ c }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\\n' }}{%- endif -%}"
)
# Like DeepSeek V3.1: a closer alone, in front of each response; `thinking` opens a block for generation.
DEEPSEEK = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<|User|>' + m.content }}"
    "{%- elif m.role == 'assistant' -%}{{ '<|Assistant|></think>' + m.content.split('</think>')[-1] + '<|eos|>' }}"
    "{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{ '<|Assistant|>' + ('<think>' if thinking else '</think>') }}{%- endif -%}"
)
HARMONY = (
    "{{ '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' and m.tool_calls -%}{%- set f = m.tool_calls[0].function -%}"
    "{%- if m.thinking -%}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif -%}"
    "{{ '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}"
    "{{ f.arguments | tojson + '<|call|>' }}"
    "{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt -%}"
    "{%- if 'thinking' in m -%}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif -%}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- elif m.role == 'assistant' -%}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"
)
GEMMA = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)
# Like Gemma 4: an empty channel of thought behind the generation prompt, and in no conversation.
GEMMA4 = (
    "{%- for m in messages -%}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{%- for call in m.tool_calls or [] -%}{%- if m.reasoning_content -%}"
    "{{ '<|channel>thought\\n' + m.reasoning_content + '<channel|>' }}{%- endif -%}"
    "{{ '<|tool_call>call:' + call.function.name + call.function.arguments|tojson + '<tool_call|>' }}{%- endfor -%}"
    "{{ m.content.split('<channel|>')[-1] | trim + '<turn|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{ '<|turn>model\\n' + ('' if enable_thinking else '<|channel>thought\\n<channel|>') }}{%- endif -%}"
)
# Like GLM 4.5: an empty block in front of each response, nothing behind it.
GLM = (
    "{{ '[gMASK]<sop>' }}{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' }}{%- if m.role == 'assistant' -%}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>\\n' }}{%- endif -%}{{ m.content.strip() }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}"
    "{{ '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{%- endif -%}"
)
EMPTY = "<think>\n\n</think>\n\n"
_DEEPSEEK_TOKENS = ("<|User|>", "<|Assistant|>", "<|eos|>")

KINDS = {
    "chatml": Kind(CHATML),
    "qwen3": Kind(QWEN3, EMPTY, EMPTY, ordinary=("<think>", "</think>", "<tool_call>", "</tool_call>")),
    "think open": Kind(THINK_OPEN, lead="</think>\n\n", ordinary=("<think>", "</think>")),
    "think always": Kind(THINK_ALWAYS, EMPTY, "\n</think>\n\n"),
    "nemotron": Kind(NEMOTRON, "<think></think>", "</think>", special=("<think>", "</think>")),
    "r1": Kind(R1, "<|Assistant|>", "</think>\n\n", "<|eos|>", _DEEPSEEK_TOKENS, ("<think>", "</think>")),
    "deepseek": Kind(DEEPSEEK, "</think>", "", "<|eos|>", _DEEPSEEK_TOKENS, ("<think>", "</think>")),
    "harmony": Kind(
        HARMONY,
        "<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
        "<|return|>",
        ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>", "<|call|>"),
    ),
    "gemma": Kind(
        GEMMA, "<start_of_turn>model\n", "", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), ("\n\n",), False
    ),
    "gemma4": Kind(
        GEMMA4,
        "<|turn>model\n",
        "",
        "<turn|>",
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
    ),
    "glm": Kind(
        GLM,
        "<think></think>\n",
        "\n<think></think>\n",
        "",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        ("<think>",),
    ),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the template `name` and its tokens."""
    kind, tokenizer = KINDS[name], byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in kind.special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in kind.ordinary])
    tokenizer.chat_template = kind.template
    return tokenizer
