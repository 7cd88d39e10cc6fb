"""The settings of a comparison: read from the command line and checked as a whole before anything is trained."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError, did_you_mean, gather
from lite_dil.base.files import replace_file
from lite_dil.base.hashing import blake2
from lite_dil.batching.schedule import examples_per_step, steps_of
from lite_dil.cli.parser import Parser
from lite_dil.config.options import add_flags, build, coerce, read_yaml
from lite_dil.config.train_config import FIELDS, FREE_ON_RESUME, ResolvedConfig, flag
from lite_dil.data.reader import Row, parse_columns, read_rows
from lite_dil.data.sources import EMBEDDED, split_sources
from lite_dil.objectives.accepts import check_data
from lite_dil.objectives.table import OBJECTIVES, OPTIONS
from lite_dil.runs.folder import RUNS, unused

COMMAND = "python scripts/compare.py"
POINTS = 8  # evaluations over a run, unless --eval-steps says otherwise
# What is held out where --eval-data is not given: a tenth of the data, within these bounds, and half of what a run trains on:
# it is evaluated several times, and more would take longer than the training.
HELD_OUT_SHARE, HELD_OUT_LEAST, HELD_OUT_MOST = 0.1, 20, 200
PASSES_OF_A_STEP = 3  # a step's forward and backward pass cost as much as this many forward passes
# These two decide at which steps there are figures, so that they must be the same in all runs of a comparison.
FREE = FREE_ON_RESUME - {"eval_steps", "logging_steps"}
# How the comparison's own files of data are read.
OWN_FILES: dict[str, Any] = {"data_format": "auto", "columns": None, "max_rows": None, "skip_bad_rows": False}
OWN = {"loss": "--losses", "output_dir": "--output", "report_samples": "--sample-prompts"}


@dataclass(frozen=True)
class Comparison:
    """A checked comparison. `configs` holds each loss's resolved options, still without the run's folder and seed."""

    output: Path
    configs: dict[str, ResolvedConfig]
    seeds: list[int]
    sample_prompts: int
    sample_tokens: int
    steps: int
    again: str  # the command that goes on with it

    def run(self, loss: str, seed: int) -> ResolvedConfig:
        """Return the options of one run."""
        folder = str(self.output / "runs" / f"{loss}-seed{seed}")
        return dataclasses.replace(self.configs[loss], seed=seed, output_dir=folder, report_samples=0)

    @property
    def reference(self) -> Path:
        """The folder of what is measured on the reference."""
        return self.output / "reference"


def read(argv: list[str], description: str, say: Any) -> Comparison:
    """Read the command line, hold data out where need be, and write compare.json or check that it is the same.

    Raises UserError for everything that the user can mend, in one message.
    """
    args = _parser(description).parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    base = read_yaml(Path(args.config)) if args.config else {}
    own = [f"{flag(name)} is given by {instead} here" for name, instead in OWN.items() if name in given or name in base]
    if own:
        raise UserError("; ".join(own))
    losses = _losses(args.losses)
    seeds = _seeds(args.seeds or given.pop("seed", base.pop("seed", "0")))
    rates = _rates(args.learning_rates, losses)

    output = Path(args.output) if args.output else unused(RUNS / f"compare-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    source = coerce("data", given.get("data", base.get("data", EMBEDDED)), "--data")
    eval_source = given.get("eval_data", base.get("eval_data")) or (EMBEDDED if source == EMBEDDED else None)
    files = [output / "data" / name for name in ("train.jsonl", "held_out.jsonl")]
    if eval_source is None and any(weight != 1 for _, weight in split_sources(source)):
        raise UserError(f"--data {source}: to weigh sources, give --eval-data, the rows to hold out")
    asked = {"data": source, "eval_data": eval_source}
    fixed = asked if eval_source else {"data": str(files[0]), "eval_data": str(files[1])}
    # One reference for all, shared even where nothing is to be kept elsewhere.
    if given.get("reference_cache", base.get("reference_cache")) == "off":
        fixed |= {"reference_cache": str(output / "reference-cache")}
    configs = _configs(given | fixed, base, losses, rates)

    first = configs[losses[0]]
    rows = _rows(source, "train", first)
    held_out = _rows(eval_source, "test", first) if eval_source else []
    settings = {
        "losses": losses,
        "seeds": seeds,
        "sample_prompts": args.sample_prompts,
        "sample_tokens": args.sample_tokens,
        "contents": _digest([*rows, *held_out]),
        "options": _decisive(configs, asked),
    }
    _check_folder(output, settings)
    if eval_source is None:
        rows, held_out = _split(rows, source, first)
    signs = {sign for row in rows for sign in row.signs}
    for config in configs.values():
        check_data(config.loss, rows[0].form, signs, source, config.sample_rejected is not None)

    again = [*argv, *([] if args.output else ["--output", str(output)])]
    _write_folder(output, {"command": again, "settings": settings})
    if eval_source is None:
        for path, part in zip(files, (rows, held_out), strict=True):
            replace_file(path, "".join(map(as_json, part)))
        configs = {loss: dataclasses.replace(config, **OWN_FILES) for loss, config in configs.items()}
        say(
            f"no --eval-data: the last {len(held_out)} of {len(rows) + len(held_out)} rows of {source} are held out, "
            f"the same for every loss ({files[1]})"
        )
    _, steps = steps_of(first, len(rows))
    configs = _planned(configs, steps, len(rows), len(held_out), "precompute_reference" in given | base, say)
    return Comparison(output, configs, seeds, args.sample_prompts, args.sample_tokens, steps, f"{COMMAND} {shlex.join(again)}")


def _parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog="compare.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("comparison")
    group.add_argument("--losses", default="lsif,ukl,bce,dpo,simpo", help="what is compared (default: lsif,ukl,bce,dpo,simpo)")
    group.add_argument("--seeds", help="train every loss with each of these seeds, as 0,1,2 (default: 0, or --seed)")
    group.add_argument(
        "--learning-rates", help="rates of single losses, as lsif=1e-4,dpo=5e-5 (default: --learning-rate, or each loss's own)"
    )
    group.add_argument(
        "--sample-prompts",
        type=_count,
        default=32,
        metavar="N",
        help="held-out prompts that every trained model answers (default: 32)",
    )
    group.add_argument(
        "--sample-tokens", type=_count, default=128, metavar="N", help="tokens of such an answer at most (default: 128)"
    )
    group.add_argument(
        "--output", metavar="DIR", help="folder of the comparison; an interrupted one goes on (default: new, under runs/)"
    )
    group.add_argument("--config", metavar="FILE.yaml", help="options of train as 'key: value' lines; flags win over them")
    add_flags(parser)
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _names(text: str, where: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{where}: none are given")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{where}: {', '.join(twice)} is given twice")
    return names


def _losses(text: str) -> list[str]:
    names = _names(text, "--losses")
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"--losses: {name!r}{did_you_mean(name, OBJECTIVES)} is not one of {', '.join(OBJECTIVES)}")
    return names


def _seeds(value: Any) -> list[int]:
    return [coerce("seed", seed, "--seeds") for seed in _names(str(value), "--seeds")]


def _rates(text: str | None, losses: list[str]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for item in _names(text, "--learning-rates") if text else []:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--learning-rates: {item!r} is not of the form loss=rate")
        if name not in losses:
            raise UserError(
                f"--learning-rates: {name!r}{did_you_mean(name, losses)} is not one of --losses {','.join(losses)}"
            )
        rates[name] = coerce("learning_rate", value, f"--learning-rates {name}")
    return rates


def _configs(
    given: dict[str, Any], base: dict[str, Any], losses: list[str], rates: dict[str, float]
) -> dict[str, ResolvedConfig]:
    """Return each loss's checked options, or raise one UserError with the problems of all."""
    configs, problems = {}, []
    for loss in losses:
        mine = {"loss": loss} | ({"learning_rate": rates[loss]} if loss in rates else {})
        try:
            configs[loss] = build(_of_loss(given, loss, losses) | mine, _of_loss(base, loss, losses))
        except UserError as error:
            problems += [problem for problem in str(error).splitlines() if problem not in problems]
    if problems:
        raise UserError("\n".join(problems))
    return configs


