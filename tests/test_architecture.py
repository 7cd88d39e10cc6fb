"""The rooms and who may import whom (docs/architecture.md), read from the syntax trees: nothing is imported here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
# A room imports from those on lower floors only, not from its neighbours.
FLOORS = (
    ("base",),
    ("objectives", "models"),
    ("data",),
    ("batching", "runs"),
    ("backends",),
    ("generation",),
    ("training", "rewards"),
    ("online",),
    ("config",),
    ("planning", "reports"),
    ("evaluation", "export", "labelling", "doctor"),
    ("recipes",),
    ("api",),
    ("cli",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# A library, and the places that may import it: a room, or a folder or file of one.
ONLY = {
    "argparse": ("cli", "config"),
    "rich": ("cli",),
    "prompt_toolkit": ("cli",),
    "torch": ("backends/torch",),
    "mlx": ("backends/mlx",),
    "mlx_lm": ("backends/mlx",),
}
CONFIG = (
    "config",
    "planning",
    "reports",
    "evaluation",
    "export",
    "labelling",
    "doctor",
    "recipes",
    "api",
    "cli",
)  # which see all options at once
FILE_LINES, FUNCTION_LINES = 400, 60
# At most ten, each with its reason.
EXCEPTIONS = {
    (
        "lite_dil/models/find.py",
        "torch",
    ): "transformers turns the embedded GGUF file into a folder, and takes torch for it",
}


class Import(NamedTuple):
    """One imported name: `module` as written, `name` of it or nothing, and the line."""

    module: str
    name: str
    line: int


class Source(NamedTuple):
    """A file: its dotted name, its place below its top folder, and its syntax tree."""

    name: str
    place: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """The first folder below lite_dil, nothing for lite_dil's own files."""
        return self.name.split(".")[1] if self.name.count(".") and self.name.split(".")[1] in FLOOR else ""

    def imports(self) -> Iterator[Import]:
        """Yield all imports, those in functions and under TYPE_CHECKING too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, "", node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: a relative import"
                yield from (Import(node.module or "", alias.name, node.lineno) for alias in node.names)


def _sources(top: str) -> Iterator[Source]:
    for path in sorted((ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = ("lite_dil", *parts) if top == "backends" else parts
        name = ".".join(package).removesuffix(".__init__")
        yield Source(name, str(path.relative_to(ROOT)), path, ast.parse(path.read_text(encoding="utf-8")))


PACKAGE = {source.name: source for source in chain(_sources("lite_dil"), _sources("backends"))}
SCRIPTS = {source.name: source for source in _sources("scripts")}


def target(wanted: Import) -> str:
    """Return the module of this project that an import reaches, or nothing."""
    for name in (f"{wanted.module}.{wanted.name}", wanted.module):
        if name in PACKAGE:
            return name
    return ""


def room_of(module: str) -> str:
    return PACKAGE[module].room


def excused(place: str, rule: str) -> bool:
    return (place, rule) in EXCEPTIONS


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_a_room_imports_from_lower_floors_only() -> None:
    problems = []
    for source in PACKAGE.values():
        if not source.room:
            continue
        for wanted in source.imports():
            room = room_of(found) if (found := target(wanted)) else ""
            if room and room != source.room and FLOOR[room] >= FLOOR[source.room] and not excused(source.place, room):
                problems.append(f"{source.place}:{wanted.line}: {source.room} imports {found} of {room}")
    report(problems)


def test_every_file_has_a_room() -> None:
    """Only the door and the program's start lie beside the rooms."""
    assert {s.name for s in PACKAGE.values() if not s.room} <= {"lite_dil", "lite_dil.__main__"}
    assert {source.room for source in PACKAGE.values()} - {""} <= set(FLOOR)


