"""Model families with parts of their own on torch: trained, saved and exported, each equal to transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import tokenizer_of
from families import exact, zoo
from transformers import AutoConfig, AutoModelForCausalLM, BambaConfig, BambaForCausalLM

import lite_dil as dil
from lite_dil.backends.torch import layers
from lite_dil.backends.torch.lora import Switch
from lite_dil.base.errors import UserError
from lite_dil.models import adapters
from lite_dil.recipes import observers


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families' tiny models may have the same weights."""
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "cache"))


CHECKPOINTED = {"gradient_checkpointing": "full"}
# The models that most people have in late 2026, each with its kind of chat template, and the layout that it gets.
FRONT_ROW = [
    ("deepseek_v2", "deepseek", "packed"),  # DeepSeek-V2-Lite
    ("deepseek_v3", "r1", "packed"),  # PEFT would take its dense layers and shared experts for parts of fused experts
    ("gemma3", "gemma", "packed"),
    ("gemma4", "gemma4", "packed"),  # E2B, E4B, 12B: shared keys and values, inputs per layer, a tower
    ("gemma4_text-moe", "gemma4", "packed"),  # 26B-A4B
    ("glm4_moe_lite", "glm", "packed"),  # GLM-4.7-Flash
    ("gpt_oss", "harmony", "plain"),
    ("granitemoehybrid", "chatml", "plain"),  # Granite 4
    ("lfm2", "chatml", "plain"),  # LFM2.5
    ("llama", "chatml", "packed"),
    ("mistral3", "chatml", "packed"),  # Ministral 3: has no class for text alone
    ("mistral3-small", "chatml", "packed"),
    ("nemotron_h", "nemotron", "plain"),  # Nemotron-3-Nano: PEFT refuses any out_proj; its files have other names
    ("olmo3", "chatml", "packed"),
    ("phi3", "chatml", "packed"),  # Phi-4-mini
    ("qwen3", "qwen3", "packed"),
    ("qwen3_5", "think open", "plain"),
    ("qwen3_5_moe", "think always", "plain"),  # Qwen3.6
    ("qwen3_moe", "qwen3", "packed"),
    ("smollm3", "qwen3", "packed"),
]


@pytest.fixture
def unestimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the estimate beside the peak out, which rehearses a step: half of a case's time; `test_it_is_exact` has it."""
    monkeypatch.setattr(observers, "memory_line", lambda *_: "")


@pytest.mark.usefixtures("unestimated")
@pytest.mark.parametrize(("family", "kind", "layout"), FRONT_ROW, ids=[name for name, *_ in FRONT_ROW])
def test_the_front_row(family: str, kind: str, layout: str, tmp_path: Path) -> None:
    folder = zoo.make(family, tmp_path / "model")
    tokenizer_of(kind).save_pretrained(folder)
    found = exact.check(folder, "cpu", tmp_path)
    assert found.wrong == []
    assert found.layout == layout
    assert {"router", "gate"}.isdisjoint(found.targets)


@pytest.mark.parametrize(
    ("family", "options", "layout"),
    [
        ("laguna", {}, "packed"),  # PEFT would not find its shared experts again
        ("jamba", CHECKPOINTED, "plain"),  # reads its dt_proj's weight itself; two kinds of layers
        ("phimoe", {}, "plain"),  # routes at random in training; its attention does not say its window
        ("nanochat", {}, "packed"),  # uses its last norm twice
        ("gemma4", CHECKPOINTED, "packed"),
        ("gemma3n_text", {}, "packed"),  # changes projections in place; last layers without an effect
        ("llama4", {}, "plain"),  # its router is a linear layer that returns two tensors; a model inside a model
        ("minicpm3", {}, "packed"),  # divides before its head
    ],
)
def test_it_is_exact(family: str, options: dict[str, Any], layout: str, tmp_path: Path) -> None:
    found = exact.check(zoo.make(family, tmp_path / "model"), "cpu", tmp_path, **options)
    assert found.wrong == []
    assert found.layout == layout
    assert {"dt_proj", "router", "gate"}.isdisjoint(found.targets)


def test_another_name_of_the_family_changes_nothing(tmp_path: Path) -> None:
    """What is found is found by looking, not by a list of model types."""

    class RenamedConfig(BambaConfig):
        model_type = "renamed"

    class RenamedForCausalLM(BambaForCausalLM):
        config_class = RenamedConfig

    AutoConfig.register("renamed", RenamedConfig)
    AutoModelForCausalLM.register(RenamedConfig, RenamedForCausalLM)
    folder = zoo.make("bamba", tmp_path / "model")
    config = (folder / "config.json").read_text().replace('"model_type": "bamba"', '"model_type": "renamed"')
    (folder / "config.json").write_text(config.replace("BambaForCausalLM", "RenamedForCausalLM"))
    found = exact.check(folder, "cpu", tmp_path)
    assert found.wrong == [] and "out_proj" not in found.targets


def test_a_router_is_adapted_only_by_name() -> None:
    shapes = {"layers.0.mlp.gate": (4, 64), "layers.0.mlp.gate_proj": (128, 64), "layers.0.gate.inner": (4, 64)}
    config = {"num_experts": 4}
    assert list(adapters.select_targets(shapes, "all-linear", adapters.experts_of(config))) == ["layers.0.mlp.gate_proj"]
    assert list(adapters.select_targets(shapes, "gate", adapters.experts_of(config))) == ["layers.0.mlp.gate"]
    assert adapters.select_targets(shapes, "all-linear", adapters.experts_of({})) == shapes


def test_what_is_left_out_can_not_be_asked_for(tmp_path: Path) -> None:
    folder = zoo.make("jamba", tmp_path / "model")
    with pytest.raises(UserError, match=r"no linear layer 'dt_proj'; it has .*in_proj"):
        dil.load(str(folder), backend="cpu", target_modules="dt_proj")


def test_offloaded_activations_of_shared_keys_are_refused() -> None:
    layer = torch.nn.Linear(4, 4)
    store: Any = object()  # an ActivationOffload needs a GPU; it is not reached
    layers.checkpoint(layer, object(), Switch(), store)
    with pytest.raises(UserError, match="--offload-activations"):
        layer.forward(torch.zeros(1, 4, requires_grad=True), shared={})


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
@pytest.mark.parametrize(
    "packing", [{"quant_method": "fp8"}, {"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}]
)
def test_weights_packed_in_other_ways_are_refused(backend: str, packing: dict[str, Any], tmp_path: Path) -> None:
    """In 8 bits of bitsandbytes a fresh adapter's log-ratio was 0.0016; FP8 ended in a traceback on a CPU."""
    folder = zoo.make("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": packing}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"packed by {packing['quant_method']}.* 16 bits"):
        dil.load(str(folder), backend=backend)
