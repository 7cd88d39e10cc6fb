"""All options of a training in one dataclass, the source of flags, YAML keys, validation and help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lite_dil.backends.options import EngineOptions, LoadOptions
from lite_dil.base.errors import UserError, did_you_mean, gather
from lite_dil.base.option import FREE, WRITTEN, option
from lite_dil.base.redaction import redacted
from lite_dil.batching.options import EMBEDDED_RATE, DrawOptions, ScheduleOptions
from lite_dil.config.online import ABOVE_ZERO, RANGES, online_defaults, online_problems
from lite_dil.data.arguments import canonical, parse_arguments
from lite_dil.data.options import InspectOptions, Lengths, SampleOptions
from lite_dil.data.reader import parse_columns
from lite_dil.data.sources import EMBEDDED
from lite_dil.models.options import ALL_LINEAR, DEFAULT_RANK, AdapterOptions, ModelOptions, Seeded
from lite_dil.objectives.own import is_own, shown
from lite_dil.objectives.reward_table import REWARD_OPTIONS, REWARDS, is_reward
from lite_dil.objectives.table import OBJECTIVES, OPTIONS, objective_of, options_of
from lite_dil.online.options import OnlineObjective, OnlineOptions
from lite_dil.runs.options import RunOptions
from lite_dil.training.options import ReferenceOptions

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunOptions,
    ReferenceOptions,
    EngineOptions,
    ScheduleOptions,
    AdapterOptions,
    OnlineObjective,
    SampleOptions,
    ModelOptions,
    Lengths,
    Seeded,
):
    """All options of a run. None means "decided by another option or by the model", as the help says.

    It inherits from the rooms' options: names stay flat in flags and YAML, while each room declares and takes only its own.
    """

    auto: bool = option(
        "engine",
        False,
        "choose the split of a step, --gradient-checkpointing and the offloads for the fastest training that free memory "
        "allows, by estimate; a step keeps its --batch-size x --gradient-accumulation-steps examples, so the result is the "
        "same (except for what --lora-dropout draws). Flags that are given keep their values",
        kind=FREE,
    )

    def check(self) -> None:
        """Raise one UserError that lists every invalid value, its option and what was expected."""
        problems = [
            f"{flag(name)} holds an access token, which the run's files would keep; leave it out, and use `hf auth login`"
            for name, value in self.as_dict().items()
            if isinstance(value, str) and redacted(value) != value
        ]
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not (low <= value <= high):
                problems.append(f"{flag(name)} is {value:g}; expected {_between(low, high)}")
        for name in (*_POSITIVE, *ABOVE_ZERO):
            value = getattr(self, name)
            if value is not None and not 0 < value < _BIG:
                problems.append(f"{flag(name)} is {value:g}; expected a number above 0 and below {_BIG:g}")
        problems += self._objective_problems() + online_problems(self)
        for check, value in (
            (parse_columns, self.columns),
            (tracker_names, self.report_to),
            (parse_arguments, self.chat_template_kwargs),
        ):
            try:
                check(value)
            except UserError as error:
                problems.append(str(error))
        if self.head_bits not in (None, 4, 8):
            problems.append(f"--head-bits is {self.head_bits}; expected 8 or 4, or leave it out for 16 bits")
        if self.precompute_reference and self.reference_cache == "off":
            problems.append("--precompute-reference fills the cache, which --reference-cache off disables")
        if self.offload_activations and self.gradient_checkpointing in ("off", "selective"):
            problems.append("--offload-activations stores what --gradient-checkpointing full keeps; give that, or auto")
        if self.unsloth and self.layout in ("packed", "prefix"):
            problems.append(f"--unsloth has kernels for the plain layout only, not for --layout {self.layout}")
        if self.init_adapter is None and self.reference == "initial-adapter":
            problems.append("--reference initial-adapter needs --init-adapter DIR")
        if self.eval_steps and self.eval_fraction == 0 and not self.eval_data and self.data != EMBEDDED:
            problems.append("--eval-steps needs held-out data: give --eval-data, or another --eval-fraction than 0")
        if self.eval_fraction and self.eval_data:
            problems.append("--eval-fraction holds rows of --data out, and --eval-data is held-out data: give one of them")
        if self.init_adapter is not None and self.reference is None and not is_reward(self.loss):
            problems.append(
                "--init-adapter needs --reference, the model to stay close to: initial-adapter (for example after SFT), or "
                "base for the bare base model"
            )
        if self.init_adapter is not None:
            given = [flag(n) for n in ("lora_r", "lora_alpha", "target_modules") if getattr(self, n) is not None]
            if given:
                problems.append(f"{', '.join(given)}: with --init-adapter these come from the adapter; leave them out")
        if problems:
            raise UserError(gather(problems, "these options cannot be used:") if len(problems) > 1 else problems[0])

    def _objective_problems(self) -> list[str]:
        """Return the problems with the objective's constants: of another objective, or out of range."""
        loss, objective = self.loss, objective_of(self.loss)
        problems = self._reward_problems() if is_reward(loss) else []
        for name in OPTIONS | REWARD_OPTIONS:
            value = getattr(self, name)
            if value is None:
                continue
            if name not in objective.options:
                problems.append(
                    f"{flag(name)} belongs to {_owners(name, is_reward(loss))}, not to {shown(loss)}; leave it out"
                )
                continue
            spec = options_of(loss)[name]
            if not spec.choices and not spec.low <= value <= spec.high:
                problems.append(f"{flag(name)} is {value:g}; expected {_between(spec.low, spec.high)}")
        if objective.beta is None and self.beta not in (None, 1.0):
            problems.append(f"--beta: {shown(loss)} has no beta; leave it out")
        if is_own(loss) and self.logp_reduction not in (None, objective.reduction):
            problems.append(
                f"--logp-reduction {self.logp_reduction}: {shown(loss)} has its own, {objective.reduction}; leave it out"
            )
        if objective.token_weights and self.logp_reduction == "mean":
            problems.append(f"--logp-reduction mean: {loss} is a weighted sum over tokens; leave it out")
        if self.sample_rejected is not None and objective.data == "chosen":
            problems.append(f"--sample-rejected: {loss} trains on chosen responses only; leave it out")
        for name in ("sample_file", "sample_max_tokens"):
            if getattr(self, name) is not None and self.sample_rejected is None:
                problems.append(f"{flag(name)} needs --sample-rejected; give that too")
        if objective.baseline and self.batch_size * self.gradient_accumulation_steps < 2:
            problems.append(
                f"--loss {loss} compares the responses of a step; --batch-size 2 or --gradient-accumulation-steps 2"
            )
        return problems

    def _reward_problems(self) -> list[str]:
        """Return the options that a reward model's training has no use for."""
        return [
            f"{flag(name)} {NOT_OF_REWARDS[name]}; leave it out"
            for name in NOT_OF_REWARDS
            if getattr(self, name) not in (FIELDS[name].default, _OF_REWARDS.get(name, FIELDS[name].default))
        ]

    def resolved(self) -> ResolvedConfig:
        """Return a copy with all defaults that depend on other options filled in."""
        objective, constants = objective_of(self.loss), options_of(self.loss)
        fill: dict[str, Any] = {
            "logp_reduction": objective.reduction,
            "beta": 1.0 if objective.beta is None else objective.beta,
            **{name: constants[name].default for name in objective.options},
            "learning_rate": objective.learning_rate,
            "lora_dropout": 0.0,
        }
        if self.sample_rejected is not None:
            fill["sample_max_tokens"] = 256
        fill |= online_defaults(self)
        if self.init_adapter is None:
            rank = self.lora_r or DEFAULT_RANK
            fill |= {"reference": "base", "lora_r": rank, "lora_alpha": 2.0 * rank, "target_modules": ALL_LINEAR}
        if self.data == EMBEDDED:
            fill |= {"learning_rate": EMBEDDED_RATE} | ({} if self.eval_fraction or self.online else {"eval_data": EMBEDDED})
        given = self.as_dict() | {"chat_template_kwargs": canonical(self.chat_template_kwargs)}
        given |= _OF_REWARDS if is_reward(self.loss) else {}
        return ResolvedConfig(**given | {name: value for name, value in fill.items() if given[name] is None})

    def as_dict(self) -> dict[str, Any]:
        """Return the options by field name."""
        return {name: getattr(self, name) for name in FIELDS}


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(LoadOptions, DrawOptions, InspectOptions, TrainConfig):
    """The options of a run with all defaults that depend on other options filled in."""


