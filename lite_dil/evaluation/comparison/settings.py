"""The settings of a comparison, checked as a whole before anything is trained."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError, did_you_mean, gather
from lite_dil.base.files import make_folder, replace_file
from lite_dil.base.hashing import blake2
from lite_dil.batching.schedule import examples_per_step, steps_of
from lite_dil.config.options import build, coerce
from lite_dil.config.train_config import FIELDS, FREE_ON_RESUME, ResolvedConfig, flag
from lite_dil.data.arguments import FIELD
from lite_dil.data.dataset import reader_of
from lite_dil.data.held_out import taken, wanted
from lite_dil.data.reader import Row, refuse
from lite_dil.data.rows import DATA, Rows
from lite_dil.data.sources import EMBEDDED, split_sources
from lite_dil.evaluation.comparison.files import read_measured, write_measured
from lite_dil.objectives.accepts import check_data
from lite_dil.objectives.own import OwnLoss, shown
from lite_dil.objectives.table import OBJECTIVES, OPTIONS, objective_of
from lite_dil.runs.folder import RUNS, unused

_EVALUATIONS = 8  # evaluations in a run, unless --eval-steps is given
# Rows held out without --eval-data and --eval-fraction: a tenth of the data, within these bounds, and at most half of what a
# run trains on: they are evaluated several times, and more would take longer than the training.
HELD_OUT_SHARE, HELD_OUT_LEAST, HELD_OUT_MOST = 0.1, 20, 200
PASSES_OF_A_STEP = 3  # a training step costs as much as this many forward passes
# These two decide which steps have figures, so they must be the same in all runs of a comparison.
_FREE = FREE_ON_RESUME - {"eval_steps", "logging_steps"}
# The options for reading the comparison's own data files.
OWN_FILES: dict[str, Any] = {"data_format": "auto", "columns": None, "chat": False, "max_rows": None, "skip_bad_rows": False}
_SET_HERE = {"loss": "--losses", "output_dir": "--output", "report_samples": "--sample-prompts"}


@dataclass(frozen=True)
class ComparisonRequest:
    """A request for a comparison, not yet checked.

    Attributes:
        losses: names of objectives, or own losses.
        rates: learning rates by loss.
        sample_prompts: held-out prompts that every trained model answers.
        sample_tokens: the maximum tokens of an answer.
        output: the comparison's folder; None makes a new one under runs/.
        given: options of training by name, which override those of `base`.
        rows, eval_rows: a program's own rows, which replace the options `data` and `eval_data`.
        again: returns the command or call that continues the comparison in a folder.
    """

    losses: Sequence[str | OwnLoss]
    seeds: Sequence[Any]
    rates: Mapping[str, Any]
    sample_prompts: int
    sample_tokens: int
    output: Path | None
    given: dict[str, Any]
    base: dict[str, Any]
    again: Callable[[Path], str]
    rows: Rows | None = None
    eval_rows: Rows | None = None


@dataclass(frozen=True)
class Comparison:
    """A checked comparison. `configs` holds each loss's resolved options, without the run's folder and seed."""

    output: Path
    configs: dict[str, ResolvedConfig]
    seeds: list[int]
    sample_prompts: int
    sample_tokens: int
    steps: int
    again: str  # the command or call that continues it
    own: dict[str, OwnLoss] = field(default_factory=dict)

    def run(self, loss: str, seed: int) -> ResolvedConfig:
        """Return the options of one run."""
        folder = str(self.output / "runs" / f"{loss}-seed{seed}")
        return dataclasses.replace(self.configs[loss], seed=seed, output_dir=folder, report_samples=0)

    @property
    def reference(self) -> Path:
        """The folder of the reference's measurements."""
        return self.output / "reference"


