"""python scripts/theorem.py --prompts FILE: does DIL recover pi_chosen on a real language model? Writes docs/theorem.md.

The theorem: if chosen responses come from pi_chosen and rejected ones from pi_ref, the minimiser of each DIL loss (sums,
beta 1) is pi_chosen. Here pi_ref is a real model and pi_chosen the same one with another system prompt or temperature, so that
the truth is known. Every step has fresh answers of both. Each training (an arm) is kept in --output when it ends and is not
repeated: after an interruption the same command goes on, and the page is made of the arms that are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from theorem_page import TRIED, write_page
from theorem_training import Measured, train
from theorem_world import Held, Ids, Setting, World, questions

import lite_dil as dil
from lite_dil.base.files import replace_file
from lite_dil.base.hashing import digest

TokenRow: TypeAlias = dict[str, Ids]
LOSSES: dict[str, dict[str, str | float]] = {
    "sft": {"loss": "sft"},
    "ukl": {"loss": "ukl"},
    "bce": {"loss": "bce"},
    "rulsif": {"loss": "rulsif"},
    "lsif": {"loss": "lsif"},
    "dpo": {"loss": "dpo", "beta": 1.0},
    "dpo, beta 0.1": {"loss": "dpo", "beta": 0.1},
}
RATES = (1e-4, 2e-4, 5e-4)
PAIRS = 8  # prompts of a step, each with an answer of either side
ROW_TOKENS = 8192  # of a pass: a step is one
MEASURED = (20, 40, 80, 160)  # steps after which the policy is measured, besides the last


class Arm(NamedTuple):
    """A training."""

    loss: str
    rate: float
    clip: float
    seed: int
    steps: int

    def path(self, folder: Path, setting: Setting, asked: str) -> Path:
        """Return the file that keeps it; `asked` is `Trainings.asked`."""
        loss = self.loss.replace(", beta ", "-")
        name = f"{setting.name}-{loss}-rate-{self.rate:g}-clip-{self.clip:g}-seed-{self.seed}-steps-{self.steps}"
        return folder / f"{name}-{asked}.json"


class Trainings:
    """Trains arms in one setting, one after the other, with one model for each --max-grad-norm."""

    def __init__(self, setting: Setting, prompts: Sequence[str], held_out: int, folder: Path, model: str | None) -> None:
        self.setting, self.folder, self._model = setting, folder, model
        self._prompts, self._held_out = list(prompts), held_out
        self._world: tuple[float, World] | None = None
        self._held: dict[int, Held] = {}
        self._drawn: dict[tuple[int, int], list[TokenRow]] = {}

    @property
    def asked(self) -> str:
        """What else a training's figures depend on: model, prompts and texts."""
        return digest(*map(repr, (self.setting, self._model, self._prompts, self._held_out, PAIRS, MEASURED)))[:8]

    def world(self, clip: float) -> World:
        """Return the model, loaded with this clip."""
        if self._world is None or self._world[0] != clip:
            policy = dil.load(self._model, backend="cpu", dtype="float32", max_grad_norm=clip)
            self._world = clip, World(policy, self.setting)
            for held in self._held.values():
                held.world = self._world[1]
        return self._world[1]

    def held(self, seed: int, world: World) -> Held:
        """Return the prompts that a seed is measured on, the same for all its arms."""
        if seed not in self._held:
            order = np.random.default_rng([seed, 1]).permutation(len(self._prompts))
            some = [self._prompts[i] for i in order[: self._held_out]]
            self._held[seed] = Held(world, world.pairs(some, 10**6 + seed), seed)
        return self._held[seed]

    def rows(self, world: World, seed: int, step: int) -> list[TokenRow]:
        """Return a step's fresh pairs; the same for all arms of a seed."""
        if (seed, step) not in self._drawn:
            order = np.random.default_rng([seed, 1]).permutation(len(self._prompts))[self._held_out :]
            some = [self._prompts[order[(PAIRS * (step - 1) + i) % len(order)]] for i in range(PAIRS)]
            drawn = world.pairs(some, 10**4 * seed + step)
            self._drawn[seed, step] = [
                {"prompt_ids": world.ids(prompt), "chosen_ids": chosen, "rejected_ids": rejected}
                for prompt, chosen, rejected in zip(drawn.prompts, drawn.chosen, drawn.rejected, strict=True)
            ]
        return self._drawn[seed, step]

    def run(self, arm: Arm) -> dict[str, Any]:
        """Return a training's measurements, from its file or by training."""
        path = arm.path(self.folder, self.setting, self.asked)
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        began = time.process_time()
        world = self.world(arm.clip)
        held = self.held(arm.seed, world)
        options = LOSSES[arm.loss] | {"logp_reduction": "sum", "learning_rate": arm.rate, "batch_size": PAIRS}
        measured = Measured(held.measure, MEASURED)
        pairs = [pair for step in range(1, arm.steps + 1) for pair in self.rows(world, arm.seed, step)]
        train(world.policy.fresh(arm.seed), pairs, options | {"row_tokens": ROW_TOKENS}, measured)
        clipped = np.cumsum([line["grad_norm"] > arm.clip for line in measured.lines])
        points = [
            {"step": step, "answers": 2 * PAIRS * step, "clipped_steps": int(clipped[step - 1])}
            | {name: [round(value, 5) for value in values] for name, values in figures.items()}
            for step, figures in measured.points.items()
        ]
        done = arm._asdict() | {
            "setting": self.setting.name,
            "asked": self.asked,
            "start": held.start(),
            "points": points,
            "losses": [line["loss"] for line in measured.lines],
        }
        done |= {"cpu_seconds": round(time.process_time() - began), "date": time.strftime("%Y-%m-%d")}
        replace_file(path, json.dumps(done))
        last = points[-1]
        print(f"{path.stem}: KL(chosen, policy) {np.mean(last['kl_forward']):.3f}, {done['cpu_seconds']} s of CPU", flush=True)
        return done


