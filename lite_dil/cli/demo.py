"""The demo's output: answers to held-out questions before and after, side by side, and the held-out figures."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from lite_dil.cli.progress import Terminal
from lite_dil.recipes.run import Run
from lite_dil.reports import outcome
from lite_dil.reports.record import SAMPLES, read_record
from lite_dil.reports.samples import read_samples

SHOWN, MEASURED = 6, 20


def show(run: Run, display: Terminal) -> None:
    """Print the answers from the run's report, adapter off and on, and the held-out figures."""
    if samples := read_samples(run.folder / SAMPLES):
        table = Table(show_lines=True, title="held-out questions")
        for heading in ("question", "before", "after"):
            table.add_column(heading, overflow="fold", ratio=1 if heading == "question" else 2)
        for sample in samples[:SHOWN]:
            question = sample.prompt if isinstance(sample.prompt, str) else sample.prompt[-1]["content"]
            table.add_row(*(Text(_short(text or "")) for text in (question, sample.before, sample.after)))
        display.console.print(table)
        before, after = (sum(getattr(s, n) for s in samples) / len(samples) for n in ("before_tokens", "after_tokens"))
        display.say(f"answer length: {before:.0f} tokens before, {after:.0f} after (mean of {len(samples)})")
    display.say(outcome.outcome(read_record(run.folder)))


def _short(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else f"{text[:limit].rstrip()} ..."
