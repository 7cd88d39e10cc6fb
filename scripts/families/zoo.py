"""Tiny random checkpoints of the model families that transformers knows.

A family's checkpoint is its config class's defaults with every size made small, and the few settings in `FAMILIES` that its
parts need in order to fit together. Weights are drawn large enough that every part matters to the output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What a config is given where its class has the name. Sizes that grow with `size` are doubled for the second size.
GROWING = {
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "block_ff_dim": 128,
    "intermediate_size_mlp": 128,
    "shared_intermediate_size": 64,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "expert_intermediate_size": 64,
    "word_embed_proj_dim": 64,
    "conv_dim": 64,
    "block_dim": 64,
    "mamba_n_heads": 8,
}
FIXED = {
    "vocab_size": 512,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "n_positions": 1024,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}


def _repeat(count: int, *kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds) * (count // len(kinds)), "num_hidden_layers": count}


_WINDOWS = _repeat(4, "sliding_attention", "full_attention")
_LINEAR = _repeat(4, *["linear_attention"] * 3, "full_attention")
_MLA = {"num_key_value_heads": 4}
_DENSE_FIRST = {"first_k_dense_replace": 1}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MAMBA = {"mamba_expand": 2}
_GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25}
_PER_LAYER = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2}
_GEMMA3N = {**_PER_LAYER, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]}
_GEMMA4 = {"global_head_dim": 32, "final_logit_softcapping": 30.0}
_GEMMA4_MOE = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": True, "top_k_experts": 2}
_FALCON_H1 = {
    "mamba_n_heads": 8,
    "mamba_d_ssm": 128,
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "key_multiplier": 0.7,
    "mlp_multipliers": [0.9, 0.8],
    "ssm_multipliers": [0.9, 0.8, 0.7, 0.6, 0.5],
}
_NEMOTRON_H = {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "mamba_expand": 2, "num_hidden_layers": 4}
_KIMI = {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4}

# By the name of a row of the table: the settings that differ from the defaults and the sizes above. A name before "-" is a
# model_type.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, **_WINDOWS},
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "bitnet": {},
    "bloom": {},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625, **_WINDOWS},
    "deepseek_v2": {**_MLA, **_DENSE_FIRST, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, **_DENSE_FIRST},
    "dots1": {**_DENSE_FIRST},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "exaone4": {**_WINDOWS},
    "exaone_moe": {},
    "falcon": {"num_kv_heads": 1},
    "falcon_h1": {**_MAMBA, **_FALCON_H1},
    "gemma": {},
    "gemma2": {**_WINDOWS},
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma3n_text": {**_WINDOWS, **_GEMMA3N},
    "gemma4_text": {**_WINDOWS, **_PER_LAYER, **_GEMMA4},
    "gemma4_text-moe": {**_WINDOWS, **_GEMMA4, **_GEMMA4_MOE, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_DENSE_FIRST},
    "glm4_moe_lite": {**_MLA, "mlp_layer_types": ["dense", "sparse"]},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "granite": {**_GRANITE},
    "granite_swa": {},
    "granitemoe": {**_GRANITE},
    "granitemoehybrid": {**_repeat(4, "mamba", "mamba", "mamba", "attention"), **_GRANITE, **_MAMBA},
    "granitemoehybrid-dense": {
        **_repeat(4, "mamba", "mamba", "mamba", "attention"),
        **_GRANITE,
        **_MAMBA,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hyperclovax": {},
    "internlm3": {},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {**_MLA, **_DENSE_FIRST, "num_hidden_layers": 4, "linear_attn_config": _KIMI},
    "laguna": {},
    "lfm2": {**_repeat(4, "conv", "conv", "full_attention", "conv"), "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_repeat(4, "conv", "conv", "full_attention", "conv"), "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 4},
    "llama": {},
    "llama4_text": {
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
        "num_experts_per_tok": 1,
    },
    "mamba2": {"num_heads": 8, "expand": 2},
    "mellum": {},
    "minicpm3": {**_MLA, "hidden_act": "silu"},
    "minimax_m2": {},
    "ministral": {**_WINDOWS},
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {**_NEMOTRON_H},
    "olmo": {},
    "olmo2": {},
    "olmo3": {**_WINDOWS},
    "olmo_hybrid": {**_LINEAR},
    "olmoe": {},
    "opt": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": {**_LINEAR},
    "qwen3_5_text": {**_LINEAR},
    "qwen3_moe": {},
    "qwen3_next": {**_LINEAR},
    "qwen4_exp_text": {},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},  # the third layer attends
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "vaultgemma": {},
    "youtu": {**_MLA},
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_PIXELS = {**_VISION, "image_size": 28, "patch_size": 14}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_position_embeddings": 16}
_GEMMA_IMAGES = {"boi_token_id": 501, "eoi_token_id": 502, "image_token_id": 500}
_QWEN_IMAGES = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
# Packagings with a tower for images: the text model's row above (with changes), the tower, and the tokens' ids.
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}, _PIXELS, {"mm_tokens_per_image": 4, "image_token_index": 500}),
    "gemma4": (
        "gemma4_text",
        {},
        {**_VISION, "num_key_value_heads": 2, "head_dim": 16},
        {**_GEMMA_IMAGES, "audio_token_id": 503, "video_token_id": 504, "audio_config": None},
    ),
    "gemma4_unified": ("gemma4_text", {"hidden_size_per_layer_input": 0}, {}, {}),  # which its text model does not have
    "llama4": (
        "llama4_text",
        {},
        {**_PIXELS, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {},
    ),
    "mistral3": ("ministral3", {}, {"model_type": "pixtral", **_PIXELS}, {"image_token_index": 500}),
    "mistral3-small": ("mistral", {}, {"model_type": "pixtral", **_PIXELS}, {"image_token_index": 500}),
    "qwen2_5_vl": ("qwen2", {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}, _QWEN_VISION, _QWEN_IMAGES),
    "qwen3_5": ("qwen3_5_text", {}, _QWEN_VISION, _QWEN_IMAGES),
    "qwen3_5_moe": ("qwen3_5_moe_text", {}, _QWEN_VISION, _QWEN_IMAGES),
    "qwen3_vl": ("qwen3", {"sliding_window": None}, {**_QWEN_VISION, "deepstack_visual_indexes": [0]}, _QWEN_IMAGES),
}
_GROWING_WITH_THEM = (
    *("num_hidden_layers", "layer_types", "layers_block_type", "mlp_layer_types", "activation_sparsity_pattern"),
    *("no_rope_layers", "num_heads"),
)
_SAME_LAYERS = ("glm4_moe_lite", "kimi_linear", "qwen4_exp_text")  # their layers are listed in other ways; only widths grow
NAMES = sorted([*FAMILIES, *TOWERS])


def make(name: str, folder: Path, size: int = 1) -> Path:
    """Save the checkpoint of a row of the table, with a tokenizer; `size` 2 doubles its widths and its layers."""
    torch.manual_seed(0)
    if name in TOWERS:
        text, changes, vision, tokens = TOWERS[name]
        kind = text.partition("-")[0]
        settings: dict[str, Any] = {"text_config": {**_settings(text, size), **changes, "model_type": kind}, **tokens}
        if vision:
            grown = {"out_hidden_size": 64 * size} if vision is _QWEN_VISION or "depth" in vision else {}
            settings["vision_config"] = {**vision, **grown}
        rope = settings["text_config"].get("rope_parameters") or {}
        if "mrope_section" in rope:  # together half of a head's width
            rope = {**rope, "mrope_section": [part * size for part in rope["mrope_section"]]}
            settings["text_config"]["rope_parameters"] = rope
        if not name.startswith("mistral3"):  # whose text model may be of several types
            del settings["text_config"]["model_type"]
        config = CONFIG_MAPPING[name.partition("-")[0]](**settings)
        model: Any = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name.partition("-")[0]](**_settings(name, size)))
    _draw(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _settings(name: str, size: int) -> dict[str, Any]:
    kind = CONFIG_MAPPING[name.partition("-")[0]]
    names = set(kind().to_dict()) | set(kind.attribute_map)
    found: dict[str, Any] = {"num_hidden_layers": 2, **{key: value * size for key, value in GROWING.items()}, **FIXED}
    found = {key: value for key, value in found.items() if key in names or key == "num_hidden_layers"}
    found |= FAMILIES[name]
    if name == "gpt_neox":  # as every Pythia has it
        found["intermediate_size"] = 4 * found["hidden_size"]
    if name in ("helium", "cohere2", "internlm3", "mixtral", "recurrent_gemma"):  # its last projection is square, by mlx-lm
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    if name == "minicpm3":  # as mlx-lm computes it, and MiniCPM3-4B has it
        found["v_head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    if size == 2:
        for key in _GROWING_WITH_THEM if name not in _SAME_LAYERS else ():
            if key in found:
                found[key] = found[key] * 2
    return found


def _draw(model: Any) -> None:
    """Draw matrices wide enough, and move norms and biases off their ones and zeros."""
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        with torch.no_grad():
            if weight.ndim > 1:
                weight.copy_(0.12 * noise)
            elif "norm" in name or ("bias" in name and "dt_" not in name and "correction" not in name):
                weight.add_(0.05 * noise)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of fewer than 512 tokens, with ChatML."""
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<pad>"]
    text = [
        f"{who} {what} {how}." for who in ("The cat", "A model", "Rain") for what in ("is", "has") for how in ("blue", "it")
    ]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(text, trainer)
    begin, _, end, pad = special
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=begin, eos_token=end, pad_token=pad)
    made.chat_template = CHATML
    return made
