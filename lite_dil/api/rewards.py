"""Training reward models, and scoring responses with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

from lite_dil.api.loading import LOADED
from lite_dil.api.notebook import display_of
from lite_dil.api.reading import Data, as_data
from lite_dil.api.telling import tell
from lite_dil.api.training import check_names, decided
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError, did_you_mean
from lite_dil.base.observer import Observer
from lite_dil.base.start import start
from lite_dil.config.options import build
from lite_dil.config.resume import resumed
from lite_dil.config.reward_source import find_reward, head_on
from lite_dil.data.encoder import Encoder, encoder_of
from lite_dil.generation import policy as policies
from lite_dil.generation.asked import Asked, Several, encode_responses
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.objectives.reward_table import REWARDS, identity
from lite_dil.recipes.given import Given
from lite_dil.recipes.reward import train_reward as train_by_config
from lite_dil.recipes.run import Run
from lite_dil.rewards.heads import HeadReward


def train_reward(
    policy: Policy,
    data: str | Path | Data | Iterable[Mapping[str, Any]],
    *,
    reward_loss: str = "bt",
    eval_data: str | Path | Data | Iterable[Mapping[str, Any]] | None = None,
    observers: Sequence[Observer] = (),
    display: Display | None = None,
    resume: str | Path | None = None,
    output_dir: str | Path | None = None,
    accept_changes: bool = False,
    **options: Any,
) -> Run:
    """Train a reward model: the policy's adapter, with a head that scores a response by the state of its end token.

    The base stays frozen; ``policy.fresh()`` makes a policy of it again, without a head. Other arguments, and the errors, are
    those of `lite_dil.train`.

    Args:
        policy: one that no run has trained, or made `fresh` again.
        data: pairs; for the density ratios also unpaired chosen and rejected responses.
        reward_loss: a loss of docs/rewards.md.
        **options: others of ``lite-dil reward --help``.
    """
    loaded = decided(policy, "dil.train_reward")
    check_names(options, loaded, "dil.train_reward")
    if reward_loss not in REWARDS:
        near = did_you_mean(reward_loss, REWARDS)
        raise UserError(f"dil.train_reward: reward_loss {reward_loss!r}{near} is not one of {', '.join(REWARDS)}")
    rows, eval_rows = as_data(data, eval_data, "dil.train_reward")
    given = {name: value for name, value in options.items() if name not in LOADED}
    given |= {"loss": identity(reward_loss)} | rows.options | {"data": rows.name}
    if eval_rows is not None:
        given["eval_data"] = eval_rows.name
    if output_dir is not None:
        given["output_dir"] = str(output_dir)
    own_eval = None if eval_rows is None else eval_rows.rows
    handed = Given(policy, data=rows.rows, eval_data=own_eval, accept_changes=accept_changes)
    own_rows = [name for name in ("data", "eval_data") if getattr(handed, name) is not None]
    config, checkpoint = (None, None)
    if resume is not None:
        config, checkpoint = resumed(given | loaded, {}, str(resume), tell, accept_changes, own_rows)
    if config is None or checkpoint is None:
        if policy.trained:
            where = policy.run.path if policy.run else "a run"
            raise UserError(f"dil.train_reward: {where} has trained this policy; policy.fresh() gives it a new adapter")
        config = build(given | loaded, {})
    return train_by_config(config, display_of(display), checkpoint, observers, handed)


class Reward:
    """A reward model in memory; `lite_dil.load_reward` returns one. A ``with`` block closes it at its end."""

    def __init__(self, head: HeadReward, encoder: Encoder, chat: bool, own: Policy | None) -> None:
        self._head, self._encoder, self._chat, self._own = head, encoder, chat, own

    def __enter__(self) -> Reward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free its memory, if it loaded its own base; a policy's stays."""
        if self._own is not None:
            self._own.close()

    @overload
    def score(self, prompts: Asked, responses: str) -> float: ...
    @overload
    def score(self, prompts: Asked | Several, responses: list[str]) -> list[float]: ...
    def score(self, prompts: Asked | Several, responses: str | list[str]) -> float | list[float]:
        """Return the reward of whole responses; arguments and errors as for `Policy.logps`.

        A text prompt is a user message if the reward model's data was read with ``chat``, and is otherwise continued, as in
        ``lite-dil score``; chat messages are always what they are. Nothing is cut to ``max_length``.

        Only differences between responses to the same prompt mean something, except for the density ratios, whose scores are
        log-ratios of chosen to rejected responses.
        """
        examples = encode_responses(self._encoder, prompts, responses, self._chat)
        found = [float(row[0]) for rows in self._head.scores(examples) for row in rows]
        return found[0] if isinstance(responses, str) else found


def load_reward(run: str | Path, *, policy: Policy | None = None, backend: str | None = None) -> Reward:
    """Load a reward model that `train_reward` or ``lite-dil reward`` trained.

    Args:
        run: a run, one of its checkpoints, or its adapter's folder.
        policy: a policy whose base it shares, beside the policy's own adapter; None loads the base of the run.
        backend: "cuda", "mlx", "cpu" or "auto", if it loads its own base.

    Raises UserError if it is no reward model, is damaged, or was trained on another base than the policy's.
    """
    start(training=False)
    if policy is not None:
        if backend is not None:
            raise UserError("dil.load_reward: backend is the policy's; leave it out")
        found = find_reward(str(run), {"backend": policy.backend.name})
        head = head_on(policy, found, tell)
        return Reward(head, encoder_of(policy.model, found.options), found.chat, None)
    found = find_reward(str(run), {} if backend is None else {"backend": backend})
    own = policies.load(AdapterSource(None, None, found.options), tell)
    with ExitStack() as opened:
        opened.callback(own.close)
        reward = Reward(head_on(own, found, tell), encoder_of(own.model, found.options), found.chat, own)
        opened.pop_all()
    return reward
