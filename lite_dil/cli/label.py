"""``lite-dil label``: make preference data by choosing the better of two answers."""

from __future__ import annotations

import argparse
import io
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lite_dil.backends.types import Sampling
from lite_dil.base.errors import UserError
from lite_dil.base.shares import interval
from lite_dil.base.text import count, printable
from lite_dil.cli import adapter_flags, keyboard
from lite_dil.cli.generate import add_common, check_counts
from lite_dil.config.train_config import flag
from lite_dil.data import prompts
from lite_dil.data.prompts import Prompt
from lite_dil.data.reader import same_text
from lite_dil.generation import policy
from lite_dil.generation.policy import AdapterSource
from lite_dil.labelling.labels import Candidate, Labels, Mark
from lite_dil.models.options import trusting

if TYPE_CHECKING:
    from lite_dil.cli.progress import Terminal
    from lite_dil.labelling.offers import Offers

HELP = "make preference data: the model offers two answers, you press 1 or 2"
DESCRIPTION = """\
Make preference data. For each prompt the model offers two answers; press the better one's number, b if both are bad, or t to
type a better one. Every decision is saved at once, and the same command continues with the remaining prompts. The file of
pairs is ready to train on; bad answers are kept in a second file until a better answer to their prompt is chosen.

  lite-dil label prompts.txt --adapter runs/mine --output labels.jsonl
"""
AHEAD = 3  # prompts whose answers are generated while the user reads
_SIDE_BY_SIDE = 100  # terminal columns from which answers are shown side by side
_KEYS = "[1] [2] choose the better one  [b]oth bad  [t]ype or [e]dit a better one  [s]kip  [u]ndo  [q]uit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_common(parser, temperature=1.0)
    group = parser.add_argument_group("labels")
    group.add_argument(
        "--output",
        metavar="FILE.jsonl",
        default="labels.jsonl",
        help="file for the pairs; bad answers go to a second file such as labels.bad.jsonl (default: labels.jsonl)",
    )
    group.add_argument(
        "--against-base",
        action="store_true",
        help="one of the two answers is the base model's (adapter off), without showing which; the summary tells how "
        "often the adapter's was chosen",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from lite_dil.cli.progress import Terminal
    from lite_dil.labelling.offers import Offers

    check_counts(args, "max_new_tokens")
    sampling = Sampling(args.temperature, args.top_p)
    if args.temperature == 0 and not args.against_base:
        raise UserError("--temperature 0 gives the same answer twice; choose a value above 0")
    source = adapter_flags.find(args)
    if args.against_base and source.adapter is None:
        raise UserError("--against-base compares an adapter with its base model; give --adapter")
    if isinstance(sys.stdin, io.TextIOWrapper):  # if not UTF-8: what cannot be decoded is refused as an answer
        sys.stdin.reconfigure(errors="surrogateescape")
    display = Terminal()
    labels = Labels(Path(args.output))
    for file in (labels.pairs, labels.bad):
        if file.torn:
            display.say(file.torn)
    options = adapter_flags.options_of(args)
    asked, chats = prompts.read_and_encode(args.prompts, options, source.options, args.chat, args.max_new_tokens, display.say)
    if args.chat is None and chats and not asked[0].chat:
        display.say("the prompts are plain text, which the model continues as is; --chat sends them as messages")
    labels.check_kind(asked[0].chat)
    left = [prompt for prompt in asked if not labels.is_done(prompt)]
    if len(left) < len(asked):
        display.say(f"{len(asked) - len(left)} of {len(asked)} prompts are labelled in {args.output}, {len(left)} remain")
    stopped = False
    name = policy.identity(source)
    if left:
        model = policy.load(source, display.say)
        origins = (name, "base" if args.against_base else name)
        offers = Offers(model, sampling, args.draw_seed, args.max_new_tokens, origins)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # which restores the terminal
        try:
            Session(left, labels, offers, display).run()
        except KeyboardInterrupt:
            stopped = True
        finally:
            offers.close()
            signal.signal(signal.SIGTERM, before)
    _summary(labels, source, name if args.against_base else "", args, display)
    return 130 if stopped else 0


class _Decision(NamedTuple):
    """What undo restores: the prompt's number, the answers shown, and the files' state before the decision."""

    number: int
    shown: list[Candidate]
    mark: Mark


class Session:
    """Asks about one prompt after another, until the last one or q."""

    def __init__(self, left: Sequence[Prompt], labels: Labels, offers: Offers, display: Terminal) -> None:
        self.left, self.labels, self.offers, self.display = left, labels, offers, display
        self.number = 0
        self.history: list[_Decision] = []

    def run(self) -> None:
        """Go through the prompts."""
        shown: list[Candidate] = []
        while (key := self._ask(shown)) != "q":
            shown = self._undo() if key == "u" else []

    def _ask(self, shown: list[Candidate]) -> str:
        """Ask about the next prompt, with the answers `shown` before or with new ones; return the key."""
        if self.number == len(self.left):
            return self._end()
        prompt = self.left[self.number]
        shown = shown or self._offer(prompt)
        if shown:
            show(self.display, prompt, shown, f"{self.number + 1} of {len(self.left)}")
            return self._decide(prompt, shown)
        self.display.say(
            f"{prompt.place}: skipped, because the model gave no two different usable answers; a higher --temperature may help"
        )
        self.number += 1
        return ""

    def _end(self) -> str:
        """Ask whether the last decision stands; return u if it does not."""
        if not self.history:
            return "q"
        self.display.say("that was the last prompt: [u]ndo, or any other key to end")
        return "u" if keyboard.read_key() == "u" else "q"

    def _undo(self) -> list[Candidate]:
        """Undo the last decision; return the answers shown for it."""
        self.number, shown, mark = self.history.pop()
        self.labels.undo(mark)
        self.display.say("the last decision is undone")
        return shown

    def _offer(self, prompt: Prompt) -> list[Candidate]:
        """Return two answers, and start generating those for the next prompts."""
        avoid = frozenset(same_text(each.text) for each in self.labels.bad_of(prompt))
        with self.display.console.status("generating two answers"):
            shown = self.offers.take(prompt, avoid)
        for later in self.left[self.number + 1 : self.number + 1 + AHEAD]:
            self.offers.ahead(later, frozenset(same_text(each.text) for each in self.labels.bad_of(later)))
        return shown

    def _decide(self, prompt: Prompt, shown: list[Candidate]) -> str:
        """Ask until there is a decision, and save it; return the key: q also at the input's end, u for the caller to undo."""
        while True:
            key = keyboard.read_key()
            if key is None or key == "q":
                return "q"
            if key == "u" and self.history:
                return key
            mark = self.labels.mark()
            if key in ("1", "2"):
                self._take(prompt, shown[int(key) - 1], shown)
            elif key in ("t", "e"):
                winner = self._written(prompt, shown, edit=key == "e")
                if winner is None:
                    self.display.say(_KEYS)
                    continue
                self._take(prompt, winner, shown)
            elif key == "b":
                self.labels.reject(prompt, shown)
                self.display.say("both are bad: here are two others")
            elif key == "s":
                self.display.say("skipped; the next run asks again")
            else:
                self.display.say("nothing to undo" if key == "u" else _KEYS)
                continue
            self.history.append(_Decision(self.number, shown, mark))
            self.number += key != "b"
            return key

    def _take(self, prompt: Prompt, winner: Candidate, shown: list[Candidate]) -> None:
        added = self.labels.take(prompt, winner, shown)
        self.display.say(f"{count(added, 'pair')} added")
        if winner.cut:
            self.display.say(
                "warning: --max-new-tokens cut this answer, and training would teach the model to end there; u undoes "
                "the choice, e edits the answer"
            )

    def _written(self, prompt: Prompt, shown: list[Candidate], edit: bool) -> Candidate | None:
        """Return the user's own answer, or None if there is no usable one."""
        text = ""
        if edit:
            self.display.say("edit [1], [2], or a [n]ew answer?")
            which = keyboard.read_key() or ""
            try:
                before = shown[int(which) - 1].text.strip() if which in ("1", "2") else ""
                text = keyboard.edit_text(before)
            except UserError as error:
                self.display.say(str(error))
                return None
            text = "" if text == before else text
        else:
            with suppress(EOFError):
                text = keyboard.read_text("better answer: ").strip()
        if not text:
            self.display.say("no new answer was written")
            return None
        if not prompt.chat and all(each.text[:1].isspace() for each in shown):
            text = f" {text}"  # a continuation starts with a space, as the model's do
        if problem := self.offers.problem(prompt, text):
            self.display.say(f"this answer could not be trained on: {problem}")
            return None
        return Candidate(text, "typed")


def show(display: Terminal, prompt: Prompt, shown: Sequence[Candidate], where: str) -> None:
    """Print a prompt and its two answers, side by side if there is room."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    panels = []
    for number, each in enumerate(shown, 1):
        parts = [Text(printable(each.text.strip()))]
        if each.cut:
            parts.append(Text("(cut by --max-new-tokens)", style="dim"))
        panels.append(Panel(Group(*parts), title=str(number), title_align="left"))
    console = display.console
    console.rule(where)
    console.print(Text(printable(_asked(prompt)), style="bold"))
    if console.width >= _SIDE_BY_SIDE:
        console.print(Columns(panels, width=console.width // 2 - 1, expand=True))
    else:
        for panel in panels:
            console.print(panel)
    display.say(_KEYS)


def _asked(prompt: Prompt) -> str:
    """Return a prompt as text: a single question as is, other conversations with the role of each message."""
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    if len(prompt.prompt) == 1:
        return str(prompt.prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt.prompt)


def _summary(labels: Labels, source: AdapterSource, against: str, args: argparse.Namespace, display: Terminal) -> None:
    """Print the number of labels and how to train on them."""
    path, bad = labels.pairs.path, labels.bad.path
    display.say(f"{count(len(labels.rows), 'pair')} in {path}")
    if labels.bad_rows:
        display.say(
            f"{count(len(labels.bad_rows), 'bad answer')} in {bad}, not trained on alone: each joins a pair once "
            "an answer to its prompt is chosen"
        )
    if against:
        won, met = labels.wins(against, "base")
        if met:
            low, high = interval(won / met, met)
            display.say(
                f"the adapter's answer was chosen {won} of {met} times: {won / met:.0%}, between {low:.0%} and {high:.0%} at "
                "95% confidence; 50% is chance"
            )
    if labels.rows:
        words = ["lite-dil", "train", "--data", str(path), "--model", source.options.model]
        words += ["--4bit"] * source.options.load_in_4bit + trusting(source.options)
        words += [flag("backend"), args.backend] if "backend" in args else []
        kwargs = source.options.chat_template_kwargs
        words += [flag("chat_template_kwargs"), kwargs] if kwargs else []
        if source.adapter:
            words += ["--init-adapter", str(source.adapter), "--reference", "initial-adapter"]
        display.say(f"train on them: {shlex.join(words)}")
