"""The memory estimate of the MLX backend against MLX's own peak, and the tape that it is made of against a pencil."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import config
from live_bytes import Measured, measure

from lite_dil.errors import UserError
from lite_dil.estimate import Load, estimate
from lite_dil.estimate_mlx import MLXStep
from lite_dil.estimate_tape import Array, Tape
from lite_dil.models import EMBEDDED_MODEL
from lite_dil.shape import ModelShape, Quantization, read_shape

MIB = 2**20
LOAD = Load((64,), ((256, 200),))  # prefix 63 + 456 tokens, plain 2 rows of 320


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Random Llamas, large enough that what scales with tokens outweighs the rest."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made: dict[tuple[int, int], str] = {}

    def make(layers: int = 4, vocabulary: int = 2048) -> str:
        if (layers, vocabulary) not in made:
            torch.manual_seed(0)
            sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers, "vocab_size": vocabulary}
            folder = tmp_path_factory.mktemp("llama")
            LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
            made[layers, vocabulary] = str(folder)
        return made[layers, vocabulary]

    return make


def measured(model: str, load: Load = LOAD, **options: Any) -> Measured:
    base = {"model": model, "backend": "mlx", "gradient_accumulation_steps": 1, "gradient_checkpointing": "off"}
    return measure(config(**{**base, "reference_cache": "off", **options}), load)


def within(found: Measured, tolerance: float) -> None:
    """The estimate is of a later step: at the first one the optimiser's state is not there before the update."""
    ratio = found.estimate.total / found.later
    print(f"{found.estimate.phase}: {ratio:.3f} of {found.later / MIB:.1f} MiB, first {found.first / MIB:.1f}")
    assert ratio == pytest.approx(1, abs=tolerance)


FORMS = [{}, {"dtype": "bfloat16"}, {"load_in_4bit": True}]


@pytest.mark.parametrize("form", FORMS, ids=("float32", "bfloat16", "4bit"))
@pytest.mark.parametrize("layout", ["plain", "prefix"])
@pytest.mark.parametrize("kept", ["off", "selective"])
def test_what_is_kept(models: Any, kept: str, layout: str, form: dict[str, Any]) -> None:
    within(measured(models(), layout=layout, gradient_checkpointing=kept, **form), 0.05)


@pytest.mark.parametrize("form", FORMS, ids=("float32", "bfloat16", "4bit"))
@pytest.mark.parametrize("layout", ["plain", "prefix"])
def test_what_is_computed_again(models: Any, layout: str, form: dict[str, Any]) -> None:
    within(measured(models(), layout=layout, gradient_checkpointing="full", **form), 0.1)


@pytest.mark.parametrize("kept", ["off", "full"])
@pytest.mark.parametrize("form", FORMS[:2], ids=("float32", "bfloat16"))
def test_a_large_vocabulary(models: Any, kept: str, form: dict[str, Any]) -> None:
    """Two chunks of the head, 40 times the hidden states of a layer."""
    within(measured(models(2, 16384), layout="prefix", gradient_checkpointing=kept, **form), 0.05)


@pytest.mark.parametrize(
    ("load", "options"),
    [
        (Load((400,), ((100, 90),)), {}),
        (Load((60, 20, 60), ((100, 90), (30, 80), (100, 90))), {}),
        (Load((60, 20, 60), ((100, 90), (30, 80), (100, 90))), {"layout": "plain"}),
        (LOAD, {"target_modules": "q_proj,v_proj", "lora_r": 8}),
        (LOAD, {"lora_dropout": 0.1}),
        (LOAD, {"head_bits": 8}),
        (LOAD, {"gradient_accumulation_steps": 2}),
    ],
    ids=("long prompt", "three pairs", "three padded pairs", "two adapters", "dropout", "head of 8 bits", "two passes"),
)
def test_other_settings(models: Any, load: Load, options: dict[str, Any]) -> None:
    within(measured(models(), load, **options), 0.05)


