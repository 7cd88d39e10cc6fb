"""A run's folder as its report reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lite_dil.base.checked import read_object, with_digest
from lite_dil.base.errors import UserError
from lite_dil.base.files import replace_file
from lite_dil.base.formats import RUN, check_format
from lite_dil.base.hashing import file_pieces, sha256
from lite_dil.base.shares import standard_error
from lite_dil.config.resume import other_options
from lite_dil.data.overlap import Overlap
from lite_dil.objectives.reward_table import is_reward
from lite_dil.reports.pairs import PAIRS, HeldOutPairs, read_pairs
from lite_dil.reports.samples import Sample, read_samples
from lite_dil.reports.scores import Evaluations, read_evaluations
from lite_dil.runs.history import History, checked_history, metrics_of
from lite_dil.runs.options_file import read_options

FACTS, SAMPLES = "report.json", "report_samples.jsonl"


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's folder for its report.

    Attributes:
        facts: report.json.
        pairs: None for old runs, and where they are damaged.
        scores: what lite-dil eval found; empty where it is damaged.
        damage: what of it is damaged, for people.
    """

    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    history: History = field(default_factory=History)
    samples: list[Sample] = field(default_factory=list)
    pairs: HeldOutPairs | None = None
    damage: list[str] = field(default_factory=list)
    scores: Evaluations = field(default_factory=lambda: Evaluations([], []))

    @property
    def per(self) -> str:
        """The unit of a log-ratio: "token" if it is averaged, else "response"."""
        return "token" if self.config.get("logp_reduction") == "mean" else "response"

    @property
    def reward(self) -> bool:
        """Whether the run trains a reward model, which has scores where a policy has log-ratios."""
        return is_reward(self.config["loss"])

    @property
    def accuracy_name(self) -> str:
        """The name of the accuracy among the metrics."""
        return "accuracy" if self.reward else "rewards/accuracies"

    @property
    def start(self) -> str:
        """The model that the policy is compared with: the initial model, or the bare base model."""
        other = self.config.get("init_adapter") and self.config.get("reference") == "base"
        return "the bare base model" if other else "the model it started from"

    def data(self, use: str) -> dict[str, Any] | None:
        """Return the facts of the data "training" or "held out"."""
        return next((data for data in self.facts["data"] if data["use"] == use), None)

    def figure(self, name: str) -> tuple[float | None, str]:
        """Return a final figure and its origin: held out, or the mean of the last quarter of training."""
        if (value := self.history.held_out.last(f"eval_{name}")) is not None:
            return value, "held out"
        return self.history.train.recent(name), "training"

    @property
    def accuracy(self) -> tuple[float, float, int] | None:
        """The last held-out accuracy, its standard error, and the number of pairs; None without held-out pairs."""
        value, data = self.history.held_out.last(f"eval_{self.accuracy_name}"), self.data("held out")
        return None if value is None or data is None else with_error(value, data, self.config)


def shared(data: dict[str, Any] | None) -> Overlap:
    """Return the overlap of held-out and training data from the facts; old runs have none."""
    return Overlap(**found) if data and (found := data.get("in_training")) else Overlap(0, 0, 0)


def with_error(accuracy: float, data: dict[str, Any], config: dict[str, Any]) -> tuple[float, float, int]:
    """Return an accuracy with its standard error and its number of pairs.

    Pairs with the same prompt, which ``--sample-rejected`` may make, share their chosen response and are not independent: the
    error counts each prompt once, so it is never too small.
    """
    examples = int(data["examples"])
    return accuracy, standard_error(accuracy, examples), examples * (config.get("sample_rejected") or 1)


def read_facts(folder: Path) -> dict[str, Any]:
    """Read a run's report.json. Raises UserError if it cannot be read or is not what the run wrote."""
    facts = read_object(folder / FACTS, digest=True)
    check_format(facts, RUN, folder)
    return facts


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write a run's report.json."""
    replace_file(folder / FACTS, json.dumps(with_digest(facts), indent=1) + "\n")


def digests_of(folder: Path) -> dict[str, str]:
    """Return the digests of a run's sample answers and held-out pairs, for report.json; "" for one that is not there."""
    paths = {name: folder / name for name in (SAMPLES, PAIRS)}
    return {name: sha256(file_pieces(path)) if path.exists() else "" for name, path in paths.items()}


def other_files(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    """Return the digests in report.json of those files that are there and have others; none where it has none."""
    now = digests_of(folder)
    return {name: noted for name, noted in facts.get("files", {}).items() if now.get(name, "") not in ("", noted)}


def read_record(folder: Path, metrics: bytes | None = None) -> RunRecord:
    """Read a run's folder: config.yaml, report.json, metrics.jsonl, report_samples.jsonl, held_out_pairs.json, evaluations.

    `metrics` is the content of metrics.jsonl if it has been read.

    Of damaged metrics, samples and pairs the rest is read; `RunRecord.damage` names them. Raises UserError if config.yaml or
    report.json is damaged.
    """
    facts = read_facts(folder)
    options = read_options(folder)
    history, wrong = checked_history(folder, metrics_of(folder) if metrics is None else metrics, facts.get("metrics"))
    damage = [text for text in (wrong, other_options(folder, options)) if text]
    others, told = other_files(folder, facts), len(damage)
    samples, pairs = read_samples(folder / SAMPLES, damage.append), read_pairs(folder / PAIRS, damage.append)
    if others and len(damage) == told:  # whole, but of another run
        damage += [f"{folder / name} is not what the run wrote" for name in others]
        samples, pairs = [] if SAMPLES in others else samples, None if PAIRS in others else pairs
    scores = Evaluations([], [])
    try:
        scores = read_evaluations(folder)
    except UserError as error:
        damage.append(str(error))
    return RunRecord(folder, options, facts, history, samples, pairs, damage, scores)
