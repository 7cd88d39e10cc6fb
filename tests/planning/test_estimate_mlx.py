"""The memory estimate of the MLX backend against MLX's own peak."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import config
from live_bytes import Measured, measure

from lite_dil.backends import registry
from lite_dil.base.errors import UserError
from lite_dil.models.shape import ModelShape, Quantization, read_shape
from lite_dil.planning.estimate import Load
from lite_dil.planning.estimate_mlx import MLXStep
from lite_dil.planning.peak import estimate

MIB = 2**20
LOAD = Load((20,), ((60, 50),))  # prefix 19 + 110 tokens, plain 2 rows of 80


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Random Llamas, large enough that what scales with tokens outweighs the rest."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made: dict[tuple[int, int, bool], str] = {}

    def make(layers: int = 3, vocabulary: int = 2048, tied: bool = False) -> str:
        key = layers, vocabulary, tied
        if key not in made:
            torch.manual_seed(0)
            sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers, "vocab_size": vocabulary}
            sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
            folder = tmp_path_factory.mktemp("llama")
            LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).save_pretrained(folder)
            made[key] = str(folder)
        return made[key]

    return make


def measured(model: str, load: Load = LOAD, **options: Any) -> Measured:
    base = {"model": model, "backend": "mlx", "gradient_accumulation_steps": 1, "gradient_checkpointing": "off"}
    return measure(config(**{**base, "reference_cache": "off", **options}), load)


def within(found: Measured) -> None:
    """The estimate is of a later step: at the first one the optimiser's state is not there before the update.

    It is to be an upper one: what fits by it has to fit. Two runs of a step differ by a hundredth.
    """
    ratio = found.estimate.total / found.later
    print(f"{found.estimate.phase}: {ratio:.3f} of {found.later / MIB:.1f} MiB, first {found.first / MIB:.1f}")
    assert 0.98 <= ratio <= 1.20


BFLOAT16, FOUR_BIT = {"dtype": "bfloat16"}, {"load_in_4bit": True}


@pytest.mark.parametrize("form", [{}, BFLOAT16, FOUR_BIT], ids=("float32", "bfloat16", "4bit"))
@pytest.mark.parametrize("layout", ["plain", "prefix"])
def test_what_is_kept(models: Any, layout: str, form: dict[str, Any]) -> None:
    within(measured(models(), layout=layout, **form))


@pytest.mark.parametrize(("layout", "form"), [("plain", BFLOAT16), ("prefix", {})], ids=("plain bfloat16", "prefix float32"))
@pytest.mark.parametrize("kept", ["selective", "full"])
def test_what_is_computed_again(models: Any, layout: str, form: dict[str, Any], kept: str) -> None:
    within(measured(models(), layout=layout, gradient_checkpointing=kept, **form))


def test_many_layers_computed_again(models: Any) -> None:
    """MLX is at the next layer before the gradients of this one are done."""
    within(measured(models(6), layout="plain", gradient_checkpointing="full", **BFLOAT16))


@pytest.mark.parametrize("form", [{"gradient_checkpointing": "full"}, BFLOAT16], ids=("full float32", "off bfloat16"))
def test_a_large_vocabulary(models: Any, form: dict[str, Any]) -> None:
    """Two chunks of the head, 40 times the hidden states of a layer."""
    within(measured(models(2, 16384), layout="prefix", **form))


@pytest.mark.parametrize(
    ("load", "options"),
    [
        (Load((200,), ((50, 40),)), {}),
        (Load((60, 20), ((60, 50), (30, 60))), {"layout": "plain"}),
        (LOAD, {"target_modules": "q_proj,v_proj", "lora_r": 8}),
        (LOAD, {"lora_dropout": 0.1}),
        (LOAD, {"gradient_accumulation_steps": 2}),
        (Load((193,), ((192, 192),)), {"compile": True}),  # lengths that compiling does not pad
        (Load((60, 20), ((60, 50), (30, 60))), {"compile": True}),  # compiled attention sees padded blocks on a CPU too
    ],
    ids=("long prompt", "three padded pairs", "two adapters", "dropout", "two passes", "compiled", "compiled blocks"),
)
def test_other_settings(models: Any, load: Load, options: dict[str, Any]) -> None:
    within(measured(models(), load, **options))


def test_blocks_with_padding_as_on_metal(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lite_dil.backends.mlx.backend import MLXBackend

    monkeypatch.setattr(MLXBackend, "pads_attention", True)
    load = Load((100, 30), ((80, 60), (80, 20)))
    found = measured(models(), load, layout="prefix")
    shape, options = read_shape(models()), config(model=models(), layout="prefix", gradient_checkpointing="off")
    step = MLXStep(replace(options, gradient_accumulation_steps=1), shape, "float32", load, metal=False)
    unpadded = step.estimate().total
    step.pads_attention = True
    within(found._replace(estimate=step.estimate()))
    assert step.estimate().total > 1.05 * unpadded


@pytest.mark.parametrize("form", [FOUR_BIT, {"head_bits": 8}, FOUR_BIT | {"head_bits": 8} | BFLOAT16])
@pytest.mark.parametrize("tied", [False, True], ids=("untied", "tied"))
def test_weights_are_counted(models: Any, tied: bool, form: dict[str, Any]) -> None:
    """Also of a tied table, which is the head too."""
    model = models(2, 1024, tied)
    gc.collect()
    mx.clear_cache()  # a freed buffer that serves again counts whole
    before = mx.get_active_memory()
    options = config(model=model, backend="mlx", **form)
    backend = registry.load("mlx", options, model, options, options)
    found = mx.get_active_memory() - before
    said = MLXStep(options, read_shape(model), backend.dtype_name, LOAD).estimate()
    assert said.weights + said.adapter == pytest.approx(found, rel=0.005)


def test_bits_of_the_checkpoint() -> None:
    shape = ModelShape.of({**_CONFIG, "quantization": {"group_size": 32, "bits": 8}})
    said = estimate(config(), shape, "mlx", "bfloat16", LOAD)
    weight = 512 * 256
    assert said.head == said.embeddings == weight + 2 * 2 * weight // 32
    with pytest.raises(UserError, match="bitsandbytes"):
        estimate(config(), replace(shape, quantization=Quantization("bitsandbytes", 4, 64)), "mlx", "float32", LOAD)


def test_metal_queues_by_bytes() -> None:
    """Large arrays are executed soon, so that a large model's peak is near what is kept; small ones are all queued."""
    shape = ModelShape.of({**_CONFIG, "num_hidden_layers": 8})
    options = config(gradient_checkpointing="off")
    small, large = Load((64,), ((64, 64),)), Load((64,), ((4096, 4096),))
    ratios = []
    for load in (small, large):
        metal = MLXStep(options, shape, "float32", load, metal=True).estimate().activations
        step = MLXStep(options, shape, "float32", load, metal=False)
        step.pads_attention = True
        ratios.append(metal / step.estimate().activations)
    assert ratios[0] > ratios[1]


_CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def test_what_a_layer_keeps_by_hand() -> None:
    """Two rows of 16 tokens on Metal, 4 heads of 64 and 2 for keys, rank 16."""
    options = config(layout="plain", gradient_checkpointing="off", compile=False, lora_r=16)
    step = MLXStep(options, ModelShape.of(_CONFIG), "float32", Load((8,), ((8, 8),)))
    norms, attention, mlp = 2 * 256, 256 + 2 * 128, 4 * 512  # inputs; queries, keys and values; gate, sigmoid, silu and up
    scores, inputs, low = 4 * 16, 3 * 256 + 512, 7 * 16  # inputs of q, k and v, of o, of gate and up, of down
    (block,) = step._blocks()
    assert sum(stage.keeps for stage in step._stages(block)) == 32 * 4 * (norms + attention + mlp + scores + inputs + low)


def test_nothing_is_loaded(tmp_path: Path) -> None:
    import json
    import subprocess
    import sys

    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    code = (
        "import sys; from lite_dil.config.train_config import TrainConfig;"
        "from lite_dil.planning.estimate import Load; from lite_dil.planning.peak import estimate;"
        "from lite_dil.models.shape import read_shape;"
        f"e = estimate(TrainConfig().resolved(), read_shape({str(tmp_path)!r}), 'mlx', 'bfloat16', Load((9,), ((9, 9),)));"
        "assert e.total > 0 and not {'torch', 'mlx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
