"""Options by the names that TRL, Unsloth, LLaMA-Factory, mlx-lm and mlx-lm-lora give them, and what they are here."""

from __future__ import annotations

from collections.abc import Mapping

from lite_dil.config.train_config import FIELDS, flag

# Another tool's name, with dashes, and the field that is the same thing.
SAME = {
    "model": "model-name-or-path model-name model-path base-model model-id pretrained-model-name-or-path",
    "data": "dataset dataset-name dataset-path data-path data-dir train-file train-data train-dataset",
    "eval_data": "eval-dataset eval-file val-file validation-file test-file val-data",
    "max_rows": "max-samples max-train-samples num-samples",
    "max_length": "max-seq-length max-seq-len max-sequence-length cutoff-len model-max-length seq-len seq-length",
    "loss": "loss-type pref-loss dpo-cpo-loss-type train-mode stage rlhf-type",
    "beta": "pref-beta dpo-beta kl-beta",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr-scheduler lr-schedule scheduler",
    "warmup_ratio": "warmup-fraction warmup-proportion",
    "batch_size": "per-device-train-batch-size per-gpu-train-batch-size train-batch-size micro-batch-size bs",
    "gradient_accumulation_steps": "grad-accum grad-accumulation gradient-accumulation grad-accumulation-steps",
    "epochs": "num-train-epochs num-epochs n-epochs",
    "max_steps": "iters iterations steps num-steps train-steps num-train-steps",
    "max_grad_norm": "grad-clip gradient-clipping clip-grad-norm",
    "optim": "optimizer",
    "lora_r": "lora-rank rank r lora-dim",
    "lora_alpha": "alpha",
    "target_modules": "lora-target-modules lora-target lora-modules lora-keys",
    "init_adapter": "adapter-name-or-path resume-adapter-file adapter-file",
    "output_dir": "output output-folder output-path save-dir save-path adapter-path",
    "logging_steps": "steps-per-report log-every logging-interval",
    "eval_steps": "steps-per-eval eval-every eval-interval",
    "save_steps": "save-every save-interval",
    "dtype": "torch-dtype compute-type compute-dtype precision bnb-4bit-compute-dtype",
    "precompute_reference": "precompute-ref-log-probs",
    "unsloth": "use-unsloth",
    "gradient_checkpointing": "grad-checkpoint use-gradient-checkpointing gradient-checkpoint",
    "report_to": "logger",
    "reward": "reward-funcs reward-model reward-function reward-functions reward-model-name-or-path reward-model-path",
    "samples": "num-generations num-samples-per-prompt rloo-k",
    "max_new_tokens": "max-completion-length response-length",
    "num_iterations": "num-ppo-epochs ppo-epochs",
    "epsilon": "cliprange clip-range",
    "reward_scale": "scale-rewards",
}
_SWITCHES = {
    "load-in-4bit": "--4bit",
    "load-in-4bits": "--4bit",
    "use-4bit": "--4bit",
    "qlora": "--4bit",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "grad-checkpoint": "--gradient-checkpointing full",
    "use-gradient-checkpointing": "--gradient-checkpointing full",
    "gradient-checkpoint": "--gradient-checkpointing full",
    "precompute-ref-log-probs": "--precompute-reference",
    "use-unsloth": "--unsloth",
}
# What has no flag here, and why none is needed, or that it cannot be had.
NONE = {
    "the model's own chat template is used": "template chat-template",
    "the reference is the model itself with its adapter off (--reference)": "ref-model reference-model reference-model-path "
    "ref-model-path",
    "it is always LoRA": "use-peft use-lora peft finetuning-type fine-tune-type train-type do-train train",
    "every layer's linear layers are adapted; choose among them with --target-modules": "num-layers lora-layers",
    "the prompt is cut to what --max-length leaves beside the answers": "max-prompt-length max-prompt-len",
    "the way of attending is chosen by --layout": "attn-implementation flash-attn flash-attention use-flash-attention "
    "use-flash-attn",
    "rows are packed without it (--layout)": "packing neat-packing",
    "give the share of the steps: --warmup-ratio": "warmup-steps warmup",
    "give the number of steps between them: --eval-steps": "eval-strategy evaluation-strategy do-eval val-batches",
    "give the number of steps between them: --save-steps": "save-strategy",
    "not offered": "use-dora use-rslora neftune-noise-alpha rpo-alpha load-in-8bit deepspeed fsdp",
}
_FLAGS = {flag(name): name for name in FIELDS}
_FIELD_OF = {name: field for field, names in SAME.items() for name in names.split()}
_REASON_OF = {name: reason for reason, names in NONE.items() for name in names.split()}
# Values of `loss` that others spell in another way; those of other losses than are here have none.
_LOSSES = {"sigmoid": "dpo", "bco-pair": "bce", "bco": "bce"}
_VALUES: Mapping[str, Mapping[str, str]] = {
    "loss": _LOSSES,
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"},
    "target_modules": {"all": "all-linear"},
    "optim": dict.fromkeys(("adamw-8bit", "paged-adamw-32bit", "paged-adamw-8bit"), "paged_adamw_8bit")
    | dict.fromkeys(("adamw-torch", "adamw-torch-fused", "adamw-hf"), "adamw"),
    "gradient_checkpointing": {"unsloth": "full"},
}


def here(name: str, value: str | None) -> str:
    """Return what another tool's option is here, as flags or in words; nothing where its name is not known.

    Args:
        name: without dashes in front; underscores are dashes.
        value: what was given to it, None for a switch.
    """
    name = name.replace("_", "-").lower()
    if name == "quantization-bit" or name == "bits":
        return "--4bit" if value == "4" else "--4bit; other numbers of bits are not offered"
    if name in ("resume-from-checkpoint", "resume-checkpoint"):
        return f"--resume {value or ''}".rstrip()
    if name in _SWITCHES and (value or "true").lower() == "true":
        return _SWITCHES[name]
    if name in _SWITCHES and value and value.lower() == "false":
        return "leave it out"
    if name in _REASON_OF:
        return f"leave it out: {_REASON_OF[name]}"
    field = _FIELD_OF.get(name) or (name.replace("-", "_") if name.replace("-", "_") in FIELDS else None)
    if field is None:
        return ""
    return f"{flag(field)} {_value(field, value)}".rstrip()


def key_here(name: str, value: object) -> str:
    """Return `here` for a key of a YAML file, as such a key."""
    text = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else str(value)
    name, _, ours = (found := here(name, text)).partition(" ")
    return f"{_FLAGS[name]}: {ours or 'true'}" if name in _FLAGS else found


def _value(field: str, value: str | None) -> str:
    if value is None:
        return ""
    ours = _VALUES.get(field, {}).get(value.replace("_", "-").lower(), value)
    choices = FIELDS[field].metadata["choices"]
    return ours if not choices or ours in choices else f"{{{','.join(choices)}}} ({value} is not one of these)"
