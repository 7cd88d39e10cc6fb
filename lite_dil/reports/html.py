"""Pages from this folder's Jinja templates, with every text escaped; matplotlib's SVG is the only markup passed in."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

# Control characters except tab and line feed, lone surrogates and noncharacters, which a page must not contain.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(template: str, **values: Any) -> str:
    """Return a template's page for `values`. Raises jinja2.UndefinedError for a missing name."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lite_dil.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _clean(value: Any) -> Any:
    """Return a printed value before escaping: markup unchanged, everything else as text valid in a page."""
    return value if hasattr(value, "__html__") else _FORBIDDEN.sub("\ufffd", str(value).replace("\r\n", "\n"))
