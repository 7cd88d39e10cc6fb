"""The files in which a comparison keeps what it measured: written with digests, and refused if they are damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_dil.base.checked import with_digest, without_digest
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.files import make_folder, replace_file
from lite_dil.base.strict_json import parse_json

RESULT = "result.json"  # marks a finished run: trained and measured, or diverged
REFERENCE_FILE, ANSWERS_FILE = "reference.json", "samples.jsonl"
Answer = dict[str, Any]


def write_measured(path: Path, content: Mapping[str, Any]) -> None:
    """Write result.json, reference.json or compare.json."""
    replace_file(path, json.dumps(with_digest(content), indent=1, ensure_ascii=False) + "\n")


def read_measured(path: Path, **of: Any) -> dict[str, Any]:
    """Read one of these files. Raises UserError if it is damaged, or if the fields `of` are others than they should be."""
    try:
        content = without_digest(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise _damaged(path, first_line(error)) from None
    for name, value in of.items():
        if name in content and content[name] != value:
            raise _damaged(path, f"its {name} is {content[name]!r}, expected {value!r}")
    return content


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write samples.jsonl."""
    make_folder(path.parent)
    replace_file(path, "".join(json.dumps(with_digest(answer), ensure_ascii=False) + "\n" for answer in answers))


def read_answers(path: Path, seed: int, number: int | None = None) -> list[Answer]:
    """Read samples.jsonl, whose answers were drawn with `seed`.

    Raises UserError if it is damaged, or if it has another `number` of answers.
    """
    try:
        answers = [without_digest(parse_json(line)) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise _damaged(path, first_line(error)) from None
    if number is not None and len(answers) != number:
        raise _damaged(path, f"it has {len(answers)} answers, expected {number}")
    if any(answer.get("seed", seed) != seed for answer in answers):
        raise _damaged(path, f"its answers are of another seed than {seed}")
    return answers


def _damaged(path: Path, why: str) -> UserError:
    """Return the error, with what to delete so that the command makes the file again."""
    if path.name == "compare.json":
        return UserError(f"{path}: cannot be read ({why}); give a new folder")
    shared = path.name == REFERENCE_FILE or path.parent.name == "reference"  # measured with the first run
    beside = "" if path.name == RESULT else f" and the {RESULT} {'of a run' if shared else 'beside it'}"
    return UserError(f"{path} is damaged ({why}); delete it{beside}, and the same command measures that again")
