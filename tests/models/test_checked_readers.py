"""Files of models and adapters with wild values: one message with file and field, never a traceback, never a wrong number."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import write_pairs
from safetensors import SafetensorError, safe_open

from lite_dil.base.errors import UserError
from lite_dil.cli.main import main
from lite_dil.doctor.tiny_model import CONFIG
from lite_dil.models import adapter_files, tensors
from lite_dil.models.adapter_config import read_config
from lite_dil.models.model_config import read_config as read_model
from lite_dil.models.shape import read_shape
from lite_dil.runs.progress import read_progress

ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS: dict[str, tuple[Any, str]] = {
    "a list": ([1], "not a JSON object"),
    "no entry": ({"a": [1]}, "expected dtype, shape and data_offsets"),
    "deep": (b"[" * 100_000, "recursion"),
    "not UTF-8": (b'{"\xff": 1}', "utf-8"),
    "twice": (b'{"a": 1, "a": 2}', "twice"),
    "type": ({"a": ENTRY | {"dtype": "Q9"}}, "dtype is 'Q9'; expected one of F64"),
    "type list": ({"a": ENTRY | {"dtype": [1]}}, "dtype"),
    "shape number": ({"a": ENTRY | {"shape": 4}}, "shape is 4; expected whole numbers"),
    "shape text": ({"a": ENTRY | {"shape": ["4"]}}, "shape"),
    "shape true": ({"a": ENTRY | {"shape": [True, 4]}}, "shape"),
    "negative shape": ({"a": ENTRY | {"shape": [-4]}}, "shape"),
    "huge shape": ({"a": ENTRY | {"shape": [2**62, 2**62]}}, "expected 8507"),
    "other shape": ({"a": ENTRY | {"shape": [5]}}, "expected 20 bytes"),
    "negative": ({"a": ENTRY | {"data_offsets": [-8, 8]}}, "data_offsets"),
    "backwards": ({"a": ENTRY | {"data_offsets": [16, 0]}}, "data_offsets"),
    "fraction": ({"a": ENTRY | {"data_offsets": [0.0, 16.0]}}, "data_offsets"),
    "behind the end": ({"a": ENTRY | {"data_offsets": [2**70, 2**70 + 16]}}, "data_offsets"),
    "one over another": ({"a": ENTRY, "b": ENTRY}, "b: data_offsets begin"),
    "hole": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [32, 48]}}, "b: data_offsets begin"),
    "bytes behind": ({"a": ENTRY}, "where its last tensor ends"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header(name: str, tmp_path: Path) -> None:
    """What the library refuses is refused here, with file and field."""
    header, message = HEADERS[name]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(48))
    with pytest.raises(SafetensorError), safe_open(path, "np"):
        pass
    with pytest.raises(UserError) as error:
        tensors.read(path)
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 2**63) + b"x", struct.pack("<Q", 9) + b"{}"])
def test_a_safetensors_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors: not a readable safetensors file"):
        tensors.read(tmp_path / "x.safetensors")


PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
MLX = {"lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}}
WRONG_PEFT: dict[str, list[Any]] = {
    "r": [0, -1, 10**30, True, "2", 2.0, None, [2]],
    "lora_alpha": [1e308, -1e308, math.nan, math.inf, 10**400, "4", [4], None, True],
    "lora_dropout": ["x", math.nan, [0.5], -1, 2],
    "use_rslora": ["false", 1],
    "target_modules": [3, [1], {}],
    "base_model_name_or_path": [3],
    "bias": [3, "all"],
    "init_lora_weights": ["pissa", ["gaussian"]],
    "peft_type": [[], "LOHA"],
    "use_dora": [True],
    "layers_to_scale": [[1]],  # of a future version
}
WRONG_MLX: dict[str, list[Any]] = {
    "rank": [0, -1, "2", True],
    "scale": [math.nan, math.inf, 1e300, "20", [1], None],
    "dropout": [[1], "x", math.nan],
    "keys": [3, [1]],
    "magic": [1],
}


def make_adapter(folder: Path, config: Any, value: float = 0.0, kind: type = np.float32) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    a, b = np.zeros((2, 64), kind), np.zeros((64, 2), kind)
    a[1, 3] = value
    name = "model.layers.0.self_attn.q_proj"
    peft = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    mlx = {f"{name}.lora_a": np.ascontiguousarray(a.T), f"{name}.lora_b": np.ascontiguousarray(b.T)}
    safetensors.numpy.save_file(peft, folder / "adapter_model.safetensors")
    safetensors.numpy.save_file(mlx, folder / "adapters.safetensors")
    return folder


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in WRONG_PEFT.items() for value in values])
def test_a_peft_config(field: str, value: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", PEFT | {field: value})
    with pytest.raises(UserError, match=rf"{folder}: adapter_config\.json: {field} "):
        adapter_files.read_adapter(str(folder))


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in WRONG_MLX.items() for value in values])
def test_an_mlx_config(field: str, value: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", {"lora_parameters": MLX["lora_parameters"] | {field: value}})
    with pytest.raises(UserError, match=rf"{folder}: adapter_config\.json: lora_parameters\.{field} "):
        adapter_files.read_adapter(str(folder))


@pytest.mark.parametrize("config", [{"lora_parameters": None}, {"lora_parameters": [1]}, MLX | {"use_dora": True}, []])
def test_an_mlx_config_of_another_kind(config: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_config(make_adapter(tmp_path / "adapter", config))


def test_configs_that_are_right(tmp_path: Path) -> None:
    """What PEFT itself writes of a plain adapter, with every field that it knows, and mlx-lm's with a trainer's options."""
    from peft import LoraConfig

    LoraConfig(r=4, lora_alpha=6, use_rslora=True, lora_dropout=0.1, target_modules=["q_proj"]).save_pretrained(tmp_path)
    found = read_config(tmp_path)
    assert (found.peft, found.rank, found.scale, found.dropout) == (True, 4, 3.0, 0.1)
    more = MLX | {"fine_tune_type": "lora", "num_layers": 16, "iters": 100, "learning_rate": 1e-5, "model": "m"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(more))
    found = read_config(tmp_path)
    assert (found.peft, found.rank, found.scale, found.model) == (False, 2, 2.0, "m")


@pytest.mark.parametrize("config", [PEFT, MLX], ids=["peft", "mlx"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_an_adapter_that_is_not_finite(config: Any, value: float, kind: type, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", config, value, kind)
    for read in (lambda: adapter_files.read_adapter(str(folder)), lambda: adapter_files.read_files(folder)):
        with pytest.raises(UserError, match=r"adapter.*\.safetensors: .*lora_[aA].* holds numbers that are not finite"):
            read()


def test_numbers_of_16_bits_that_are_not_finite(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0x7F7F, 0xFF7F, 0x0000], np.uint16)  # 1, the largest, the smallest, 0
    assert tensors.is_finite(bits.view(np.uint8), "BF16")
    for bad in (0x7F80, 0xFF80, 0x7FC0, 0xFFFF):
        bits[2] = bad
        assert not tensors.is_finite(bits.view(np.uint8), "BF16")


@pytest.mark.parametrize("format", ["adapter", "merged"])
@pytest.mark.parametrize("place", ["adapter", "base"])
def test_an_export_never_writes_them(
    format: str, place: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without its check; an adapter whose base is at fault is written, since the base is not in it."""
    model, value = tmp_path / "model", math.nan if place == "adapter" else 0.0
    shutil.copytree(tiny, model)
    if place == "base":
        weights = safetensors.numpy.load_file(model / "model.safetensors")
        weights["model.norm.weight"][3] = math.inf
        safetensors.numpy.save_file(weights, model / "model.safetensors", {"format": "pt"})
    folder = make_adapter(tmp_path / "adapter", PEFT | {"base_model_name_or_path": str(model)}, value)
    argv = ["export", "--adapter", str(folder), "--format", format, "--no-check", "--output", str(tmp_path / "out")]
    written = place == "base" and format == "adapter"
    assert main([*argv, "--backend", "cpu"]) == (0 if written else 2)
    said = capsys.readouterr().err
    assert (tmp_path / "out").exists() == written and ("not finite" in said) == (not written)
    assert not list(tmp_path.glob(".out*"))


