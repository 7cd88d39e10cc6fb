"""The rewards of an on-policy training: found before its model is loaded, and opened beside it."""

from __future__ import annotations

from collections.abc import Callable

from lite_dil.base.display import Display
from lite_dil.config.classifier_source import ClassifierModel
from lite_dil.config.implicit_source import ImplicitModel, find_implicit
from lite_dil.config.reward_source import RewardModel, find_reward, head_on
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.generation.policy import Policy
from lite_dil.recipes.given import Given
from lite_dil.rewards.source import RewardSource
from lite_dil.rewards.spec import IMPLICIT, MODELS, REWARD_RUN, Part, joined, parse, source_of
from lite_dil.rewards.total import TotalReward
from lite_dil.runs.progress import Progress

_Found = RewardModel | ImplicitModel | ClassifierModel


class RewardSources:
    """The sources of --reward and --eval-reward.

    Raises UserError if a function is missing or was changed.
    """

    def __init__(self, config: ResolvedConfig, given: Given) -> None:
        assert config.reward is not None and config.reward_timeout is not None  # resolved
        self._config, timeout = config, config.reward_timeout
        self._texts = {"--reward": config.reward, "--eval-reward": config.eval_reward}
        # Names are unique in both together.
        self._parts, self._found = parse(joined(*self._texts.values())), dict[str, _Found]()
        self._sources = {
            part.name: source_of(part, given.rewards, timeout, flag)
            for flag, text in self._texts.items()
            for part in (parse(text) if text else ())
            if part.kind not in MODELS
        }

    def find(self, config: ResolvedConfig, say: Callable[[str], None]) -> None:
        """Read the small files of the models that reward. Raises UserError if one of them cannot be used."""
        self._config = config
        self._found = {part.name: _find(part, config, say) for part in self._parts if part.kind in MODELS}

    @property
    def identities(self) -> dict[str, str]:
        """Hashes of the models' files, by the reward's name."""
        return {name: found.files if isinstance(found, RewardModel) else found.identity for name, found in self._found.items()}

    def open(self, policy: Policy, progress: Progress, display: Display) -> tuple[TotalReward, TotalReward | None]:
        """Return the reward and the one that is only measured, with models beside the policy in memory.

        Raises UserError if a model cannot be loaded, or is of another base than the policy.
        """
        for part in self._parts:
            if (found := self._found.get(part.name)) is None:
                continue
            if isinstance(found, RewardModel):
                self._sources[part.name] = head_on(policy, found, display.say, part.weight)
            elif isinstance(found, ImplicitModel):
                self._sources[part.name] = found.open(policy, self._config, progress, display.say)
            else:
                with display.status(f"loading {part.value}"):
                    self._sources[part.name] = found.open(display.say)
        trained, judge = ([self._weighted(part) for part in parse(text)] if text else [] for text in self._texts.values())
        return TotalReward(trained, self._config.missing_eos_penalty or 0.0), TotalReward(judge) if judge else None

    def _weighted(self, part: Part) -> tuple[RewardSource, float]:
        return self._sources[part.name], part.weight


def _find(part: Part, config: ResolvedConfig, say: Callable[[str], None]) -> _Found:
    """Return the model of a part of a reward."""
    if part.kind == IMPLICIT:
        return find_implicit(part, config)
    if part.kind != REWARD_RUN:
        return ClassifierModel(part, config, say)
    found = find_reward(part.value, {"model": config.model, "backend": config.backend})
    found.description.cut_score(part.weight, found.adapter)
    if found.options.load_in_4bit != config.load_in_4bit:
        bits = [f"{'4' if packed else '16'}-bit" for packed in (found.options.load_in_4bit, config.load_in_4bit)]
        say(
            f"warning: --reward {part.value} was trained on the {bits[0]} base, and this run's is {bits[1]}: its scores are "
            "not quite those that it was trained to give"
        )
    if (own := found.options.chat_template_kwargs) != config.chat_template_kwargs:
        say(
            f"warning: --reward {part.value} was trained with --chat-template-kwargs {own or 'left out'}, and this run has "
            f"{config.chat_template_kwargs or 'none'}: its head reads other prompts than those it was trained on"
        )
    return found
