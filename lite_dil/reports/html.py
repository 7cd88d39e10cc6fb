"""Pages from this folder's Jinja templates, with every text escaped; matplotlib's SVG is the only markup passed in."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from lite_dil.base.html import clean
from lite_dil.base.redaction import redacted

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """Return a template's page for `values`, without secrets. Raises jinja2.UndefinedError for a missing name."""
    return redacted(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lite_dil.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printed(value: Any) -> Any:
    """Return a printed value before escaping: markup unchanged, everything else as text that a page may hold."""
    return value if hasattr(value, "__html__") else clean(value)