def _has(loss: str, option: str) -> bool:
    return OBJECTIVES[loss].beta is not None if option == "beta" else option in OBJECTIVES[loss].options


def _of_loss(options: dict[str, Any], loss: str, losses: list[str]) -> dict[str, Any]:
    """Leave out the constants that only others of the compared losses have. Raises UserError for one that none has."""
    constants = [name for name in ("beta", *OPTIONS) if options.get(name) is not None]
    for name in constants:
        if not any(_has(other, name) for other in losses):
            owners = ", ".join(other for other in OBJECTIVES if _has(other, name))
            raise UserError(f"{flag(name)} belongs to --loss {owners}, which is not compared; leave it out")
    foreign = {name for name in constants if not _has(loss, name)}
    return {name: value for name, value in options.items() if name not in foreign}


def _decisive(configs: dict[str, ResolvedConfig], asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by loss the options that decide its figures; `asked` are those that stand for files of the comparison's own."""
    others = FREE | {"seed", "output_dir", "loss"}
    return {
        loss: {name: value for name, value in (config.as_dict() | asked).items() if name not in others}
        for loss, config in configs.items()
    }


def _rows(source: str, split: str, config: ResolvedConfig) -> list[Row]:
    return read_rows(
        source,
        split,
        format=config.data_format,
        columns=parse_columns(config.columns),
        limit=config.max_rows,
        skip=config.skip_bad_rows,
    )


def _split(rows: list[Row], source: str, config: ResolvedConfig) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and the last ones, which are held out."""
    seen = steps_of(config, len(rows))[1] * examples_per_step(config)
    count = max(min(round(len(rows) * HELD_OUT_SHARE), HELD_OUT_MOST, seen // 2), HELD_OUT_LEAST)
    if len(rows) < 2 * count:
        raise UserError(f"--data {source} has {len(rows)} rows, too few to hold {count} of them out; give --eval-data")
    return rows[:-count], rows[-count:]


def as_json(row: Row) -> str:
    """Return a row as a line of JSON Lines, in the form that it was read in."""
    said = [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer} for answer in row.answers]
    answers: list[Any] = [[message] for message in said] if row.chat else list(row.answers)
    fields: dict[str, Any]
    if row.form == "pairs":
        fields = {"chosen": answers[0], "rejected": answers[1]}
    else:
        fields = {"completion": answers[0]} | ({"label": row.signs[0] > 0} if row.form == "unpaired" else {})
    tools = {"tools": row.tools} if row.tools else {}
    return json.dumps({"prompt": row.prompt, **fields, **tools}, ensure_ascii=False) + "\n"


def _digest(rows: list[Row]) -> str:
    return blake2(as_json(row).encode() for row in rows).hex()


def _planned(
    configs: dict[str, ResolvedConfig], steps: int, rows: int, held_out: int, asked: bool, say: Any
) -> dict[str, ResolvedConfig]:
    """Return the options with what depends on the length of a run filled in.

    Args:
        asked: whether it was said if the reference is to be precomputed.
    """
    first = next(iter(configs.values()))
    seen = steps * examples_per_step(first)
    eval_steps = first.eval_steps or math.ceil(steps / POINTS)
    points = math.ceil(steps / eval_steps)
    if points > 1 and points * held_out > PASSES_OF_A_STEP * seen:
        say(
            f"evaluating {held_out} rows {points} times takes longer than a run's {steps} steps; --eval-steps {steps} does it "
            "once, and --eval-data FILE may hold fewer rows"
        )
    # In large batches before the first run, unless that run sees a part of the data only: then it computes what it needs.
    precompute = first.precompute_reference or (not asked and seen >= rows)
    return {
        loss: dataclasses.replace(config, eval_steps=eval_steps, precompute_reference=precompute)
        for loss, config in configs.items()
    }


def _check_folder(output: Path, settings: dict[str, Any]) -> None:
    """Raise UserError where the folder holds another comparison, or something else."""
    known = output / "compare.json"
    if known.exists():
        _check_same(settings, _saved(known), output)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} holds something that is no comparison; give a new folder")


def _write_folder(output: Path, content: dict[str, Any]) -> None:
    """Make the folder and compare.json, where they are not there from an earlier start."""
    known = output / "compare.json"
    if known.exists():
        return
    try:
        (output / "data").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made ({error.strerror})") from None
    replace_file(known, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _saved(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a new folder") from None


def _check_same(settings: dict[str, Any], saved: dict[str, Any], output: Path) -> None:
    """Raise UserError naming every difference from the comparison that the folder holds."""
    problems = []
    for name in ("losses", "seeds", "sample_prompts", "sample_tokens"):
        if settings[name] != saved[name]:
            mine, other = (",".join(map(str, v)) if isinstance(v, list) else v for v in (settings[name], saved[name]))
            problems.append(f"--{name.replace('_', '-')} is {mine}, but the comparison has {other}")
    shared = [loss for loss in settings["losses"] if loss in saved["options"]]
    for name in next(iter(settings["options"].values())):
        values = [(loss, settings["options"][loss][name], saved["options"][loss].get(name)) for loss in shared]
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
