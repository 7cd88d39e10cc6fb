"""Listing a model of any family by transformers' own class, on the device "meta": nothing takes memory but the names."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lite_dil.backends.torch import packed_attention
from lite_dil.backends.torch.layers import layers_of
from lite_dil.backends.torch.load import (
    attention_of,
    auto_class,
    decoder_of,
    drop_towers,
    keeps_float32,
    without_dropout,
)
from lite_dil.backends.torch.rehearsal import Rehearser
from lite_dil.base.errors import UserError, first_line
from lite_dil.models import adapters
from lite_dil.models.hub import needs_code
from lite_dil.models.listing import ListedModel, Rehearsal, StepProfile
from lite_dil.models.logits import logit_transform
from lite_dil.models.shape import Linear, Quantization, read_long_rope

_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "experts_per_token",
)


def listed(model: str, path: Path, quantization: Quantization | None, trust_remote_code: bool = False) -> ListedModel:
    """Return what a model consists of.

    Args:
        model: its folder or hub id, as the user named it.
        path: its config.json.
        quantization: how its checkpoint is quantised.

    Raises:
        UserError: it cannot be made from its config.json, or not be computed without memory; `rehearse` raises it too.
    """
    where = f"--model {model}"
    with _planning(where):
        source = model if trust_remote_code and Path(model) != path else str(path)
        config = without_dropout(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code))
        skipped = (getattr(config, "quantization_config", None) or {}).get("llm_int8_skip_modules")
        with torch.device("meta"):
            base: Any = auto_class(config).from_config(
                copy.deepcopy(config), attn_implementation=attention_of(config), trust_remote_code=trust_remote_code
            )
        base.requires_grad_(False)
        found = _list(base.eval(), config, quantization, skipped)

    def rehearse(of: Rehearsal) -> StepProfile:
        with _planning(where):
            return found.rehearse(of)

    return replace(found, rehearse=rehearse)


@contextmanager
def _planning(where: str) -> Iterator[None]:
    """Turn every error in the block into a UserError: code of transformers, torch or the model runs in it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # that code may raise anything
        raise UserError(f"{where}: cannot be planned ({needs_code(error) or first_line(error)})") from error


def _list(base: Any, config: Any, quantization: Quantization | None, skipped: list[str] | None) -> ListedModel:
    text = config.get_text_config()
    kept = HfQuantizer.get_modules_to_not_convert(base, skipped, base._keep_in_fp32_modules)
    whole = _Parts.of(base, base, kept)
    drop_towers(base)
    decoder = decoder_of(base)
    parts = _Parts.of(base, decoder, kept)
    head, table = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    each = adapters.experts_of(text.to_dict())
    stacked = {
        name: size
        for name, size in parts.others.items()
        if each and size.shape[0] == each and (size.ndim == 3 or ".experts." in name)
    }
    narrow = {name: _kept_wide(base, getattr(torch, name), decoder) for name in ("bfloat16", "float16")}
    rehearser = Rehearser(base)
    experts = sum(map(torch.numel, stacked.values()))
    layers = layers_of(decoder) or nn.ModuleList()
    own = getattr(config, "quantization_config", None) or {}
    return ListedModel(
        model_type=str(text.model_type),
        layers=len(layers),
        stem=rehearser.stem,
        hidden=table.shape[1],
        vocabulary=table.shape[0],
        tied=head is table,
        dtype=str(config.dtype or text.dtype or torch.bfloat16).removeprefix("torch."),
        max_positions=int(getattr(text, "max_position_embeddings", 0) or 0),
        long_rope=read_long_rope(text.to_dict()),
        transform=logit_transform(base.config.to_dict()),
        quantization=quantization,
        layers_by_name=parts.linears,
        packed=frozenset(parts.packed),
        adaptable=rehearser.adaptable(),
        experts_each=each,
        experts=experts,
        expert_linears=sum(linear.parameters for name, linear in parts.linears.items() if ".experts." in name),
        chosen=min(1.0, _chosen(text) / each) if each else 1.0,
        largest_expert=max(map(torch.numel, stacked.values()), default=0),
        tables=parts.tables,
        rest=sum(map(torch.numel, parts.others.values())) - experts,
        wide=narrow,
        tower=tuple(linear for name, linear in whole.linears.items() if name not in parts.linears and name in whole.packed),
        tower_rest=whole.unpacked(head) - parts.unpacked(head),
        packs_rows=_packs_rows(base, decoder, rehearser),
        selective=all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers),
        experts_stored_in=4.25 if own.get("quant_method") == "mxfp4" else None,
        rehearse=rehearser.rehearse,
    )


@dataclass(frozen=True)
class _Parts:
    """A module's weights by kind."""

    linears: dict[str, Linear]
    packed: list[str]
    tables: int
    others: dict[str, Any]

    @classmethod
    def of(cls, base: Any, inside: Any, kept: list[str]) -> _Parts:
        """List the weights of `inside`, a part of `base`, but for the output head; `kept` are names that 4 bits leave."""
        wanted = {id(module) for module in inside.modules()} - {id(base.get_output_embeddings())}
        linears: dict[str, Linear] = {}
        packed, tables, others, seen = [], 0, {}, set()
        for name, module in base.named_modules():
            if id(module) not in wanted:
                continue
            if isinstance(module, nn.Linear):
                linears[name] = Linear(module.out_features, module.in_features, module.bias is not None)
                if type(module) is nn.Linear and should_convert_module(name, kept):
                    packed.append(name)
                continue
            if isinstance(module, Conv1D):  # GPT-2's; packed, and never adapted
                linears[name] = Linear(module.weight.shape[1], module.weight.shape[0], True)
                packed += [name] if should_convert_module(name, kept) else []
                continue
            for own, weight in module.named_parameters(recurse=False):
                if id(weight) in seen:
                    continue
                seen.add(id(weight))
                if isinstance(module, nn.Embedding):
                    tables += weight.numel()
                else:
                    others[f"{name}.{own}"] = weight
        return cls(linears, packed, tables, others)

    def unpacked(self, head: Any) -> int:
        """Return the parameters that 4 bits leave, without the head."""
        left = sum(linear.parameters for name, linear in self.linears.items() if name not in self.packed)
        return left + self.tables + sum(map(torch.numel, self.others.values()))


def _chosen(text: Any) -> int:
    found = [getattr(text, name, None) for name in _CHOSEN]
    return max((max(n) if isinstance(n, list) else n for n in found if isinstance(n, (int, list)) and n), default=1)


def _kept_wide(base: Any, dtype: torch.dtype, decoder: Any) -> int:
    """Return how many of the decoder's parameters transformers keeps in float32 when it loads the model in `dtype`."""
    wide = {id(weight) for name, weight in base.named_parameters() if keeps_float32(base, name, dtype)}
    return sum(weight.numel() for weight in decoder.parameters() if id(weight) in wide)


def _packs_rows(base: Any, decoder: Any, rehearser: Rehearser) -> bool:
    """Return whether packed rows compute this model rightly, as far as its parts show; training compares the results."""
    if packed_attention.why_not(base, 1) or layers_of(decoder) is None or not hasattr(decoder, "norm"):
        return False
    # What mixes tokens other than by attention would mix those of different responses.
    mixes = any(isinstance(m, nn.Conv1d) or "A_log" in dict(m.named_parameters(recurse=False)) for m in decoder.modules())
    return not mixes and rehearser.packs_rows()