def test_files_import_in_no_circle() -> None:
    graph = {
        name: {found for wanted in source.imports() if (found := target(wanted)) and found != name}
        for name, source in PACKAGE.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "a circle: " + " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_private_names_stay_in_their_file() -> None:
    problems = []
    for source in chain(PACKAGE.values(), SCRIPTS.values()):
        modules = {}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (node.module or "").partition(".")[0] == "lite_dil" or node.module in SCRIPTS:
                        if alias.name.startswith("_") and not alias.name.startswith("__"):
                            problems.append(f"{source.place}:{node.lineno}: {alias.name} of {node.module}")
                        modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                if private and modules.get(node.value.id) in PACKAGE:
                    problems.append(f"{source.place}:{node.lineno}: {node.value.id}.{node.attr}")
    report(problems)


def test_a_public_name_means_one_thing() -> None:
    """A class or constant is defined in one file. The backends mirror each other, and each command has two texts."""
    defined: dict[str, set[str]] = {}
    for source in PACKAGE.values():
        place = re.sub(r"^backends/(torch|mlx)/", "backends/", source.place)
        for node in source.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [name.id for each in targets if each for name in ast.walk(each) if isinstance(name, ast.Name)]
            for name in [node.name] if isinstance(node, ast.ClassDef) else names:
                if name.startswith("_") or (source.room == "cli" and name in ("HELP", "DESCRIPTION")):
                    continue
                defined.setdefault(name, set()).add(place)
    report([f"{name}: {', '.join(sorted(places))}" for name, places in sorted(defined.items()) if len(places) > 1])


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    problems = []
    for source in PACKAGE.values():
        inside = source.place.removeprefix("lite_dil/")
        if any(inside == place or inside.startswith(f"{place}/") for place in ONLY[library]):
            continue
        for wanted in source.imports():
            if wanted.module.partition(".")[0] == library and not excused(source.place, library):
                problems.append(f"{source.place}:{wanted.line}: imports {library}")
    report(problems)


def test_all_options_at_once_are_seen_only_where_it_says() -> None:
    report(
        [
            f"{source.place}:{wanted.line}: TrainConfig"
            for source in PACKAGE.values()
            for wanted in source.imports()
            if wanted.name in ("TrainConfig", "ResolvedConfig")
            and source.room not in CONFIG
            and not excused(source.place, "TrainConfig")
        ]
    )


def test_files_and_functions_fit_a_head() -> None:
    problems = []
    for source in chain(PACKAGE.values(), SCRIPTS.values()):
        lines = len(source.path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES and not excused(source.place, "lines"):
            problems.append(f"{source.place}: {lines} lines")
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES and not excused(source.place, node.name):
                    problems.append(f"{source.place}:{node.lineno}: {node.name} has {length} lines")
    report(problems)


def test_the_page_shows_these_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    floors = re.findall(r"^\d+\. (.+)$", page, re.MULTILINE)
    assert [tuple(floor.split(", ")) for floor in floors] == list(FLOORS)
    for room in FLOOR:
        assert f"`lite_dil/{room}/`" in page or (room == "backends" and "`backends/`" in page)


def test_modules_that_are_named_at_run_time_are_known() -> None:
    """Such an import escapes the rules above; each of these loads a backend's part, a command, an optional library, the API"""
    found = {
        source.place
        for source in PACKAGE.values()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") == "import_module"
        and not isinstance(node.args[0], ast.Constant)
    }
    commands, optional = "lite_dil/cli/main.py", "lite_dil/data/files.py"
    assert found == {"lite_dil/__init__.py", commands, optional, "backends/registry.py"}


def test_exceptions_are_few_and_have_reasons() -> None:
    assert len(EXCEPTIONS) <= 10
    imported = {(s.place, wanted.module.partition(".")[0]) for s in PACKAGE.values() for wanted in s.imports()}
    assert set(EXCEPTIONS) <= imported, "an exception that nothing needs any more"
    for (place, _), reason in EXCEPTIONS.items():
        assert (ROOT / place).is_file(), f"{place} is gone; so should be its exception"
        assert len(reason.split()) > 3
