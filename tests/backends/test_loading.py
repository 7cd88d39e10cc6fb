"""A table and a head that stay in the computer's memory: where each weight goes, and that nothing else changes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from test_torch_layout import ARCHITECTURES
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lite_dil.backends.torch.head import QuantizedHead
from lite_dil.backends.torch.load import device_map, load_base

CPU = torch.device("cpu")
# The same memory by another name: for transformers and accelerate another device than "cpu", as a GPU is.
GPU = torch.device("cpu:0")


def place(places: dict[str, torch.device], name: str) -> torch.device:
    """Where a weight goes: by the longest name that it, or what it is in, has there."""
    parts = name.split(".")
    return next(places[part] for n in range(len(parts), -1, -1) if (part := ".".join(parts[:n])) in places)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_table_and_the_head_alone_stay_on_the_host(kind: str, tied: bool) -> None:
    config, gpu = (
        type(ARCHITECTURES[kind])(**{**ARCHITECTURES[kind].to_dict(), "tie_word_embeddings": tied}),
        torch.device("cuda"),
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    weights = [*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())]
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    assert table in weights and head in weights

    def on_host(offload: bool, quantise: bool) -> set[str]:
        places = device_map(config, gpu, offload, quantise)
        scales = {name for name in weights if name.endswith("embed_scale")}  # Gemma 3's, a number of the table's module
        return {name for name in weights if place(places, name) == CPU} - scales

    assert on_host(True, True) == {table, head}
    assert on_host(True, False) == ({table, head} if tied else {table})
    assert on_host(False, True) == (set() if tied else {head})
    assert device_map(config, gpu, False, False) == {"": gpu}
    assert device_map(config, CPU, True, True) == {"": CPU}


@pytest.mark.parametrize("packed", ["no", "flag", "checkpoint"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_with_parts_on_the_host_is_loaded_the_same(tied: bool, packed: str, tmp_path: Path) -> None:
    model = str(make_checkpoint(tmp_path / "whole", tied=tied))
    if packed == "checkpoint":
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        ready = AutoModelForCausalLM.from_pretrained(model, quantization_config=settings, dtype=torch.float32)
        model = str(tmp_path / "packed")
        ready.save_pretrained(model, max_shard_size="100KB")
        assert len(list(Path(model).glob("*.safetensors"))) > 1
    whole = load_base(model, torch.float32, CPU, packed == "flag")
    ids = torch.arange(3, 40)[None]
    for table, head in ((True, True), (True, False), (False, True)):
        parted = load_base(model, torch.float32, GPU, packed == "flag", table, head)
        assert getattr(parted, "is_loaded_in_4bit", False) == (packed != "no")
        expected, got = whole.state_dict(), parted.state_dict()
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(got[name], value), name
        assert torch.equal(parted(input_ids=ids).logits, whole(input_ids=ids).logits)
        one, two = (QuantizedHead(base.get_output_embeddings(), 8, torch.float32, GPU) for base in (whole, parted))
        for (_, this), (_, other) in zip(one.tiles(), two.tiles(), strict=True):
            assert torch.equal(this, other)
        # accelerate's hooks would move the table's rows and the head's input, and keep weights on "meta".
        assert not any(hasattr(module, "_hf_hook") for module in parted.modules())