def test_blocks_with_padding_as_on_metal(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lite_dil.backends.mlx import MLXBackend

    monkeypatch.setattr(MLXBackend, "pads_attention", True)
    load = Load((200, 40), ((150, 100), (150, 20)))
    found = measured(models(), load, layout="prefix")
    shape, options = read_shape(models()), config(model=models(), layout="prefix", gradient_checkpointing="off")
    step = MLXStep(replace(options, gradient_accumulation_steps=1), shape, "float32", load, metal=False)
    unpadded = step.estimate().total
    step.pads_attention = True
    within(found._replace(estimate=step.estimate()), 0.05)
    assert step.estimate().total > 1.05 * unpadded


@pytest.mark.parametrize("form", [{}, {"load_in_4bit": True}, {"head_bits": 8}, {"dtype": "bfloat16"}])
def test_weights_are_counted_to_the_byte(embedded: str, form: dict[str, Any]) -> None:
    """A tied table that is the head too; what lies beside the weights are tables of rope and numbers of a norm."""
    from lite_dil import backends

    mx.clear_cache()
    before = mx.get_active_memory()
    options = config(model=EMBEDDED_MODEL, backend="mlx", **form)
    backend = backends.load("mlx", options, embedded)
    found = mx.get_active_memory() - before
    said = MLXStep(options, read_shape(EMBEDDED_MODEL), backend.dtype_name, LOAD).estimate()
    assert said.weights + said.adapter == pytest.approx(found, rel=0.003)


def test_bits_of_the_checkpoint() -> None:
    shape = ModelShape.of({**_CONFIG, "quantization": {"group_size": 32, "bits": 8}})
    said = estimate(config(), shape, "mlx", "bfloat16", LOAD)
    weight = 512 * 256
    assert said.head == said.embeddings == weight + 2 * 2 * weight // 32
    with pytest.raises(UserError, match="packed by bitsandbytes are for CUDA"):
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


def _chain(tape: Tape, length: int) -> Array:
    x = tape.make([], 100, 4)
    for _ in range(length):
        x = tape.make([x], 100, 4)
    assert x.buffer is not None
    tape.outputs, tape.held = [x.buffer], {x.buffer}
    return x


def test_the_tape_by_hand() -> None:
    """An array of 400 bytes goes 100 dispatches, 50 operations, after its reader: 51 of them and the newest are live."""
    for length, expected in ((10, 11), (49, 50), (200, 52)):
        tape = Tape()
        _chain(tape, length)
        assert tape.peak(metal=False).total() == expected * 400


def test_the_tape_keeps_what_the_backward_pass_needs() -> None:
    """W x with x of 100 and W of 50 numbers: x, the result's gradient and that of W are there at the end."""
    tape = Tape()
    x, weight = tape.make([], 100, 4), tape.weight(50, wanted=True)
    unused = tape.make([x], 1000, 4)
    y = tape.matmul(x, weight, 20)
    tape.backward(y, tape.make([], 20, 4))
    peak = tape.peak(metal=False)
    assert unused.buffer not in {op.makes for op in tape._breadth_first()}
    assert peak.total() == 4 * (100 + 20 + 50) and peak.kinds["gradients"] == 200


def test_checkpointing_on_the_tape() -> None:
    """Ten functions of three operations each: 30 results are kept, or ten inputs and what is queued."""

    def peak(again: bool) -> int:
        tape = Tape()
        x, weight = tape.make([], 10000, 4), tape.weight(1, wanted=True)

        def function(x: Array) -> Array:
            for _ in range(30):
                x = tape.multiply(tape.matmul(x, weight, 10000), x)
            return x

        for _ in range(10):
            x = tape.checkpoint(function, x) if again else function(x)
        tape.backward(x, tape.make([x], 10000, 4))
        return tape.peak(metal=False).total()

    assert peak(again=True) < 0.4 * peak(again=False)


def test_nothing_is_loaded(tmp_path: Path) -> None:
    import json
    import subprocess
    import sys

    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    code = (
        "import sys; from lite_dil.config import TrainConfig; from lite_dil.estimate import Load, estimate;"
        "from lite_dil.shape import read_shape;"
        f"e = estimate(TrainConfig().resolved(), read_shape({str(tmp_path)!r}), 'mlx', 'bfloat16', Load((9,), ((9, 9),)));"
        "assert e.total > 0 and not {'torch', 'mlx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