WRONG_MODEL: dict[str, list[Any]] = {
    "hidden_size": [0, -1, "128", 1.5, math.nan, True, {}, 10**400],
    "num_hidden_layers": [0, -1, "2", 10**400],
    "vocab_size": [0, -1, "2", 10**12],
    "num_attention_heads": [0, -1, "2", [-1]],
    "num_key_value_heads": [0, -1, 4],
    "head_dim": [0, "64"],
    "max_position_embeddings": ["x", [1], -1, math.nan],
    "rms_norm_eps": ["x", -1, math.nan],
    "rope_theta": [0, math.nan, "x", [1]],
    "rope_scaling": [[1], 3, {"rope_type": "longrope", "original_max_position_embeddings": "x"}],
    "rope_parameters": [3, {"full_attention": {"rope_theta": -1}}],
    "quantization": [{}, [1], {"bits": "x", "group_size": 64}, {"bits": -4, "group_size": 0}],
    "quantization_config": [[1]],
    "logit_scale": ["x", math.inf],
    "logits_scaling": [0, math.nan],
    "final_logit_softcapping": ["x", -1],
    "sliding_window": ["x", -1],
    "layer_types": [3, [1]],
    "tie_word_embeddings": ["no"],
    "model_type": [[1], {}],
    "dtype": [[1]],
    "text_config": [3, {"hidden_size": "x"}],
    "vision_config": [{"patch_size": 0}],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in WRONG_MODEL.items() for value in values])
