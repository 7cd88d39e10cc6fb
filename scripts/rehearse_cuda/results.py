"""Results of cases: kept as JSON, one file per case, and shown as one line each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rehearse_cuda.cases import Case

from lite_dil.base.files import replace_file
from lite_dil.base.hashing import sha256

ROOT = Path(__file__).parent.parent.parent
LIBRARIES = ("torch", "triton", "transformers", "peft", "bitsandbytes")
PART, CARD, NAME, SECONDS = 15, 6, 44, 5  # widths of the table's columns


@dataclass(frozen=True)
class Result:
    """The result of a case: `text`, one line for people, and figures for programs."""

    ok: bool
    text: str
    figures: dict[str, Any]
    seconds: float


class Results:
    """A folder of results. Each is valid only for the sources and libraries that it was made with."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made_with = folder, made_with()
        folder.mkdir(parents=True, exist_ok=True)

    def passed(self, case: Case) -> Result | None:
        """Return an earlier result that need not be repeated: it passed, and nothing has changed since."""
        path = self._path(case)
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        same = kept["made_with"] == self._made_with and kept["case"] == json.loads(json.dumps(asdict(case)))
        return Result(**kept["result"]) if same and kept["result"]["ok"] else None

    def latest(self, case: Case) -> Result | None:
        """Return an earlier result, regardless of what it was made with."""
        path = self._path(case)
        return Result(**json.loads(path.read_text(encoding="utf-8"))["result"]) if path.exists() else None

    def keep(self, case: Case, result: Result) -> None:
        """Write a result."""
        content = {"case": asdict(case), "result": asdict(result), "made_with": self._made_with}
        replace_file(self._path(case), json.dumps(content, indent=1) + "\n")

    def _path(self, case: Case) -> Path:
        return self._folder / f"{case.key}.json"


def made_with() -> dict[str, str]:
    """Return what else decides a result: a digest of the sources, and the libraries' versions."""
    files = (path for top in ("lite_dil", "backends", "scripts/rehearse_cuda") for path in sorted((ROOT / top).rglob("*")))
    sources = (path.read_bytes() for path in files if path.suffix in (".py", ".cpp", ".h"))
    return {"sources": sha256(sources)[:16]} | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def heading() -> str:
    """Return the table's first line."""
    return f"{'part':{PART}}{'card':{CARD}}  {'case':{NAME}}  {'':6}{'s':>{SECONDS}}  what was seen"


def line(case: Case, result: Result, before: bool = False) -> str:
    """Return a case's line of the table; `before` marks a result of an earlier run."""
    seconds = "kept" if before else f"{result.seconds:.0f}"
    state = "ok" if result.ok else "FAILED"
    return f"{case.part:{PART}}sm_{case.card:<{CARD - 3}}  {case.name:{NAME}}  {state:6}{seconds:>{SECONDS}}  {result.text}"


def summary(results: Sequence[Result]) -> str:
    """Return the table's last line."""
    failed = sum(not result.ok for result in results)
    minutes = sum(result.figures.get("cpu_s", 0) for result in results) / 60
    return f"{len(results)} cases, {failed or 'none'} failed; {minutes:.1f} minutes of CPU time"
