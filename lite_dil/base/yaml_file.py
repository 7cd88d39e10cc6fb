"""Read YAML: the one reader of configs, runs and model cards, which strangers may have written.

Imported where it is used: PyYAML takes a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST_YAML, _DEEPEST = 2**17, 20  # bytes of a file, levels in each other; ours have some kilobytes and one level


class _Loader(yaml.SafeLoader):
    """Plain values only, each written once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):  # a few lines of them stand for gigabytes
            raise yaml.MarkedYAMLError(problem=f"write the value of *{event.anchor} out", problem_mark=mark)
        if self.level == _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

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
    """Return the content of a YAML text: plain values, with no alias, no key twice and no tag that makes an object.

    Raises yaml.YAMLError, whose text says where and what.
    """
    if len(text) > LARGEST_YAML:
        raise yaml.YAMLError(f"larger than {LARGEST_YAML >> 10} KB")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml_file(path: Path) -> Any:
    """Return the content of a YAML file. Raises OSError, UnicodeDecodeError or yaml.YAMLError."""
    with path.open("rb") as file:
        return parse_yaml(file.read(LARGEST_YAML + 1).decode("utf-8"))
