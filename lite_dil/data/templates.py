"""Render chat templates as transformers does, within bounds of time and memory.

A chat template is a program that comes with a model. jinja2's sandbox keeps it from all that is outside, but not from
`{% for %}` within `{% for %}`, `'a' * 10**10` or `x ~ x` forty times. Here what a template makes is counted, and one that
makes too much, or takes too long, is stopped.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from functools import lru_cache, wraps
from string import Formatter
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lite_dil.data.template_meter import METER, MOST_BITS, TemplateCosts

LENGTH = 100_000  # characters of a template; those of the hub have up to 30,000
_WIDTH = 1000  # of white space around a text, and of padding
_SHORT = 1000  # characters of a text

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
# Methods and filters that `_check` looks at.
_GROWING = {
    *("ljust", "rjust", "center", "zfill", "indent", "batch", "slice", "round", "replace", "strip", "lstrip"),
    *(
        "rstrip",
        "trim",
        "rsplit",
        "rfind",
        "rindex",
        "rpartition",
        "%",
        "format",
        "format_map",
        "join",
    ),
}
# Names of our own filters, which no template can spell.
_MADE, _LOOPED, _CUT = " made", " looped", " cut"


# What a template raises that does not take the messages, or is not one.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, SyntaxError)


def _made(value: Any) -> Any:
    """Count a value that the template made, and return it. Short texts are counted by what holds or prints them."""
    if type(value) is str:
        if len(value) > _SHORT:
            METER.add(len(value) if value.isascii() else 4 * len(value))
    elif value is not None and type(value) is not bool:
        METER.add(METER.size(value))
    return value


def _cut(value: Any) -> Any:
    """Count a slice, of which nothing is new but the list."""
    METER.add(64 + 8 * len(value) if isinstance(value, Sized) else 64)
    return value


def _looped(values: Iterable[Any], printed: int) -> Iterator[Any]:
    """Yield what a loop goes through, counting `printed`, the bytes of text that the template itself has within the loop."""
    for value in values:
        METER.add(printed)
        yield value


def _printed(value: Any) -> Any:
    """Count a value before it is printed. One that is not a text was counted when it was made, with all that it holds."""
    METER.add(64 + (len(value) if value.isascii() else 4 * len(value)) if isinstance(value, str) else 64)
    return value


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
        block = nodes.CallBlock(self.call_method("_content"), [], [], body)
        block.set_lineno(line)
        return block

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
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_printed, cache_size=0
        )
        self.filters = {name: _bounded(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {"tojson": _bounded("tojson", _to_json), _MADE: _made, _LOOPED: _looped, _CUT: _cut}
        made = {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")} | made

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
            _check_format(left, percent=True)
        return _made(super().call_binop(context, operator, left, right))

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
        if isinstance(of := getattr(method, "__self__", None), str) and (name := method.__name__) in _GROWING:
            args = _check(name, of, args, kwargs)
        return _made(super().call(context, obj, *args, **kwargs))


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
        _check_width(widest)
        METER.add(METER.size(x) * (widest + 1))
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts its result, and is refused where that would be huge."""
    at = 0 if getattr(function, "jinja_pass_arg", None) is None else 1  # behind the environment, or what it evaluates
    growing = "%" if name == "format" else name if name in _GROWING else ""

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        METER.add(64)
        if growing:
            _check(growing, args[at], args[at + 1 :], kwargs)
        if name in ("join", "sum"):
            args = (*args[:at], _pieces(name, args[at], args[at + 1 :], kwargs), *args[at + 1 :])
        return _made(function(*args, **kwargs))

    return bounded


def _pieces(name: str, values: Iterable[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what is joined, counted: the same long text may come many times."""
    for value in values:
        if name == "sum" and isinstance(value, (list, tuple)):
            raise TemplateError("the filter sum takes numbers")
        METER.add(METER.size((value, *args, *kwargs.values())))
        yield value


def _check(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Refuse a filter, or a text's method, whose result or time would be huge; return the arguments."""
    given = [*args, *kwargs.values()]
    text = value if isinstance(value, str) else ""
    longest = max((len(each) for each in given if isinstance(each, str)), default=0)
    if name in ("ljust", "rjust", "center", "zfill", "indent", "batch", "slice", "round"):
        _check_width(max((abs(each) for each in given if isinstance(each, int)), default=0))
    if name == "indent":
        METER.add((text.count("\n") + 2) * longest)
    elif name == "replace":
        METER.add(4 * longest * max((str(value).count(str(each)) for each in given[:2]), default=0))
    elif name in ("strip", "lstrip", "rstrip", "trim", "rsplit", "rfind", "rindex", "rpartition"):
        METER.add(len(text) * longest >> 8)  # in the worst case each character is compared with each
    elif name in ("%", "format", "format_map"):
        _check_format(text, percent=name == "%")
    elif name == "join" and args and isinstance(value, str):  # the method; the filter's values are counted one by one
        if not isinstance(args[0], str):
            return (_pieces(name, args[0], [text], {}), *args[1:])
        METER.add(4 * len(args[0]) * len(text))
    return tuple(args)


def _check_width(width: int) -> None:
    if width > _WIDTH:
        raise TemplateCosts(f"asks for a width or number of {width:,}; expected at most {_WIDTH:,}")


def _check_format(text: str, percent: bool) -> None:
    """Refuse a format whose width is huge, or comes from another value."""
    if percent:
        wide = re.search(r"%[^a-zA-Z%]*(?:\d{4}|\*)", text) is not None
    else:
        wide = any(spec and re.search(r"\d{4}|\{", spec) for _, _, spec, _ in Formatter().parse(text))
    if wide:
        raise TemplateCosts(f"asks for a width of more than {_WIDTH:,} in the format {text[:60]!r}")


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
        TemplateCosts: it takes more than `TEMPLATE_SECONDS`, or makes too much for the size of the messages.
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
