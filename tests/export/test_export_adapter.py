"""Adapters in the other library's format, and folders for mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import export

from lite_dil.base.errors import UserError
from lite_dil.models import adapter_files

Trainer = Callable[..., Path]


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
    with pytest.raises(UserError, match="--to mlx-lm: lm_head lies outside the model's layers"):
        adapter_files.write_mlx(tmp_path, adapter_files.Files(adapter, "F32", 0.0), 1.0, "x", 2)


# ---- mlx ----


# Bits are written alike whatever the model's family and whoever trained it; its head, and biases, are not.
@pytest.mark.parametrize(
    ("name", "bits"), [("untied", None), ("tied", None), ("qwen", None), ("untied", 4), ("tied", 8), ("qwen", 8)]
)
def test_mlx_lm_loads_the_folder_as_it_is(
    name: str, bits: int | None, backend_name: str, checkpoints: dict[str, str], trained: Trainer, tmp_path: Path
) -> None:
    from mlx_lm import load as mlx_load

    run = trained("--model", checkpoints[name], "--backend", backend_name)
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