def best_rate(trainings: Trainings, loss: str, clip: float, steps: int) -> float:
    """Return the rate with the least KL(pi_chosen, pi) after some steps, on prompts and draws of their own."""
    ends = {rate: trainings.run(Arm(loss, rate, clip, TRIED, steps))["points"][-1] for rate in RATES}
    return min(RATES, key=lambda rate: float(np.mean(ends[rate]["kl_forward"])))


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 for options that make no sense or would be ignored."""
    if args.temperature is not None and args.system is not None:
        parser.error("--temperature is in place of --system; give one of them")
    if args.rate is not None and args.rate_steps is not None:
        parser.error("--rate-steps is of the trainings that choose the rates, and --rate sets it; give one of them")
    if args.null and args.rate is not None and (args.system is not None or args.temperature is not None):
        parser.error("--null makes pi_chosen pi_ref, and --rate chooses no rate: --system and --temperature would be ignored")
    if not args.prompts.is_file():
        parser.error(f"--prompts {args.prompts}: there is no such file")
    if args.system == "":
        parser.error("--system is empty; expected the system prompt of pi_chosen")
    if min(args.seeds) < 0:
        parser.error(f"--seeds: {min(args.seeds)} is below 0; expected integers from 0 on")
    if TRIED in args.seeds:
        parser.error(f"--seeds: {TRIED} is the seed of the trainings that choose the rates; give another")
    numbers = ("temperature", "rate", "clip", "tokens", "longest", "steps", "rate_steps", "held_out")
    for name in numbers:
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {value:g}; expected a finite number above 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSON Lines with a prompt a row; its first question is taken"
    )
    parser.add_argument("--model", help="model folder or hub id (default: the embedded one)")
    parser.add_argument("--longest", type=int, default=80, help="most characters of a question (default: 80)")
    parser.add_argument("--tokens", type=int, default=4, help="most tokens of an answer (default: 4)")
    parser.add_argument("--system", help=f"system prompt of pi_chosen (default: {Setting.brief!r})")
    parser.add_argument("--temperature", type=float, help="temperature of pi_chosen, in place of --system")
    parser.add_argument("--null", action="store_true", help="pi_chosen is pi_ref: what each loss does without a signal")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES, metavar="LOSS", help="; ".join(LOSSES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clip", type=float, default=1.0, help="--max-grad-norm (default: 1)")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rate", type=float, help="learning rate of every loss, in place of choosing one each")
    parser.add_argument("--rate-steps", type=int, help="steps of the trainings that choose the rates (default: 20)")
    parser.add_argument("--held-out", type=int, default=48, help="prompts that are measured")
    parser.add_argument("--output", type=Path, default=Path("docs/theorem"), help="folder of the finished trainings")
    parser.add_argument("--page", type=Path, help="write the page and its figure, such as docs/theorem.md")
    args = parser.parse_args()
    _check(parser, args)
    args.output.mkdir(parents=True, exist_ok=True)
    brief = None if args.temperature else args.system or Setting.brief
    setting = Setting(args.tokens, brief, args.temperature or 1.0)
    prompts = questions(args.prompts, args.longest)
    apart, rest = prompts[::5], [prompt for number, prompt in enumerate(prompts) if number % 5]
    if (fewest := min(map(len, (rest,) if args.rate else (apart, rest)))) <= args.held_out:
        parser.error(
            f"--held-out {args.held_out} leaves nothing to train on: there are {fewest} prompts; give fewer, or more data"
        )
    tried = Trainings(setting, apart, args.held_out, args.output, args.model)
    rates = {loss: args.rate or best_rate(tried, loss, args.clip, args.rate_steps or 20) for loss in args.losses}
    print("rates: " + ", ".join(f"{loss} {rate:g}" for loss, rate in rates.items()), flush=True)
    trainings = Trainings(replace(setting, null=args.null), rest, args.held_out, args.output, args.model)
    for seed in args.seeds:
        for loss in args.losses:
            trainings.run(Arm(loss, rates[loss], args.clip, seed, args.steps))
            if args.page:
                write_page(args.output, args.page)


if __name__ == "__main__":
    try:
        main()
    except dil.UserError as error:
        print(f"theorem.py: error: {error}", file=sys.stderr)
        sys.exit(2)
