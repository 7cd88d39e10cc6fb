"""The data report for people: in colour on a terminal, with plain-text marks elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lite_dil.base.text import count, visible
from lite_dil.data.formats import FORMATS, kind_of_prompts
from lite_dil.planning.how_long import in_words

# Tokens shown from the start and from the end of a text that is too long to show whole.
_PROMPT, _ANSWER = (40, 60), (160, 80)
_STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}
_LAID_OUT = {
    "chat messages": ", laid out by the model's chat template",
    "plain text": ", no chat template",
    "token ids": ", trained as they are",
}
_FORMS = {"pairs": "pairs", "unpaired": "single answers with labels", "demonstrations": "demonstrations"}


class Show:
    """Prints a report of `lite_dil.data.inspect.findings` on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.coloured = console.color_system is not None and not console.no_color

    def all(self, found: dict[str, Any], command: str) -> None:
        """Print everything; `command` is the shell command that trains on this data."""
        for source in found["sources"]:
            self._source(source)
        if held_out := found["held_out"]:
            self._line()
            for source in held_out["sources"]:
                self._source(source, ", held out")
            if not held_out["sources"]:
                number = held_out["in_training"]["of"]
                self._line(f"{number} of these rows would be held out, whole prompts, and not trained on (--eval-fraction)")
            elif not held_out["in_training"]["prompts"]:
                self._line("no held-out prompt is in the training data")
        elif found["form"] and not found["stops"]:
            self._line()
            self._line("nothing would be held out; --eval-fraction 0.1 holds out a tenth, --eval-data FILE other rows")
        if found["form"]:
            self._answers(found)
            self._lengths(found)
            self._rest(found)
            for number, sample in enumerate(found["samples"], 1):
                title = f"sample {number} of {len(found['samples'])}, {sample['place']}"
                self._sample(title, sample["parts"], _names(found))
        self._line()
        for warning in found["warnings"]:
            self._line(Text("warning: ", "bold yellow"), warning)
        for stop in found["stops"]:
            self._line(Text("train stops: ", "bold red"), stop["why"])
        if found["stops"]:
            self._line("what to do: ", Text("; then ".join(stop["mend"] for stop in found["stops"]), "bold"))
        else:
            self._line(in_words(found["time"]))
            self._line("to train on this data: ", Text(visible(command), "bold"))

    def _line(self, *parts: str | Text, indent: int = 0) -> None:
        """Print one paragraph; plain strings may contain data, so they are printed without markup."""
        text = Text.assemble(*(part if isinstance(part, Text) else visible(part) for part in parts))
        if self.coloured:
            self.console.print(Padding(text, (0, 0, 0, indent), expand=False))
        else:
            self.console.print(Text(" " * indent).append_text(text), soft_wrap=True)

    def _source(self, source: dict[str, Any], use: str = "") -> None:
        out = sum(reason["rows"] for reason in source["left_out"])
        self._line(Text(visible(source["name"]), "bold"), use)
        title = FORMATS[source["format"]].title
        self._line(f"read as {title} (--data-format {source['format']})", indent=2)
        often = "" if source["weight"] == 1 else f", {source['weight']:g} times an epoch"
        self._line(f"{count(source['kept'], 'row')} of {source['kept'] + out:,} kept{often}", indent=2)
        for reason in source["left_out"]:
            self._line(f"{count(reason['rows'], 'row')} not kept: ", Text(visible(reason["reason"]), "bold red"), indent=2)
            for story in reason["stories"]:
                self._line(f"{story['first']}: {story['message']}", indent=6)
        for note in source["notes"]:
            self._line(f"{count(note['rows'], 'row')}: {note['note']}", indent=2)
        if source["unread"]:
            self._line(f"columns not read: {', '.join(map(str, source['unread']))}", indent=2)

    def _answers(self, found: dict[str, Any]) -> None:
        kind = kind_of_prompts(found["chat"], [source["format"] for source in found["sources"]])
        kind += _LAID_OUT[kind]
        numbers = found["answers"]
        sides = f": {numbers['chosen']:,} good and {numbers['rejected']:,} bad" if found["form"] == "unpaired" else ""
        self._line()
        self._line(f"{_FORMS[found['form']]}{sides}; {kind}")
        self._line(f"losses for this data: {', '.join(found['losses']) or 'none'} (--loss is {found['loss']})")
        if found["form"] == "demonstrations":
            self._line("the other losses also need rejected answers: --sample-rejected 1 samples them from the model")

    def _lengths(self, found: dict[str, Any]) -> None:
        names = _names(found)
        columns = list(found["tokens"]["prompt"])
        self._line()
        self._line(Text(f"{'tokens, uncut':<18}" + "".join(f"{column:>9}" for column in columns), "bold"))
        for name, values in found["tokens"].items():
            figures = "".join(f"{values[c]:>9,.1f}" if c == "mean" else f"{values[c]:>9,}" for c in columns)
            self._line(f"{names[name]:<18}{figures}")
        total, cut, rows = found["all_rows"], found["max_length"], sum(source["kept"] for source in found["sources"])
        once = "" if all(source["weight"] == 1 for source in found["sources"]) else ", each row once"
        self._line(
            f"all rows as cut{once}, each prompt once: {total['computed']:,} tokens, of which {total['trained']:,} are answers"
        )
        if not cut["examples_cut"]:
            self._line(f"--max-length {cut['given']} cuts nothing; the longest example has {cut['cuts_none']} tokens")
            return
        self._line(
            f"--max-length {cut['given']} cuts {_share(cut['prompts_cut'], rows)} of the prompts, at their start, and "
            f"{_share(cut['answers_cut'], sum(found['answers'].values()))} of the answers, at their end; "
            f"{cut['cuts_none']} would cut none, {cut['cuts_one_percent']} at most 1% of the examples"
        )

    def _rest(self, found: dict[str, Any]) -> None:
        if bias := found.get("length_bias"):
            self._line(
                f"chosen is longer than rejected in {bias['chosen_longer']:.1%} of the pairs, shorter in "
                f"{bias['rejected_longer']:.1%}; by {bias['mean_difference']:+.1f} tokens on average"
            )
        self._line(
            f"exact duplicates: {found['duplicates']['rows']:,}; contradictions (same prompt and answers, opposite "
            f"preference): {found['contradictions']['rows']:,}"
        )
        for mark in found["marks"]:
            if mark["as_token"]:
                where = f"{mark['mark']!r} in {count(mark['rows'], 'row')}, first {mark['first']}"
                self._line(f"the model's own control tokens in plain text, read as control tokens: {where}")

    def _sample(self, title: str, parts: list[dict[str, Any]], names: dict[str, str]) -> None:
        self._line()
        self._line(Text(visible(title), "bold"))
        for part in parts:
            side, tokens = part["side"], len(part["ids"])
            cut = f"; {count(part['cut'], 'token')} cut off" if part["cut"] else ""
            trained = "trained" if part["trained"] else "not trained"
            self._line(Text(f"{names[side]}, {count(tokens, 'token')}, {trained}{cut}", _STYLES[side]), indent=2)
            shown = _PROMPT if side == "prompt" else _ANSWER
            for piece_run in _ends(part["pieces"], tokens, shown):
                if isinstance(piece_run, int):
                    self._line(f"[... {count(piece_run, 'token')} not shown ...]", indent=4)
                else:
                    self._pieces(piece_run, _STYLES[side])

    def _pieces(self, run: list[Any], style: str) -> None:
        """Print tokens: every other one underlined, control tokens in reverse; without colour, with bars between them."""
        text = Text(overflow="fold")
        for number, (piece, _, special) in enumerate(run):
            more = " underline" if number % 2 and not special else ""
            shown = visible(piece, lines=True)
            if number == len(run) - 1:
                shown = shown.removesuffix("\n")
            elif not self.coloured:
                shown = f"{shown[:-1]}│\n" if shown.endswith("\n") else f"{shown}│"
            text.append(shown, f"{style}{' reverse' if special else more}")
        if self.coloured:
            self.console.print(Padding(text, (0, 0, 0, 4), expand=False))
        else:
            for line in text.plain.split("\n"):
                self.console.print(Text(f"    {line}"), soft_wrap=True)


def _names(found: dict[str, Any]) -> dict[str, str]:
    """Return the displayed names of an example's parts, by their names in the report."""
    if found["form"] == "pairs":
        return {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "whole": "pair, prompt once"}
    return {"prompt": "prompt", "chosen": "good answer", "rejected": "bad answer", "whole": "prompt and answer"}


def _ends(run: list[Any], tokens: int, shown: tuple[int, int]) -> Iterable[Any]:
    """Yield pieces from the start, the number of tokens left out, and pieces up to the end; or all of them."""
    start, end = _reach(run, shown[0]), len(run) - _reach(run[::-1], shown[1])
    if tokens <= sum(shown) or start >= end:
        yield run
        return
    yield run[:start]
    yield sum(held for _, held, _ in run[start:end])
    yield run[end:]


def _reach(run: list[Any], tokens: int) -> int:
    """Return how many pieces hold at least `tokens` tokens."""
    total = np.cumsum([held for _, held, _ in run])
    return min(int(np.searchsorted(total, tokens)) + 1, len(run))


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.1%})"
