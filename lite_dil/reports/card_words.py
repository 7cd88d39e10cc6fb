"""Text that may be published: names and commands without a machine's folders, and escaped Markdown."""

from __future__ import annotations

import re
import shlex
from typing import Any

from lite_dil.base.text import one_line
from lite_dil.config.train_config import FIELDS, TrainConfig, flag
from lite_dil.data.sources import is_local, looks_like_file, split_sources
from lite_dil.models.names import HUB_ID, last_part, public_name

# Paths on this machine: from the root, a home folder, a drive, or above the current folder.
_PLACE = re.compile(r"(?:~|\.\.|[A-Za-z]:)?[/\\][^,=]*")


def code(text: object) -> str:
    """Return text as Markdown code, whatever it contains."""
    words = one_line(str(text))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    space = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{space}{words}{space}{fence}"


def public_sources(text: str) -> tuple[list[str], list[str]]:
    """Return the names of --data's sources, and the hub ids among them."""
    names, hub = [], []
    for source, weight in split_sources(text) if text else []:
        times = "" if weight == 1 else f"={weight:g}"
        found = re.match(rf"({HUB_ID})(/[\w.-]+)?(:[\w.-]+)?$", source, re.ASCII)
        if found and not is_local(source) and not is_local(source.rpartition(":")[0]) and not looks_like_file(source):
            names.append(source + times)
            hub.append(found[1])
        else:
            names.append(last_part(source) + times)
    return names, list(dict.fromkeys(hub))


def public_command(command: str) -> str:
    """Return a shell command on one line, with paths on this machine cut to their last parts."""
    return shlex.join(_without_places(one_line(word)) for word in shlex.split(command))


def _without_places(word: str) -> str:
    """Shorten each path in a word such as ``--data=/home/me/a.jsonl,b.jsonl=0.5``."""

    def shorten(found: re.Match[str]) -> str:
        return last_part(found[0]) or "."

    # Not within a word: owner/name and runs/one also contain a slash.
    return re.sub(rf"(?<![^,=]){_PLACE.pattern}", shorten, word)


def train_command(options: dict[str, Any]) -> str:
    """Return the lite-dil train command for a run's resolved options: those that differ from the defaults."""
    chosen = {name: options[name] for name in ("model", "data", "loss", "init_adapter", "sample_rejected") if name in options}
    defaults = TrainConfig(**chosen, reference=options.get("reference")).resolved().as_dict() | {
        name: FIELDS[name].default for name in chosen
    }
    words = ["lite-dil", "train"]
    for name, value in options.items():
        if name in _OWN or name not in FIELDS or value is None or value == defaults[name]:
            continue
        option = flag(name)
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, _public_value(name, value)]
    return shlex.join(words)


# Options with paths on this machine.
_OWN = {"output_dir", "reference_cache", "sample_file"}


def _public_value(name: str, value: Any) -> str:
    if name in ("data", "eval_data"):
        return ",".join(public_sources(value)[0])
    if name in ("model", "init_adapter"):
        return public_name(value)
    return f"{value:g}" if isinstance(value, float) else one_line(str(value))
