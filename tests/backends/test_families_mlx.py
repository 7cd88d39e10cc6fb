"""MLX against transformers on a model's small twin, at load, and what makes families equal: configs, ropes, experts, names."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
import torch
from chat_templates import tokenizer_of
from conftest import config, load
from families import exact, zoo
from families.exact import independent, token_logps
from mlx_lm.models import llama as mlx_llama
from test_families import FRONT_ROW
from test_mlx_layout import ragged
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lite_dil.backends import registry
from lite_dil.backends import twin as twins
from lite_dil.backends.mlx import load as mlx_load
from lite_dil.backends.mlx import repairs
from lite_dil.backends.mlx import twin as mlx_twin
from lite_dil.backends.types import Sampling
from lite_dil.base.errors import UserError
from lite_dil.models.twin import shrink


@pytest.fixture(autouse=True)
def own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "cache"))


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the comparison take the package's figures; the rest, and the independent model, have torch."""
    monkeypatch.setattr(twins, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None)))


# Those of which mlx-lm's code has least in common with Llama's; of the others the log-probs suffice.
WHOLE = (
    *("deepseek_v3", "gemma4", "gemma4_text-moe", "glm4_moe_lite", "gpt_oss", "granitemoehybrid", "lfm2", "mistral3"),
    *("nemotron_h", "phi3", "qwen3_5_moe", "qwen3_moe"),
)


@pytest.mark.parametrize(("family", "kind"), [row[:2] for row in FRONT_ROW if row[0] in WHOLE], ids=WHOLE)
def test_the_front_row(family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From train to export, on folders as transformers 5 saves them; at load the package's figures are enough, as on a Mac."""
    without_torch(monkeypatch)
    folder = zoo.make(family, tmp_path / "model")
    tokenizer_of(kind).save_pretrained(folder)
    found = exact.check(folder, "mlx", tmp_path)
    assert found.wrong == []
    assert {"router", "gate"}.isdisjoint(found.targets)


@pytest.mark.parametrize("family", [name for name, *_ in FRONT_ROW if name not in WHOLE])
def test_the_rest_of_the_front_row(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_torch(monkeypatch)
    folder, data = zoo.make(family, tmp_path), ragged()
    backend = load("mlx", str(folder), max_length=4096)
    np.testing.assert_allclose(backend.token_logps(data), token_logps(independent(folder), data), atol=1e-4)
    assert not any(layer.rpartition(".")[2] in ("gate", "router") for layer in backend.adapters["policy"].layers)


@pytest.mark.parametrize("family", ["minicpm3", "recurrent_gemma"])
def test_what_mlx_lm_multiplies_by_is_mended(family: str, tmp_path: Path) -> None:
    """A tied head's scale, which it leaves out, and the root of a width (of which the second size's is no whole number)."""
    folder, data = zoo.make(family, tmp_path, 2), ragged()
    logps = load("mlx", str(folder), max_length=4096).token_logps(data)
    np.testing.assert_allclose(logps, token_logps(independent(folder), data), atol=1e-4)


# As the hub has them, in the spelling of transformers 4.
_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LONG = {"type": "longrope", "long_factor": [1 + 0.9 * i for i in range(48)], "short_factor": [1 + i / 16 for i in range(48)]}
_GQA = {"num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
HUB: dict[str, dict[str, Any]] = {
    "Llama 3.1 8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        **_GQA,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "llama3", **_ROPE},
    },
    "Phi-4-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        **_GQA,
        "vocab_size": 200064,
        "pad_token_id": 199999,
        "eos_token_id": 199999,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": _LONG,
    },
}


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_the_hub_is_read_right(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    assert mlx_twin.compare(tmp_path, name).right


def test_a_router_gets_an_adapter_if_it_is_asked_for(tmp_path: Path) -> None:
    model = str(zoo.make("qwen3_moe", tmp_path))
    adapted = load("mlx", model, target_modules="gate").adapters["policy"].layers
    assert set(adapted) == {f"model.layers.{layer}.mlp.gate" for layer in range(2)}


def test_a_rope_that_mlx_lm_builds_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm rotates all of GLM-4's heads, transformers half of them: without the repair the twin tells."""
    model = str(zoo.make("glm", tmp_path))
    monkeypatch.setattr(mlx_load, "mend_ropes", lambda *_: None)
    with pytest.raises(UserError, match=r"differently from transformers, by up to .* nats per token .*--backend"):
        load("mlx", model)


def test_another_form_of_gelu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm's StarCoder2 computes GELU with erf, transformers with tanh: up to 4e-4 nats a token, which is not rounding."""
    model = str(zoo.make("starcoder2", tmp_path))
    load("mlx", model)
    monkeypatch.setattr(repairs, "mend_gelu", lambda *_: None)
    with pytest.raises(UserError, match="differently from transformers"):
        load("mlx", model)


def test_parts_that_only_their_owner_computes_with_are_left_alone() -> None:
    class Parts(nn.Module):  # as mlx-lm's Gemma3nAltUp: no __call__
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    model = Parts()
    repairs.mend_gelu(model, {"hidden_act": "gelu"})
    repairs.mend_constants(model, "gemma3n")
    assert type(model) is Parts


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("granitemoehybrid-dense", {"down_proj", "gate_proj", "up_proj"}),  # two halves of one weight in transformers
        ("laguna", {"down_proj", "gate_proj", "up_proj"}),  # of shared experts, which PEFT does not find again
    ],
)
def test_a_layer_that_transformers_has_not_gets_no_adapter(family: str, left_out: set[str], tmp_path: Path) -> None:
    model = zoo.make(family, tmp_path / "model")
    said = remark(model)
    assert all(name in said for name in left_out) and "no adapter on some layers" in said
    with pytest.raises(UserError, match=r"no linear layer 'gate_proj'") if "dense" in family else nullcontext():
        names = load("mlx", str(model), target_modules="gate_proj").adapters["policy"].layers
        assert not any("shared_expert" in name for name in names)


