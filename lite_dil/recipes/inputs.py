"""What a run reads, recognised by its content when it is resumed, wherever its files are by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError, gather
from lite_dil.config.resume import paths_of
from lite_dil.config.train_config import ResolvedConfig, flag
from lite_dil.data.encoder import Example, fingerprint
from lite_dil.data.rows import is_rows_name
from lite_dil.models.fingerprint import base_of
from lite_dil.models.fingerprint import fingerprint as files_fingerprint
from lite_dil.recipes.read_data import RunData
from lite_dil.runs.folder import RunFolder
from lite_dil.runs.progress import Progress, read_progress
from lite_dil.training.reference_cache import cache_folder

_REWARDS = ("reward", "eval_reward")


def say_paths(config: ResolvedConfig, saved: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Say which paths of a resumed run are taken from its `saved` options, and which are not."""
    read, written = paths_of(saved)
    taken = [f"{flag(n)} {path}" for n, path in read.items() if path == getattr(config, n) and not is_rows_name(path)]
    if taken:
        say(f"reading what the run did: {', '.join(taken)}; what has moved can be given anew")
    left = [f"{flag(name)} {path}" for name, path in written.items() if path != getattr(config, name)]
    if left:
        say(f"not written to, unless it is given again: {', '.join(left)}")


class Inputs:
    """What a run reads, compared with what the checkpoint that it continues from has recorded.

    Args:
        resume: the checkpoint; None for a new run.
        accept: go on although something has changed, and say what.
    """

    def __init__(
        self, config: ResolvedConfig, folder: RunFolder, resume: Path | None, say: Callable[[str], None], accept: bool
    ) -> None:
        self.config, self.folder, self.resume, self._say, self._accept = config, folder, resume, say, accept
        self.saved = read_progress(resume) if resume else Progress()

    def data(self, data: RunData) -> Progress:
        """Return the run's progress with the fingerprints of its data. Raises UserError if they are others than before."""
        now = fingerprint(data.examples) + data.others, fingerprint(data.held_out) if data.held_out else ""
        before = self.saved.fingerprint, self.saved.held_out
        changes = []
        if self.resume and now[0] != before[0]:
            changes.append(f"{self.config.data} is not the data that this run was trained on")
        if before[1] and now[1] != before[1]:
            path = self.config.eval_data
            changes.append(
                f"{f'--eval-data {path} is' if path else 'the held-out rows are'} not what this run was evaluated on"
            )
        self._check(changes)
        return replace(self.saved, fingerprint=now[0], held_out=now[1])

    def models(self, progress: Progress, model: str) -> None:
        """Put the fingerprints of the base model, a result of `resolve_model`, and the initial adapter into `progress`.

        Both have been loaded. Raises UserError if they are others than before.
        """
        config, saved = self.config, self.saved
        memo = None if config.reference_cache == "off" else cache_folder(config)
        progress.base = base_of(model, memo)
        progress.init_adapter = files_fingerprint(Path(config.init_adapter), memo) if config.init_adapter else ""
        changes = list(_changes_of_base(saved.base, progress.base, config.model)) if saved.base else []
        if saved.init_adapter and saved.init_adapter != progress.init_adapter:
            changes.append(f"--init-adapter {config.init_adapter} is not what this run began with")
        self._check(changes)
        if self.resume:
            self._follow(
                {
                    "data": saved.fingerprint,
                    "eval_data": saved.held_out,
                    "model": saved.base,
                    "init_adapter": saved.init_adapter,
                }
            )

    def rewards(self, progress: Progress, found: Mapping[str, str]) -> None:
        """Put the hashes of the models that reward answers into `progress`. Raises UserError if they were others."""
        progress.rewards, saved = dict(found), list(self.saved.rewards.items())
        if not self.resume:
            return
        # By place: a folder that has moved may have another name.
        pairs = [(name, value, *before) for (name, value), before in zip_longest(found.items(), saved, fillvalue=("", ""))]
        self._check(
            [f"--reward {name} is not the model that this run began with" for name, now, _, old in pairs if now != old]
        )
        for name, _, before, _ in pairs:
            if name != before:
                self._say(f"--reward: what was called {before} is {name} in metrics from here on")
        self._follow(dict.fromkeys(_REWARDS, "known"))

    def drawn(self, progress: Progress, examples: Sequence[Example]) -> None:
        """Put the fingerprint of the examples with drawn responses into `progress`. Raises UserError if it was another one."""
        progress.drawn = fingerprint(examples)
        if self.saved.drawn and self.saved.drawn != progress.drawn:
            file = self.folder.options.get("sample_file")
            again = f"; --sample-file {file} has those" if file else ""
            self._check([f"the responses that --sample-rejected draws are not those that this run was trained on{again}"])

    def _check(self, changes: list[str]) -> None:
        if changes and not self._accept:
            heading = f"--resume {self.resume}: something has changed; start a new run, or accept it by --accept-changes:"
            raise UserError(gather(changes, heading))
        for change in changes:
            self._say(f"accepted: {change}")

    def _follow(self, known: Mapping[str, Any]) -> None:
        """Write new places of what is read into config.yaml, so that later commands find them.

        Args:
            known: what the run has recorded of each, by option.
        """
        config, folder = self.config, self.folder
        anew = [name for name in known if getattr(config, name) != folder.options.get(name)]
        for name in (name for name in anew if not known[name]):
            path = getattr(config, name)
            self._say(f"warning: this run recorded nothing of its {flag(name)}; whether {path} is the same is unknown")
        if anew:
            folder.create(folder.options | {name: getattr(config, name) for name in known})


def _changes_of_base(before: dict[str, Any], now: dict[str, Any], model: str) -> Iterator[str]:
    if before["weights"] != now["weights"]:
        yield f"--model {model} has other weights than this run began with"
    old, new = before["config"], now["config"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"--model {model}: {name} in its config.json was {old.get(name)}, and is {new.get(name)}"
