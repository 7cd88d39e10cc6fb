"""How a config.json spells a setting: transformers 5, transformers 4 and mlx-lm use different names for the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError

_LINEAR = {"linear_attention": "mamba", "full_attention": "attention"}  # kinds of layers in transformers 5, and in mlx-lm


def known_config(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return a config.json with transformers' defaults for what it leaves out, under all of transformers' names.

    Raises whatever transformers raises if it does not know the model, or refuses the config.
    """
    from transformers import AutoConfig

    return _all_names(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))


def _all_names(config: Any) -> dict[str, Any]:
    found = config.to_dict()
    for name, other in config.attribute_map.items():
        if (value := found.get(other, found.get(name))) is not None:
            found |= {name: value, other: value}
    return found | {name: _all_names(part) for name, part in vars(config).items() if hasattr(part, "attribute_map")}


def mlx_config(config: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return what to add to a config.json so that mlx-lm reads from it what transformers reads.

    A setting that it leaves out gets transformers' default, and one that mlx-lm calls by another name is there under both.
    Whether the model is then the same is not decided here: `lite_dil.backends.mlx.twin` compares them.

    Args:
        known: the result of `known_config`, or empty if transformers does not know the model.
    """
    added = {name: value for name, value in known.items() if value is not None and _unsaid(config.get(name))}
    if isinstance(config.get("text_config"), dict):
        text = dict(config["text_config"])
        name = "tie_word_embeddings"  # transformers goes by the outer one
        text |= {name: config.get(name, known.get(name, text.get(name, False)))}
        added["text_config"] = text | mlx_config(text, known.get("text_config") or {})
        for name in ("vocab_size", "tie_word_embeddings"):  # which some of mlx-lm's wrappers read outside
            added.setdefault(name, added["text_config"].get(name))
        return added
    both = added | config
    added |= {name: value for name, value in _sizes(both).items() if both.get(name) is None}
    if config.get("num_local_experts") == 0 and "shared_intermediate_size" in config:  # Granite 4 without experts
        added["intermediate_size"] = config["shared_intermediate_size"]
    return added | _kinds(both) | rope_config(both)


def _unsaid(value: Any) -> bool:
    """Return whether a value is null, or has transformers 5's own spelling of infinity."""
    return value is None or "__float__" in str(value)


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Return sizes that transformers computes from others, or has under another name."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    found = {"block_dim": hidden, "n_ctx": config.get("max_position_embeddings")}
    # Where mlx-lm's default is Gemma 4 E2B's, and a config that does not have them means none.
    found |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    if heads and hidden and "head_dim" not in config:
        found["head_dim"] = hidden // heads
    if hidden and config.get("expand"):  # Mamba 2
        found["intermediate_size"] = config["expand"] * hidden
    for layer in (config.get("per_layer_config") or {}).values():  # Gemma 4: what its full attention has of its own
        found |= {"global_head_dim": layer.get("head_dim"), "num_global_key_value_heads": layer.get("num_key_value_heads")}
    return {name: value for name, value in found.items() if value is not None}


def _kinds(config: dict[str, Any]) -> dict[str, Any]:
    """Return what mlx-lm computes or reads the kinds of the layers from."""
    found: dict[str, Any] = {}
    kinds = config.get("layer_types") or ()
    if {"sliding_attention", "full_attention"} <= set(kinds) and not isinstance(config.get("sliding_window_pattern"), str):
        found["sliding_window_pattern"] = kinds.index("full_attention") + 1
    if "sparse" in (mixtures := config.get("mlp_layer_types") or ()):
        found["is_moe_layer"] = [kind == "sparse" for kind in mixtures]  # EXAONE's name of it
    if "mamba_num_heads" in config and config.get("time_step_min"):
        # Nemotron-H: transformers keeps time steps above the least one, whatever time_step_limit says.
        found["time_step_limit"] = [config["time_step_min"], math.inf]
    if "position_embedding_type" in config and config["position_embedding_type"] is None:
        found["position_embedding_type"] = "nope"  # mlx-lm takes none for rope
    if any("mamba" in name for name in config):
        for name in ("layer_types", "layers_block_type"):
            if set(config.get(name) or ()) & _LINEAR.keys():
                found[name] = [_LINEAR.get(kind, kind) for kind in config[name]]
    return found


def rope_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return what to add to a config.json so that mlx-lm uses the rope that the model was trained with.

    transformers 5 writes ``rope_parameters``, which mlx-lm 0.32 does not read for Llama and others: it silently uses theta
    10000 instead.
    """
    if "text_config" in config:
        return {"text_config": config["text_config"] | rope_config(config["text_config"])}
    rope = config.get("rope_parameters")
    if not rope:
        return {}
    added: dict[str, Any] = {}
    if all(isinstance(each, dict) for each in rope.values()):  # one rope per layer type, as in Gemma 3
        if "sliding_attention" in rope:
            added["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        if "full_attention" not in rope:
            return added
        rope = rope["full_attention"]
        if "full_attention" in config.get("layer_types", ()):  # mlx-lm computes each layer's type from this
            added["sliding_window_pattern"] = config["layer_types"].index("full_attention") + 1
    if "rope_theta" not in rope:
        raise UserError(f"config.json: rope_parameters has {', '.join(rope)}; expected rope_theta, which mlx-lm needs")
    theta, part = rope["rope_theta"], rope.get("partial_rotary_factor")
    added |= {"rope_theta": theta, "rotary_emb_base": theta}
    added["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if part is not None:
        added |= {"partial_rotary_factor": part, "rotary_pct": part}
        if config.get("head_dim") and "rotary_dim" not in config:
            added["rotary_dim"] = int(config["head_dim"] * part)
    return added


_TOWERS, _TEXT = "model.language_model.", "model."  # what the layers of a model with towers, or without, are called by


def text_only(config: dict[str, Any]) -> bool:
    """Return whether transformers loads the text model alone from a checkpoint with towers, as it does Qwen3.5's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    return "text_config" in config and str(CLASSES.get(config.get("model_type", ""))).endswith("ForCausalLM")


def hf_layer(name: str, alone: bool) -> str:
    """Return transformers' name of a layer from mlx-lm's.

    Args:
        alone: the result of `text_only`.
    """
    for ours, theirs in (("language_model.model.", _TEXT if alone else _TOWERS), ("backbone.", _TEXT)):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def mlx_layer(name: str, alone: bool) -> str:
    """Return mlx-lm's name of a layer from transformers', which differs in models with towers.

    Those of Nemotron-H and Mamba 2 cannot be told from others' by their names; mlx-lm then says that it lacks them.
    """
    prefix = _TEXT if alone else _TOWERS
    return f"language_model.model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
