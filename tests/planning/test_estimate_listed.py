"""The memory estimate of mixtures, hybrids and other families that transformers lists, against the measured peak."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import config
from families import zoo
from live_bytes import measure
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lite_dil.backends import registry
from lite_dil.backends.torch.listing import listed
from lite_dil.backends.torch.rehearsal import Rehearser
from lite_dil.base.errors import UserError
from lite_dil.base.memory import GIB, Memory
from lite_dil.cli.main import main
from lite_dil.models.adapter_files import Files, write_mlx, write_peft
from lite_dil.models.adapters import Adapter
from lite_dil.models.listing import ListedModel, Rehearsal, StepProfile, layer_number
from lite_dil.planning import before_loading
from lite_dil.planning.estimate import Load
from lite_dil.planning.known import read_model
from lite_dil.planning.peak import estimate

LOAD = Load((160, 60), ((120, 80), (40, 100)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in folders:
            folders[name] = str(zoo.make(name, tmp_path_factory.mktemp(name)))
        return folders[name]

    return make


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_moe", {"gradient_checkpointing": "selective"}),
        ("qwen3_moe", {"load_in_4bit": True, "dtype": "bfloat16", "layout": "plain"}),
        ("granitemoehybrid", {"gradient_checkpointing": "full"}),
        ("qwen3_5", {}),
        ("gemma4", {"gradient_checkpointing": "full"}),  # with a tower, and layers that share keys and values
        ("gpt_oss", {}),
        ("deepseek_v3", {}),
    ],
    ids=str,
)
def test_within_five_percent_and_not_below(made: Any, name: str, options: dict[str, Any]) -> None:
    base = {"model": made(name), "gradient_accumulation_steps": 1, "optim": "adamw"}
    found = measure(config(**{**base, **options}), LOAD)
    said = found.estimate
    ratios = (said.total - said.optimizer) / found.first, said.total / found.later
    print(f"{name}: {said.phase}: first {ratios[0]:.3f}, later {ratios[1]:.3f} of {found.later / 2**20:.1f} MiB")
    assert 0.99 <= min(ratios) <= max(ratios) <= 1.05


def test_between_rehearsals_the_estimate_is_about_that_of_the_load_itself(made: Any) -> None:
    for name in ("qwen3_moe", "gpt_oss"):
        shape = read_model(made(name))
        assert isinstance(shape, ListedModel)
        load = Load((1, 1), ((299, 299), (299, 299)))  # no power of four
        asked = config(model=made(name), gradient_accumulation_steps=1)
        near, itself = (estimate(asked, each, "cpu", "float32", load).total for each in (shape, replace(shape, exact=True)))
        assert 0.99 * itself <= near <= 1.1 * itself


def test_the_weights_and_adapters_are_those_that_are_loaded(made: Any) -> None:
    options = config(model=made("qwen3_moe"), load_in_4bit=True, dtype="bfloat16")
    shape = read_model(options.model)
    assert isinstance(shape, ListedModel)
    backend: Any = registry.load("cpu", options, options.model, options, options)
    state = [weight.quant_state for weight in backend.base.parameters() if weight.dtype == torch.uint8]
    bytes_ = sum(weight.nbytes for name, weight in backend.base.named_parameters() if "lora_" not in name)
    scales = sum(
        s.absmax.nbytes + s.code.nbytes + s.state2.absmax.nbytes + s.state2.code.nbytes + s.offset.nbytes for s in state
    )
    assert estimate(options, shape, "cpu", "bfloat16", LOAD).weights == pytest.approx(bytes_ + scales, rel=1e-3)
    assert shape.adaptable == backend.linear
    share = f"4-bit ({shape.packed_share:.0%} of the weights are packed; experts stay at 16 bits)"
    assert share in backend.description


QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def test_qwen3_30b_a3b_by_pencil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_30B))
    experts = 48 * 128 * 3 * 2048 * 768
    attention = 48 * (2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128)
    rest = 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048 + 2 * 151936 * 2048  # routers, norms, table and head
    shape = read_model(str(path))
    assert isinstance(shape, ListedModel)
    assert shape.parameters == experts + attention + rest == 30_532_122_624
    assert shape.active == experts * 8 // 128 + attention + rest
    assert shape.packed_share == attention / shape.parameters  # routers are no linear layers here
    said: list[str] = []
    free = Memory(24 * GIB, "a card")
    monkeypatch.setattr(before_loading, "memory_here", lambda backend: free)
    asked = config(model=str(path), load_in_4bit=True, dtype="bfloat16")
    words = (
        r"its weights take 55\.\d GB with --4bit, and 24\.0 GB are free: 3% of the weights are packed; experts stay at 16 bits"
    )
    with pytest.raises(UserError, match=words):
        before_loading.check_experts(replace(asked, backend="cuda"), said.append)
    before_loading.check_experts(replace(asked, backend="cpu"), said.append)
    assert len(said) == 1 and re.search(words, said[0])
    free = Memory(80 * GIB, "a card")
    before_loading.check_experts(replace(asked, backend="cuda"), said.append)
    before_loading.check_experts(replace(asked, load_in_4bit=False, backend="cuda"), said.append)
    assert len(said) == 1


def test_layers_that_a_checkpoint_leaves_unpacked_are_not_planned_as_packed(tmp_path: Path) -> None:
    dense = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512}
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": False}

    def linears(skipped: Any, kind: dict[str, Any]) -> int:
        path = tmp_path / "config.json"
        own = {"quantization_config": {**packed, "llm_int8_skip_modules": skipped}}
        path.write_text(json.dumps({**dense, "num_attention_heads": 4, **kind, **own}))
        read_model.__globals__["_listed"].cache_clear()
        return estimate(config(model=str(path)), read_model(str(path)), "cpu", "bfloat16", LOAD).linears

    size = 64 * 128
    difference = 3 * (2 * size - (size // 2 + size // 64 * 4))
    for kind in ({}, {"model_type": "ministral3", "num_key_value_heads": 4, "head_dim": 16}):
        assert linears(["lm_head", "model.layers.1.mlp"], kind) - linears(["lm_head"], kind) == difference
        for wrong in ("lm_head", ["*"], [1]):
            with pytest.raises(UserError, match="llm_int8_skip_modules"):
                linears(wrong, kind)


def test_plan_prints_what_is_active_and_what_is_packed(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", made("qwen3_moe"), "--backend", "cuda", "--memory", "8", "--4bit"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for expected in ("active for a token", "% of the weights are packed; experts stay at 16 bits", "a rehearsal of its"):
        assert expected in words


def test_what_cannot_be_listed_is_said(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, message in (
        ({"model_type": "nobody_knows"}, "cannot be planned .*nobody_knows"),
        ({"model_type": "qwen3_moe", "hidden_size": 63, "num_experts": "many"}, "config.json|cannot be planned"),
    ):
        path.write_text(json.dumps(text))
        with pytest.raises(UserError, match=message):
            listed(str(path), path, None)


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}


def test_a_model_that_cannot_be_listed_trains_all_the_same(tmp_path: Path) -> None:
    """JetMoE's code reads numbers that are not there without memory."""
    CONFIG_MAPPING["jetmoe"](**SMALL, kv_channels=16, num_local_experts=4).save_pretrained(tmp_path)
    asked = config(model=str(tmp_path), load_in_4bit=True, dtype="bfloat16")
    with pytest.raises(UserError, match="cannot be planned"):
        read_model(asked.model)
    said: list[str] = []
    before_loading.check_experts(replace(asked, backend="cuda"), said.append)
    assert len(said) == 1
    assert said[0].startswith("Not checked before loading whether the weights fit: --model")