class Renamed(LlamaConfig):
    model_type = "renamed"


class RenamedForCausalLM(LlamaForCausalLM):
    config_class = Renamed


@pytest.mark.parametrize("setting", ["rms_norm_eps", "rope_theta", "rope pairs", ""])
def test_a_family_under_another_name_is_compared_too(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model_type that nobody knows, whose MLX model ignores a setting."""

    class Arguments(mlx_llama.ModelArgs):
        @classmethod
        def from_dict(cls, params: dict[str, Any]) -> Any:
            wrong = {"rms_norm_eps": 1e-8, "rope_theta": 10000.0}
            return super().from_dict(params | ({setting: wrong[setting]} if setting in wrong else {}))

    class Model(mlx_llama.Model):
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            if setting == "rope pairs":  # neighbours, not halves
                for layer in self.model.layers:
                    layer.self_attn.rope = nn.RoPE(layer.self_attn.rope.dims, traditional=True)
            return super().sanitize(weights)

    module = type(sys)("mlx_lm.models.renamed")
    module.Model, module.ModelArgs = Model, Arguments
    monkeypatch.setitem(sys.modules, "mlx_lm.models.renamed", module)
    AutoConfig.register("renamed", Renamed, exist_ok=True)
    AutoModelForCausalLM.register(Renamed, RenamedForCausalLM, exist_ok=True)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    RenamedForCausalLM(Renamed(**sizes, num_key_value_heads=2, rope_theta=5e5)).save_pretrained(tmp_path)
    if not setting:
        load("mlx", str(tmp_path))
        return
    with pytest.raises(UserError, match="differently from transformers"):
        load("mlx", str(tmp_path))


def test_a_window_counts_by_what_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's windows, which its loop keeps to itself, are applied; Mixtral's are not, before the repair."""
    load("mlx", str(zoo.make("gemma4_text", tmp_path / "gemma")), max_length=4096)
    mixtral = str(zoo.make("mixtral", tmp_path / "mixtral"))
    monkeypatch.setattr(repairs, "mend_windows", lambda *_: None)
    with pytest.raises(UserError, match=r"16 tokens.*--max-length 16\b"):
        load("mlx", mixtral, max_length=17)
    load("mlx", mixtral, max_length=16)


@pytest.mark.parametrize("name", ["mixtral", "gemma2"])
def test_a_repaired_window_holds_in_generation_too(name: str, tmp_path: Path) -> None:
    """Greedy tokens, alone and in a batch, against transformers' log-probs of whole sequences."""
    folder = zoo.make(name, tmp_path)
    backend, base = load("mlx", str(folder), max_length=4096), independent(folder)
    prompts = [list(range(40, 62)), list(range(100, 105))]  # one longer than the window of 16
    answers = backend.generate(prompts, 24, [], None, Sampling())
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([prompt + list(answer.ids)])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(answer.ids)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5"])
def test_the_package_has_the_figures_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's two sizes differ in the ratio of the width to the heads, which one packaged twin cannot have both ways."""
    packaged = json.loads(twins.PACKAGED.read_text(encoding="utf-8"))[name]
    models = [zoo.make(name, tmp_path / str(size), size) for size in (1, 2)]
    with twins.twin(models[0]) as one:
        assert json.loads((one.folder / "config.json").read_text(encoding="utf-8")) == packaged["config"]
        np.testing.assert_allclose(one.figures.logps, packaged["logps"], atol=1e-4)
    assert mlx_twin.compare(models[1], name).right
    without_torch(monkeypatch)
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "empty"))
    first, second = (mlx_twin.compare(model, name) for model in models)
    assert first.right and not first.uncovered
    assert second.right and {setting.rpartition(".")[2] for setting in second.uncovered} == {"hidden_size"}


def test_without_torch_it_is_said_what_was_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_torch(monkeypatch)
    model = zoo.make("llama", tmp_path / "llama")
    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(raw | {"hidden_act": "gelu"}))
    assert "hidden_act" in remark(model)
    with monkeypatch.context() as patched:  # the family's twin is compared all the same
        patched.setattr(mlx_llama.Attention, "__call__", lambda self, x, *_, **__: self.o_proj(self.q_proj(x)))
        with pytest.raises(UserError, match="differently from transformers"):
            remark(model)
    monkeypatch.setattr(twins, "PACKAGED", tmp_path / "families.json")
    twins.PACKAGED.write_text("{}")
    assert "was not compared" in remark(model) and "torch is not installed" in remark(model)


def remark(model: Path) -> str:
    said: list[str] = []
    options = config(backend="mlx", model=str(model))
    registry.load("mlx", options, str(model), options, options, said.append)
    return " ".join(said)


def test_a_twin_keeps_ratios_and_kinds_of_layers() -> None:
    """Sizes of Qwen3-30B-A3B and of a hybrid with an attention layer every fourth."""
    known = {"num_hidden_layers": 48, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12}
    raw = {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    raw |= {"hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "eos_token_id": 151645}
    small = shrink(raw, known)
    assert (small["num_hidden_layers"], small["num_attention_heads"] // small["num_key_value_heads"]) == (4, 8)
    assert small["num_experts_per_tok"] < small["num_experts"] < 128 and small["eos_token_id"] < small["vocab_size"]
