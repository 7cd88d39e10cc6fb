"""4 bits: gradients equal those of the same weights dequantised and run in the same compute dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import batch, criterion, load, make_checkpoint
from step_gradients import step_gradients
from steps import adapter, step

from lite_dil.backends.torch.load import load_base
from lite_dil.base.errors import UserError


def test_nf4_gradients_equal_those_of_dequantised_weights_bitwise(tiny: str) -> None:
    import bitsandbytes as bnb

    packed = load("cpu", tiny, load_in_4bit=True, optim="adamw")
    plain = load("cpu", tiny)
    layers = 0
    with torch.no_grad():
        modules = dict(plain.base.named_modules())
        for name, module in packed.base.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                modules[name].weight.copy_(weight.reshape(modules[name].weight.shape))
                layers += 1
    assert layers == 2 * 7
    assert packed.head.weight.dtype == torch.float32, "the head stays whole"
    for _ in range(3):  # evaluation in between, after which bitsandbytes would repack the weights on some CPUs
        np.testing.assert_array_equal(packed.sequence_logps(batch()), plain.sequence_logps(batch()))
        one, two = step(packed, [batch()], 1e-3), step(plain, [batch()], 1e-3)
        assert one.grad_norm == two.grad_norm
        np.testing.assert_array_equal(one.policy, two.policy)
    for name, value in adapter(packed).items():
        np.testing.assert_array_equal(value, adapter(plain)[name])


def test_a_checkpoint_packed_before_computes_in_the_type_asked_for(tiny: str, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    cpu = torch.device("cpu")
    first = load_base(tiny, torch.bfloat16, cpu, in_4bit=True)
    first.save_pretrained(tmp_path)
    again, plain = (
        load_base(str(tmp_path), torch.float32, cpu, in_4bit=False),
        load_base(tiny, torch.float32, cpu, in_4bit=False),
    )
    packed = {name: module for name, module in first.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            module = packed.get(name.removesuffix(".weight"))
            if module is None:
                parameter.copy_(parameter.bfloat16())  # as the checkpoint has it
            else:
                module.weight.quant_state.dtype = torch.float32
                parameter.copy_(bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state))
        ids = torch.arange(8)[None]
        assert len(packed) == 2 * 7
        torch.testing.assert_close(again(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-5)


def lora_gradients(backend: Any) -> dict[str, np.ndarray]:
    """Gradients of the MLX backend's adapter, with a B that is not 0."""
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    fill = tree_map_with_path(
        lambda name, value: mx.full(value.shape, 0.01) if name.endswith("lora_b") else value,
        backend.model.trainable_parameters(),
    )
    backend.model.update(fill)
    return step_gradients(backend, [batch()], criterion())[1]


def test_mlx_4bit_gradients_equal_those_of_dequantised_weights(tiny: str) -> None:
    import mlx.nn as nn
    from mlx_lm.utils import dequantize_model

    plain, (packed, oracle) = load("mlx", tiny), (load("mlx", tiny, load_in_4bit=True, max_grad_norm=1e9) for _ in range(2))
    assert sum(isinstance(module, nn.QuantizedLinear) for _, module in packed.model.named_modules()) == 2 * 7 + 1
    for layer in [m for _, m in oracle.model.named_modules() if type(m).__name__ == "LoRALinear"]:
        layer.linear = dequantize_model(layer).linear
        layer.linear.freeze()
    found, expected = lora_gradients(packed), lora_gradients(oracle)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4 * np.abs(value).max())
    for _ in range(3):
        one, two, full = (step(backend, [batch()], 1e-3) for backend in (packed, oracle, plain))
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-4)
        np.testing.assert_allclose(one.policy, two.policy, atol=1e-3)
        assert np.abs(one.policy - full.policy).max() > 0.05, "4 bits must cost something"
    for name, value in adapter(packed).items():
        np.testing.assert_allclose(value, adapter(oracle)[name], atol=1e-4)


def test_4bit_starts_at_0_and_trains(backend_name: str, tiny: str) -> None:
    backend = load(backend_name, tiny, load_in_4bit=True)
    assert "4-bit" in backend.description
    first = step(backend, [batch()])
    assert (first.policy == first.reference).all()
    second = step(backend, [batch()])
    assert second.loss < first.loss
    np.testing.assert_array_equal(second.reference, first.reference)


