"""lite-dil export: what is made is what was trained, and what is not is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from conftest import (
    bare_model,
    batch,
    criterion,
    examples,
    load,
    make_checkpoint,
    one_step,
    oracle_logps,
    sentencepiece_tokenizer,
    write_pairs,
)
from safetensors.torch import load_file, save_file

from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.export import check as export_check
from lite_dil.export import exporting, merge
from lite_dil.models import adapter_files, tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl"))


Trainer = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Trains a run by the command, once for each set of flags, and returns its folder."""
    made: dict[tuple[str, ...], Path] = {}

    def train(*flags: str) -> Path:
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("run") / "out"
            common = ["--data", data, "--output-dir", str(made[flags]), "--max-steps", "3", "--learning-rate", "0.02"]
            assert main(["train", *common, "--dtype", "float32", "--lora-r", "4", *flags]) == 0
        return made[flags]

    return train


def export(run: Path, output: Path, *flags: str) -> dict[str, Any]:
    """Export by the command, which must succeed; return export.json."""
    assert main(["export", "--adapter", str(run), "--output", str(output), *flags]) == 0
    return json.loads((output / "export.json").read_text())


def qwen(folder: Path) -> Path:
    """A tiny Qwen 2: biases on queries, keys and values, and a tied head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    make_checkpoint(folder)
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, rope_parameters=rope, tie_word_embeddings=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny: str, tiny_tied: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    piece = make_checkpoint(tmp_path_factory.mktemp("piece"))
    sentencepiece_tokenizer().save_pretrained(piece)
    return {
        "untied": tiny,
        "tied": tiny_tied,
        "qwen": str(qwen(tmp_path_factory.mktemp("qwen"))),
        "sentencepiece": str(piece),
    }


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
    with pytest.raises(UserError, match="too large for float16, which ends at 65504; take --dtype bfloat16"):
        list(tensors.encode(np.array([1e5], np.float32), "F16"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="not a safetensors file that can be read"):
        tensors.read(tmp_path / "cut.safetensors")


# ---- merged ----


@pytest.mark.parametrize("name", ["untied", "tied", "qwen", "sentencepiece"])
def test_merged_is_the_checkpoint_plus_the_adapter(
    name: str, backend_name: str, models: dict[str, str], trained: Trainer, tmp_path: Path
) -> None:
    model = models[name]
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
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (Path(model) / file).read_bytes()


@pytest.mark.parametrize("head", [(), ("--head-bits", "4")])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_4bit_run_is_merged_into_the_weights_it_was_trained_with(
    name: str, head: tuple[str, ...], backend_name: str, models: dict[str, str], trained: Trainer, tmp_path: Path
) -> None:
    run = trained("--model", models[name], "--backend", backend_name, "--4bit", *head)
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

    from lite_dil.models.find import rope_config

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
    whole = torch_export.model_logps(tmp_path / "model", sequences)
    spread = torch_export.model_logps(tmp_path / "model", sequences, {"cpu": 200_000})
    for one, two in zip(whole, spread, strict=True):
        np.testing.assert_array_equal(one, two)


def test_files_that_cannot_be_merged_are_named(tiny: str, trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(Path(tiny) / "model.safetensors"), model / "pytorch_model.bin")
    command = ["export", "--adapter", str(trained("--model", tiny, "--backend", "cpu")), "--format", "merged"]
    assert main([*command, "--model", str(model), "--output", str(tmp_path / "out")]) == 2
    assert "weights in other files (.bin) cannot be merged. Load it by transformers" in capsys.readouterr().err
    # Experts, which MLX has in one array a layer.
    packed = {"quantization": {"bits": 4}, "dtype": "float32"}
    stored = tensors.Stored(tmp_path, "U32", (4, 64, 8), 0, 8192)
    checkpoint = merge.Checkpoint(tmp_path, packed, {"model.layers.0.mlp.switch_mlp.up_proj.weight": stored})
    with pytest.raises(UserError, match=r"up_proj\.weight is quantised in a way that lite-dil does not know"):
        merge.plan(checkpoint, adapter_files.Adapter(1, 1.0, {}), {}, None, "x")


def test_the_file_that_loaders_take_is_merged(tiny: str, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    other = {key: value + 1 for key, value in load_file(Path(tiny) / "model.safetensors").items()}
    save_file(other, tmp_path / "model" / "model.fp16.safetensors")
    found = merge.Checkpoint.open(tmp_path / "model", "x").tensors
    assert {stored.path.name for stored in found.values()} == {"model.safetensors"}


def test_a_head_is_tied_where_neither_config_nor_files_have_one(tiny: str, tiny_tied: str, tmp_path: Path) -> None:
    for model, tied in ((tiny, False), (tiny_tied, True)):
        for key in ({}, {"tie_word_embeddings": tied}):
            checkpoint = merge.Checkpoint.open(Path(model), "x")
            config = {name: value for name, value in checkpoint.config.items() if name != "tie_word_embeddings"} | key
            assert replace(checkpoint, config=config).tied == tied


# ---- the check ----


def test_a_wrong_merge_is_refused(
    tiny: str, backend_name: str, trained: Trainer, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    run = trained("--model", tiny, "--backend", backend_name)
    right = adapter_files.float_adapter

    def transposed(adapter: Any) -> Any:
        return {n: (b.T, a.T) if a.shape[1] == b.shape[0] else (a[:, ::-1], b) for n, (a, b) in adapter.weights.items()}

    wrong: dict[str, Callable[..., Any]] = {
        "twice": lambda files, strength: right(files, 2 * strength),
        "half": lambda files, strength: right(files, 0.5 * strength),
        "dropped": lambda files, strength: right(files, 0.0),
        "transposed": lambda files, strength: replace(right(files, strength), weights=transposed(right(files, strength))),
    }
    for name, mistake in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(adapter_files, "float_adapter", mistake)
            output = tmp_path / name
            assert main(["export", "--adapter", str(run), "--format", "merged", "--output", str(output)]) == 1, name
        assert not output.exists()
        report = json.loads((tmp_path / f"{name}.refused" / "export.json").read_text())
        assert report["check"]["ok"] is False
        assert "rounded" not in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(adapter_files, "float_adapter", wrong["half"])
        patch.setitem(export_check.TOLERANCES, "float32", 1.4)
        assert main(["export", "--adapter", str(run), "--format", "merged", "--output", str(tmp_path / "half")]) == 1
        assert "weights of few bits may have rounded the adapter away: try float32" in capsys.readouterr().err
    export(run, tmp_path / "half", "--format", "merged")  # an earlier refusal is not in the way


Passed = Callable[[float], np.ndarray]


def figures(draw: np.random.Generator, effect: float, rounding: float) -> tuple[export_check.Trained, Passed]:
    """The figures of a model whose adapter does `effect`, computed with `rounding`, and what makes an exported model's."""
    base, own = draw.normal(size=2000), effect * draw.standard_t(4, 2000)

    def passed(share: float) -> np.ndarray:
        return base + share * own + rounding * draw.normal(size=2000)

    return export_check.Trained([], "x", passed(1), passed(0), passed(1.5) - passed(0.5), "bfloat16"), passed


