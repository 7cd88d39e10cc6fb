"""The torch engine: the packed layout, fused layers and computing again, each against the plain layout of stock modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_parity
import torch
from conftest import bare_model, batch, criterion, load, one_step, oracle_logps
from test_memory import LargestTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from lite_dil.backends.torch import flex, packed_attention
from lite_dil.backends.torch import fused as torch_fused
from lite_dil.backends.torch.row import PackedRow, Scores
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import packed
from lite_dil.objectives.loss import SUMS

SMALL: dict[str, Any] = {**test_parity.SMALL, "max_position_embeddings": 4096}
SLIDING = ["sliding_attention", "full_attention"]
ARCHITECTURES = {
    "Llama": LlamaConfig(**SMALL),
    "Qwen 2, biases": Qwen2Config(**SMALL, attention_bias=True),
    "Qwen 3, norms on heads": Qwen3Config(**SMALL),
    "Gemma 2, soft caps, window 5": Gemma2Config(**SMALL, sliding_window=5, layer_types=SLIDING, attn_logit_softcapping=2.0),
    "Gemma 3, window 5": Gemma3TextConfig(**SMALL, sliding_window=5, layer_types=SLIDING),
    "Mistral, window 6": MistralConfig(**SMALL, sliding_window=6),
    "Phi 3, joined projections": Phi3Config(**{**SMALL, "hidden_size": 64}, sliding_window=2000),
    "Mixtral, experts": MixtralConfig(**SMALL, num_local_experts=4),
}


def shared_tokens(batch: Batch) -> int:
    """Tokens that must be computed where a prompt is computed once: prompts and responses, without padding."""
    return sum(map(len, [*batch.prompts, *batch.responses]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny checkpoint of each architecture."""
    folders = {}
    for kind, architecture in ARCHITECTURES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(architecture)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                torch.nn.init.normal_(parameter, std=0.1, mean=parameter.mean().item())
        folders[kind] = str(tmp_path_factory.mktemp("model"))
        model.save_pretrained(folders[kind])
    return folders


def gradients(backend: Any, data: Batch) -> tuple[Any, dict[str, torch.Tensor]]:
    """The result of a step at an adapter whose B is not 0, and the gradients it was made with."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(backend.adapters["policy"].weights.items()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    taken = {}

    def take(*_: Any, **__: Any) -> None:
        taken.update({name: p.grad.clone() for name, p in backend.adapters["policy"].weights.items()})

    backend.adapters["policy"].optimizer.step = take
    return one_step(backend, [data], criterion(), 0.0), taken


def assert_same(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(other[0].policy, one[0].policy, atol=tolerance)
    np.testing.assert_allclose(other[0].reference, one[0].reference, atol=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        error = (other[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_layout_and_fused_layers_change_nothing(kind: str, models: dict[str, str]) -> None:
    data, model = batch(4), models[kind]
    stock = load("cpu", model, layout="plain", fused_layers=False, max_grad_norm=1e9)
    with torch.no_grad():
        np.testing.assert_allclose(stock.token_logps(data), oracle_logps(bare_model(model), data).numpy(), atol=1e-4)
    expected = gradients(stock, data)
    for fused in (False, True):
        for mode in ("off", "selective", "full"):
            backend = load("cpu", model, fused_layers=fused, gradient_checkpointing=mode, max_grad_norm=1e9)
            assert (backend.layout, backend.layout_reason) == ("packed", "")
            assert_same(expected, gradients(backend, data))
    assert_same(expected, gradients(load("cpu", model, layout="plain", max_grad_norm=1e9), data))


def test_layout_auto_falls_back_and_says_why(tmp_path: Path) -> None:
    """ALiBi is no rope: transformers' Bloom has its own attention."""
    architecture = BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4, hidden_dropout=0.1)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(tmp_path)
    backend = load("cpu", str(tmp_path))
    assert backend.layout == "plain"
    assert "BloomForCausalLM" in backend.layout_reason
    assert gradients(backend, batch())[0].loss != 0
    with pytest.raises(UserError, match=r"--layout packed: not for .*its own attention; leave out --layout"):
        load("cpu", str(tmp_path), layout="packed")
    expected = gradients(load("cpu", str(tmp_path), fused_layers=False), batch())
    for mode in ("selective", "full"):  # its MLP takes the residual, too, as an input with a gradient
        assert_same(expected, gradients(load("cpu", str(tmp_path), gradient_checkpointing=mode), batch()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layers of type chunked_attention"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic rope depends on the length",
        ),
    ],
)
def test_layouts_that_a_config_forbids(change: dict[str, Any], reason: str) -> None:
    class Base:
        _supports_attention_backend = True
        config = LlamaConfig(**{**SMALL, "max_position_embeddings": 512})

    for name, value in change.items():
        setattr(Base.config, name, value)
    assert reason in packed_attention.why_not(Base, 1024)
    if "rope_parameters" in change:
        assert packed_attention.why_not(Base, 512) == ""


