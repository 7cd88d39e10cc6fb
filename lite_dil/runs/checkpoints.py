"""Save a run's checkpoints and its final adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lite_dil.base.observer import Event, Observer
from lite_dil.runs.folder import RunFolder
from lite_dil.runs.options import RunOptions
from lite_dil.runs.progress import Progress, read_progress


class Checkpoints(Observer):
    """Saves a checkpoint every ``--save-steps`` steps, at the end, and if a run is stopped; at the end also the adapter.

    Args:
        progress: the run's progress, which changes as the run proceeds.
        save_state: writes what a resumed run needs into a folder.
        save_adapter: writes the trained adapter into a folder.
    """

    writes = True

    def __init__(
        self,
        folder: RunFolder,
        progress: Progress,
        save_state: Callable[[Path], None],
        save_adapter: Callable[[Path], None],
        options: RunOptions,
    ) -> None:
        self.folder, self.progress, self.options = folder, progress, options
        self._save_state, self._save_adapter = save_state, save_adapter

    def started(self, event: Event) -> None:
        """Do what a run that was killed had not done after its last checkpoint."""
        self.folder.drop_old(self.options.save_total_limit)
        if event.last:
            self.folder.save_adapter(self._save_adapter)

    def after_step(self, event: Event) -> None:
        """Save if due."""
        if event.due(self.options.save_steps):
            self._save()
        if event.last:
            self.folder.save_adapter(self._save_adapter)

    def stopped(self, event: Event) -> None:
        """Save the last step."""
        self.keep()

    def keep(self) -> Path:
        """Return the checkpoint of the last step, saving it now if necessary."""
        latest = self.folder.latest()
        if latest is None or read_progress(latest).step < self.progress.step:
            return self._save()
        return latest

    def _save(self) -> Path:
        return self.folder.save_checkpoint(self.progress, self._save_state, self.options.save_total_limit)
