"""Merged folders: the checkpoint plus the adapter to the last digit, of plain and of 4-bit checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    bare_model,
    batch,
    criterion,
    load,
    one_step,
    oracle_logps,
)
from safetensors.torch import load_file, save_file
from trainings import export

from lite_dil.base.errors import UserError
from lite_dil.cli.main import main
from lite_dil.export import merge
from lite_dil.models import adapter_files, tensors

Trainer = Callable[..., Path]


# ---- safetensors ----


@pytest.mark.parametrize("code", ["F32", "F16", "BF16"])
def test_numbers_are_rounded_as_torch_rounds_them(code: str, tmp_path: Path) -> None:
    values = torch.cat([torch.randn(5000), torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 65504.0])]).view(2, -1)
    planned = tensors.Planned("x", code, tuple(values.shape), lambda: tensors.encode(values.numpy(), code))
    other = tensors.Planned("y", "I64", (1,), lambda: [np.array([7])])
    tensors.write(tmp_path / "f.safetensors", [planned, other], "pt")
    found = load_file(tmp_path / "f.safetensors")
    expected = values.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[code])
    assert torch.equal(found["x"], expected)
    assert found["y"].tolist() == [7]
    here = tensors.read(tmp_path / "f.safetensors")["x"]
    np.testing.assert_array_equal(here.float32(), expected.float().numpy())
    again = b"".join(bytes(piece) for piece in here.pieces("F32"))
    assert again == expected.float().numpy().tobytes()


def test_a_weight_too_large_for_float16_and_a_cut_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"65504.*--dtype bfloat16"):
        list(tensors.encode(np.array([1e5], np.float32), "F16"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="safetensors"):
        tensors.read(tmp_path / "cut.safetensors")


# ---- merged ----


@pytest.mark.parametrize("name", ["untied", "tied", "qwen", "sentencepiece"])
def test_merged_is_the_checkpoint_plus_the_adapter(
    name: str, backend_name: str, checkpoints: dict[str, str], trained: Trainer, tmp_path: Path
) -> None:
    model = checkpoints[name]
    run = trained("--model", model, "--backend", backend_name)
    report = export(run, tmp_path / "out", "--format", "merged")
    assert report["check"]["ok"] and report["check"]["mean"] < 1e-4
    assert report["check"]["effect"] > 0.1, "the adapter must do something, or nothing is checked"
    assert report["check"]["share"] == pytest.approx(1, abs=1e-2)
    assert report["check"]["data"] == "pairs.jsonl", "no folder of this machine"
    adapter = adapter_files.float_adapter(adapter_files.read_files(run / "adapter"))
    before, after = load_file(Path(model) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = 0
    for key, value in before.items():
        pair = adapter.weights.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if pair is None:
            assert torch.equal(value, after[key]), key
            continue
        delta = adapter.scale * torch.from_numpy(pair[1]).double() @ torch.from_numpy(pair[0]).double()
        torch.testing.assert_close(after[key], (value.double() + delta).float(), atol=1e-6, rtol=0)
        changed += 1
    assert changed == 14
    here, there = (
        bare_model(str(tmp_path / "out")),
        load(backend_name, model, init_adapter=str(run / "adapter"), reference="base"),
    )
    np.testing.assert_allclose(there.token_logps(batch()), oracle_logps(here, batch()).detach().numpy(), atol=1e-3)
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (Path(model) / file).read_bytes()
    settings = [json.loads((folder / "generation_config.json").read_text()) for folder in (Path(model), tmp_path / "out")]
    assert settings[1] == settings[0] | {"eos_token_id": 2}, "the end of the chat template, which one of them lacks"


@pytest.mark.parametrize("head", [(), ("--head-bits", "4")])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_4bit_run_is_merged_into_the_weights_it_was_trained_with(
    name: str, head: tuple[str, ...], backend_name: str, checkpoints: dict[str, str], trained: Trainer, tmp_path: Path
) -> None:
    run = trained("--model", checkpoints[name], "--backend", backend_name, "--4bit", *head)
    report = export(run, tmp_path / "out", "--format", "merged")
    assert report["check"]["mean"] < 1e-3, "rounded once, to float32"
    assert report["dequantised_weights"] >= 14
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and "quantization" not in config
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (name == "untied")
    other = export(run, tmp_path / "other", "--format", "merged", "--merge-into", "original")
    assert other["dequantised_weights"] == 0 and other["check"]["mean"] < 1e-3
    one, two = (load_file(tmp_path / part / "model.safetensors") for part in ("out", "other"))
    layer = "model.layers.0.mlp.up_proj.weight"
    assert (one[layer] - two[layer]).abs().max() > 0.01, "4 bits must cost something"


# The 16 values of NF4: QLoRA, Dettmers 2023, appendix E.
_LOW = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833334)
_MIDDLE = (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
NF4 = np.array([*_LOW, *_MIDDLE, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def nf4_by_hand(packed: Any, state: Any, shape: tuple[int, int]) -> np.ndarray:
    """Two numbers a byte, the first in its upper half; a scale for 64 of them, itself a byte perhaps, with one for 256."""
    values = packed.numpy().reshape(-1)
    scales = state.absmax.numpy()
    if state.nested:
        outer = np.repeat(state.state2.absmax.numpy(), 256)[: len(scales)]
        scales = state.state2.code.numpy()[scales] * outer + state.offset.numpy()
    return (NF4[np.stack([values >> 4, values & 15], -1).reshape(-1)] * np.repeat(scales, 64)).reshape(shape)


def affine_by_hand(module: Any) -> np.ndarray:
    """Eight numbers a word, the first in its lowest bits; a scale and an offset for 64 of them."""
    import mlx.core as mx

    numbers = (np.array(module.weight)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(len(module.weight), -1)
    scales, offsets = (np.array(part.astype(mx.float32)).repeat(64, -1) for part in (module.scales, module.biases))
    return scales * numbers + offsets


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4bit_weights_by_hand(dtype: str, backend_name: str, tiny: str, trained: Trainer, tmp_path: Path) -> None:
    run = trained("--model", tiny, "--backend", backend_name, "--4bit", "--head-bits", "4", "--dtype", dtype)
    export(run, tmp_path / "out", "--format", "merged", "--dtype", "float32", "--strength", "0.7")
    backend: Any = load(backend_name, tiny, load_in_4bit=True, head_bits=4, dtype=dtype)
    expected: dict[str, np.ndarray] = {}
    if backend_name == "mlx":
        layers = {name.removesuffix(".linear"): part for name, part in backend.model.named_modules() if "scales" in part}
        expected = {name: affine_by_hand(part) for name, part in layers.items()}
    else:
        for name, part in backend.base.named_modules():
            if hasattr(getattr(part, "weight", None), "quant_state"):
                shape = (part.out_features, part.in_features)
                expected[name.removesuffix(".base_layer")] = nf4_by_hand(part.weight.data, part.weight.quant_state, shape)
        ((data, state),) = backend.base.lm_head.packed
        expected["lm_head"] = nf4_by_hand(data, state, (512, 64))
        if dtype == "bfloat16":  # which bitsandbytes unpacks to
            expected = {k: torch.from_numpy(v).float().bfloat16().float().numpy() for k, v in expected.items()}
    found = load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(next((run / "adapter").glob("*.safetensors")))
    for name, weight in expected.items():
        if name.endswith("_proj"):
            if backend_name == "mlx":
                a, b = adapter[f"{name}.lora_a"].T, adapter[f"{name}.lora_b"].T
            else:
                a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            weight = weight + 0.7 * 2 * (b.double() @ a.double()).numpy()  # alpha is twice the rank
        np.testing.assert_allclose(found[f"{name}.weight"].numpy(), weight, atol=2e-6, err_msg=name)
    assert len(expected) == (16 if backend_name == "mlx" else 15), "MLX has the embeddings in 4 bits too"


def test_packed_checkpoints_are_merged(
    tiny: str, trained: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=settings, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "nf4")
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    from lite_dil.models.spelling import rope_config

    raw = json.loads((Path(tiny) / "config.json").read_text())
    model, config = load_model(Path(tiny), model_config=rope_config(raw))
    model, config = quantize_model(model, config, 64, 4)
    save_model(tmp_path / "mlx4", model)
    save_config(config, tmp_path / "mlx4" / "config.json")
    for folder, backend in (("nf4", "cpu"), ("mlx4", "mlx")):
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / folder / file).write_bytes((Path(tiny) / file).read_bytes())
        run = trained("--model", str(tmp_path / folder), "--backend", backend)
        report = export(run, tmp_path / f"{folder}-out", "--format", "merged")
        assert report["check"]["mean"] < 1e-3
        keys = load_file(tmp_path / f"{folder}-out" / "model.safetensors").keys()
        assert keys == load_file(Path(tiny) / "model.safetensors").keys()
        wanted = ["--format", "merged", "--merge-into", "original", "--output", str(tmp_path / "x")]
        assert main(["export", "--adapter", str(run), *wanted]) == 2
        assert "itself is quantised" in capsys.readouterr().err
        other = "mlx-lm" if backend == "cpu" else "peft"
        assert main(["export", "--adapter", str(run), "--format", "adapter", "--output", str(tmp_path / "x")]) == 2
        assert f"--to {other}: {tmp_path / folder} is quantised for" in capsys.readouterr().err


def test_shards_types_and_strength(tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    monkeypatch.setattr(merge, "SHARD_BYTES", 100_000)
    report = export(run, tmp_path / "out", "--format", "merged", "--dtype", "bfloat16", "--strength", "0.5")
    assert report["check"]["ok"] and report["strength"] == 0.5
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert {t.dtype for f in (tmp_path / "out").glob("*.safetensors") for t in load_file(f).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_memory_does_not_hold_is_read_from_the_disk(tiny: str, tmp_path: Path) -> None:
    from lite_dil.backends.torch import export as torch_export

    sequences = [((5, 6, 7), (8, 9, 10)), ((3, 4), (11,))]
    (tmp_path / "model").symlink_to(tiny)
    with torch_export.exported(tmp_path / "model") as model:
        whole = model.logps(sequences)
    with torch_export.exported(tmp_path / "model", {"cpu": 200_000}) as model:
        spread = model.logps(sequences)
    for one, two in zip(whole, spread, strict=True):
        np.testing.assert_array_equal(one, two)


def test_files_that_cannot_be_merged_are_named(tiny: str, trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(Path(tiny) / "model.safetensors"), model / "pytorch_model.bin")
    command = ["export", "--adapter", str(trained("--model", tiny, "--backend", "cpu")), "--format", "merged"]
    assert main([*command, "--model", str(model), "--output", str(tmp_path / "out")]) == 2
    assert "(.bin)" in capsys.readouterr().err
    # Experts, which MLX has in one array a layer.
    packed = {"quantization": {"bits": 4}, "dtype": "float32"}
    stored = tensors.Stored(tmp_path, "U32", (4, 64, 8), 0, 8192)
    checkpoint = merge.Checkpoint(tmp_path, packed, {"model.layers.0.mlp.switch_mlp.up_proj.weight": stored})
    with pytest.raises(UserError, match=r"up_proj\.weight .*quantised"):
        merge.plan(checkpoint, adapter_files.Adapter(1, 1.0, {}), {}, None, "x")


def make_gemma4(folder: Path) -> None:
    """A tiny Gemma 4, which has a rope for each type of layer."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=512,
        vocab_size_per_layer_input=512,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        intermediate_size=128,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=0,
        head_dim=16,
        global_head_dim=32,
    )
    Gemma4ForCausalLM(config).save_pretrained(folder)


