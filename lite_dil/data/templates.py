"""Render chat templates as transformers does, within bounds of time and memory.

A chat template is a program that comes with a model. jinja2's sandbox keeps it from all that is outside, but not from
`{% for %}` within `{% for %}`, `'a' * 10**10` or `x ~ x` forty times. Here what a template makes is counted, and one that
makes too much, or takes too long, is stopped.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lite_dil.data.template_costs import (
    GROWING,
    METER,
    MOST_BITS,
    TemplateCosts,
    bounded,
    check,
    check_format,
    check_width,
    looped,
    made,
    printed,
    sliced,
)

LENGTH = 100_000  # characters of a template; those of the hub have up to 30,000
# Of jinja2's filters, those whose cost and result the checks below bound. The others are for web pages.
_FILTERS = {
    *("abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max"),
    *("min", "random", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr"),
    *("slice", "sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "urlencode"),
    *("wordcount",),
}
# Methods of values that no template for text needs: they make bytes, or texts of any length from a short one.
_METHODS = {"encode", "expandtabs", "translate", "maketrans", "striptags", "to_bytes", "from_bytes", "fromhex"}
# Names of our own filters, which no template can spell.
_MADE, _LOOPED, _CUT = " made", " looped", " cut"


# What a template raises that does not take the messages, or is not one.
REFUSALS = (
    *(TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, SyntaxError),
    NameError,  # of jinja2, which writes the sum of two huge numbers as the name inf
)


class _Counted(NodeTransformer):
    """Has the template's loops, and what it puts together, counted."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        text = 64 + sum(4 * len(data.data) + 64 for data in node.find_all(nodes.TemplateData))
        node.iter = nodes.Filter(node.iter, _LOOPED, [nodes.Const(text)], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_through(_MADE, part) for part in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _through(_CUT, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _through(_MADE, node) if node.ctx == "load" else node

    def _through(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _through(_MADE, node)

    visit_Add = visit_List = visit_Dict = _through  # noqa: N815


def _through(name: str, node: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """The tag `{% generation %}` around what the model writes; it prints its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the tag's content as a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """jinja2's, without attributes that begin with an underscore; it does not print what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that an attribute may be called self
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace has no attribute {name!r}: its name begins with an underscore")


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, in which what grows is counted."""

    intercepted_binops = frozenset(["*", "**", "%", "//", "/"])

    def __init__(self) -> None:
        self._safe: dict[tuple[type, str], bool] = {}
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=printed, cache_size=0
        )
        self.filters = {name: bounded(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {"tojson": bounded("tojson", _to_json), _MADE: made, _LOOPED: looped, _CUT: sliced}
        ours = {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")} | ours

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse an operation whose result would be huge, before it is computed."""
        if isinstance(left, int) and isinstance(right, int):
            bits, by = left.bit_length(), right.bit_length()
            if (bits * max(right, 1) if operator == "**" else bits + by) > MOST_BITS:
                raise TemplateCosts(f"makes a number of more than {MOST_BITS:,} bits")
        elif operator == "*":
            for some, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(some, (str, list, tuple)):
                    METER.add(METER.size(some) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            check_format(left, percent=True)
        return made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may use an attribute; that depends on the types alone."""
        kind = type(obj), attr
        if (known := self._safe.get(kind)) is None:
            unbounded = attr in _METHODS and isinstance(obj, (str, int, float))
            known = self._safe[kind] = not unbounded and super().is_safe_attribute(obj, attr, value)
        return known

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls."""
        METER.add(64)
        method = getattr(obj, "__wrapped__", obj)  # jinja2's own str.format
        if isinstance(of := getattr(method, "__self__", None), str) and (name := method.__name__) in GROWING:
            args = check(name, of, args, kwargs)
        return made(super().call(context, obj, *args, **kwargs))


class _Dict:
    """The function `dict`, without the attributes of Python's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Return a dict with these keys."""
        return dict.fromkeys(*args, **kwargs)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Return a value as JSON; jinja2's own filter escapes what HTML does not take."""
    if indent or separators:
        widest = max(indent if isinstance(indent, int) else len(indent or ""), *map(len, separators or ("",)))
        check_width(widest)
        METER.add(METER.size(x) * (widest + 1))
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(64)
def _compiled(text: str) -> Template:
    if len(text) > LENGTH:
        raise TemplateCosts(f"has {len(text):,} characters; expected at most {LENGTH:,}")
    environment = _Environment()
    tree = _Counted().visit(environment.parse(text))
    return environment.from_string(tree.set_environment(environment))


def _plain(value: Any) -> Any:
    """Return a value in JSON's own types, whose methods the sandbox knows, as transformers does."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (int, float)):
        return (int if isinstance(value, int) else float)(value)
    return f"<{type(value).__name__}>"


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without what is None, its reasoning under the names that transformers gives it."""
    message = {name: value for name, value in _plain(given).items() if value is not None}
    reasoning = next((message[name] for name in ("reasoning_content", "thinking", "reasoning") if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def render(text: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Return messages as a chat template prints them, exactly as transformers' `apply_chat_template` does.

    Args:
        text: the template.
        variables: what it reads beside the messages: tools, add_generation_prompt, special tokens and arguments.

    Raises:
        TemplateCosts: it takes or makes too much.
        REFUSALS: it refuses the messages, or is not a template.
    """
    METER.start((messages, variables))
    try:
        template = _compiled(text)
        return template.render(messages=list(map(_message, messages)), documents=None, **_plain(variables))
    except TemplateCosts as error:
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
        where = f", line {lines[-1]}," if lines else ""
        raise TemplateCosts(f"{where} {error}") from None
    except RecursionError:
        raise TemplateCosts(" calls itself without end, or is nested too deeply") from None
    except MemoryError:
        raise TemplateCosts(" needs more memory than there is, or is nested too deeply") from None
    finally:
        METER.given = None
