"""Read YAML: the one reader of configs, runs and model cards, which strangers may have written.

Imported where it is used: PyYAML takes a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST_YAML, _DEEPEST = 2**17, 20  # bytes of a file, levels in each other; ours have some kilobytes and one level


# libyaml's parser, which wheels of PyYAML have, is ten times faster than the one in Python. Both read all YAML alike; of texts
# that are none, such as a tab inside a plain value, libyaml takes a few that the other refuses.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """Plain values only, each written once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        known: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in known:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
                known.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            OverflowError,
        ):  # a date of the 99th, a number of 5,000 digits
            raise yaml.MarkedYAMLError(problem="not a value that can be read", problem_mark=node.start_mark) from None


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text, which is valid Unicode: plain values, no alias, no key twice, no tag for an object.

    Raises yaml.YAMLError, whose text says where and what.
    """
    if len(text) > LARGEST_YAML:
        raise yaml.YAMLError(f"larger than {LARGEST_YAML >> 10} KB")
    _check_events(text)
    return yaml.load(text, _Loader)  # noqa: S506 - it is a SafeLoader


def _check_events(text: str) -> None:
    """Refuse aliases and deep nesting before anything is made of them: a few lines of either stand for gigabytes."""
    level = 0
    for event in yaml.parse(text, _Base):
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem=f"write the value of *{event.anchor} out", problem_mark=mark)
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
            if level > _DEEPEST:
                raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1


def read_yaml_file(path: Path) -> Any:
    """Return the content of a YAML file. Raises OSError, UnicodeDecodeError or yaml.YAMLError."""
    with path.open("rb") as file:
        return parse_yaml(file.read(LARGEST_YAML + 1).decode("utf-8"))
