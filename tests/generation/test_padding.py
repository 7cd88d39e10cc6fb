"""Batches of prompts of unequal lengths on torch, for models that read the padding and models that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from conftest import bare_model, byte_level_tokenizer, load

from lite_dil.backends.torch.generate import ignores_padding

PROMPTS = [(5, 6, 7, 8, 9, 10, 11), (12, 13), (14, 15), (5, 6, 7, 8, 9, 10, 12)]


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> str:
    """RecurrentGemma, whose convolution over the last 4 tokens does not know which of them are padding."""
    folder = tmp_path_factory.mktemp("recurrent")
    tokenizer = byte_level_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
    torch.manual_seed(0)
    made = transformers.RecurrentGemmaConfig(vocab_size=512, num_key_value_heads=1, lru_width=64, **shape)
    transformers.RecurrentGemmaForCausalLM(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("seeds", [None, [1, 2, 3, 4]])
def test_a_batch_for_a_model_that_reads_padding_is_its_rows_one_by_one(recurrent: str, seeds: list[int] | None) -> None:
    backend = load("cpu", recurrent)
    answers = backend.generate(PROMPTS, 8, [511], seeds)
    assert answers == [backend.generate([p], 8, [511], seeds and [seeds[i]])[0] for i, p in enumerate(PROMPTS)]
    assert len({tuple(answer.ids) for answer in answers}) == 4


def test_who_ignores_padding(recurrent: str, tiny: str, tmp_path: Path) -> None:
    """GPT-2 adds learned positions, which left padding would shift."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    shape = transformers.GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=2, n_positions=64, **ends)
    transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    for model, ignores in ((recurrent, False), (tiny, True), (str(tmp_path), True)):
        assert ignores_padding(bare_model(model), torch.device("cpu")) is ignores, model