def test_8bit_adamw_state_survives_a_checkpoint(tmp_path: Path) -> None:
    model = str(make_checkpoint(tmp_path / "model"))
    # Rank 64 on 64-wide layers: 4096 elements, from which bitsandbytes keeps 8-bit state.
    same: dict[str, Any] = {"load_in_4bit": True, "lora_r": 64}
    whole = load("cpu", model, **same)
    assert type(whole.adapters["policy"].optimizer).__name__ == "AdamW8bit"
    for _ in range(2):
        step(whole, [batch()], 1e-3)
    whole.save_state(tmp_path)
    assert any(s["state1"].dtype == torch.uint8 for s in whole.adapters["policy"].optimizer.state.values())
    resumed = load("cpu", model, **same)
    resumed.load_state(tmp_path)
    for _ in range(2):
        one, two = step(whole, [batch()], 1e-3), step(resumed, [batch()], 1e-3)
        assert one.loss == two.loss
    for name, value in adapter(whole).items():
        np.testing.assert_array_equal(value, adapter(resumed)[name])


def test_an_mlx_4bit_folder_loads_as_it_is(tiny: str, tmp_path: Path) -> None:
    from mlx_lm import convert

    convert(tiny, str(tmp_path / "q"), quantize=True, q_group_size=64, q_bits=4)
    convert(tiny, str(tmp_path / "q8"), quantize=True, q_group_size=64, q_bits=8)
    ready, made = load("mlx", str(tmp_path / "q")), load("mlx", tiny, load_in_4bit=True)
    assert "4-bit" in ready.description
    # mlx-lm's convert drops the rope that it does not read, so only the shapes and the packing are compared.
    assert ready.model.model.layers[0].mlp.up_proj.linear.weight.tolist() == (
        made.model.model.layers[0].mlp.up_proj.linear.weight.tolist()
    )
    with pytest.raises(UserError, match=r"8 bits.*--4bit"):
        load("mlx", str(tmp_path / "q8"), load_in_4bit=True)
    assert "8-bit" in load("mlx", str(tmp_path / "q8")).description
    convert(tiny, str(tmp_path / "q16"), quantize=True, q_bits=4, dtype="bfloat16")
    import mlx.core as mx

    # float32 holds bfloat16's scales exactly, and a CPU is up to ten times faster in it.
    assert load("mlx", str(tmp_path / "q16")).dtype_name == ("bfloat16" if mx.metal.is_available() else "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "paged_adamw_8bit"}, "--optim paged_adamw_8bit is for the cuda and cpu backends"),
        ({"dtype": "float16"}, "--dtype float16 is for the cuda backend"),
    ],
)
def test_mlx_refuses_what_it_cannot_do(tiny: str, changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("mlx", tiny, **changes)


def test_cpu_refuses_float16(tiny: str) -> None:
    with pytest.raises(UserError, match="--dtype float16 is for GPUs"):
        load("cpu", tiny, dtype="float16")


def test_a_checkpoint_packed_by_bitsandbytes_trains_as_with_the_flag(tiny: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(tiny, quantization_config=settings, dtype=torch.float32).save_pretrained(tmp_path)
    packed, flagged = load("cpu", str(tmp_path)), load("cpu", tiny, load_in_4bit=True)
    assert packed.description == flagged.description
    assert type(packed.adapters["policy"].optimizer) is type(flagged.adapters["policy"].optimizer)
    for _ in range(2):
        packed.sequence_logps(batch())
        one, two = step(packed, [batch()], 1e-3), step(flagged, [batch()], 1e-3)
        assert one.grad_norm == two.grad_norm
        assert one.loss == two.loss
    with pytest.raises(UserError, match="bitsandbytes"):
        load("mlx", str(tmp_path))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_head_that_is_packed_in_the_checkpoint_is_refused(tiny: str, tmp_path: Path, storage: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["none"], bnb_4bit_quant_storage=storage)
    ready = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=settings, dtype=torch.float32)
    assert "quant_state" in vars(ready.lm_head.weight)
    ready.save_pretrained(tmp_path)
    for options, flag in (({}, "--model"), ({"head_bits": 8}, "--head-bits")):
        with pytest.raises(UserError, match=f"^{flag}: the output head of {tmp_path} is packed in its checkpoint.*$"):
            load("cpu", str(tmp_path), **options)
