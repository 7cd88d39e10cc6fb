"""Pages made by Jinja from the templates beside this file, which escapes every text; SVG by matplotlib is the only markup."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

# Control characters but tab and line feed, halves of surrogate pairs, and what is no character: no page may hold them.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(template: str, **values: Any) -> str:
    """Return the page that a template makes of `values`. Raises jinja2.UndefinedError where it names what is not there."""
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
    """Return what a template prints, before it is escaped: markup as it is, all else as text that a page may hold."""
    return value if hasattr(value, "__html__") else _FORBIDDEN.sub("\ufffd", str(value).replace("\r\n", "\n"))
