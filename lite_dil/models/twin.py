"""A model's small twin: its config.json with small sizes, and random weights, on which two libraries are compared.

What a library gets wrong about a family does not depend on sizes: which settings it reads, and what it computes from them.
So a twin keeps all settings, each kind of layer and most ratios. Its windows are shorter than the probe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lite_dil.base.hashing import blake2
from lite_dil.base.streams import named

WINDOW = 12  # tokens of each attention window
PROBE = 28  # tokens, longer than every window
_CONTEXT = 48  # tokens before a rope is scaled, longer than the probe
_VOCABULARY, _WORDS, _HEAD, _STATE, _MOST_LAYERS = 512, 384, 32, 16, 16
_TEXT = ("text_config", "llm_config", "language_config")
_TOWER = re.compile(r"vision|audio|image|speech|video")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim")
_HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels")
_INNER = re.compile(r"intermediate|inner|ffn|(^|_)ff_|d_ff|mlp.*(size|dim)")
_EXPERTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$")
_CHOSEN = re.compile(r"^(num_experts_per_tok(en)?|moe_k|moe_topk|moe_top_k|top_k_experts)$")
_PERIOD = re.compile(r"(interval|period|pattern|step|freq|interleave\w*)$")
_STATE_HEADS = (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"), ("num_heads", "head_dim"))
_DEFAULTED = ("vocab_size", "vocab_size_per_layer_input", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size")
# Sizes that are bound to no other one, by what they become at most.
_AT_MOST = {
    "vocab_size": _VOCABULARY,
    "vocab_size_per_layer_input": _VOCABULARY,
    "hidden_size_per_layer_input": _STATE,
    "laurel_rank": 8,
    "original_max_position_embeddings": _CONTEXT,
    "floor_scale": 8,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "linear_key_head_dim": _STATE,
    "linear_value_head_dim": _STATE,
    "state_size": _STATE,
    "ssm_state_size": _STATE,
    "mamba_d_state": _STATE,
    "mamba_n_groups": 2,
    "n_groups": 2,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
}


def shrink(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a twin.

    Args:
        config: the content of the model's config.json. What it leaves out stays out, since each library has its own default;
            but for sizes, since a wrong one does not fit the weights.
        known: the same with transformers' defaults for what it leaves out.
    """
    made: dict[str, Any] = {}
    nested = any(isinstance(config.get(key), dict) for key in _TEXT)
    for key, value in config.items():
        if key in _TEXT and isinstance(value, dict):
            made[key] = shrink(value, known.get(key) or {})
        elif isinstance(value, dict) and _TOWER.search(key):
            made[key] = _tower(value)
        elif not key.startswith("quantization"):
            made[key] = value
    return dict(_special(made if nested else _Text(made, known).small()))


