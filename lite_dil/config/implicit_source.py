"""Find a trained policy whose log-ratio rewards another one's answers: its adapter, its beta and its reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_dil.backends.head_files import has_head
from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.config.adapter_source import find
from lite_dil.config.resume import trained_with
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.models.adapter_config import read_config
from lite_dil.models.fingerprint import base_of, fingerprint
from lite_dil.objectives.table import objective_of
from lite_dil.rewards.heads import add_files
from lite_dil.rewards.implicit import ImplicitReward
from lite_dil.rewards.spec import Part
from lite_dil.runs.folder import checkpoint_of, trained_options
from lite_dil.runs.progress import Progress, read_progress
from lite_dil.training.options import ReferenceOptions
from lite_dil.training.reference_cache import cache_folder

INITIAL = "initial-adapter"


@dataclass(frozen=True)
class ImplicitModel:
    """A trained policy's files.

    Attributes:
        part: what the user gave.
        beta: multiplies its log-ratio.
        mean: whether the log-ratio is averaged over the tokens.
        weights: a hash of its base's weights; "" if nothing says it.
        base: the name of its base, where nothing says the weights; "" if nothing names it.
        reference: a hash of the initial adapter that it was trained against; "" for the bare base.
        identity: a hash of its files.
    """

    part: Part
    adapter: Path
    beta: float
    mean: bool
    weights: str
    reference: str
    identity: str
    base: str

    def open(self, policy: Policy, config: ResolvedConfig, progress: Progress, say: Any) -> ImplicitReward:
        """Add it to the base of a policy in training.

        Args:
            progress: has what identifies the run's base and initial adapter.

        Raises UserError if it was trained on another base, or against another reference. What cannot be told is said.
        """
        where = f"--reward {self.part}"
        base = progress.base or base_of(policy.model, cache_folder(ReferenceOptions()))
        weights = self.weights or self._weights_of_base()
        if weights and weights != base["weights"]:
            raise UserError(f"{where} was trained on another base than {config.model}; give one that was trained on this base")
        if not weights and self.base != config.model:
            named = f"its base is called {self.base}" if self.base else "nothing names its base"
            say(
                f"warning: {where}: {named}, and no hash of that is there to compare with {config.model}; its log-ratio is a "
                "reward only on the base that it was trained on"
            )
        if self.reference != (progress.init_adapter if config.reference == INITIAL else ""):
            own = "the initial adapter of its run" if self.reference else "the bare base"
            raise UserError(
                f"{where} was trained against {own}, which is not the reference of this run (--reference {config.reference}): "
                "its log-ratio would be to another model; train with the same --init-adapter and --reference"
            )
        name = f"implicit-{digest(self.identity)[:16]}"
        add_files(policy.backend, name, self.adapter)
        return ImplicitReward(policy.backend, name, self.beta, self.mean, self.part.name, say)

    def _weights_of_base(self) -> str:
        """Return a hash of the weights of the base that only a name tells; "" if it is not in a folder here."""
        if not self.base or not any(Path(self.base).glob("*.safetensors")):
            return ""
        return str(base_of(self.base, cache_folder(ReferenceOptions()))["weights"])


def find_implicit(part: Part, config: ResolvedConfig) -> ImplicitModel:
    """Return the trained policy that ``implicit:ADAPTER`` names: a run, one of its checkpoints, or an adapter's folder.

    Raises UserError if there is none, if it was not trained against a reference, or if nothing says its beta.
    """
    where = f"--reward {part}"
    source = find(part.value, {"model": config.model, "backend": config.backend})
    assert source.adapter is not None
    if has_head(source.adapter):
        raise UserError(f"{where} is a reward model, whose head scores: give it as --reward {part.value}")
    options = trained_with(source.adapter, source.run) if source.run else trained_options(source.adapter)
    progress, identity = _progress(source), fingerprint(source.adapter, cache_folder(ReferenceOptions()))
    weights = str(progress.base.get("weights", ""))
    base = str(options.get("model") or read_config(source.adapter).model or "")
    if "beta" not in options:
        if not part.given:
            raise UserError(
                f"{where}: nothing there says which beta it was trained with; give it as the weight, such as "
                f"implicit:{part.value}=0.1"
            )
        return ImplicitModel(part, source.adapter, 1.0, False, weights, "", identity, base)
    loss, divergence = options["loss"], options.get("divergence")
    if not objective_of(loss).reference:
        raise UserError(f"{where} was trained by {loss}, which has no reference: its log-ratio is no reward")
    if divergence not in (None, "reverse_kl"):
        raise UserError(f"{where} was trained by {loss} with --divergence {divergence}, whose reward is not beta times f")
    reference = ""
    if options["reference"] == INITIAL and not (reference := progress.init_adapter):
        raise UserError(f"{where}: its run has no checkpoint left, which says what it was trained against; keep one")
    mean = options["logp_reduction"] == "mean"
    return ImplicitModel(part, source.adapter, float(options["beta"]), mean, weights, reference, identity, base)


def _progress(source: AdapterSource) -> Progress:
    """Return what the adapter's checkpoint, or the newest of its run, records; nothing if there is none."""
    assert source.adapter is not None
    checkpoint = checkpoint_of(source.adapter) or (source.run.latest() if source.run else None)
    return read_progress(checkpoint) if checkpoint else Progress()
