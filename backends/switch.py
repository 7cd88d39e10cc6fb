"""Switching between the adapters of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def switched(set_reference: Callable[[bool], None]) -> Iterator[None]:
    """Run a block with the reference switched on, and switch back to the policy whatever happens in it."""
    set_reference(True)
    try:
        yield
    finally:
        set_reference(False)