class _Text:
    """A text model's config on its way to a twin's."""

    def __init__(self, config: dict[str, Any], known: Mapping[str, Any]) -> None:
        if _LAYERS[0] in config:  # else another library's names, which have no defaults here
            config = {name: known[name] for name in _DEFAULTED if known.get(name)} | config
        self.config, self.known = config, known
        self.layers = self._get(_LAYERS) or 0
        self.kept, self.shared = self._kept_layers()
        self.heads, self.keys, self.hidden = (self._get(names) or 0 for names in (_HEADS, _KEY_HEADS, _HIDDEN))
        self.keys = self.keys or self.heads
        own = next((config[name] for name in _HEAD_DIM if config.get(name)), 0)
        self.head = own or (self.hidden // self.heads if self.heads else 0)
        self.new_keys = min(self.keys, 2)
        self.new_heads = self.new_keys * max(1, self.heads // self.keys) if self.keys else 0
        # Widths whose roots a 16-bit number holds, since Gemma multiplies by them.
        self.new_head = {4: 64, 16: 16}.get(self.new_heads, _HEAD)
        bound = self.heads and (not own or own * self.heads == self.hidden)
        self.new_hidden = max(64, self.new_heads * self.new_head) if bound else 64
        self.inner: list[int] = []

    def small(self) -> dict[str, Any]:
        """Return the config with small sizes."""
        made = self._each(self.config)
        for heads, width in _STATE_HEADS:
            if heads in made and width in self.config and ("mamba" in heads or _HEADS[0] not in made):
                inner = self._get((f"{heads.partition('_')[0]}_expand", "expand")) or 2
                made[heads] = inner * self.new_hidden // _STATE
                made[width] = _STATE if isinstance(made[width], int) else made[width]
                if "mamba_d_ssm" in made:
                    made["mamba_d_ssm"] = made[heads] * _STATE
        if "linear_num_key_heads" in made and (keys := self.config["linear_num_key_heads"]):
            made["linear_num_key_heads"] = 2
            made["linear_num_value_heads"] = 2 * self.config.get("linear_num_value_heads", keys) // keys
        return made

    def _get(self, names: tuple[str, ...]) -> int | None:
        for source in (self.config, self.known):
            for name in names:
                if isinstance(value := source.get(name), int):
                    return value
        return None

    def _kept_layers(self) -> tuple[int, int]:
        """Return how many layers show every kind of them, and how many of those share keys and values with earlier ones."""
        both = {**self.known, **self.config}
        lists = [value for key, value in both.items() if _is_list(key, value) and len(value) == self.layers]
        kinds = [tuple(map(str, kind)) for kind in zip(*lists, strict=True)]
        kept = next((n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds)), 1)
        for key, value in _flat(both):
            if isinstance(value, int) and 1 < value <= _MOST_LAYERS and _PERIOD.search(key):
                kept = max(kept, value)
            elif _is_indices(key, value):
                kept = max(kept, value[0] + 1)
            elif key == "block_types" and isinstance(value, list):  # RecurrentGemma's, which repeat
                kept = max(kept, len(value))
        shared = both.get("num_kv_shared_layers") or 0
        kept = min(max(2, kept), _MOST_LAYERS)
        if shared:
            kept = min(2 * kept, self.layers)
            return kept, kept // 2
        return min(kept, max(2, self.layers)), 0

    def _each(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if not (key.isdigit() and int(key) >= self.kept)}  # by layer
        return {key: self._one(key, value) for key, value in kept.items()}

    def _one(self, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return self._each(value)
        if _is_list(key, value) and len(value) == self.layers:
            value = value[: self.kept]
        elif _is_indices(key, value):
            value = [index for index in value if index <= self.kept]
        if key in ("long_factor", "short_factor"):
            return value[: max(1, len(value) * self.new_head // self.head)]
        if key == "mrope_section":
            return _section(value, sum(value) * self.new_head // self.head)
        if isinstance(value, list):
            return [self._one(key, each) for each in value] if key not in _AT_MOST else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
            return value
        return self._number(key, value)

    def _number(self, key: str, value: Any) -> Any:
        """Return what a number becomes."""
        if key.endswith(("eps", "epsilon")):
            return 5e-5  # large enough to show where it is not read, but for latents, whose norms may have one of their own
        if key == "time_step_min":
            return 0.3  # large enough to show where it is not read
        if not isinstance(value, int):
            return value
        whole: dict[str, int] = {
            **dict.fromkeys(_LAYERS, self.kept),
            **dict.fromkeys(_HEADS, self.new_heads),
            **dict.fromkeys(_KEY_HEADS, self.new_keys),
            **dict.fromkeys(_HIDDEN, self.new_hidden),
            **dict.fromkeys(_HEAD_DIM, value * self.new_head // self.head if self.head else _HEAD),
            "num_kv_shared_layers": self.shared,
            "max_window_layers": self.kept // 2,
            "moe_layer_end_index": self.kept - 1,
        }
        if key == "head_dim" and value == self.config.get("qk_rope_head_dim"):
            return _AT_MOST["qk_rope_head_dim"]
        if key == "v_head_dim" and "dim_model_base" in self.config and self.new_heads:  # MiniCPM 3's, which mlx-lm computes
            return self.new_hidden // self.new_heads
        if key in whole:
            return whole[key]
        if key in _WINDOWS:
            return WINDOW
        if key in _AT_MOST:
            return min(value, _AT_MOST[key])
        if key == "max_position_embeddings":
            original = dict(_flat(self.config)).get("original_max_position_embeddings")
            return value * _CONTEXT // original if original and original < value else value
        return self._bound(key, value)

    def _bound(self, key: str, value: int) -> int:
        """Return what a number that goes with others becomes, or the number if nothing is known about it."""
        if key.endswith(("key_value_heads", "kv_heads")):
            return max(1, self.new_keys * value // self.keys)
        if "attention_heads" in key:
            return max(1, self.new_heads * value // self.heads)
        if key in ("rotary_dim", "global_head_dim"):
            return value * self.new_head // self.head
        if _EXPERTS.search(key):
            return min(value, 8)
        if _CHOSEN.search(key):
            return min(value, 3)
        if _INNER.search(key):
            if value == 4 * self.hidden:  # which some of mlx-lm's models take for granted
                return 4 * self.new_hidden
            if value not in self.inner:
                self.inner.append(value)
            return (96, 64, 80, 112)[self.inner.index(value) % 4]
        if value == self.hidden and re.search("dim|width|size", key):
            return self.new_hidden
        return value


def _tower(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tower of one layer, which is never run."""
    depth = (*_LAYERS, "depth", "conf_num_hidden_layers")
    made = {key: 1 if key in depth and value else value for key, value in config.items()}
    return {key: [0] if _is_indices(key, value) else value for key, value in made.items()}


def _special(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Move special tokens to ids that the small vocabulary has and the probe does not."""
    for key, value in config.items():
        if re.search(r"token_id$|token_index$", key) and isinstance(value, int) and value >= 0:
            value = _WORDS + value % (_VOCABULARY - _WORDS)
        elif re.search(r"token_id$", key) and isinstance(value, list):
            value = [_WORDS + each % (_VOCABULARY - _WORDS) for each in value]
        yield key, value


def _section(parts: list[int], total: int) -> list[int]:
    """Scale whole numbers to another sum."""
    made = [part * total // sum(parts) for part in parts]
    return [made[0] + total - sum(made), *made[1:]]


def _is_list(key: str, value: Any) -> bool:
    """Return whether a value may have an entry per layer: a list, or a pattern of letters (Nemotron-H)."""
    return len(value) > 1 if isinstance(value, list) else isinstance(value, str) and key.endswith("pattern")


def _is_indices(key: str, value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and bool(re.search("layers|indices|indexes", key))
        and all(isinstance(each, int) and not isinstance(each, bool) for each in value)
        and value == sorted(set(value))
    )


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value


def probe() -> np.ndarray:
    """Return the ids of the probe, (PROBE,)."""
    return named("twin", 0, "probe").integers(4, _WORDS, PROBE)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a weight of a twin by its name in the checkpoint, float32."""
    values = named("twin", 0, name).standard_normal(shape)
    if len(shape) > 1:
        return (1.2 * values / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    # Norms are about 1; biases, and state spaces' A and time steps, about 0.
    center, width = (0.0, 0.3) if re.search(r"bias|A_log|dt_|sinks", name) else (1.0, 0.2)
    return (center + width * values).astype(np.float32)


def weight_digest(weight: np.ndarray) -> str:
    """Return a hash of a weight's shape and values in float32, 16 hexadecimal digits."""
    return blake2([repr(weight.shape).encode(), np.ascontiguousarray(weight, np.float32).tobytes()], 8).hex()
