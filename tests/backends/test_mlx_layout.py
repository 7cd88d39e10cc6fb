"""MLX's prefix layout against transformers' own models: right or refused, and only the cost changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import bare_model, criterion, load, one_step, oracle_logps
from mlx.utils import tree_unflatten
from step_gradients import step_gradients
from steps import adapter, step
from test_parity import SMALL
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from lite_dil.backends.mlx import backend as mlx_backend
from lite_dil.backends.mlx import lora as mlx_lora
from lite_dil.backends.mlx import prefix as mlx_prefix
from lite_dil.backends.mlx.backend import MLXBackend
from lite_dil.backends.mlx.load import memory_limits, windows
from lite_dil.backends.mlx.twin import TwinCheck
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.objectives.loss import SUMS

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "Llama": LlamaConfig(**SMALL, rope_theta=50000.0),
    "Llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "Qwen 2": Qwen2Config(**SMALL),
    "Qwen 3": Qwen3Config(**SMALL),
    "Gemma 2": Gemma2Config(**SMALL, query_pre_attn_scalar=16, sliding_window=256),
    "Gemma 2, as many key heads as prompts": Gemma2Config(
        **{**SMALL, "num_attention_heads": 8, "num_key_value_heads": 4}, query_pre_attn_scalar=16, sliding_window=256
    ),
    "Gemma 3": Gemma3TextConfig(
        **SMALL, query_pre_attn_scalar=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "Mistral": MistralConfig(**SMALL, sliding_window=64),
    "Phi 3": Phi3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "Mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "Qwen 2 MoE": Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64
    ),
}


@pytest.fixture(autouse=True)
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's way to attend: row by row, and here three queries at a time."""
    monkeypatch.setattr(MLXBackend, "pads_attention", False)
    monkeypatch.setattr(mlx_prefix, "MLX_QUERIES", 3)


