"""Find a reward model by name, and how to load its base and read its data: by default as in the run that made it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.config.adapter_source import find
from lite_dil.config.classifier_source import ClassifierModel, find_classifier
from lite_dil.config.options import build
from lite_dil.config.resume import trained_with
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.encoder import Encoder, encoder_of
from lite_dil.data.prompts import FLAGS
from lite_dil.generation import policy as policies
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.models.find import resolve_model
from lite_dil.models.fingerprint import fingerprint
from lite_dil.models.options import ModelOptions
from lite_dil.rewards.classifier import ClassifierReward
from lite_dil.rewards.description import Description, read_description
from lite_dil.rewards.heads import HeadReward, open_head
from lite_dil.rewards.spec import HF
from lite_dil.runs.folder import trained_options
from lite_dil.training.options import ReferenceOptions
from lite_dil.training.reference_cache import cache_folder

_READ = ("max_length", "chat")  # options of the run by which its data was read


@dataclass(frozen=True)
class RewardModel:
    """A reward model's files.

    Attributes:
        name: what the user called it.
        adapter: the folder of its adapter and head.
        options: how its base is loaded.
        read: how its run read data, by option.
    """

    name: str
    adapter: Path
    options: ModelOptions
    description: Description
    read: Mapping[str, Any]

    @property
    def chat(self) -> bool:
        """Whether its run made plain-text prompts user messages."""
        return bool(self.read.get("chat", False))

    @property
    def adapter_name(self) -> str:
        """A name for it beside others on a backend."""
        return f"reward-{digest(self.files)[:16]}"

    @property
    def files(self) -> str:
        """A hash of its files."""
        return digest(fingerprint(self.adapter, cache_folder(ReferenceOptions())), asdict(self.description))

    @property
    def identity(self) -> str:
        """A name for its weights, in files of scores."""
        return f"{policies.identity(AdapterSource(self.adapter, None, self.options))} {self.description.scale!r}"

    def data_options(self, given: Mapping[str, Any]) -> ResolvedConfig:
        """Return options that read data, `FLAGS`; those of its run where they are not given."""
        own = {name: value for name, value in self.read.items() if name == "max_length"}
        return build({name: value for name, value in given.items() if name in FLAGS and value is not None}, own)

    def encoder(self, say: Callable[[str], None]) -> Encoder:
        """Return the base's encoder."""
        return encoder_of(resolve_model(self.options.model, say), self.options)


def find_scorer(name: str, given: Mapping[str, Any], say: Callable[[str], None]) -> RewardModel | ClassifierModel:
    """Return what scores responses by its name: a reward model as `find_reward` finds it, or hf:MODEL."""
    return find_classifier(name, given, say) if name.startswith(f"{HF}:") else find_reward(name, given)


def find_reward(folder: str, given: Mapping[str, Any]) -> RewardModel:
    """Return the reward model that `folder` names: a run, one of its checkpoints, or an adapter's folder.

    Args:
        given: options by field name; those that load a model override the run's.

    Raises UserError if there is none.
    """
    if not Path(folder).exists():
        raise UserError(f"--reward {folder}: no such folder")
    source = find(folder, dict(given))
    assert source.adapter is not None
    read = trained_with(source.adapter, source.run) if source.run else trained_options(source.adapter)
    description = read_description(source.adapter)
    return RewardModel(
        folder, source.adapter, source.options, description, {name: read[name] for name in _READ if name in read}
    )


@contextmanager
def open_reward(found: RewardModel | ClassifierModel, say: Callable[[str], None]) -> Iterator[HeadReward | ClassifierReward]:
    """Load a reward model, a head on its base, for the block. Raises UserError if its base is another one by now."""
    if isinstance(found, ClassifierModel):
        yield found.open(say)
        return
    policy = policies.load(AdapterSource(None, None, found.options), say)
    try:
        yield head_on(policy, found, say)
    finally:
        policy.close()


def head_on(policy: Policy, found: RewardModel, say: Callable[[str], None], weight: float | None = None) -> HeadReward:
    """Add a reward model to the base of a policy in memory. Raises UserError if it was trained on another one.

    Args:
        weight: its weight in a sum of rewards, for which the reward of a response that was cut is the worst; None gives NaN.
    """
    name = Path(found.name).absolute().name
    cut = math.nan if weight is None else found.description.cut_score(weight, found.adapter)
    memo = cache_folder(ReferenceOptions())
    return open_head(policy.backend, found.adapter_name, found.adapter, policy.model, memo, name, say, cut)