def test_a_model_whose_packed_layout_differs_gets_the_plain_one(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no config tells, the comparison at start-up sees: here, positions that the model does not take from its caller."""
    rotate = PackedRow.of.__func__

    def shifted(cls: Any, *args: Any) -> PackedRow:
        row = rotate(cls, *args)
        row.position_ids = torch.arange(row.position_ids.shape[1])[None]
        return row

    monkeypatch.setattr(PackedRow, "of", classmethod(shifted))
    backend = load("cpu", tiny)
    assert backend.layout == "plain"
    assert "log-probs differ" in backend.layout_reason


def test_a_packed_layout_whose_gradients_differ_is_not_taken(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one whose forward pass alone is right: here, no gradient goes back through the keys."""
    whole = packed_attention.blockwise

    def cut(q: Any, k: Any, *rest: Any) -> Any:
        return whole(q, k.detach(), *rest)

    monkeypatch.setattr(packed_attention, "blockwise", cut)
    backend = load("cpu", tiny)
    assert backend.layout == "plain"
    assert "gradients differ" in backend.layout_reason
    assert all(weight.grad is None for weight in backend.model.parameters())


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 2.0)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_of_a_packed_layout_equals_the_cpus(window: int | None, softcap: float | None) -> None:
    """The mask that CUDA's FlexAttention is given, against the CPU's own attention. There it has no backward pass."""
    layout = packed(batch(3), multiple=128)
    row = PackedRow.of(layout, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    tokens = layout.input_ids.shape[1]
    q, k, v = (torch.randn(1, heads, tokens, 16, generator=draw) for heads in (4, 2, 2))
    real = shared_tokens(batch(3))
    scores = Scores(0.25, softcap or 0.0, window)
    own = packed_attention.blockwise(q, k, v, row, scores)
    torch.testing.assert_close(flex.attend(q, k, v, row, scores)[:, :real], own[:, :real], atol=1e-5, rtol=1e-5)


class Widths(TorchDispatchMode):
    """Remembers how many rows each matrix product of a given output width has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and out.shape[-1] == self.width:
            self.rows.append(out.shape[0])
        return out


def test_the_last_layer_computes_only_what_is_read(models: dict[str, str]) -> None:
    data = batch(4)
    backend = load("cpu", models["Llama"])
    with backend.adapter_off(), Widths(128) as seen, torch.no_grad():
        backend.reader.logps(data, SUMS)
    # Gate and up of either layer. Read are the last prompt tokens and all of each response but its last token.
    read = len(np.unique(packed(data).hidden_index))
    assert seen.rows == [shared_tokens(data), shared_tokens(data), read, read]
    with backend.adapter_off(), Widths(512) as seen, torch.no_grad():
        backend.reader.logps(data, SUMS)
    assert seen.rows == [int(data.lengths.sum())]  # the head


def test_no_mask_is_larger_than_a_pair(tiny: str) -> None:
    """Neither tokens x tokens of the row nor of a prompt: the pieces need no mask at all."""
    draw = np.random.default_rng(0)
    data = Batch(
        [draw.integers(3, 500, 1500) for _ in range(2)],
        [draw.integers(3, 500, 20) for _ in range(4)],
        np.array([0, 0, 1, 1]),
        np.array([1, -1, 1, -1]),
    )
    backend = load("cpu", tiny, layout="packed")
    with LargestTensor() as seen:
        one_step(backend, [data], criterion(), 1e-3)
    assert seen.largest < 1500 * 1500 / 4


def test_an_mlp_that_is_computed_again_goes_in_tiles(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch(8)
    expected = gradients(load("cpu", tiny, max_grad_norm=1e9), data)
    monkeypatch.setattr(torch_fused, "MLP_TILE", 128 * 20)  # 20 tokens
    backend = load("cpu", tiny, gradient_checkpointing="selective", max_grad_norm=1e9)
    with Widths(128) as seen:
        assert_same(expected, gradients(backend, data))
    assert max(seen.rows) == 20 < shared_tokens(data) / 4


@pytest.mark.parametrize("mode", ["off", "full"])
def test_an_mlp_whose_inside_is_kept_makes_the_rest_in_tiles(mode: str, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch(8)
    expected = gradients(load("cpu", tiny, max_grad_norm=1e9), data)
    monkeypatch.setattr(torch_fused, "MLP_TILE", 128 * 20)  # 20 tokens
    rows, silu = [], torch_fused.ACTIVATIONS["silu"]
    counting = (lambda x: rows.extend(x.shape[:-1]) or silu[0](x), silu[1])
    monkeypatch.setitem(torch_fused.ACTIVATIONS, "silu", counting)
    assert_same(expected, gradients(load("cpu", tiny, gradient_checkpointing=mode, max_grad_norm=1e9), data))
    assert max(rows) == 20 < shared_tokens(data) / 4


def test_fused_layers_keep_less(tiny: str) -> None:
    """Measured by what autograd saves, in bytes, over stock modules; and checkpointing less still."""
    kept = {}
    data = batch(8)
    for fused, mode in ((False, "off"), (True, "off"), (True, "selective"), (True, "full")):
        backend = load("cpu", tiny, fused_layers=fused, gradient_checkpointing=mode, dtype="bfloat16")
        seen: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in backend.model.parameters()}

        def pack(x: torch.Tensor, seen: dict[int, int] = seen, weights: set[int] = weights) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logps = backend.reader.logps(data, SUMS)
        kept[fused, mode] = sum(seen.values())
        del logps
    assert kept[True, "off"] < 0.6 * kept[False, "off"]
    assert kept[True, "selective"] < 0.8 * kept[True, "off"]
    assert kept[True, "full"] < 0.3 * kept[True, "off"]


def test_known_references_are_taken_and_not_computed(tiny: str) -> None:
    data = batch(3)
    known, computed = load("cpu", tiny), load("cpu", tiny)
    with known.adapter_off():
        reference = known.sequence_logps(data)
    passes = []
    off = known.adapter_off
    known.adapter_off = lambda: passes.append(1) or off()
    for _ in range(2):
        one = one_step(known, [data], criterion(), 1e-3, [reference])
        two = one_step(computed, [data], criterion(), 1e-3)
        assert one.loss == two.loss
        np.testing.assert_array_equal(one.policy, two.policy)
    assert not passes
    assert (one_step(known, [data], criterion(), 0.0, [reference + 1]).policy == one.policy).sum() < 6


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_head_is_the_same_for_policy_and_reference(bits: int, tiny: str, tiny_tied: str) -> None:
    data = batch()
    for model in (tiny, tiny_tied):
        whole, small = load("cpu", model), load("cpu", model, head_bits=bits)
        assert f"{bits}-bit head" in small.description
        assert small.identity != whole.identity
        result = one_step(small, [data], criterion(), 0.0)
        assert (result.policy == result.reference).all()
        error = np.abs(small.token_logps(data) - whole.token_logps(data))
        assert 0 < error.mean() < (0.1 if bits == 8 else 0.6)
        # Its gradient is that of its own unpacked weight.
        weight = torch.cat([tile for _, tile in small.head.tiles()])
        whole.head.weight = torch.nn.Parameter(weight, requires_grad=False)
        assert_same(gradients(whole, data), gradients(small, data))


def test_the_table_that_is_offloaded_is_looked_up_the_same(tiny: str) -> None:
    from lite_dil.backends.torch import layers as torch_layers

    model = AutoModelForCausalLM.from_pretrained(tiny)
    table, ids = model.get_input_embeddings(), torch.arange(7)[None]
    before = table(ids)
    torch_layers.offload_embeddings(model, model.get_output_embeddings(), torch.device("cpu"))
    torch.testing.assert_close(table(ids), before)
    with pytest.raises(UserError, match="the embedding table is also the output head"):
        torch_layers.offload_embeddings(model, table, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "prefix"}, "--layout prefix is for the mlx backend; cpu has packed"),
        ({"compile": True}, "--compile is for the mlx backend"),
        ({"offload_activations": True, "gradient_checkpointing": "full"}, "--offload-activations is for the cuda backend"),
        ({"offload_embeddings": True}, "--offload-embeddings is for the cuda backend"),
    ],
)
def test_the_cpu_refuses_what_it_cannot_do(changes: dict[str, Any], message: str, tiny: str) -> None:
    with pytest.raises(UserError, match=message):
        load("cpu", tiny, **changes)
