"""Texts that are tokenised in segments have the tokens that the tokenizer gives them whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import CHATML, WORDS, byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lite_dil.base.errors import UserError
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.files import RowError
from lite_dil.data.reader import Row
from lite_dil.data.segments import Segments

IM, END = "<|im_start|>", "<|im_end|>"
PIECES = [
    IM,
    END,
    "<|im_",
    "start|>",
    "user\n",
    " ",
    "\n",
    "  tea",
    "é",
    "",
    "<s>",
    "</s>",
    "<",
    "|>",
    "<|endoftext|>",
    "Ünder",
]


def metaspace(scheme: str) -> Callable[[], PreTrainedTokenizerFast]:
    """Unigram behind a Metaspace, which marks the first word of a text or of every piece."""

    def make() -> PreTrainedTokenizerFast:
        inner = Tokenizer(models.Unigram())
        inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        special = ["<unk>", IM, END]
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
        inner.train_from_iterator([" ".join(WORDS)] * 20 + WORDS, trainer)
        made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, unk_token="<unk>")
        made.chat_template = CHATML
        return made

    return make


def with_token(content: str, printed: bool = True, **options: bool) -> Callable[[], PreTrainedTokenizerFast]:
    def make() -> PreTrainedTokenizerFast:
        made = byte_level_tokenizer()
        made.add_tokens([AddedToken(content, normalized=False, **options)], special_tokens=True)
        made.chat_template += f"{{# {content} #}}" if printed else ""
        return made

    return make


TOKENIZERS = {
    "byte level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "metaspace, first": metaspace("first"),
    "metaspace, always": metaspace("always"),
    # Tokens that take the place of another, run into it, or depend on what is around them.
    "longer": with_token("<|im_start|>user", printed=False),
    "before": with_token("a<|im", printed=False),
    "space before": with_token("<s>", lstrip=True),
    "space behind": with_token("<s>", rstrip=True),
    "word": with_token("tea", single_word=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_segments_have_the_tokens_of_the_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    segments, draw = Segments(tokenizer, str(tokenizer.chat_template)), random.Random(0)
    whole_only = name in ("sentencepiece", "before")  # the one has no such token, in the other something may run into it
    assert segments.cut(f"a{END}b") == ([f"a{END}b"] if whole_only else ["a", f"{END}b"])
    texts = ["".join(draw.choices([*PIECES, *WORDS], k=draw.randrange(14))) for _ in range(400)]
    whole = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert segments.ids([segments.cut(text) for text in texts]) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("chat", [True, False])
def test_rows_encoded_together_are_those_encoded_by_the_definition(name: str, chat: bool) -> None:
    """A response's tokens are what its prompt's text with it has after the prompt's; here each text is tokenised by itself."""
    tokenizer, draw = TOKENIZERS[name](), random.Random(1)
    encoder = Encoder(tokenizer)

    def say(least: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, 6)))

    rows = []
    for number in range(60):
        turns = [{"role": "user", "content": say(1)}, {"role": "assistant", "content": say(1)}] * draw.randrange(3)
        prompt: Any = [*turns, {"role": "user", "content": f"{number} {say(1)}"}] if chat else f"{say(1)} {number}"
        begin = draw.choice(["", " ", "\n"])
        if not chat and number % 3 == 0:  # in the middle of a word
            prompt, begin = f"{prompt} make br", "ead "
        rows.append(Row(prompt, (begin + say(1), begin + say(1) + " no"), (1, -1), f"row {number}", "pairs"))
    found = encoder.encode_all(rows)
    for row, example in zip(rows, found, strict=True):
        if name == "word" and chat and isinstance(example, RowError):  # its token is a word, which a message may not hold
            continue
        assert isinstance(example, Example)
        text = encoder.rendering.prompt(row.prompt)
        ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
        assert example.prompt[len(example.prompt) - len(ids) :] == ids
        assert example.prompt[: len(example.prompt) - len(ids)] == (
            () if chat else encoder.bos[: len(example.prompt) - len(ids)]
        )
        for answer, response in zip(row.answers, example.responses, strict=True):
            said = encoder.rendering.answer(row.prompt, text, answer)
            both = tuple(tokenizer(text + said, add_special_tokens=False).input_ids)
            assert response == (both[len(ids) :] if both[: len(ids)] == ids else encoder.continuation(text, said))


def test_a_tokenizer_that_looks_across_special_tokens_is_given_whole_texts() -> None:
    class Looks:
        """Numbers a text's tokens by their place, as no fast tokenizer does."""

        bos_token, eos_token, split_special_tokens = None, END, False

        def __init__(self) -> None:
            self.added_tokens_decoder = {1: AddedToken(END, special=True, normalized=False)}

        def __call__(self, texts: list[str], **_: Any) -> Any:
            ids = [list(range(len(text))) for text in texts]
            return type("Found", (), {"input_ids": ids})

    segments = Segments(Looks(), "")
    assert len(segments.cut(f"a{END}b")) == 2
    text = f"a{END}b"
    assert segments.ids([segments.cut(text)]) == [tuple(range(len(text)))]
    assert segments.cut(text) == [text]


def test_a_token_beyond_the_table_is_still_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(byte_level_tokenizer())
    number = encoder.ids("tea")[0]
    monkeypatch.setattr(encoder, "_beyond", {number: "beyond"})
    with pytest.raises(UserError, match="beyond"):
        encoder.encode_all([Row("what", ("tea", "no"), (1, -1), "row 1", "pairs")])