def test_a_model_config(field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"num_attention_heads": 2, "num_key_value_heads": 1} | {field: value}))
    for read in (lambda: read_model(path, "--model m"), lambda: read_shape(str(path))):
        with pytest.raises(UserError, match=rf"--model .*: config\.json: {'num_' if 'heads' in field else field}"):
            read()


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "3"])
def test_a_model_config_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"--model m: config\.json"):
        read_model(tmp_path / "config.json", "--model m")


def test_every_command_reads_it_so(tiny: str, tmp_path: Path, backend_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tmp_path / "model", str(write_pairs(tmp_path / "pairs.jsonl"))
    shutil.copytree(tiny, model)
    config = json.loads((model / "config.json").read_text())
    for field, value in (("vocab_size", -1), ("hidden_size", 0), ("intermediate_size", "x"), ("model_type", [1])):
        (model / "config.json").write_text(json.dumps(config | {field: value}))
        for command in ("train", "data", "plan"):
            engine = [] if command == "data" else ["--backend", backend_name]
            assert main([command, data, "--model", str(model), *engine]) == 2, (command, field)
            said = capsys.readouterr()
            assert f"config.json: {field} is {value!r}" in said.err


PROGRESS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda content: [1],
    "an unknown field": lambda content: content | {"stp": 3},
    "no step": lambda content: {name: value for name, value in content.items() if name != "step"},
    "a step in words": lambda content: content | {"step": "three"},
    "half a step": lambda content: content | {"step": 1.5},
    "a negative step": lambda content: content | {"step": -1},
    "a window of words": lambda content: content | {"window": {"loss": "x"}},
    "a base that is a list": lambda content: content | {"base": [1]},
    "a base without weights": lambda content: content | {"base": {"config": {}}},
    "metrics in words": lambda content: content | {"metrics": ["x", "y"]},
    "metrics of one": lambda content: content | {"metrics": [1]},
    "a fingerprint that is a number": lambda content: content | {"fingerprint": 3},
}


@pytest.mark.parametrize("name", PROGRESS)
def test_progress(name: str, tmp_path: Path) -> None:
    content = {"format": 3, "step": 3, "num_tokens": 10, "fingerprint": "a", "window": {"loss": [1.0, 2]}}
    (tmp_path / "progress.json").write_text(json.dumps(content))
    assert read_progress(tmp_path).step == 3
    (tmp_path / "progress.json").write_text(json.dumps(PROGRESS[name](content)))
    with pytest.raises(UserError, match=r"progress\.json: "):
        read_progress(tmp_path)
