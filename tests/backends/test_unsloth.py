"""``--unsloth``: its errors, and, where unsloth is installed, equality with the plain path in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, MistralConfig
from unsloth_run import make, measure

from lite_dil.backends import registry
from lite_dil.backends.torch import unsloth as torch_unsloth
from lite_dil.base.errors import UserError
from lite_dil.base.install import install
from lite_dil.config.train_config import TrainConfig

RUN = Path(__file__).parent.parent / "unsloth_run.py"
needs_unsloth = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None,
    reason="unsloth is not installed (it allows transformers up to 5.17; these tests' requirements have a later one)",
)


def python(code: str, path: Path | None = None) -> str:
    """What `code` prints in a new interpreter, with `path` in front of the installed packages."""
    env = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def distribution(folder: Path, name: str, version: str, *requirements: str) -> None:
    """A package as pip leaves it: importable, with its requirements in its dist-info folder."""
    (folder / f"{name}.py").write_text(f"raise ImportError('this is no real {name}\\nand more')\n")
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {text}" for text in requirements)]) + "\n")


REQUIRE = """
from lite_dil.backends.torch import unsloth as torch_unsloth
from lite_dil.base.errors import UserError
from lite_dil.base.install import install
try:
    torch_unsloth.require()
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="unsloth is installed here")
def test_missing_unsloth_is_one_line_with_the_fix() -> None:
    assert python(REQUIRE) == f"--unsloth: unsloth and unsloth_zoo not installed: {install('unsloth')}"


def test_versions_that_do_not_go_together_are_listed(tmp_path: Path) -> None:
    zoo = "unsloth_zoo>=2026.10.9"
    pins = ("transformers!=5.0.0,<=4.99,>=4.52.4", "torch<2.0,>=1.4; sys_platform != 'darwin' or platform_machine != 'arm64'")
    other = ("torch<0.1; sys_platform == 'nowhere'", "torch<0.1; extra == 'cu118'", "numpy<0.1", "nothing_of_the_sort>=1")
    distribution(tmp_path, "unsloth", "2026.10.9", zoo, *pins, *other)
    distribution(tmp_path, "unsloth_zoo", "2026.10.1", "peft>=0.1,!=0.2")
    lines = python(REQUIRE, tmp_path).splitlines()
    assert lines[0] == f"--unsloth: these versions do not work together: {install('unsloth')}"
    assert lines[1] == "  - unsloth_zoo 2026.10.1, but unsloth 2026.10.9 needs >=2026.10.9"
    assert lines[2].startswith("  - transformers 5.")
    assert lines[2].endswith(", but unsloth 2026.10.9 needs <=4.99")
    assert lines[3].startswith("  - torch 2.")
    assert len(lines) == 4


def test_unsloth_comes_before_transformers(tmp_path: Path) -> None:
    distribution(tmp_path, "unsloth", "2026.10.9")
    distribution(tmp_path, "unsloth_zoo", "2026.10.9")
    assert python("import transformers" + REQUIRE, tmp_path) == (
        "--unsloth: transformers already imported, and unsloth patches what is imported after it: "
        "import unsloth first (lite-dil train does)"
    )


def test_the_command_imports_unsloth_before_transformers_and_says_why_it_fails(tmp_path: Path) -> None:
    distribution(tmp_path, "unsloth", "2026.10.9")
    distribution(tmp_path, "unsloth_zoo", "2026.10.9")
    code = "import torch, sys; torch.cuda.is_available = lambda: True; from lite_dil.cli.main import main\n"
    code += "sys.stderr = sys.stdout; print(main(['train', '--unsloth', '--backend', 'cuda']), 'transformers' in sys.modules)"
    expected = "importing torch ...\nlite-dil: --unsloth: unsloth cannot be imported (this is no real unsloth)\n2 False"
    assert python(code, tmp_path) == expected


def test_its_failures_are_told_apart_from_our_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> Any:
            raise KeyError("no such patch")

    class OfOtherArguments:
        @staticmethod
        def from_pretrained(model: str) -> Any:
            raise AssertionError(model)

    monkeypatch.setattr(torch_unsloth, "check_model", lambda *_: None)
    given = ("model", torch.float32, torch.device("cpu"), False, 64)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=Broken))
    with pytest.raises(UserError, match=r"--model model: cannot be loaded through unsloth .*no such patch"):
        torch_unsloth.load(*given)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=OfOtherArguments))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        torch_unsloth.load(*given)


@pytest.mark.parametrize("name", ["cpu", "mlx"])
def test_other_backends_are_refused(name: str) -> None:
    options = TrainConfig(unsloth=True)
    with pytest.raises(UserError, match=f"^--unsloth .*{name}"):
        registry.prepare(name, options, options)
    with pytest.raises(UserError, match="--unsloth is for the cuda backend"):
        registry.load(name, options, "nowhere", None, options)


def test_a_window_long_rows_and_other_architectures_are_refused(tmp_path: Path) -> None:
    """unsloth would leave out the window, stretch the positions, and compile the model anew."""
    cases = {
        "has kernels for .*, not for gpt2": (GPT2Config(), 64),
        "--max-length 128: with --unsloth at most the model's own maximum, 100": (
            LlamaConfig(max_position_embeddings=100),
            128,
        ),
        "has a window of 32 tokens; give --max-length 32 or less": (MistralConfig(sliding_window=32), 64),
    }
    for text, (model, longest) in cases.items():
        model.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=text):
            torch_unsloth.check_model(str(tmp_path), longest)