def settle(asked: ComparisonRequest, say: Callable[[str], None]) -> Comparison:
    """Check the request, hold out data if needed, and write compare.json or check that it is the same.

    Raises UserError with everything that the user must fix, in one message.
    """
    _check(asked)
    given, base = asked.given, asked.base
    losses = _losses([loss if isinstance(loss, str) else loss.identity for loss in asked.losses])
    seeds = [coerce("seed", seed, "--seeds") for seed in _once(asked.seeds, "--seeds")]

    output = asked.output or unused(RUNS / f"compare-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    source = DATA if asked.rows else coerce("data", given.get("data", base.get("data", EMBEDDED)), "--data")
    fraction = _fraction(given, base)
    eval_source = DATA if asked.eval_rows else given.get("eval_data", base.get("eval_data"))
    eval_source = eval_source or (EMBEDDED if source == EMBEDDED and not fraction else None)
    files = [output / "data" / name for name in ("train.jsonl", "held_out.jsonl")]
    names = {"data": source, "eval_data": eval_source, "eval_fraction": fraction}
    # Data split here and rows that no file holds are written into the folder, where all runs read them.
    written = eval_source is None or DATA in (source, eval_source)
    if written and any(weight != 1 for _, weight in split_sources(source)):
        raise UserError(f"--data {source}: to weigh sources, give --eval-data, a file of the rows to hold out")
    placed = {"data": str(files[0]), "eval_data": eval_source and str(files[1])} if written else {}
    fixed = {name: value for name, value in (names | placed).items() if value is not None}
    given, base = ({name: value for name, value in part.items() if name not in names} for part in (given, base))
    # One reference for all runs, shared even if nothing may be kept elsewhere.
    if given.get("reference_cache", base.get("reference_cache")) == "off":
        fixed |= {"reference_cache": str(output / "reference-cache")}
    configs = _configs(given | fixed, base, losses, _rates(asked.rates, losses))

    first = next(iter(configs.values()))
    rows = _rows(source, "train", first, asked.rows)
    held_out = _rows(eval_source, "test", first, asked.eval_rows) if eval_source else []
    settings = {
        "losses": losses,
        "seeds": seeds,
        "sample_prompts": asked.sample_prompts,
        "sample_tokens": asked.sample_tokens,
        "contents": digest_of([*rows, *held_out]),
        "options": _decisive(configs, names),
    }
    _check_folder(output, settings)
    whole = len(rows)
    if eval_source is None:
        rows, held_out = _earlier(files, first) if files[1].exists() else _split(rows, source, first)
    _check_rows(rows, source, configs)
    if eval_source is None:
        part = f"{len(held_out)} of {whole} rows of {source}, whole prompts, are held out"
        say(f"no --eval-data: {part}, the same for every loss ({files[1]})")

    again = asked.again(output)
    _write_folder(output, {"again": again, "settings": settings})
    if written:
        replace_file(files[0], "".join(map(as_json, rows)))
        replace_file(files[1], "".join(map(as_json, held_out)))
        mine = OWN_FILES | {"eval_data": str(files[1]), "eval_fraction": None}
        configs = {name: dataclasses.replace(config, **mine) for name, config in configs.items()}
    _, steps = steps_of(first, len(rows))
    configs = _planned(configs, steps, len(rows), len(held_out), "precompute_reference" in given | base, say)
    own = {loss.name: loss for loss in asked.losses if isinstance(loss, OwnLoss)}
    return Comparison(output, configs, seeds, asked.sample_prompts, asked.sample_tokens, steps, again, own)


def _check(asked: ComparisonRequest) -> None:
    """Raise UserError for options that other options replace here, and for counts below 1."""
    given = asked.given | asked.base
    if taken := [f"{flag(name)} is given by {instead} here" for name, instead in _SET_HERE.items() if name in given]:
        raise UserError("; ".join(taken))
    for name in ("sample_prompts", "sample_tokens"):
        if getattr(asked, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(asked, name)}; expected at least 1")


def _once(values: Sequence[Any], where: str) -> Sequence[Any]:
    if not values:
        raise UserError(f"{where}: none given")
    if twice := sorted({str(value) for value in values if values.count(value) > 1}):
        raise UserError(f"{where}: {', '.join(twice)} is given twice")
    return values


def _losses(identities: list[str]) -> list[str]:
    """Check that all are known and no two have the same name."""
    _once([shown(loss) for loss in identities], "--losses")
    for loss in identities:
        if loss == shown(loss) and loss not in OBJECTIVES:
            raise UserError(f"--losses: {loss!r}{did_you_mean(loss, OBJECTIVES)} is not one of {', '.join(OBJECTIVES)}")
    return identities


def _rates(rates: Mapping[str, Any], losses: list[str]) -> dict[str, float]:
    names = list(map(shown, losses))
    for name in rates:
        if name not in names:
            raise UserError(f"--learning-rates: {name!r}{did_you_mean(name, names)} is not one of --losses {','.join(names)}")
    return {name: coerce("learning_rate", value, f"--learning-rates {name}") for name, value in rates.items()}


def _fraction(given: dict[str, Any], base: dict[str, Any]) -> float | None:
    """Return the share of the data to hold out; None takes the default. Of a file, such as a run's own, 0 is the default."""
    value = given.get("eval_fraction", base.get("eval_fraction"))
    fraction = None if value is None else coerce("eval_fraction", value, "--eval-fraction")
    if fraction == 0 and "eval_fraction" in given:
        raise UserError("--eval-fraction 0: a comparison measures held-out rows; leave it out, or give --eval-data")
    return fraction or None


def _configs(
    given: dict[str, Any], base: dict[str, Any], losses: list[str], rates: dict[str, float]
) -> dict[str, ResolvedConfig]:
    """Return each loss's checked options by name, or raise one UserError with all problems."""
    configs, problems = {}, []
    for loss in losses:
        name = shown(loss)
        mine = {"loss": loss} | ({"learning_rate": rates[name]} if name in rates else {})
        try:
            configs[name] = build(of_loss(given, loss, losses) | mine, of_loss(base, loss, losses))
        except UserError as error:
            problems += [problem for problem in str(error).splitlines() if problem not in problems]
    if any(config.online for config in configs.values()):
        problems.append("--reward: a comparison is of losses on the same given answers; leave it out")
    if problems:
        raise UserError("\n".join(problems))
    return configs


def _has(loss: str, option: str) -> bool:
    objective = objective_of(loss)
    return objective.beta is not None if option == "beta" else option in objective.options


def of_loss(options: dict[str, Any], loss: str, losses: list[str]) -> dict[str, Any]:
    """Leave out the constants that only other compared losses have. Raises UserError for one that none has."""
    constants = [name for name in ("beta", *OPTIONS) if options.get(name) is not None]
    for name in constants:
        if not any(_has(other, name) for other in losses):
            owners = ", ".join(other for other in OBJECTIVES if _has(other, name))
            raise UserError(f"{flag(name)} belongs to --loss {owners}, which is not compared; leave it out")
    foreign = {name for name in constants if not _has(loss, name)}
    return {name: value for name, value in options.items() if name not in foreign}


def _decisive(configs: dict[str, ResolvedConfig], asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by loss the options that decide its figures; `asked` replaces those that name the comparison's own files."""
    others = _FREE | {"seed", "output_dir", "loss"}
    return {
        loss: {name: value for name, value in (config.as_dict() | asked).items() if name not in others}
        for loss, config in configs.items()
    }


def _rows(source: str, split: str, config: ResolvedConfig, own: Rows | None) -> list[Row]:
    """Read and check all rows of a source, or of a program."""
    found = []
    for name, _ in [(DATA, 1)] if own else split_sources(source):
        reader = reader_of(name, split, config, own)
        rows = list(reader)
        refuse(name, [] if config.skip_bad_rows and rows else reader.problems, len(rows))
        found += rows
    return found


def _check_rows(rows: list[Row], source: str, configs: dict[str, ResolvedConfig]) -> None:
    """Raise UserError if a loss cannot be trained on such rows."""
    signs = {sign for row in rows for sign in row.signs}
    for config in configs.values():
        check_data(config.loss, rows[0].form, signs, source, config.sample_rejected is not None)


def _earlier(files: Sequence[Path], config: ResolvedConfig) -> list[list[Row]]:
    """Read the parts of a comparison that goes on, which stay as they are even if an earlier version chose them."""
    own = dataclasses.replace(config, **OWN_FILES)
    return [_rows(str(path), "train", own, None) for path in files]


def _split(rows: list[Row], source: str, config: ResolvedConfig) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on, and those that are held out, by prompt."""
    if not config.eval_fraction:
        seen = steps_of(config, len(rows))[1] * examples_per_step(config)
        count = max(min(round(len(rows) * HELD_OUT_SHARE), HELD_OUT_MOST, seen // 2), HELD_OUT_LEAST)
    else:
        count = wanted(len(rows), config.eval_fraction)
    if len(rows) < 2 * count:
        raise UserError(f"--data {source} has {len(rows)} rows, too few to hold {count} of them out; give --eval-data")
    held = taken(np.frombuffer(b"".join(map(_prompt_digest, rows)), np.uint64), count)
    if not held.any():
        raise UserError(f"--data {source}: no prompt has as few as {count} rows, to be held out whole; give --eval-data")
    sides = [[row for row, is_held in zip(rows, held, strict=True) if is_held == side] for side in (False, True)]
    return sides[0], sides[1]


def _prompt_digest(row: Row) -> bytes:
    """Return 8 bytes that name a prompt; chat templates may drop white space around a message, so it does not count there."""
    prompt: Any = row.ids[0] if row.ids else row.prompt
    if row.chat:
        prompt = [(message.get("role"), (message.get("content") or "").strip()) for message in prompt]
    return blake2([json.dumps(prompt).encode()], 8)


def as_json(row: Row) -> str:
    """Return a row as a line of JSON Lines, in its original form."""
    said = [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer} for answer in row.answers]
    answers: list[Any] = [[message] for message in said] if row.chat else list(row.ids[1:] or row.answers)
    fields: dict[str, Any]
    if row.form == "pairs":
        fields = {"chosen": answers[0], "rejected": answers[1]}
    else:
        fields = {"completion": answers[0]} | ({"label": row.signs[0] > 0} if row.form == "unpaired" else {})
    further = {name: value for name, value in (("tools", row.tools), (FIELD, row.arguments)) if value}
    whole = {"prompt": row.ids[0] if row.ids else row.prompt, **fields}
    if row.ids:
        whole = {name if name == "label" else f"{name}_ids": value for name, value in whole.items()}
    return json.dumps(whole | further, ensure_ascii=False) + "\n"


def digest_of(rows: list[Row]) -> str:
    """Return a hash of the rows' content."""
    return blake2(as_json(row).encode() for row in rows).hex()


def _planned(
    configs: dict[str, ResolvedConfig], steps: int, rows: int, held_out: int, asked: bool, say: Callable[[str], None]
) -> dict[str, ResolvedConfig]:
    """Return the options, completed with those that depend on the length of a run.

    Args:
        asked: whether the user set whether to precompute the reference.
    """
    first = next(iter(configs.values()))
    seen = steps * examples_per_step(first)
    eval_steps = first.eval_steps or math.ceil(steps / _EVALUATIONS)
    points = math.ceil(steps / eval_steps)
    if points > 1 and points * held_out > PASSES_OF_A_STEP * seen:
        say(
            f"evaluating {held_out} rows {points} times takes longer than a run's {steps} steps; --eval-steps {steps} does it "
            "once, and --eval-data FILE may hold fewer rows"
        )
    # In large batches before the first run, unless that run uses only part of the data: then it computes what it needs.
    precompute = first.precompute_reference or (not asked and seen >= rows)
    return {
        loss: dataclasses.replace(config, eval_steps=eval_steps, precompute_reference=precompute)
        for loss, config in configs.items()
    }


def _check_folder(output: Path, settings: dict[str, Any]) -> None:
    """Raise UserError if the folder holds another comparison or something else."""
    known = output / "compare.json"
    if known.exists():
        before = read_measured(known).get("settings")
        if not isinstance(before, dict):
            raise UserError(f"{known} holds no comparison's settings; give a new folder with --output")
        _check_same(settings, before, output)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} holds something that is not a comparison; give a new folder")


def _write_folder(output: Path, content: dict[str, Any]) -> None:
    """Create the folder and compare.json, unless they exist from an earlier start."""
    known = output / "compare.json"
    if known.exists():
        return
    try:
        make_folder(output / "data")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be created ({error.strerror})") from None
    write_measured(known, content)


def _check_same(settings: dict[str, Any], saved: dict[str, Any], output: Path) -> None:
    """Raise UserError with every difference from the comparison in the folder."""
    problems = []
    for name in ("losses", "seeds", "sample_prompts", "sample_tokens"):
        if settings[name] != saved[name]:
            mine, other = (",".join(map(str, v)) if isinstance(v, list) else v for v in (settings[name], saved[name]))
            problems.append(f"--{name.replace('_', '-')} is {mine}, but the comparison has {other}")
    shared = [loss for loss in settings["losses"] if loss in saved["options"]]
    for name in next(iter(settings["options"].values())):
        default = FIELDS[name].default  # of an option that the version before did not have
        values = [(loss, settings["options"][loss][name], saved["options"][loss].get(name, default)) for loss in shared]
        changed = [(loss, mine, other) for loss, mine, other in values if mine != other]
        if changed:
            _, mine, other = changed[0]
            of = "" if len(changed) == len(shared) else f" for {', '.join(loss for loss, _, _ in changed)}"
            problems.append(f"{flag(name)} is {mine}{of}, but the comparison has {other}")
    if not problems and settings["contents"] != saved["contents"]:
        problems.append("the data's contents have changed since")
    if problems:
        heading = f"--output {output} holds another comparison; give another folder, or the same options:"
        raise UserError(gather(problems, heading) if len(problems) > 1 else f"{heading} {problems[0]}")
