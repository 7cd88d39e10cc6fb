"""``lite-dil doctor``: show what is installed and missing, and check that the device computes the right numbers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
from dataclasses import asdict
from pathlib import Path

HELP = "check that lite-dil runs and computes the right numbers on this machine"
DESCRIPTION = """\
Show what is installed and what the machine has. Then check on the device, with a tiny model, that all ways of computing give
the same numbers. Takes a minute or two and downloads nothing. Exit code 1 if the backend cannot run or a check fails; a
missing extra is not a failure.

  lite-dil doctor
  lite-dil doctor --json > doctor.json  # for a bug report: contains no paths, names or tokens
"""
_PRIVATE = re.compile(r"hf_\w+|(?<![\w.])(?:[A-Za-z]:)?[\\/][^\s'\",;:)]+")
_WORDS = {True: "ok", False: "NOT OK", None: "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``lite-dil doctor``."""
    parser.add_argument("--backend", choices=("auto", "cuda", "cpu", "mlx"), default="auto", help="what to check (auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for a bug report")


def run(args: argparse.Namespace) -> int:
    """Inspect the machine and run the checks; return 0 if all pass, else 1."""
    from lite_dil.doctor.examine import Checked, examine, names_for
    from lite_dil.doctor.machine import how_to_install, look, places

    machine = look(args.backend)
    names: list[str] = []
    if machine.backend:
        names = names_for(machine.backend, machine.backend == "mlx" or importlib.util.find_spec("bitsandbytes") is not None)
    done: list[Checked] = []
    if not args.json:
        print(f"lite-dil {machine.lite_dil}, Python {machine.python}, {machine.system}")
        print(f"backend   {machine.backend or 'none'}: {machine.device}")
        if machine.driver:
            print(f"driver    {machine.driver}")
        print(f"disk      {machine.disk_free_gb:g} GB free for models")
        for what, (folder, variable) in places().items():
            sizes = {name: size for name, size in machine.caches_gb.items() if (name == "hub") == (what == "hub")}
            kinds = ", ".join(f"{name} {size:.1f}" for name, size in sizes.items() if size >= 0.05 and what != "hub")
            print(f"cache     {sum(sizes.values()):.1f} GB in {folder}{f' ({kinds})' if kinds else ''}; {variable} moves it")
        print(f"packages  {', '.join(f'{name} {version}' for name, version in machine.packages.items())}")
        if machine.missing:
            print("\nnot installed, needed only for:")
            width = max(map(len, machine.missing))
            for what in machine.missing:
                print(f"  {what:{width}}  {how_to_install(what)}")
        if names:
            print(f"\nchecks on {machine.backend} with a tiny model (a minute or two):", flush=True)
    for checked in examine(machine.backend or "", names) if names else ():
        done.append(checked)
        if not args.json:
            print(f"  {_WORDS[checked.ok]:6}  {checked.name:24} {checked.text}", flush=True)
    wrong = [checked.name for checked in done if checked.ok is False]
    if args.json:
        checks = [checked._asdict() | {"text": _public(checked.text)} for checked in done]
        print(json.dumps(asdict(machine) | {"device": _public(machine.device), "checks": checks}, indent=1))
    elif wrong:
        print(f"\nFailed here: {', '.join(wrong)}. Please report this with the output of lite-dil doctor --json.")
    elif names:
        print(f"\nAll checks passed: lite-dil trains on {machine.backend} here.")
    return 1 if wrong or not machine.backend else 0


def _public(text: str) -> str:
    """Return the text without paths, tokens and the names of this user and machine."""
    text = _PRIVATE.sub("...", text)
    for name in (Path.home().name, platform.node()):
        text = text.replace(name, "...") if len(name) > 1 else text
    return text