def test_lacking_weights_are_refused(tiny: str, tmp_path: Path) -> None:
    """unsloth would train on random numbers in their place."""
    torch_unsloth.check_model(tiny, 64)
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"\b1 .*model\.layers\.0\.mlp\.up_proj"):
        torch_unsloth.check_model(str(tmp_path), 64)


def test_options_that_unsloth_does_not_go_with_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = TrainConfig(unsloth=True, gradient_checkpointing="selective", head_bits=8, offload_embeddings=True)
    with pytest.raises(UserError) as error:
        registry.prepare("cuda", options, options)
    for part in ("full or off", "--head-bits", "--offload-embeddings"):
        assert part in str(error.value)


def through_unsloth(path: str, model: str, out: Path, **options: object) -> dict[str, np.ndarray]:
    """What tests/unsloth_run.py computes on "stock" or "kernels"."""
    words = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    file = out / "results.npz"
    env = os.environ | {"LITE_DIL_CACHE": str(out / "cache")}
    done = subprocess.run([sys.executable, RUN, path, model, file, *words], capture_output=True, text=True, cwd=out, env=env)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, "unsloth's banner went to the terminal"
    assert {entry.name for entry in out.iterdir()} <= {"cache", "results", "results.npz"}  # no unsloth_compiled_cache
    assert (out / "results" / "adapter_model.safetensors").is_file()
    with np.load(file) as results:
        return dict(results)


def check_reference(results: dict[str, np.ndarray]) -> None:
    """f is exactly 0 at the start, and training moves the policy and not the reference, bit for bit."""
    np.testing.assert_array_equal(results["policy0"], results["reference0"])
    np.testing.assert_array_equal(results["start"], results["off"])
    np.testing.assert_array_equal(results["off"], results["off_again"])
    assert np.abs(results["on"] - results["off"]).max() > 1e-2
    assert results["norm0"] > 1e-3


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray], prefix: str) -> float:
    """Of all arrays whose names start with `prefix`: the norm of the difference over the norm."""
    names = sorted(name for name in other if name.startswith(prefix))
    assert names == sorted(name for name in one if name.startswith(prefix))
    a, b = (np.concatenate([side[name].ravel() for name in names]).astype(np.float64) for side in (one, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


EQUAL = ("start", "off", "policy0", "policy1", "on", "gradient0", "gradient1", "norm_after_generation")


@needs_unsloth
@pytest.mark.parametrize("path", ["stock", "kernels"])
def test_equals_the_plain_path_in_float32(path: str, tiny: str, tmp_path: Path) -> None:
    """Log-probs, gradients of two steps, the reference, answers with the adapter off and on, and a step after those.

    With checkpointing: 256 tokens are too few for unsloth to move activations off the GPU, which needs CUDA.
    """
    results = through_unsloth(path, tiny, tmp_path, max_length=256, gradient_checkpointing="full")
    plain = measure(make(tiny))
    check_reference(results)
    for prefix in EQUAL:
        assert distance(results, plain, prefix) < 1e-4, prefix
    for name in ("answers_off", "answers_on", "drawn"):
        np.testing.assert_array_equal(results[name], plain[name])
    assert results["checkpointing"]
    assert results["forwards"][0] == ("forward" if path == "stock" else "LlamaModel_fast_forward")


@needs_unsloth
def test_fused_lora_kernels_are_as_near_to_float32_as_stock_layers_are(tiny: str, tmp_path: Path) -> None:
    """unsloth's fused LoRA functions take 16-bit weights only: their error is compared with that of stock float16."""
    results = through_unsloth("kernels", tiny, tmp_path, half=True)
    assert list(results["forwards"]) == ["LlamaModel_fast_forward", "apply_lora_mlp_swiglu", "apply_lora_qkv"]
    check_reference(results)
    exact, stock = measure(make(tiny)), measure(make(tiny, half=True))
    for prefix in ("start", "policy0", "gradient0", "on"):
        assert distance(results, exact, prefix) < 2 * distance(stock, exact, prefix), prefix


@needs_unsloth
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("in_4bit", [False, True])
def test_on_a_gpu_it_is_as_near_to_float32_as_the_plain_path_is(in_4bit: bool, tiny: str, tmp_path: Path) -> None:
    """bfloat16 by real kernels, with activations moved off the GPU, against the same weights in float32."""
    results = through_unsloth("cuda", tiny, tmp_path, dtype="bfloat16", load_in_4bit=in_4bit, gradient_checkpointing="full")
    check_reference(results)
    exact = measure(make(tiny, "cuda", load_in_4bit=in_4bit, optim="adamw"))
    stock = measure(make(tiny, "cuda", dtype="bfloat16", load_in_4bit=in_4bit, optim="adamw"))
    for prefix in ("start", "policy0", "gradient0"):
        assert distance(results, exact, prefix) < 2 * distance(stock, exact, prefix), prefix