@pytest.fixture(params=["by itself", "padded"])
def attention(request: pytest.FixtureRequest, by_itself: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way to attend: a CPU's, and Metal's, in padded blocks."""
    monkeypatch.setattr(MLXBackend, "pads_attention", request.param == "padded")


def make(architecture: PretrainedConfig, folder: Path) -> str:
    """A random checkpoint whose logits and gradients are not all alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def ragged(lengths: list[tuple[int, list[int]]] | None = None, seed: int = 0) -> Batch:
    """Prompts and responses of unequal lengths, rows of up to 25 tokens, one prompt of a single token."""
    lengths = lengths or [(14, [11, 4]), (1, [6, 1]), (5, [2, 9]), (9, [3, 3])]
    draw = np.random.default_rng(seed)
    return Batch(
        [draw.integers(3, 512, prompt) for prompt, _ in lengths],
        [draw.integers(3, 512, n) for _, responses in lengths for n in responses],
        np.array([i for i, (_, responses) in enumerate(lengths) for _ in responses]),
        np.array([sign for _, responses in lengths for sign in (1, -1)[: len(responses)]]),
    )


def moved(backend: Any) -> Any:
    """Give B values that are not 0, the same for every backend."""
    draw = np.random.default_rng(1)
    values = {k: draw.normal(0, 0.02, v.shape) if k.endswith("lora_b") else v for k, v in sorted(adapter(backend).items())}
    backend.model.update(tree_unflatten([(k, mx.array(v, mx.float32)) for k, v in values.items()]))
    return backend


def gradients(backend: Any, data: Batch) -> dict[str, np.ndarray]:
    return step_gradients(backend, [data], criterion())[1]


def assert_same_gradients(one: dict[str, np.ndarray], two: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    assert one.keys() == two.keys()
    for name, expected in two.items():
        error = np.linalg.norm(one[name] - expected) / np.linalg.norm(expected)
        assert error < tolerance, f"{name}: {error}"


def oracle_gradients(model: str, names: list[str], values: dict[str, np.ndarray], data: Batch) -> dict[str, np.ndarray]:
    """lsif through the bare model, W + scale A B merged into its weights by hand."""
    bare = bare_model(model)
    weights = dict(bare.named_parameters())
    leaves = {name: torch.from_numpy(np.array(value)).requires_grad_() for name, value in values.items()}
    merged = {f"{n}.weight": weights[f"{n}.weight"] + 2.0 * (leaves[f"{n}.lora_a"] @ leaves[f"{n}.lora_b"]).T for n in names}

    class Merged(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return torch.func.functional_call(bare, merged, kwargs=inputs)

    with torch.no_grad():
        reference = oracle_logps(bare, data)
    owner = torch.from_numpy(np.repeat(np.arange(len(data.responses)), data.lengths.astype(int)))
    f = torch.zeros(len(data.responses)).index_add(0, owner, oracle_logps(Merged(), data) - reference)
    f = f / torch.from_numpy(data.lengths)
    loss = (-f[data.chosen].exp() + (2 * f[data.rejected]).exp() / 2).mean()
    return dict(zip(leaves, (g.numpy() for g in torch.autograd.grad(loss, list(leaves.values()))), strict=True))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_prefix_layout_equals_plain_and_the_models_own(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs against transformers one sequence at a time; gradients against the plain layout and autograd there."""
    model, data = make(ARCHITECTURES[kind], tmp_path), ragged()
    bare, options = bare_model(model), {"max_length": 32, "max_grad_norm": 1e9}
    with torch.no_grad():
        expected = oracle_logps(bare, data).numpy()
    plain = load("mlx", model, layout="plain", **options)
    np.testing.assert_allclose(plain.token_logps(data), expected, atol=1e-4)
    values, in_plain = adapter(moved(plain)), gradients(plain, data)
    names = [name.removesuffix(".lora_a") for name in values if name.endswith("lora_a")]
    theirs = oracle_gradients(model, names, values, data)
    for padded in (False, True):  # either way to attend, as `attention` has them
        monkeypatch.setattr(MLXBackend, "pads_attention", padded)
        prefix = load("mlx", model, layout="auto", **options)
        assert (prefix.layout, prefix.layout_reason, plain.layout) == ("prefix", "", "plain")
        np.testing.assert_allclose(prefix.token_logps(data), expected, atol=1e-4)
        in_prefix = gradients(moved(prefix), data)
        assert_same_gradients(in_prefix, in_plain)
        assert_same_gradients(in_prefix, theirs, 1e-3)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("lengths", [[(3, [2])], [(1, [1, 1])], [(4, [2, 5]), (2, [3])], [(1, [4, 2]), (1, [1, 7])]])
def test_prefix_layout_of_odd_batches(lengths: Any, tiny: str) -> None:
    """One response, prompts of a single token, prompts with different numbers of responses, out of order."""
    prefix, plain = (moved(load("mlx", tiny, layout=layout)) for layout in ("prefix", "plain"))
    data = ragged(lengths)
    np.testing.assert_allclose(prefix.token_logps(data), plain.token_logps(data), atol=2e-5)
    order = np.arange(len(data.responses))[::-1]
    turned = Batch(data.prompts, [data.responses[i] for i in order], data.prompt_of[order], data.signs[order])
    np.testing.assert_allclose(prefix.sequence_logps(turned), plain.sequence_logps(turned), atol=2e-5)


SLIDING = {
    "Mistral": MistralConfig(**SMALL, sliding_window=6),
    "Gemma 2": Gemma2Config(**SMALL, query_pre_attn_scalar=16, sliding_window=6),
    "Phi 3": Phi3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}, sliding_window=6),
}


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("kind", SLIDING)
def test_a_window_that_mlx_lm_leaves_out_is_applied_in_any_layout(kind: str, tmp_path: Path) -> None:
    model = make(SLIDING[kind], tmp_path)
    data = ragged([(9, [2, 5]), (3, [12])])  # rows longer than the window
    with torch.no_grad():
        expected = oracle_logps(bare_model(model), data).numpy()
    for layout in ("auto", "plain"):
        found = load("mlx", model, layout=layout, max_length=32).token_logps(data)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_windows_are_read_from_the_config() -> None:
    assert windows(Qwen2Config(num_hidden_layers=2).to_dict()) == [None, None]
    assert windows({"num_hidden_layers": 3, "model_type": "gemma2", "sliding_window": 8}) == [8, None, 8]
    assert windows({"num_hidden_layers": 7, "model_type": "gemma3_text", "sliding_window": 8}) == [8] * 5 + [None, 8]
    assert windows({"num_hidden_layers": 2, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}) == [
        None,
        8,
    ]
    assert windows({"text_config": {"num_hidden_layers": 2, "sliding_window": 8, "model_type": "mistral"}}) == [8, 8]


@pytest.mark.usefixtures("attention")
def test_a_window_that_mlx_lm_applies_is_in_the_prefix_layout_too(tmp_path: Path) -> None:
    """Rows of 25 tokens on windows of 6, in the layers that have one."""
    model, data = make(Cohere2Config(**{**SMALL, "num_hidden_layers": 4}, sliding_window=6), tmp_path), ragged()
    backend = load("mlx", model, max_length=32)
    assert backend.layout == "prefix"
    with torch.no_grad():
        expected = oracle_logps(bare_model(model), data).numpy()
    np.testing.assert_allclose(backend.token_logps(data), expected, atol=1e-4)


SMALL_MAMBA = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
CONVOLUTIONS = Lfm2Config(
    **SMALL, layer_types=["conv", "full_attention"], block_dim=64, block_ff_dim=128, block_auto_adjust_ff_dim=False
)


def test_layers_that_are_not_attention_keep_the_plain_layout(tmp_path: Path) -> None:
    model, data = make(CONVOLUTIONS, tmp_path), ragged()
    backend = load("mlx", model)
    assert backend.layout == "plain"
    assert backend.layout_reason.startswith("plain layout: ") and "attention" in backend.layout_reason
    with torch.no_grad():
        expected = oracle_logps(bare_model(model), data).numpy()
    np.testing.assert_allclose(backend.token_logps(data), expected, atol=1e-4)
    with pytest.raises(UserError, match=r"--layout prefix .*attention"):
        load("mlx", model, layout="prefix")


def test_a_layout_that_would_be_wrong_is_not_taken(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A position scheme that counts pads: the numbers decide, whatever the code looks like."""
    from mlx_lm.models import llama

    def absolute(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> mx.array:
        hidden = self.embed_tokens(inputs) + 0.1 * mx.arange(inputs.shape[1])[:, None]
        mask = llama.create_attention_mask(hidden, cache[0] if cache else None)
        for layer, entry in zip(self.layers, cache or [None] * 2, strict=True):
            hidden = layer(hidden, mask, entry)
        return self.norm(hidden)

    monkeypatch.setattr(llama.LlamaModel, "__call__", absolute)
    monkeypatch.setattr(mlx_backend, "check_twin", lambda *_: TwinCheck())  # which would refuse the model
    assert "log-probs" in load("mlx", tiny).layout_reason


def test_models_built_in_another_way_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"architecture|differently from transformers"):
        load("mlx", make(MambaConfig(**SMALL_MAMBA), tmp_path))


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("layout", ["prefix", "plain"])
def test_checkpointing_in_a_layout_changes_no_gradient(layout: str, tiny: str) -> None:
    data = ragged()
    kept, *others = (
        gradients(moved(load("mlx", tiny, layout=layout, gradient_checkpointing=mode, max_grad_norm=1e9)), data)
        for mode in ("off", "selective", "full")
    )
    for again in others:
        assert_same_gradients(again, kept, 1e-5)


def test_known_references_take_the_same_step(tiny: str) -> None:
    """One batch's reference known and the other's not, against none known; a wrong one must show."""
    one, two, wrong = (moved(load("mlx", tiny)) for _ in range(3))
    batches = [ragged(), ragged(seed=1)]
    expected = step(one, batches)
    with two.adapter_off():
        known = two.sequence_logps(batches[0])
    result = one_step(two, batches, criterion(), 1e-2, references=[known, None])
    assert (result.loss, result.grad_norm) == (expected.loss, expected.grad_norm)
    np.testing.assert_array_equal(result.reference, expected.reference)
    for name, value in adapter(one).items():
        np.testing.assert_array_equal(adapter(two)[name], value)
    assert one_step(wrong, batches, criterion(), 1e-2, references=[known + 1, None]).loss != expected.loss


def test_known_references_cost_no_pass(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load("mlx", tiny)
    monkeypatch.setattr(backend, "adapter_off", None)
    one_step(backend, [ragged()], criterion(), 1e-2, references=[np.zeros(8, np.float32)])
    with pytest.raises(TypeError):
        one_step(backend, [ragged()], criterion(), 1e-2)


def watched(kind: type, seen: list[Any]) -> type:
    """A class of modules that notes the shape of what goes in."""

    def call(self: Any, x: mx.array) -> mx.array:
        seen.append(x.shape[:2])
        return kind.__call__(self, x)

    return type("Watched", (kind,), {"__call__": call})


def test_the_prefix_layout_computes_only_what_is_read(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products in the graph of a pass: of the prompts, the last of two layers computes keys and values alone."""
    monkeypatch.setattr(MLXBackend, "pads_attention", True)  # by itself a prompt has products of its own
    backend, data = load("mlx", tiny, layout="prefix"), ragged()
    whole_layer = 7 + 2  # linear layers, and two products in attention
    with mx.stream(mx.cpu), backend.adapter_off():
        mx.export_to_dot(str(tmp_path / "graph"), backend._read(backend._arrays(data), SUMS))
    products = (tmp_path / "graph").read_text().count("Matmul")
    assert products == 2 * whole_layer + 2 + whole_layer + 1  # and the head

    seen = []  # tokens, not places in padded blocks, go through the MLPs and the head
    for layer in backend.model.layers:
        layer.mlp.__class__ = watched(type(layer.mlp), seen)
    project = backend._project
    backend._project = lambda hidden: (seen.append(hidden.shape[:1]), project(hidden))[1]
    backend.token_logps(data)
    prompts, responses = sum(map(len, data.prompts)) - len(data.prompts), int(data.lengths.sum())
    assert seen == [(1, prompts), (1, responses)] * 2 + [(responses,)]


@pytest.mark.usefixtures("attention")
def test_the_prefix_layout_in_bfloat16_starts_at_0(tiny: str) -> None:
    backend, data = load("mlx", tiny, dtype="bfloat16"), ragged()
    assert (backend.layout, backend.identity) == ("prefix", "mlx bfloat16")
    result = step(backend, [data])
    assert (result.policy == result.reference).all()
    np.testing.assert_allclose(result.policy, load("mlx", tiny).sequence_logps(data), rtol=0.02)


@pytest.mark.parametrize("shape", [(7, 64), (2, 7, 64)])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_an_adapters_input_has_the_gradient_of_a_plain_product(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    x, a, slope = (mx.random.normal(size) for size in (shape, (64, 4), (*shape[:-1], 4)))
    x = x.astype(dtype)

    def gradients(product: Any) -> list[np.ndarray]:
        found = mx.grad(lambda x, a: (product(x, a) * slope).sum(), argnums=(0, 1))(x, a)
        assert [each.dtype for each in found] == [dtype, mx.float32]
        return [np.array(each.astype(mx.float32)) for each in found]

    expected = gradients(lambda x, a: x.astype(mx.float32) @ a)
    for product in (mlx_lora.times, mx.compile(mlx_lora.times)):
        for one, two in zip(gradients(product), expected, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiled_step_equals_the_plain_one(tiny: str, dropout: float) -> None:
    """Padded to multiples of 64, so dropout is compared with itself: another step draws another mask."""
    data = ragged()
    compiled = moved(load("mlx", tiny, compile=True, lora_dropout=dropout))
    first, second = step(compiled, [data], 0.0), step(compiled, [data], 0.0)
    np.testing.assert_array_equal(first.reference, second.reference)
    if dropout:
        assert (first.policy != second.policy).any()
        return
    expected = step(moved(load("mlx", tiny)), [data], 0.0)
    np.testing.assert_allclose(first.policy, expected.policy, atol=5e-5)
    assert first.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    with compiled.adapter_off():  # on and off are functions of their own
        off = compiled.sequence_logps(data)
    assert (compiled.sequence_logps(data) != off).all()
    np.testing.assert_array_equal(off, first.reference)
    fresh = step(load("mlx", tiny, compile=True), [data])
    assert (fresh.policy == fresh.reference).all()


@pytest.mark.parametrize(("bits", "four"), [(8, False), (4, False), (8, True)])
def test_head_bits(bits: int, four: bool, tiny: str, tiny_tied: str) -> None:
    data = ragged()
    for model in (tiny, tiny_tied):
        backend, again = (load("mlx", model, head_bits=bits, load_in_4bit=four) for _ in range(2))
        np.testing.assert_array_equal(backend.token_logps(data), again.token_logps(data))
        whole = load("mlx", model, load_in_4bit=four)
        difference = np.abs(backend.token_logps(data) - whole.token_logps(data)).max()
        assert 1e-4 < difference < (0.5 if bits == 8 and not four else 5)
        result = step(backend, [data])
        assert (result.policy == result.reference).all()
        head = f"head {bits}"
        assert backend.identity == ("mlx float32 4-bit group 64 " if four else "mlx float32 ") + head
        inside = backend.model.model.embed_tokens if "lm_head" not in backend.model else backend.model.lm_head
        assert inside.bits == bits
    assert whole.identity == "mlx float32" + (" 4-bit group 64" if four else "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "packed"}, "--layout packed is for the cuda and cpu backends; mlx has prefix"),
        ({"offload_embeddings": True}, "--offload-embeddings is for the cuda backend"),
        ({"offload_activations": True}, "--offload-activations is for the cuda backend"),
        ({"fused_layers": False}, "--no-fused-layers is for the cuda and cpu backends"),
    ],
)
def test_options_without_a_meaning_on_mlx_are_refused(changes: dict[str, Any], message: str, tiny: str) -> None:
    with pytest.raises(UserError, match=message):
        load("mlx", tiny, **changes)
    with pytest.raises(UserError, match=f"(?s){message.split()[0]}.*--optim|--optim.*{message.split()[0]}"):
        load("mlx", tiny, optim="paged_adamw_8bit", **changes)


def test_memory_limits_leave_room_for_the_system() -> None:
    gib = 2**30
    # memory, what macOS recommends for the GPU: wired, cached
    assert memory_limits({"memory_size": 8 * gib, "max_recommended_working_set_size": 16 * gib // 3}) == (
        16 * gib // 3,
        gib // 2,
    )
    assert memory_limits({"memory_size": 16 * gib, "max_recommended_working_set_size": 13 * gib}) == (12 * gib, gib)
    assert memory_limits({"memory_size": 24 * gib, "max_recommended_working_set_size": 17 * gib}) == (17 * gib, 3 * gib // 2)
    assert memory_limits({"memory_size": 128 * gib}) == (96 * gib, 4 * gib)
