"""Logging of messages for people that no display shows."""

from __future__ import annotations

import logging

from lite_dil.base.display import Silent
from lite_dil.base.redaction import redacted

_LOGGER = logging.getLogger("lite_dil")


def tell(text: str) -> None:
    """Log a line at INFO, without secrets."""
    _LOGGER.info(redacted(text))


class Logged(Silent):
    """A display that shows nothing and logs its messages."""

    def say(self, text: str) -> None:
        """Log a line."""
        tell(text)

    def stopping(self, text: str) -> None:
        """Log that a stop was asked for."""
        tell(text)
