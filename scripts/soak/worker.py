"""Run pieces of one part, whose names come line by line, and answer each with its rows in JSON. A process of its own."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from soak.row import as_json


def main(part: str, folder: str, form: str) -> None:
    """Run pieces in `folder`, which is removed at the end but for what a part keeps of failures beside it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    place = Path(folder).resolve()
    with importlib.import_module(f"soak.part_{part}").opened(place, short=form == "short") as rows:
        for line in sys.stdin:
            found = [as_json(row) for row in rows(line.rstrip("\n"))]
            answers.write(json.dumps(found) + "\n")
            answers.flush()
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