@pytest.mark.parametrize("effect", [1.0, 0.05])
def test_a_small_effect_is_told_from_a_lost_one_where_rounding_is_as_large(effect: float) -> None:
    trained, passed = figures(np.random.default_rng(0), effect, 0.05)
    for share, ok in ((1.0, True), (0.0, False), (0.5, False), (2.0, False)):
        check = trained.compare([passed(share)], 0.1)
        # The plain slope would find 2/3 of it where all is there, as two of three parts of the difference are the adapter's.
        assert check.share == pytest.approx(share, abs=0.15)
        assert check.ok == ok, share
        assert check.conclusive and "too little" not in str(check)
    assert not trained.compare([np.full(2000, np.nan)], 1.4).ok
    assert not trained.compare([passed(1) + 2], 1.4).ok, "a shift is beyond the tolerance"


def test_a_right_export_of_a_barely_trained_adapter_is_not_refused() -> None:
    shares = []
    for seed in range(40):
        trained, passed = figures(np.random.default_rng(seed), 0.004, 0.03)
        check = trained.compare([passed(1)], 0.15)
        assert check.ok, check
        shares.append((check.share - 1) / check.share_error)
        assert check.conclusive or "too little to tell whether it is there at all" in str(check)
    assert np.median(np.abs(shares)) < 1.5, "the standard error is what it is called"
    base = np.zeros(9)
    idle = export_check.Trained([], "x", base, base, base, "float32").compare([base], 0.5)
    small = export_check.Check(6, 400, "x", mean=0.088, max=0.97, tolerance=0.4, effect=0.073, share=2.01, share_error=0.17)
    assert small.ok and not small.conclusive  # a right export of an adapter of two steps, in 8 bits
    large = replace(small, effect=0.75)
    assert not large.ok and large.conclusive
    assert idle.ok and not idle.conclusive and idle.as_dict()["share_error"] is None