_BIG = 1e18
_POSITIVE = ("beta", "learning_rate", "epochs", "lora_alpha", "max_grad_norm")
_RANGES = [
    *RANGES,
    ("max_length", 2, _BIG),
    ("max_rows", 1, _BIG),
    ("eval_fraction", 0, 0.5),
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


# Options of a policy's training alone, each with the reason, and the values that a reward model's training has of some.
NOT_OF_REWARDS = {
    "logp_reduction": "is of log-ratios, which a reward model does not read",
    "reference": "is what a policy is compared with; a reward model has no reference",
    "reference_cache": "is of a policy's reference; a reward model has none",
    "precompute_reference": "is of a policy's reference; a reward model has none",
    "sample_rejected": "adds responses to demonstrations; a reward model takes both sides from its data",
    "sample_file": "belongs to --sample-rejected, which a reward model does not take",
    "sample_max_tokens": "belongs to --sample-rejected, which a reward model does not take",
    "report_samples": "answers prompts, which a reward model cannot",
    "unsloth": "is not offered for a reward model's head",
    **dict.fromkeys(
        (each.name for each in dataclasses.fields(OnlineOptions)),
        "is of a policy's own answers; a reward model learns from the data's",
    ),
}
_OF_REWARDS: dict[str, Any] = {"logp_reduction": "sum", "beta": 1.0, "reference": "base", "report_samples": 0}


def _owners(option: str, reward: bool) -> str:
    """Return the flags to which a constant belongs; those of `reward` models first."""
    tables = {"--reward-loss": REWARDS, "--loss": OBJECTIVES}
    found = {name: [loss for loss, of in table.items() if option in of.options] for name, table in tables.items()}
    of = "--reward-loss" if found["--reward-loss"] and (reward or not found["--loss"]) else "--loss"
    return f"{of} {', '.join(found[of])}"


def _between(low: float, high: float) -> str:
    return f"between {low:g} and {high:g}" if high < _BIG else f"at least {low:g}"


_GROUPS = ("model", "data", "objective", "reward", "online", "adapter", "optimisation", "engine", "run")
FIELDS = {f.name: f for f in sorted(dataclasses.fields(TrainConfig), key=lambda f: _GROUPS.index(f.metadata["group"]))}
# Those of a policy's training.
POLICY_FIELDS = [name for name, field in FIELDS.items() if field.metadata["group"] != "reward"]
# What may differ in a resumed run, because it does not change what is learned.
FREE_ON_RESUME = {name for name, field in FIELDS.items() if field.metadata["kind"] in (FREE, WRITTEN)}
# The split of a step into passes; only the product decides what is learned.
SPLIT = {"batch_size", "gradient_accumulation_steps"}


def tracker_names(report_to: str | None) -> list[str]:
    """Return the trackers in ``--report-to``, each once; raise UserError for an unknown one."""
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
