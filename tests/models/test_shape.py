"""The shape of a model from its config.json: as many parameters as the real model has, for every family, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lite_dil.base.errors import UserError
from lite_dil.models.find import EMBEDDED_MODEL
from lite_dil.models.shape import FAMILIES, ModelShape, Quantization, read_shape

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "mlp_bias": True, "use_qk_norm": True},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
]


def linears(model: torch.nn.Module) -> dict[str, tuple[int, int, bool]]:
    return {
        name.partition("layers.0.")[2]: (module.out_features, module.in_features, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers.0." in name
    }


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "+".join(v) or "defaults")
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_real_model(family: str, variant: dict[str, Any]) -> None:
    wide = {} if family == "phi3" else {"head_dim": 16}  # which phi3 always divides from the width
    config = AutoConfig.for_model(family, **SMALL, **wide, **variant)
    model = AutoModelForCausalLM.from_config(config)
    # Newer files name every option, older ones those alone that are not the default.
    for text in (config.to_json_string(use_diff=False), config.to_json_string()):
        shape = ModelShape.of(json.loads(text))
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert {name: tuple(linear) for name, linear in shape.linears().items()} == linears(model)


def test_a_vision_tower_is_counted_with_the_decoder() -> None:
    text = {**SMALL, "head_dim": 16}
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "image_size": 56, "patch_size": 14}
    vision = {**sizes, "num_attention_heads": 2, "vision_use_head": False}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.of(json.loads(config.to_json_string()))
    assert shape.model_type == "gemma3_text"
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_sparse_configs_get_their_family_s_defaults() -> None:
    # As google/gemma-3-4b-it has it: no heads, no vocabulary.
    sparse = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    shape = ModelShape.of({"model_type": "gemma3", "text_config": sparse})
    assert (shape.heads, shape.kv_heads, shape.head_width, shape.vocabulary, shape.tied) == (8, 4, 256, 262208, True)
    assert shape.parameters == 3_880_263_168  # of the decoder, by transformers


def test_the_embedded_model_is_known_unprepared(embedded: str) -> None:
    assert read_shape(EMBEDDED_MODEL) == read_shape(embedded)
    assert read_shape(EMBEDDED_MODEL).parameters == 134_515_008
    assert read_shape(f"{embedded}/config.json") == read_shape(embedded)


def test_quantised_checkpoints() -> None:
    base = {**SMALL, "model_type": "llama"}
    mlx = {"group_size": 32, "bits": 4}
    shape = ModelShape.of({**base, "quantization": mlx, "quantization_config": mlx})
    assert shape.quantization == Quantization("mlx", 4, 32)
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    assert ModelShape.of({**base, "quantization_config": packed}).quantization == Quantization("bitsandbytes", 4, 64, True)
    with pytest.raises(UserError, match=r"gptq; .*bitsandbytes.*MLX"):
        ModelShape.of({**base, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(UserError, match="quantised in different ways"):
        ModelShape.of({**base, "quantization": {**mlx, "lm_head": {"group_size": 32, "bits": 8}}})


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "mamba", None])
def test_other_architectures_are_refused_with_what_is_known(kind: str | None) -> None:
    with pytest.raises(UserError, match=rf"model_type is {kind!r}.* llama, mistral"):
        ModelShape.of({**SMALL, "model_type": kind})


def test_errors_name_place_and_fix(tmp_path: Path) -> None:
    def refused(text: str, pattern: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=pattern):
            read_shape(str(tmp_path))

    refused("{", "config.json cannot be read")
    refused('{"hidden_size": 64, "hidden_size": 128}', "the key 'hidden_size' is given twice in one object")
    refused("[]", "it is not a JSON object")
    refused('{"model_type": "llama", "hidden_size": 8}', "intermediate_size, num_hidden_layers, .* missing")
    with pytest.raises(UserError, match="no such folder"):
        read_shape(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"nobody/nothing: .* cache .* hub cannot be reached"):
        read_shape("nobody/nothing")  # the tests are offline


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": -32}, "num_hidden_layers is -32; expected a whole number from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; expected a whole number"),
        ({"num_attention_heads": 33}, "num_attention_heads is 33; expected a multiple of num_key_value_heads, 8"),
        ({"hidden_size": 4100}, "hidden_size is 4100; expected a multiple of num_attention_heads, 32"),
    ],
)
def test_numbers_that_no_model_has(change: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    good = {"model_type": "llama", **sizes, "num_key_value_heads": 8, "vocab_size": 128256}
    ModelShape.of(good)
    with pytest.raises(UserError, match=message):
        ModelShape.of(good | change)
