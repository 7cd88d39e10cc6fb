"""Growing texts side by side on a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

NARROW = 72  # terminal columns below which two texts are shown one after the other
GAP = 3
SECONDS = 0.08  # between two redraws: faster would not be visible


class SideBySide:
    """A context manager with one column per title. While texts grow, only their last screenful is shown."""

    def __init__(self, console: Console, titles: tuple[str, ...]) -> None:
        self.console, self.titles = console, titles
        self.texts = ["" for _ in titles]
        self._live = Live(console=console, auto_refresh=False)
        self._drawn = 0.0

    @staticmethod
    def fit(console: Console) -> bool:
        """Return whether `console` is a terminal that is wide enough."""
        return console.is_terminal and not console.is_dumb_terminal and console.width >= NARROW

    def __enter__(self) -> SideBySide:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(self._table(None))
        self._live.stop()

    def add(self, column: int, text: str) -> None:
        """Append text to a column."""
        self.texts[column] += text
        if (now := time.monotonic()) - self._drawn >= SECONDS:
            self._drawn = now
            self._live.update(self._table(self.console.height - 3), refresh=True)

    def _table(self, lines: int | None) -> Table:
        """Lay out the last `lines` lines of each text, or all."""
        width = (self.console.width - GAP * (len(self.titles) - 1)) // len(self.titles)
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
        for title in self.titles:
            table.add_column(title, width=width, overflow="fold")
        whole = (Text(text).wrap(self.console, width, overflow="fold", tab_size=4) for text in self.texts)
        table.add_row(*(Text("\n").join(text[-lines:] if lines else text) for text in whole))
        return table
