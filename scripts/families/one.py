"""One family on one backend, in a process of its own that starts with the libraries imported."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 300  # seconds for a family on a backend


@dataclass(frozen=True)
class Result:
    """What came of a family: `status` is exact, refused, wrong or error; `text` says why."""

    family: str
    backend: str
    size: int
    status: str
    text: str = ""
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status in ("exact", "refused")


def server() -> Any:
    """Return the context whose processes are forked from one that has the libraries."""
    # Python 3.11's server does not get the path of this process.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["families.preloaded"])
    return context


def run(context: Any, folder: Path, family: str, backend: str, size: int) -> Result:
    """Check a family in a process of its own."""
    place = folder / f"{family}-{backend}-{size}"
    place.mkdir()
    file = place / "result.json"
    process = context.Process(target=_child, args=(family, backend, size, place, file))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        return Result(family, backend, size, "error", f"not done after {LIMIT} s")
    if not file.exists():
        return Result(family, backend, size, "error", f"the process ended with {process.exitcode}")
    return Result(**json.loads(file.read_text(encoding="utf-8")))


def _child(family: str, backend: str, size: int, place: Path, file: Path) -> None:
    from families import exact, zoo

    from lite_dil.base.errors import UserError

    sys.stdout = sys.stderr = open(place / "log.txt", "w", encoding="utf-8")  # noqa: SIM115 - the process's last
    os.environ["LITE_DIL_CACHE"] = str(place / "cache")
    try:
        # The second size also shows that recomputed layers have the same gradients.
        more = {"gradient_checkpointing": "full"} if size == 2 and backend == "cpu" else {}
        found = exact.check(zoo.make(family, place / "model", size), backend, place, **more)
        result = Result(family, backend, size, "wrong" if found.wrong else "exact", "; ".join(found.wrong), asdict(found))
    except UserError as error:
        result = Result(family, backend, size, "refused", str(error).replace(str(place / "model"), "MODEL"))
    except Exception as error:  # the boundary of what is tested: any other exception is what the table is to show
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        result = Result(family, backend, size, "error", " ".join(text.split()))
    file.write_text(json.dumps(asdict(result)), encoding="utf-8")
