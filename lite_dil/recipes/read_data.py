"""Reading and describing the data that a run is trained and evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.base.signs import CHOSEN
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.dataset import DataSet, describe, halved, load, remarks
from lite_dil.data.encoder import Encoder, Example, fingerprint
from lite_dil.data.ended import ended
from lite_dil.data.held_out import split
from lite_dil.data.overlap import Overlap, overlap
from lite_dil.data.reader import Problem
from lite_dil.data.rows import DATA, Rows, rows_name
from lite_dil.objectives.accepts import check_data
from lite_dil.objectives.reward_table import is_reward, name_of
from lite_dil.objectives.table import objective_of
from lite_dil.recipes.given import Given
from lite_dil.reports.samples import SamplePrompt, data_facts, lengths_of, sample_prompts


@dataclass(frozen=True)
class RunData:
    """The data read: examples, skipped rows, and for the report the prompts to answer and a description.

    `config` names a program's own rows by their content. `others` is a hash of what else of the rows decides what is learned.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example]
    skipped: list[Problem]
    prompts: list[SamplePrompt]
    facts: list[dict[str, Any]]
    config: ResolvedConfig
    others: str = ""


def read_data(encoder: Encoder, config: ResolvedConfig, say: Callable[[str], None], given: Given) -> RunData:
    """Read the training data, and the held-out data if there is any; for a reward model only responses that end."""
    data = _read(encoder, config, say, given)
    return _ended(data, encoder, say) if is_reward(config.loss) else data


def _ended(data: RunData, encoder: Encoder, say: Callable[[str], None]) -> RunData:
    """Leave out examples with a response that was cut before its end token, whose state a reward model would read."""
    ends, kept, facts = set(encoder.end_ids()), [], [dict(fact) for fact in data.facts]
    for examples, use in ((data.examples, "training"), (data.held_out, "held out")):
        kept.append(whole := ended(examples, ends))
        left_out = len(examples) - len(whole)
        for fact in facts:
            if fact["use"] == use:
                fact |= {"examples": len(whole), "without_end": left_out}
        if left_out:
            say(
                f"{use} data: {left_out} of {len(examples)} examples left out, because --max-length {data.config.max_length} "
                "cuts a response before its end token, which is what a reward model scores"
            )
    if not kept[0]:
        raise UserError(f"no training example is left; give a larger --max-length than {data.config.max_length}")
    return replace(data, examples=kept[0], held_out=kept[1], facts=facts)


def _read(encoder: Encoder, config: ResolvedConfig, say: Callable[[str], None], given: Given) -> RunData:
    data, name = _load(given.data or config.data, "train", encoder, config, say)
    config = replace(config, data=name)
    if not config.eval_data:
        return _held_out_of(data, name, config, say)
    facts = [data_facts("training", name, data, _lengths(data))]
    held_out, name = _load(given.eval_data or config.eval_data, "test", encoder, config, say)
    config = replace(config, eval_data=name)
    shared = overlap(data, held_out)
    if shared.warning:
        say(f"warning: {shared.warning}")
    facts.append(data_facts("held out", name, held_out, _lengths(held_out)) | {"in_training": shared._asdict()})
    prompts = sample_prompts(held_out.read, config.report_samples, config)
    return RunData(data.examples, held_out.examples, data.problems + held_out.problems, prompts, facts, config)


def _held_out_of(data: DataSet, name: str, config: ResolvedConfig, say: Callable[[str], None]) -> RunData:
    """Hold out part of the training data, if it is large enough or the user asks for it."""
    rows, prompts, tokens = len(data.examples), sample_prompts(data.read, config.report_samples, config), _lengths(data)
    data, held_out = split(data, config.eval_fraction)
    facts = [data_facts("training", name, data, tokens)]
    if held_out is None:
        if config.eval_steps:
            raise UserError(
                f"--eval-steps: nothing is held out of {rows} rows; give --eval-data or --eval-fraction 0.1, or leave it out"
            )
        return RunData(data.examples, [], data.problems, prompts, facts, config)
    number = len(held_out.examples)
    say(f"held-out data: {number} of these rows, whole prompts, not trained on (--eval-fraction, --eval-data)")
    part = [(length, sign) for example in held_out.examples for length, sign in _sequences(example)]
    tokens = lengths_of(*np.array(part, np.int32).T)
    found = data_facts("held out", f"a part of {name}", held_out, tokens)
    facts.append(found | {"in_training": Overlap(number, 0, 0)._asdict()})
    among = {example.prompt for example in held_out.examples}
    prompts = [prompt for prompt in prompts if prompt.ids in among] or prompts
    return RunData(data.examples, held_out.examples, data.problems, prompts, facts, config)


def _lengths(data: DataSet) -> dict[str, np.ndarray]:
    return lengths_of(data.read.lengths[:, 1], data.read.signs)


def _sequences(example: Example) -> Iterator[tuple[int, int]]:
    """Yield the length and the sign of an example's prompt and of its responses."""
    return zip(map(len, (example.prompt, *example.responses)), (0, *example.signs), strict=True)


def _check_margins(config: ResolvedConfig, data: DataSet, source: str) -> None:
    """Raise UserError if a reward model's data has margins that its loss does not read.

    Args:
        source: the data's name, for the message.
    """
    if not is_reward(config.loss):
        return
    if not objective_of(config.loss).margins and any("margin" in each.unread for each in data.sources):
        raise UserError(
            f"{source} has a column 'margin', by how much the chosen response's reward should be above the other's, which "
            f"--reward-loss {name_of(config.loss)} cannot take: only bt compares two rewards in fixed units; give that, or "
            "remove the column"
        )
    if config.label_smoothing and data.read.margins.any():
        raise UserError(
            f"--label-smoothing: {source} has a column 'margin', and what the margin of a wrong label is nobody says; leave "
            "one of the two out"
        )


def _load(
    given: str | Rows, split: str, encoder: Encoder, config: ResolvedConfig, say: Callable[[str], None]
) -> tuple[DataSet, str]:
    """Read and describe a data set; return also its name in the run's files."""
    source = DATA if isinstance(given, Rows) else given
    objective = objective_of(config.loss)
    good_only = objective.data == "chosen"
    data = load(given, split, encoder, config, good_only=good_only, say=say, margins=objective.margins)
    _check_margins(config, data, source)
    check_data(config.loss, data.form, set(data.answers), source, config.sample_rejected is not None)
    number, good = len(data.examples), data.answers[CHOSEN]
    kinds = {
        "pairs": "pairs",
        "demonstrations": "demonstrations",
        "unpaired": f"answers, {good} good and {data.answers[-CHOSEN]} bad",
    }
    if data.form == "unpaired" and objective_of(config.loss).data == "chosen":
        kinds["unpaired"] = f"good answers, and {data.answers[-CHOSEN]} bad ones that {config.loss} leaves out"
    text = f"{'training' if split == 'train' else 'held-out'} data {source}: {number} {kinds[data.form]}, {describe(data)}"
    if data.prompts_cut or data.responses_cut:
        text += f"; --max-length {config.max_length} cut {data.prompts_cut} prompts and the answers of {data.responses_cut}"
    say(text)
    for line in remarks(data):
        say(line)
    if lost := halved(data, config.max_length):
        say(f"warning: {lost}")
    return data, rows_name(fingerprint(data.examples)) if isinstance(given, Rows) else source
