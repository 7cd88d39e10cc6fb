"""Where prompts and answers begin and end, with tokenizers of both families, and what is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer, pair_row, sentencepiece_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lite_dil.base.errors import UserError
from lite_dil.data.encoder import Encoder, Example, fingerprint, truncate
from lite_dil.data.files import RowError
from lite_dil.data.reader import Row

TOKENIZERS = {"byte-level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(TOKENIZERS[request.param]())


def chat(prompt: str, chosen: str, rejected: str) -> Row:
    return pair_row([{"role": "user", "content": prompt}], chosen, rejected, "file line 1")


@pytest.mark.parametrize("answer", ["Paris.", " Paris", "\nParis", "\n\n Paris is the capital", "é🙂"])
def test_chat_prompt_and_answers_join_to_the_template(encoder: Encoder, answer: str) -> None:
    row = chat("what is the capital of France", answer, "I do not know")
    example = encoder.encode(row)
    tokenizer = encoder.tokenizer
    whole = tokenizer.apply_chat_template(
        [*row.prompt, {"role": "assistant", "content": answer}], tokenize=False, add_generation_prompt=False
    )
    decoded = tokenizer.decode([*example.prompt, *example.responses[0]])
    # An answer ends with its end-of-turn token; the newline that ChatML prints after it is dropped.
    assert decoded.replace(" ", "") == whole.rstrip("\n").replace(" ", "")
    assert example.responses[0][-1] == tokenizer.eos_token_id
    assert example.signs == (1, -1)


def test_exactly_one_end_of_turn_and_one_bos(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    text_row = pair_row("the capital of France is ", "Paris", "a river", "file line 1")
    ended = pair_row("the capital of France is ", f"Paris{tokenizer.eos_token}", "a river", "file line 1")
    for row in (chat("how do I make bread", "good tea", "blue"), text_row, ended):
        example = encoder.encode(row)
        for response in example.responses:
            assert response.count(tokenizer.eos_token_id) == 1
            assert response[-1] == tokenizer.eos_token_id
        bos_wanted = tokenizer.bos_token == "<s>"
        assert example.prompt.count(tokenizer.bos_token_id) == bos_wanted
        assert (example.prompt[0] == tokenizer.bos_token_id) == bos_wanted


def test_text_answers_are_tokenised_as_a_continuation() -> None:
    encoder = Encoder(sentencepiece_tokenizer())
    example = encoder.encode(pair_row("the capital is\n", "Paris", "a river", "file line 1"))
    tokens = encoder.tokenizer.convert_ids_to_tokens(list(example.responses[0]))
    assert not tokens[0].startswith("▁"), "tokenised apart, SentencePiece puts a space in front"
    apart = encoder.tokenizer.convert_ids_to_tokens(encoder.ids("Paris"))
    assert apart[0].startswith("▁")


def test_a_token_never_straddles_the_boundary(encoder: Encoder) -> None:
    # "bread" is one token; the boundary inside it must hold, and the prompt must be the same tokens for both answers.
    tokenizer = encoder.tokenizer
    assert len(encoder.ids(" make bread")) < len(encoder.ids(" make br")) + len(encoder.ids("ead"))
    example = encoder.encode(pair_row("how do I make br", "ead", "ick", "file line 1"))
    bos = encoder.bos
    assert example.prompt == (*bos, *encoder.ids("how do I make br"))
    text = [tokenizer.decode(response).replace(tokenizer.eos_token, "") for response in example.responses]
    assert text == ["ead", "ick"]


def test_prompt_tokens_are_those_of_a_chat(encoder: Encoder) -> None:
    messages = [{"role": "user", "content": "make good tea"}]
    expected = encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    row = pair_row(messages, "\nyes", "no", "file line 1")
    assert list(encoder.encode(row).prompt) == expected


def test_what_a_template_prints_behind_the_end_of_turn_is_dropped() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n' }}", "<|im_end|>\nbye<|endoftext|>' }}")
    example = Encoder(tokenizer).encode(chat("tea", "good", "small"))
    assert tokenizer.decode(example.responses[0]) == "good<|im_end|>"


def test_a_template_without_an_end_mark_gets_eos() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    example = Encoder(tokenizer).encode(chat("tea", "good", "small"))
    assert tokenizer.decode(example.responses[0]) == " good<|im_end|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, "no chat template"),
        ({"chat_template": "{{ raise_exception('no system role') }}"}, "refuses these messages: no system role"),
        ({"chat_template": "{% if add_generation_prompt %}A{% else %}B{% endif %}"}, "changes the text of the response"),
        ({"chat_template": "{{ messages | length }}{{ messages[-1].content }}"}, "renders the prompt differently"),
        ({"chat_template": "x{% if not add_generation_prompt %}y{% endif %}"}, "changes the text of the response"),
    ],
)
def test_templates_that_cannot_be_used_name_row_and_reason(change: dict[str, Any], message: str) -> None:
    tokenizer = byte_level_tokenizer()
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(RowError, match=message):
        Encoder(tokenizer).encode(chat("tea", "good", "small"))


def test_control_tokens_in_messages_are_refused() -> None:
    for row in (chat("a <|im_start|>system", "b", "c"), chat("a", "b<|im_end|>", "c")):
        with pytest.raises(ValueError, match="control token"):
            Encoder(byte_level_tokenizer()).encode(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair_row("a", "b<|im_end|>c", "d", ""), "holds '<|im_end|>' before its end"),
        (pair_row("a", "b<|im_end|>", "b", ""), "are the same tokens"),
        (pair_row("", "b", "c", ""), "the prompt has no token"),
    ],
)
def test_text_rows_that_cannot_be_used(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(byte_level_tokenizer()).encode(row)


def test_an_eos_that_an_answer_brings_along_is_not_doubled() -> None:
    encoder = Encoder(byte_level_tokenizer())
    plain, ended = (pair_row("make", answer, "tea", "") for answer in (" bread", " bread<|im_end|>\n"))
    assert encoder.encode(plain) == encoder.encode(ended)


def test_bos_of_a_tokenizer_that_appends_eos_too() -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    example = Encoder(tokenizer).encode(pair_row("make bread", " yes", " no", ""))
    assert example.prompt[0] == 1
    assert 2 not in example.prompt
    assert example.responses[0].count(2) == 1


def test_the_ends_of_an_answer() -> None:
    """EOS and the template's own end of turn, also of a template that opens each answer, which training refuses."""
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    both = sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert Encoder(tokenizer).end_ids() == both
    plain = tokenizer.chat_template
    tokenizer.chat_template = plain.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert tokenizer.chat_template != plain
    assert Encoder(tokenizer).end_ids() == both
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert Encoder(tokenizer).end_ids() == both[:1]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="refuses these messages: no"):
        Encoder(tokenizer).end_ids()


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = byte_level_tokenizer()
    alone = Encoder(tokenizer).encode(chat("tea", "good", "small"))
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "tools"}
    assert Encoder(tokenizer).encode(chat("tea", "good", "small")) == alone


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    encoder = Encoder(tokenizer)
    assert encoder.rendering.prompt([{"role": "user", "content": "tea"}]).startswith("26 Jul 2024\n<|im_start|>user\ntea")


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer().backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Encoder(tokenizer)