def test_each_type_of_layers_keeps_its_rope(tmp_path: Path) -> None:
    make_gemma4(tmp_path / "model")
    checkpoint = merge.Checkpoint.open(tmp_path / "model", "x")
    ropes = checkpoint.config["rope_parameters"]
    assert ropes["full_attention"]["rope_theta"] == 1e6 and ropes["sliding_attention"]["rope_theta"] == 1e4
    layer, draw = "model.layers.1.mlp.up_proj", torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, generator=draw), torch.randn(128, 2, generator=draw)
    adapter = adapter_files.Adapter(2, 0.5, {layer: (a.numpy(), b.numpy())})
    (tmp_path / "out").mkdir()
    merge.write(tmp_path / "out", merge.plan(checkpoint, adapter, {}, None, "x"), checkpoint, None, [])
    expected, ids = bare_model(str(tmp_path / "model")), torch.arange(30)[None]
    bare = expected(ids).logits
    with torch.no_grad():
        expected.get_submodule(layer).weight += 0.5 * b @ a
    found = bare_model(str(tmp_path / "out"))
    torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=1e-4, rtol=0)
    assert (found(ids).logits - bare).abs().max() > 1e-2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"] == ropes


def test_the_file_that_loaders_take_is_merged(tiny: str, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    other = {key: value + 1 for key, value in load_file(Path(tiny) / "model.safetensors").items()}
    save_file(other, tmp_path / "model" / "model.fp16.safetensors")
    found = merge.Checkpoint.open(tmp_path / "model", "x").tensors
    assert {stored.path.name for stored in found.values()} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("{", "index.json cannot be read"),
        ('{"weight_map": {}, "weight_map": {}}', "the key 'weight_map' is given twice"),
        ('{"weight_map": ["model.safetensors"]}', "has no weight_map with the names of files"),
        ('{"weight_map": {"a": 1}}', "has no weight_map with the names of files"),
    ],
)
def test_a_damaged_index_is_one_message(index: str, why: str, tiny: str, tmp_path: Path) -> None:
    shutil.copy(Path(tiny) / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=why):
        merge.Checkpoint.open(tmp_path, "mine")


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "cannot be read"), ("[]", "it is not a JSON object"), ('{"eos_token_id": ["2"]}', "expected a token's number")],
)
def test_a_damaged_generation_config_is_one_message(content: str, why: str, tmp_path: Path) -> None:
    assert merge.defaults_of(tmp_path) == {}
    (file := tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=rf"generation_config\.json: .*{why}"):
        merge.defaults_of(tmp_path)
    for right in ({}, {"eos_token_id": 2}, {"eos_token_id": [1, 2], "top_p": 0.9}, {"eos_token_id": None}):
        file.write_text(json.dumps(right))
        assert merge.defaults_of(tmp_path) == right


def test_a_head_is_tied_where_neither_config_nor_files_have_one(tiny: str, tiny_tied: str, tmp_path: Path) -> None:
    for model, tied in ((tiny, False), (tiny_tied, True)):
        for key in ({}, {"tie_word_embeddings": tied}):
            checkpoint = merge.Checkpoint.open(Path(model), "x")
            config = {name: value for name, value in checkpoint.config.items() if name != "tie_word_embeddings"} | key
            assert replace(checkpoint, config=config).tied == tied


def test_the_embedded_model(embedded: str, tmp_path: Path) -> None:
    from lite_dil.models.find import EMBEDDED_MODEL

    backend: Any = load("cpu", embedded)
    for _ in range(2):
        one_step(backend, [batch(1)], criterion(), 3e-3)
    backend.save_adapter(tmp_path / "adapter")
    del backend
    report = export(
        tmp_path / "adapter", tmp_path / "out", "--format", "merged", "--model", EMBEDDED_MODEL, "--check-rows", "1"
    )
    assert report["check"]["ok"] and report["dtype"] == "bfloat16"
    assert report["check"]["effect"] > 0.05
