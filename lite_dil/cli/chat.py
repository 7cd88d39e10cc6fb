"""``lite-dil chat``: talk to a tuned model, and compare it with its base model."""

from __future__ import annotations

import argparse
import importlib.util
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lite_dil.backends.types import Sampling
from lite_dil.base.errors import UserError, did_you_mean
from lite_dil.base.hashing import digest
from lite_dil.base.signals import StopSignal
from lite_dil.base.text import printable
from lite_dil.cli import adapter_flags, keyboard
from lite_dil.generation import policy
from lite_dil.generation.conversation import Conversation, FittedPrompt, context_limit
from lite_dil.generation.policy import Policy

if TYPE_CHECKING:
    from lite_dil.generation.stream import Stream

HELP = "talk to a tuned model, and compare it with its base model"
DESCRIPTION = """\
Talk to a tuned model. From a pipe each line is a message; answers go to standard output, everything else to standard error.

  lite-dil chat --adapter runs/lsif-20260101-120000 --compare
"""
COMMANDS = """\
/help               this list
/reset              forget the conversation
/undo               remove the last message and its answer
/system TEXT        set the system message; without TEXT, remove it
/strength X         0 is the model without its adapter, 1 the adapter as trained, 1.5 the maximum
/temperature X      0 always takes the most likely token
/compare on|off     answer with and without the adapter
/save FILE          add the answers to a JSON Lines file, which --loss sft can train on
/quit               leave, as does Ctrl-D. Ctrl-C stops an answer. Alt-Enter starts a new line
//TEXT              send /TEXT as a message
"""
_SIDES = ("base", "tuned")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of chat."""
    adapter_flags.add_arguments(parser)
    group = parser.add_argument_group("chat")
    group.add_argument("--compare", action="store_true", help="answer with and without the adapter, side by side")
    group.add_argument("--system", metavar="TEXT", default="", help="system message")
    group.add_argument(
        "--temperature", metavar="X", type=float, default=0.7, help="0 always takes the most likely token (default: 0.7)"
    )
    group.add_argument(
        "--top-p",
        metavar="X",
        type=float,
        default=0.95,
        help="sample from the likeliest tokens up to this probability (default: 0.95)",
    )
    group.add_argument("--seed", metavar="N", type=int, default=0, help="seed of sampling (default: 0)")
    group.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="maximum tokens per answer (default: 512)")


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends; return the exit code."""
    sampling = Sampling(args.temperature, args.top_p)
    for name, least in (("seed", 0), ("max_new_tokens", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    source = adapter_flags.find(args)
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes in another encoding are an error only in their message
        sys.stdin.reconfigure(errors="surrogateescape")
    screen = Screen()
    model = policy.load(source, screen.note)
    talk = Conversation(model.encoder, context_limit(model.model), args.system)
    Chat(model, talk, screen, sampling, args).run()
    return 0


class Screen:
    """Answers on standard output, notes on standard error."""

    def __init__(self) -> None:
        from rich.console import Console

        self.out = Console(highlight=False, soft_wrap=True)
        self.notes = Console(stderr=True, highlight=False, soft_wrap=True)
        self.interactive = sys.stdin.isatty() and self.out.is_terminal

    def note(self, text: str) -> None:
        """Print a line that is not an answer."""
        from rich.text import Text

        self.notes.print(Text(text, style="dim"))

    def write(self, text: str) -> None:
        """Print a piece of an answer, unchanged."""
        sys.stdout.write(text)
        sys.stdout.flush()

    @contextmanager
    def hidden_keys(self) -> Iterator[None]:
        """Do not echo what is typed in the block, so that it stays out of the answer; the next line receives it."""
        if not self.interactive or importlib.util.find_spec("termios") is None:  # not on Windows
            yield
            return
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        hidden = [*before]
        hidden[3] &= ~termios.ECHO
        termios.tcsetattr(terminal, termios.TCSADRAIN, hidden)
        try:
            yield
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)

    def lines(self) -> Iterator[str]:
        """Yield the lines that the user types, or those of the pipe."""
        if not self.interactive:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        warned = False
        while True:
            try:
                line = keyboard.read_text("> ")
            except EOFError:
                return
            except KeyboardInterrupt:  # perhaps meant for an answer that has just ended
                if warned:
                    raise
                warned = True
                self.note("Ctrl-C again leaves, as does Ctrl-D; /save FILE keeps the conversation")
            else:
                warned = False
                yield line


class Chat:
    """The loop: each line is a command, or a message that gets an answer."""

    def __init__(
        self, model: Policy, talk: Conversation, screen: Screen, sampling: Sampling, args: argparse.Namespace
    ) -> None:
        self.model, self.talk, self.screen, self.sampling = model, talk, screen, sampling
        self.compare, self.seed, self.max_new_tokens = args.compare, args.seed, args.max_new_tokens
        self.answers = self.left_out = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: screen.note(COMMANDS.rstrip()),
            "/reset": self._reset,
            "/undo": self._undo,
            "/system": self._system,
            "/strength": self._strength,
            "/temperature": self._temperature,
            "/compare": self._compare,
            "/save": self._save,
        }

    def run(self) -> None:
        """Read lines until the input ends."""
        if not self.talk.is_chat:
            self.screen.note("this model has no chat template: each text is continued as it is, on its own")
        if self.screen.interactive:
            self.screen.note(f"{self.model.source.adapter}, {self._strengths()}; /help lists the commands, Ctrl-D leaves")
        for line in self.screen.lines():
            name, _, rest = line.strip().partition(" ")
            try:
                if name == "/quit":
                    return
                if name.startswith("/") and not name.startswith("//"):
                    if name not in self.commands:
                        raise UserError(f"no command {name}{did_you_mean(name, [*self.commands, '/quit'])}; /help lists them")
                    self.commands[name](rest.strip())
                elif name:
                    # Without a keyboard, Ctrl-C can only mean to end the program.
                    signals = (signal.SIGINT,) if self.screen.interactive else ()
                    with StopSignal("", signals) as stop, self.screen.hidden_keys():
                        self._message(line.lstrip()[1:] if name.startswith("//") else line, stop)
            except UserError as error:
                self.screen.note(str(error))

    def _message(self, text: str, stop: StopSignal) -> None:
        """Answer a message."""
        prompt = self.talk.prompt(text, self.max_new_tokens)
        if prompt.left_out > self.left_out:
            turns = "turn is" if prompt.left_out == 1 else f"{prompt.left_out} turns are"
            self.screen.note(f"the oldest {turns} left out: the model takes {self.talk.limit} tokens")
        self.left_out = prompt.left_out
        # Both sides sample with the same random numbers: only the model differs.
        sides = [self._answering(prompt, side) for side in (_SIDES if self.compare else _SIDES[1:])]
        self.answers += 1
        self._show(sides, stop)
        answer = sides[-1]
        if not answer.text.strip():
            self.screen.note("the model returned nothing; the message is removed")
            return
        self.talk.add(text, answer.text, answer.whole, answer.spelled)
        self._figures(prompt, sides, stop)

    def _answering(self, prompt: FittedPrompt, side: str) -> Stream:
        from lite_dil.generation.stream import Stream

        seed = int(digest(self.seed, self.answers)[:16], 16)
        backend, encoder = self.model.backend, self.model.encoder
        return Stream(backend, encoder, prompt, seed, self.sampling, side == "base", self.talk.is_chat)

    def _show(self, sides: list[Stream], stop: StopSignal) -> None:
        """Show the answers as they come: side by side if there is room, else one after the other."""
        from lite_dil.cli.columns import SideBySide

        if len(sides) > 1 and self.screen.interactive and SideBySide.fit(self.screen.out):
            with SideBySide(self.screen.out, _SIDES) as columns:
                while (going := [i for i, side in enumerate(sides) if not side.done]) and not stop.asked:
                    for i in going:
                        columns.add(i, printable(sides[i].step()))
            return
        for title, side in zip(_SIDES, sides, strict=False):
            if len(sides) > 1:
                self.screen.write(f"{title}: ")
            while not side.done and not stop.asked:
                self.screen.write(printable(side.step()))
            self.screen.write("\n")

    def _figures(self, prompt: FittedPrompt, sides: list[Stream], stop: StopSignal) -> None:
        """Show how long and how fast the answers were, and what the adapter changed."""
        from lite_dil.generation.scoring import log_ratio

        parts = [side.figures() for side in sides]
        if len(sides) > 1:
            parts = [f"{name} {figures}" for name, figures in zip(_SIDES, parts, strict=True)]
            if not stop.asked:
                f = log_ratio(self.model.backend, prompt.ids, sides[-1].ids)
                parts.append(f"log-ratio of the tuned answer {f:+.3f} nats per token")
        if not sides[-1].whole:
            parts.append("stopped" if stop.asked else f"cut after {len(sides[-1].ids)} tokens")
        self.screen.note("; ".join(parts))

    def _strengths(self) -> str:
        return f"strength {self.model.backend.strength:g}"

    def _reset(self, _: str) -> None:
        self.talk.reset()
        self.left_out = 0
        self.screen.note("the conversation is forgotten")

    def _undo(self, _: str) -> None:
        turn = self.talk.undo()
        self.left_out = 0
        self.screen.note(f"removed: {turn.user}" if turn else "nothing to undo")

    def _system(self, text: str) -> None:
        self.talk.set_system(text)
        self.left_out = 0
        self.screen.note(f"system message: {text}" if text else "no system message")

    def _strength(self, text: str) -> None:
        self.model.backend.set_strength(_number("/strength", text))
        self.screen.note(self._strengths())

    def _temperature(self, text: str) -> None:
        self.sampling = replace(self.sampling, temperature=_number("/temperature", text))
        self.screen.note(f"temperature {self.sampling.temperature:g}")

    def _compare(self, text: str) -> None:
        if text not in ("on", "off"):
            raise UserError(f"/compare {text}: expected on or off")
        self.compare = text == "on"
        self.screen.note(f"compare {text}")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save: expected the name of a file")
        rows = self.talk.save(Path(text).expanduser())
        cut = sum(not turn.whole for turn in self.talk.turns)
        note = f"{rows} {'answer' if rows == 1 else 'answers'} added to {text}"
        self.screen.note(note + (f"; {cut} unfinished ones left out" if cut else ""))


def _number(command: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{command} {text}: expected a number") from None