def test_what_the_models_own_code_makes_impossible_is_said(tmp_path: Path) -> None:
    """Doge computes a mask for its attention: a packed row does not take it, and torch keeps more for its gradient."""
    made = CONFIG_MAPPING["doge"](**SMALL)
    made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be planned \(its attention computes a mask with a gradient\)"):
        read_model(str(tmp_path))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")
    assert not Rehearser(base.eval()).packs_rows()
    assert "lite_dil_rehearsed" not in {*ALL_ATTENTION_FUNCTIONS, *ALL_MASK_ATTENTION_FUNCTIONS}


def test_a_model_that_keeps_its_state_is_rehearsed_and_not_for_long(made: Any) -> None:
    """RecurrentGemma computes token by token: the end of a run does not rehearse all tokens that it had."""
    shape = read_model(made("recurrent_gemma"))
    assert isinstance(shape, ListedModel)
    target, sizes = next(iter(shape.adaptable)), list[int]()
    kept = shape.rehearse(Rehearsal("cpu", "float32", "off", "plain", (target,), 4, True, 0.0, (4,), ((4,),)))
    assert len(kept.layers) == shape.layers

    def rehearse(of: Rehearsal) -> StepProfile:
        sizes.append(sum(map(sum, of.responses)) + sum(of.prompts))
        return StepProfile(1, kept.layers, 100 * sizes[-1])

    asked = config(model=made("recurrent_gemma"), gradient_accumulation_steps=1)
    estimate(asked, replace(shape, exact=True, rehearse=rehearse), "cpu", "float32", Load((10,), ((5000,),)))
    assert max(sizes) == 256


def test_an_earlier_adapter_is_planned_under_the_models_names(made: Any, tmp_path: Path) -> None:
    model = made("qwen3_5")
    shape = read_model(model)
    assert isinstance(shape, ListedModel)
    layer, (out, into) = next((n, s) for n, s in shape.adaptable.items() if n.endswith("down_proj"))
    pair = np.zeros((4, into), np.float32), np.zeros((out, 4), np.float32)
    asked = config(model=model, gradient_accumulation_steps=1)
    tensors = Files(Adapter(4, 1.0, {layer: pair}), "F32", 0.0)
    write_mlx(tmp_path, tensors, 1.0, model, shape.layers, alone=True)
    assert estimate(replace(asked, init_adapter=str(tmp_path)), shape, "cpu", "float32", LOAD).adapter == 4 * 4 * (out + into)
    other = Files(Adapter(4, 1.0, {"model.layers.0.mlp.fc1": pair}), "F32", 0.0)
    (tmp_path / "other").mkdir()
    write_peft(tmp_path / "other", other, 1.0, model, {"target_modules": ["fc1"]})
    with pytest.raises(UserError, match="is it for another model"):
        estimate(replace(asked, init_adapter=str(tmp_path / "other")), shape, "cpu", "float32", LOAD)


def test_only_numbers_of_the_list_of_layers_count() -> None:
    stem = "model.layers"
    assert layer_number("model.layers.3.experts.7.up", stem) == 3
    for name in ("model.altup_projections.0", "model.norm", "model.layers_of_old.2.up", "0.up"):
        assert layer_number(name, stem) == -1