def test_the_figures_leave_the_model_as_it_was_and_must_be_finite(tiny: str, backend_name: str) -> None:
    backend = load(backend_name, tiny)
    one_step(backend, [batch(4)], criterion(), 1e-2)
    backend.set_strength(0.5)
    rows = examples(2)
    before = np.concatenate([backend.token_logps(Batch.of([row])) for row in rows])
    trained = export_check.measure(backend, rows, "x")
    np.testing.assert_array_equal(trained.policy, before)
    assert backend.strength == 0.5
    np.testing.assert_array_equal(np.concatenate([backend.token_logps(Batch.of([row])) for row in rows]), before)
    backend.set_strength(1)
    with backend.adapter_off():
        np.testing.assert_array_equal(trained.bare, np.concatenate([backend.token_logps(Batch.of([row])) for row in rows]))
    assert np.corrcoef(trained.change, trained.policy - trained.bare)[0, 1] > 0.9
    one_step(backend, [batch(4)], criterion(), float("nan"))
    with pytest.raises(UserError, match=r"not finite numbers.* export an earlier checkpoint"):
        export_check.measure(backend, rows, "x")


# ---- adapter ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_goes_to_the_other_format_and_back_bit_by_bit(
    dtype: torch.dtype, tiny: str, trained: Trainer, tmp_path: Path
) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    first = tmp_path / "first"
    first.mkdir()
    (first / "adapter_config.json").write_bytes((run / "adapter" / "adapter_config.json").read_bytes())
    stored = {n: t.to(dtype) for n, t in load_file(run / "adapter" / "adapter_model.safetensors").items()}
    save_file(stored, first / "adapter_model.safetensors")
    export(first, tmp_path / "mlx", "--format", "adapter", "--no-check")
    export(tmp_path / "mlx", tmp_path / "back", "--format", "adapter", "--no-check")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == dtype for name, value in stored.items())
    one, two = (json.loads((folder / "adapter_config.json").read_text()) for folder in (first, tmp_path / "back"))
    assert (one["r"], one["lora_alpha"]) == (two["r"], two["lora_alpha"])
    assert sorted(one["target_modules"]) == two["target_modules"]
    assert two["base_model_name_or_path"] == tiny
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["scale"] == one["lora_alpha"] / one["r"]
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]


@pytest.mark.parametrize("to", ["peft", "mlx-lm"])
@pytest.mark.parametrize("flags", [(), ("--target-modules", "q_proj,down_proj"), ("--4bit",), ("--head-bits", "4")])
def test_an_adapter_does_the_same_in_the_other_library(
    to: str, flags: tuple[str, ...], backend_name: str, tiny: str, trained: Trainer, tmp_path: Path
) -> None:
    run = trained("--model", tiny, "--backend", backend_name, *flags)
    report = export(run, tmp_path / "out", "--format", "adapter", "--to", to)
    crossed = (to == "mlx-lm") != (backend_name == "mlx")
    assert report["check"]["ok"] and report["to"] == to
    if not (crossed and flags == ("--4bit",)):
        assert report["check"]["mean"] < (0.1 if crossed else 1e-4)
    files = adapter_files.read_files(tmp_path / "out")
    assert files.adapter.weights.keys() == adapter_files.read_files(run / "adapter").adapter.weights.keys()


@pytest.mark.parametrize(("rank", "alpha"), [(16, 32), (7, 5), (49, 5), (3, 0.1), (24, 24.7)])
def test_the_scale_is_kept_to_the_last_bit(rank: int, alpha: float) -> None:
    for scale in (alpha / rank, alpha / rank**0.5):
        found, root = adapter_files._alpha(scale, rank)
        assert found / (rank**0.5 if root else rank) == scale
    assert adapter_files._alpha(2.0, 16) == (32, False)