def test_truncation_by_hand() -> None:
    example = Example((1, 2, 3, 4, 5), ((10, 11, 12), (20,)), (1, -1))
    assert truncate(example, 8) == (example, False, False)
    # 6 = 3 prompt tokens, the first and the last two, + the longer answer
    assert truncate(example, 6) == (Example((1, 4, 5), ((10, 11, 12), (20,)), (1, -1)), True, False)
    assert truncate(example, 4) == (Example((1,), ((10, 11, 12), (20,)), (1, -1)), True, False)
    assert truncate(example, 3) == (Example((1,), ((10, 11), (20,)), (1, -1)), True, True)
    assert truncate(example, 2) == (Example((1,), ((10,), (20,)), (1, -1)), True, True)


def test_fingerprint_sees_tokens_and_split() -> None:
    base = Example((1, 2), ((3, 4), (5,)), (1, -1))
    others = [
        Example((1,), ((2, 3, 4), (5,)), (1, -1)),
        Example((1, 2), ((3, 4), (5,)), (-1, 1)),
        Example((1, 2), ((3, 4), (6,)), (1, -1)),
    ]
    assert len({fingerprint([example]) for example in [base, *others]}) == 4
    assert fingerprint([base]) == fingerprint([Example((1, 2), ((3, 4), (5,)), (1, -1))])


def test_the_embedded_data_is_what_the_readme_says() -> None:
    import lite_dil

    folder = Path(lite_dil.__file__).parent / "data" / "short_answers"
    rows = {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "test")
    }
    assert sum(map(len, rows.values())) >= 240
    questions = [row["prompt"][-1]["content"].lower() for split in rows.values() for row in split]
    assert len(set(questions)) == len(questions), "a question of the test split is in the train split"
    words = [[len(row[side][0]["content"].split()) for side in ("chosen", "rejected")] for row in rows["train"]]
    assert max(chosen for chosen, _ in words) <= 32
    assert sum(chosen < rejected for chosen, rejected in words) / len(words) > 0.8


WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_and_calls_are_laid_out_by_the_template() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [{"role": "user", "content": "one and one"}, calling, {"role": "tool", "content": "2"}]
    row = Row(messages, (calling, "two"), (1, -1), "file line 1", "pairs", tools)
    example = Encoder(tokenizer).encode(row)
    prompt = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(example.prompt) == prompt
    assert "<call>add" in prompt and '"parameters"' in prompt
    call_text = '<call>add {"a": 1}</call>'
    assert [tokenizer.decode(ids) for ids in example.responses] == [f"{call_text * 2}<|im_end|>", "two<|im_end|>"]
    bad = {**calling, "tool_calls": [{**call, "function": {"name": "<|im_end|>", "arguments": {}}}]}
    with pytest.raises(RowError, match="control token"):
        Encoder(tokenizer).encode(Row(messages, (bad, "two"), (1, -1), "", "pairs", tools))
