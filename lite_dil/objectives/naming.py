"""Hash a function by everything that decides what it computes: its source, its defaults, and the outside values it uses."""

from __future__ import annotations

import dis
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from lite_dil.base.hashing import sha256

_MOST = 10_000  # the largest array that is hashed, in numbers


class CannotName(ValueError):
    """A function uses something that cannot be hashed by its content."""


def identify(functions: Sequence[Callable[..., Any]], version: str | None) -> str:
    """Return a hash of functions, 12 hexadecimal digits: of `version` if there is one, else of their content.

    Raises CannotName if part of the content is out of reach.
    """
    if version is not None:
        told = [f"version {version}"]
    else:
        told = [part for function in functions for part in _function(function, set())]
    return sha256(repr(part).encode() for part in told)[:12]


def source_of(function: Callable[..., Any]) -> str:
    """Return a function's source. Raises CannotName if there is none, as for one typed into an old interpreter."""
    inner = function.func if isinstance(function, functools.partial) else function
    try:
        return textwrap.dedent(inspect.getsource(inner))
    except (OSError, TypeError):
        raise CannotName(f"the source of {_called(inner)} is not available") from None


def place_of(function: Callable[..., Any]) -> str:
    """Return a function's name, file and line, as far as they are known."""
    inner = function.func if isinstance(function, functools.partial) else function
    code = getattr(inner, "__code__", None)
    where = f" ({code.co_filename} line {code.co_firstlineno})" if isinstance(code, CodeType) else ""
    return f"{_called(inner)}{where}"


def _called(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _function(function: Any, seen: set[int]) -> Iterator[str]:
    """Yield everything that decides what a function computes, in a fixed order."""
    if id(function) in seen:  # recursion
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        yield from _value("its arguments", [function.args, function.keywords], seen)
        yield from _function(function.func, seen)
        return
    if isinstance(function, BuiltinFunctionType):
        yield f"{function.__module__}.{function.__qualname__}"
        return
    if not isinstance(function, FunctionType):
        raise CannotName(f"{_called(function)} is not a plain function, so its content is unknown")
    text = source_of(function)
    yield text
    if text.count("lambda") > 1:  # the source is whole lines, which do not say which lambda this is
        yield from _code(function.__code__)
    yield from _value("a default", [function.__defaults__, function.__kwdefaults__], seen)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            raise CannotName(f"{name!r}, which it closes over, has no value yet") from None
        yield name
        yield from _value(f"{name!r}, which it closes over,", value, seen)
    for name in sorted(_globals(function.__code__)):
        if name in function.__globals__:
            yield name
            yield from _outer(name, function, seen)


def _outer(name: str, function: FunctionType, seen: set[int]) -> Iterator[str]:
    """Yield the content of a global; functions of other modules stand for themselves by name."""
    value = function.__globals__[name]
    if callable(value) and getattr(value, "__module__", None) != function.__module__:
        yield f"{getattr(value, '__module__', '')}.{_called(value)}"
    else:
        yield from _value(f"{name!r}", value, seen)


def _globals(code: CodeType) -> set[str]:
    found = {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _code(code: CodeType) -> Iterator[str]:
    yield repr((code.co_code, code.co_names, code.co_varnames))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield repr(constant)


def _value(what: str, value: Any, seen: set[int]) -> Iterator[str]:
    """Yield the content of a value."""
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        yield repr(value)
    elif type(value) in (list, tuple):
        yield f"{type(value).__name__} of {len(value)}"
        for each in value:
            yield from _value(what, each, seen)
    elif type(value) in (set, frozenset):
        yield from sorted("".join(_value(what, each, seen)) for each in value)
    elif type(value) is dict:
        for key, each in value.items():
            yield from _value(what, key, seen)
            yield from _value(what, each, seen)
    elif isinstance(value, re.Pattern):
        yield f"re.Pattern {value.pattern!r} {value.flags}"
    elif isinstance(value, ModuleType):
        yield f"module {value.__name__}"
    elif isinstance(value, (FunctionType, BuiltinFunctionType, functools.partial)):
        yield from _function(value, seen)
    elif hasattr(value, "tolist") and hasattr(value, "dtype") and getattr(value, "nbytes", _MOST) < 8 * _MOST:
        yield f"{type(value).__name__} {value.dtype} {value.tolist()}"  # of numpy, torch or MLX
    else:
        raise CannotName(f"{what} is a {type(value).__name__}, which cannot be hashed by its content")