def test_a_head_has_no_place_in_mlx_lms_format(tmp_path: Path) -> None:
    adapter = adapter_files.Adapter(1, 1.0, {"lm_head": (np.zeros((1, 4), np.float32), np.zeros((4, 1), np.float32))})
    with pytest.raises(UserError, match="--to mlx-lm: lm_head lies outside of the model's layers"):
        adapter_files.write_mlx(tmp_path, adapter_files.Files(adapter, "F32", 0.0), 1.0, "x", 2)


def test_a_hub_id_stays_one(tiny: str, trained: Trainer, tmp_path: Path) -> None:
    """In a process of its own, as the library reads HF_HOME once."""
    run = trained("--model", tiny, "--backend", "cpu")
    repo = tmp_path / "hub" / "models--owner--name"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "snapshots" / "abc").symlink_to(tiny)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for format in ("merged", "adapter"):
        command = ["export", "--adapter", str(run), "--model", "owner/name", "--format", format, "--output"]
        code = "import sys; from lite_dil.cli.main import main; sys.exit(main(sys.argv[1:]))"
        out = subprocess.run(
            [sys.executable, "-c", code, *command, str(tmp_path / format)], env=env, capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        assert json.loads((tmp_path / format / "export.json").read_text())["model"] == "owner/name"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["model"] == "owner/name"
    for path in [p for p in tmp_path.glob("merged/*") if p.suffix in (".json", ".md")]:
        assert tiny not in path.read_text(), path


# ---- mlx ----


@pytest.mark.parametrize("name", ["untied", "tied", "qwen"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_mlx_lm_loads_the_folder_as_it_is(
    name: str, bits: int | None, backend_name: str, models: dict[str, str], trained: Trainer, tmp_path: Path
) -> None:
    from mlx_lm import load as mlx_load

    run = trained("--model", models[name], "--backend", backend_name)
    flags = ["--bits", str(bits)] if bits else []
    if bits == 4:  # a tiny random model loses too much to 4 bits for any tolerance of use
        export(run, tmp_path / "out", "--format", "mlx", *flags, "--no-check")
    else:
        report = export(run, tmp_path / "out", "--format", "mlx", *flags)
        assert report["check"]["mean"] < (0.1 if bits else 1e-3)
    model, tokenizer = mlx_load(str(tmp_path / "out"))
    assert tokenizer.chat_template
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 50000.0
    assert (config.get("quantization") or {}).get("bits") == bits
    assert hasattr(model.layers[0].mlp.up_proj, "scales") == bool(bits)


# ---- the command ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "merged", "--to", "peft"], "--to is of --format adapter; leave it out with merged"),
        (["--format", "adapter", "--dtype", "float16"], "--dtype is of --format merged and mlx"),
        (["--format", "merged", "--bits", "4"], "--bits is of --format mlx"),
        (["--format", "merged", "--check-rows", "0"], "expected at least 1; --no-check compares nothing"),
        (["--format", "merged", "--no-check", "--check-rows", "3"], "--no-check checks nothing"),
        (["--format", "merged", "--no-check", "--push-to-hub", "a/b"], "--push-to-hub uploads what passed the check"),
        (["--format", "merged", "--private"], "--private is of --push-to-hub"),
        (["--format", "gguf", "--outtype", "q9"], "--outtype q9: expected one of f32"),
        (["--format", "merged", "--check-data", "none.jsonl"], "none.jsonl: no such file"),
        (["--format", "merged", "--strength", "2"], "--strength 2"),
    ],
)
def test_user_errors(flags: list[str], message: str, tiny: str, trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    assert main(["export", "--adapter", str(run), "--output", str(tmp_path / "out"), *flags]) == 2
    told = capsys.readouterr().err
    assert message in told and " on CPU" not in told, "a model was loaded before"
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left"


def test_nothing_is_overwritten_and_nothing_half_made_is_left(
    tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    command = ["export", "--adapter", str(run), "--format", "merged", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "is there already; give a new folder" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(merge.tensors, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*command, str(tmp_path / "new")]) == 130
    with monkeypatch.context() as patch:
        patch.setattr(exporting.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        assert main([*command, str(tmp_path / "new")]) == 2
    assert "GB are needed there, 0.0 GB are free" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".", "..", "link", "file/below"])
def test_where_nothing_can_be_made_is_told_before_the_work(
    name: str, tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    assert main(["export", "--adapter", str(run), "--format", "merged", "--output", name]) == 2
    assert ("cannot be written (" if name == "file/below" else "expected the name of a new folder") in capsys.readouterr().err


def test_a_program_that_is_ended_leaves_nothing(tiny: str, trained: Trainer, tmp_path: Path) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    code = (
        "import os, signal, sys; from lite_dil.export import merge; from lite_dil.cli.main import main;"
        "merge.write = lambda *_: os.kill(os.getpid(), signal.SIGTERM); sys.exit(main(sys.argv[1:]))"
    )
    command = ["export", "--adapter", str(run), "--format", "merged", "--output", str(tmp_path / "out")]
    out = warm.run(*command, code=code)
    assert out.returncode == 143 and "Traceback" not in out.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_check_says_so(tiny: str, trained: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    report = export(run, tmp_path / "out", "--format", "merged", "--no-check")
    assert report["check"] is None
    assert "none was made (--no-check)" in capsys.readouterr().out


# ---- gguf and ollama ----


@pytest.mark.parametrize("format", ["gguf", "ollama"])
def test_gguf(format: str, backend_name: str, tiny: str, trained: Trainer, tmp_path: Path) -> None:
    run = trained("--model", tiny, "--backend", backend_name)
    output = tmp_path / "merged"  # as the folder on the way is called
    report = export(run, output, "--format", format, "--outtype", "f32")
    assert report["check"]["mean"] < 1e-2
    modelfile = ["Modelfile"] if format == "ollama" else []
    assert sorted(path.name for path in output.iterdir()) == [*modelfile, "README.md", "export.json", "merged.gguf"]


def test_the_modelfile_has_the_models_own_sampling(tiny: str, trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(own))
    run = trained("--model", tiny, "--backend", "cpu")
    export(run, tmp_path / "My model", "--format", "ollama", "--model", str(model), "--no-check")
    text = (tmp_path / "My model" / "Modelfile").read_text()
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 20\n" in text
    assert f"cd '{tmp_path}/My model'\n  ollama create my-model -f Modelfile" in capsys.readouterr().out


def test_what_cannot_be_a_gguf_or_an_ollama_model_is_told_before_the_work(
    tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    monkeypatch.setattr(exporting.policy, "load", lambda *_: pytest.fail("the model was loaded"))

    def refused(format: str, *flags: str) -> str:
        command = ["export", "--adapter", str(run), "--model", str(model), "--output", str(tmp_path / "out"), *flags]
        assert main([*command, "--format", format]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        return capsys.readouterr().err

    assert "no convert_hf_to_gguf.py there" in refused("gguf", "--llama-cpp", str(tmp_path))
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert "cannot be written for Ollama: it leaves out a message" in refused("ollama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert "hidden_act = 'gelu' is not among" in refused("gguf")


# ---- the hub ----


def test_what_was_made_is_uploaded_after_its_check(
    tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The upload itself is tested in test_push.py; here, that it is asked for what passed, and for nothing else."""
    from lite_dil.export import push as hub

    run, pushed = trained("--model", tiny, "--backend", "cpu"), []
    monkeypatch.setattr(hub, "check", lambda repo: None)
    monkeypatch.setattr(hub, "push", lambda folder, repo, private, say: pushed.append((folder, repo, private)) or "URL")
    flags = ["--push-to-hub", "owner/name", "--private"]
    for format in ("merged", "adapter"):
        export(
            run,
            tmp_path / format,
            "--format",
            format,
            "--to" if format == "adapter" else "--dtype",
            *(["peft"] if format == "adapter" else ["float32"]),
            *flags,
        )
        assert pushed.pop() == (tmp_path / format, "owner/name", True)
        assert {
            path.relative_to(tmp_path / format).as_posix() for path in (tmp_path / format).rglob("*") if path.is_file()
        } == set(hub._files(tmp_path / format)), "nothing is made that is not published"
        for file in (tmp_path / format).rglob("*"):
            assert not file.is_file() or tiny.encode() not in file.read_bytes(), f"{file} tells of a folder of this machine"
    right = adapter_files.float_adapter
    monkeypatch.setattr(adapter_files, "float_adapter", lambda files, strength: right(files, 0.0))
    assert main(["export", "--adapter", str(run), "--format", "merged", "--output", str(tmp_path / "x"), *flags]) == 1
    assert not pushed


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
