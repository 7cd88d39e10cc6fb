"""Sources of rows: files, folders of files, and the Hugging Face hub."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from lite_dil.base.errors import UserError, first_line
from lite_dil.base.install import install
from lite_dil.base.strict_json import parse_json
from lite_dil.data.arrow import without_added
from lite_dil.data.files import COLUMNAR, PACKED, TEXT, PlacedRow, file_rows
from lite_dil.data.rows import is_rows_name
from lite_dil.models.hub import offline

EMBEDDED = "short-answers"
# Other files in a data folder of the hub or of the datasets package.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_HELD_OUT = {"test", "tests", "eval", "evaluation", "val", "valid", "validation", "dev", "heldout"}


def split_sources(text: str) -> list[tuple[str, float]]:
    """Return the sources in ``--data``, each with how many times an epoch takes its rows.

    ``a.jsonl,b.jsonl=0.5`` is all of a and half of b. A file whose name has a comma or an equals sign works too, if it is the
    only source.
    """
    if is_local(text):
        return [(text, 1.0)]
    found = []
    for part in text.split(","):
        name, equals, weight = part.strip().rpartition("=")
        if not equals or is_local(part.strip()):
            found.append((part.strip(), 1.0))
            continue
        try:
            times = float(weight)
        except ValueError:
            times = 0.0
        if not (name and 0 < times <= 1000):
            raise UserError(f"--data {part.strip()}: {weight!r} is not how often to take its rows; expected a number above 0")
        found.append((name.strip(), times))
    if not all(name for name, _ in found):
        raise UserError(f"--data {text}: an empty name between the commas")
    return found


def records(source: str, split: str = "train", limit: int | None = None) -> Iterator[PlacedRow]:
    """Yield the rows of one source unchanged, at most `limit` of them.

    Args:
        source: a file, a folder, ``folder:split``, ``short-answers``, or a hub id ``owner/name[/config][:split]``.
        split: the split to take if `source` names none: "train" or "test".

    Raises:
        UserError: the source as a whole cannot be read; an unreadable row is yielded as its RowError.
    """
    files = files_of(source, split)
    if files is not None:
        found: Iterator[PlacedRow] = itertools.chain.from_iterable(map(file_rows, files))
    elif is_rows_name(source):
        raise UserError(f"{source}: rows that a program passed and no file holds; pass them to dil.train again")
    else:
        found = _hub(source, split, stream=limit is not None)
    return itertools.islice(found, limit)


def files_of(source: str, split: str = "train") -> list[Path] | None:
    """Return the files that `records` reads, whether or not they exist; None if the source is not local. Raises UserError."""
    if source == EMBEDDED:
        return [Path(__file__).parent / "short_answers" / f"{split}.jsonl"]
    if is_local(source) and (path := Path(source)).is_dir():
        return _folder(path, split, named=False)
    if is_local(source) or looks_like_file(source):
        return [Path(source)]
    if is_local(before := source.rpartition(":")[0]) and Path(before).is_dir():
        return _folder(Path(before), source.rpartition(":")[2], named=True)
    return None


def is_local(source: str) -> bool:
    """Return whether a source is a local file or folder, or the embedded set."""
    try:
        return source == EMBEDDED or (source != "" and Path(source).exists())  # Path("") is the current folder
    except OSError:  # too long for a name
        return False


def looks_like_file(source: str) -> bool:
    """Return whether a source looks like a file name, whether or not the file exists."""
    return Path(source).suffix in {*TEXT, *COLUMNAR, *PACKED}


def _folder(folder: Path, split: str, named: bool) -> list[Path]:
    """Return the files of a folder, or of one saved by the datasets package, in order."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if split not in splits:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(splits)}: name one as {folder}:{splits[0]}")
        folder = folder / split
    if (folder / "state.json").is_file():
        try:
            state = parse_json((folder / "state.json").read_text(encoding="utf-8"))
            files = [folder / entry["filename"] for entry in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'state.json'}: not written by the datasets package ({first_line(error)})") from None
    else:
        files = _of_split([path for path in sorted(folder.rglob("*")) if _is_data(path, folder)], folder, split, named)
    if not files:
        raise UserError(f"{folder} is a directory without data files; expected {', '.join((*TEXT, *COLUMNAR))} in it")
    return files


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    kind = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    return kind in (*TEXT, *COLUMNAR) and path.is_file() and not hidden and path.name not in _NOT_DATA


def _of_split(files: list[Path], folder: Path, split: str, named: bool) -> list[Path]:
    """Leave out files whose names belong to another split: training must not read its test data.

    A file's own name counts before its folders' names.
    """

    def belongs(path: Path) -> str:
        names = [path.name, *(part.name for part in path.relative_to(folder).parents)]
        for words in (set(re.findall(r"[a-z]+", name.lower())) for name in names):
            if words & _HELD_OUT:
                return "test"
            if words & {"train", "training", split}:
                return "train" if words & {"train", "training"} else split
        return ""

    wanted = "test" if split in _HELD_OUT else split
    own = [path for path in files if belongs(path) == wanted]
    if named and not own:
        raise UserError(f"{folder}: no file there has {split!r} in its name")
    if named or (own and wanted == "test"):
        return own
    return [path for path in files if belongs(path) != "test"] if wanted == "train" else files


def _hub(source: str, split: str, stream: bool) -> Iterator[PlacedRow]:
    name, _, named_split = source.partition(":")
    owner, _, rest = name.partition("/")
    name, _, config = rest.partition("/")
    if not (owner and name) or owner.startswith((".", "~")) or "/" in config:
        raise UserError(f"{source}: no such file, and not a data set id of the form owner/name[/config][:split]")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError(f"{source}: data sets from the hub need the datasets package: {install('hub')}") from None
    unreachable = offline()  # earlier downloads may be in the cache
    try:
        rows = datasets.load_dataset(f"{owner}/{name}", config or None, split=named_split or split, streaming=stream)
        for number, row in enumerate(rows, 1):
            yield f"{source} row {number}", without_added(row)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = f"; name it as {source}:SPLIT" if "split" in str(error) and not named_split else ""
        why = f"{first_line(error)}; {unreachable}" if unreachable else first_line(error)
        raise UserError(f"{source}: cannot be loaded from the hub ({why}){hint}") from None
