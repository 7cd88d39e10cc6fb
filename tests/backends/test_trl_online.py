"""On-policy steps against TRL's own trainers: on the answers that TRL drew, the same advantages, losses and LoRA gradients.

TRL draws, rewards and scores the answers and takes a training step; lite-dil scores the same tokens on both backends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import bare_model, byte_level_tokenizer, config, load
from step_gradients import Adapter, common_name, random_adapter, relative_error, set_adapter, set_parameters, work_gradients
from steps import adapter
from test_trl import GRADIENT, LOSS, has_trl, old_names

from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.batching.schedule import Limits
from lite_dil.data.encoder import Example
from lite_dil.data.prompts import Prompt
from lite_dil.generation.rollouts import Rollout
from lite_dil.generation.scoring import compared_logps
from lite_dil.objectives.criterion import Criterion
from lite_dil.online.credit import Spread
from lite_dil.online.groups import DrawnGroups, Group
from lite_dil.online.options import ResolvedOnline
from lite_dil.online.updates import advantages_of, answer_passes, loss_of, pair_passes

pytestmark = pytest.mark.skipif(not has_trl(), reason="needs TRL 1.16, of the dev extra on Python 3.11 or later")

PROMPTS = ["what is the capital of France", "the river is", "do you"]
K, BETA, TOKENS = 4, 0.3, 7


class Theirs(NamedTuple):
    """What TRL did: for each prompt its ids and the ids of its answers, their rewards, and the step."""

    asked: list[list[int]]
    answers: list[list[list[int]]]
    rewards: np.ndarray
    advantages: np.ndarray
    loss: float
    gradients: Adapter


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Any function that tells answers apart, with equal rewards among them."""
    return [len({token % 7 for token in ids}) / 4 + (ids[0] % 3) for ids in completion_ids]


def trainer_of(kind: str, model: str, folder: Path, **settings: Any) -> Any:
    """A trainer of TRL at the weights of `random_adapter`, and these weights."""
    import datasets
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    datasets.disable_progress_bars()
    made, arguments = {
        "rloo": (RLOOTrainer, RLOOConfig),
        "grpo": (GRPOTrainer, GRPOConfig),
        "dpo": (OnlineDPOTrainer, OnlineDPOConfig),
    }[kind]
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "temperature": 1.0}
    ours = config()
    with old_names():
        trainer = made(
            model=bare_model(model),
            args=arguments(output_dir=str(folder), beta=BETA, **plain, **settings),
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            reward_funcs=reward,
            processing_class=byte_level_tokenizer(),
            peft_config=LoraConfig(
                r=ours.lora_r, lora_alpha=ours.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    shapes = {common_name(name): p.detach().numpy().T for name, p in named.items()}
    set_parameters(named, random_adapter(shapes))
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def gradients_of(trainer: Any) -> Adapter:
    found = ((name, p.grad) for name, p in trainer.model.named_parameters() if p.requires_grad)
    return {common_name(name): gradient.numpy().T.copy() for name, gradient in found}


def cut(ids: Any, mask: Any) -> list[list[int]]:
    """Rows of ids without their padding."""
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@pytest.fixture(scope="module")
def theirs(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Theirs]:
    @cache
    def taken(kind: str) -> Theirs:
        more = {
            "rloo": {},
            "grpo": {"loss_type": "dr_grpo", "scale_rewards": "group", "use_bias_correction_kl": False},
        }[kind]
        batch = K * len(PROMPTS)
        trainer = trainer_of(
            kind,
            tiny,
            tmp_path_factory.mktemp("trl"),
            per_device_train_batch_size=batch,
            num_generations=K,
            max_completion_length=TOKENS,
            **more,
        )
        trainer.model.train()
        with old_names():
            made = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(K)])
            loss = trainer.compute_loss(trainer.model, made)
            loss.backward()
        asked, answers = (cut(made[f"{n}_ids"], made[f"{n}_mask"]) for n in ("prompt", "completion"))
        grouped = [answers[at : at + K] for at in range(0, batch, K)]
        rewards = np.array([reward(some) for some in grouped])
        advantages = made["advantages"].reshape(-1, K).double().numpy()
        return Theirs(asked[::K], grouped, rewards, advantages, loss.item(), gradients_of(trainer))

    return taken


@pytest.fixture(scope="module", params=["cpu", "mlx"])
def backend(request: pytest.FixtureRequest, tiny: str) -> Any:
    loaded = load(request.param, tiny, max_grad_norm=1e9)
    set_adapter(loaded, random_adapter(adapter(loaded)))
    return loaded


def drawn(backend: Any, asked: list[list[int]], answers: list[list[list[int]]], rewards: np.ndarray) -> DrawnGroups:
    """The groups as lite-dil has them after drawing these answers itself."""
    scored = compared_logps(backend, asked, answers, print)
    groups = []
    for ids, several, logps, own in zip(asked, answers, scored, rewards, strict=True):
        found = [Rollout(tuple(one), both[:, 0], both[:, 1], True) for one, both in zip(several, logps, strict=True)]
        groups.append(Group(Prompt("", "here", ids=tuple(ids)), found, [], [], {"": own}, own))
    return DrawnGroups(groups, 0)


def options(**changes: Any) -> ResolvedOnline:
    found = {"kl_estimator": "k1", "reward_scale": "none", "num_iterations": 1, "epsilon": None, **changes}
    return ResolvedOnline(
        reward="", samples=K, max_new_tokens=TOKENS, missing_eos_penalty=0.0, refill=0, reward_timeout=60.0, **found
    )


def test_rloo(backend: Any, theirs: Callable[[str], Theirs]) -> None:
    made = theirs("rloo")
    groups = drawn(backend, made.asked, made.answers, made.rewards)
    assert abs(groups.log_ratios).mean() > 0.5
    found = advantages_of(groups, options(), BETA, Spread())
    np.testing.assert_allclose(found, made.advantages, rtol=1e-5, atol=1e-5)  # their sums of log-probs are float32's
    kl = np.float32(groups.log_ratios)  # the formula alone, of the same numbers
    values = np.float32(made.rewards) - np.float32(BETA) * kl
    by_trl = values - (values.sum(1, keepdims=True) - values) / (K - 1)
    np.testing.assert_allclose(found, by_trl, atol=1e-6)

    loss = loss_of(options(), 0)
    work = answer_passes(groups, range(len(PROMPTS)), found, loss, BETA, backend.layout, Limits(2, 60))
    assert len(work) > 1
    _, gradients = work_gradients(backend, work, loss)
    assert relative_error(gradients, made.gradients) < GRADIENT


def test_grpo(backend: Any, theirs: Callable[[str], Theirs]) -> None:
    """Their baseline is the group's own mean: (K - 1) / K of ours, which their beta does not share."""
    made, share = theirs("grpo"), (K - 1) / K
    groups = drawn(backend, made.asked, made.answers, made.rewards)
    chosen = options(kl_estimator="k3", reward_scale="group")
    found = advantages_of(groups, chosen, BETA / share, Spread())
    np.testing.assert_allclose(found * share, made.advantages, atol=1e-6)

    for update, several in ((0, chosen), (1, options(kl_estimator="k3", num_iterations=2, epsilon=0.2))):
        loss = loss_of(several, update)
        passes = answer_passes(groups, range(len(PROMPTS)), found, loss, BETA / share, backend.layout, Limits(100, 1000))
        result, gradients = work_gradients(backend, passes, loss)
        mine = {name: value * share / TOKENS for name, value in gradients.items()}
        assert relative_error(mine, made.gradients) < GRADIENT
        at_old = sum((-a).sum() * len(i) for g, i in zip(found, made.answers, strict=True) for a, i in zip(g, i, strict=True))
        whole = (result.loss + at_old / found.size) * share / TOKENS
        assert whole == pytest.approx(made.loss, rel=LOSS, abs=1e-5)


def test_online_dpo(backend: Any, tiny: str, tmp_path: Path) -> None:
    trainer = trainer_of("dpo", tiny, tmp_path, per_device_train_batch_size=len(PROMPTS), max_new_tokens=TOKENS)
    seen: dict[str, Any] = {}
    generate = trainer._generate

    def recorded(*given: Any) -> Any:
        seen["made"] = generate(*given)
        return seen["made"]

    trainer._generate = recorded
    trainer.create_optimizer()
    with old_names():
        expected = float(trainer.training_step(trainer.model, {"prompt": list(PROMPTS)}))
    asked, answers = (cut(seen["made"][at], seen["made"][at + 1]) for at in (0, 2))
    count = len(PROMPTS)
    pairs = [[answers[at], answers[at + count]] for at in range(count)]
    rewards = np.array([reward(pair) for pair in pairs])
    assert (rewards[:, 0] != rewards[:, 1]).any()
    used = np.flatnonzero(rewards[:, 0] != rewards[:, 1])  # TRL prefers the first of equal ones, lite-dil leaves them out
    assert len(used) == count, "choose a reward that tells these pairs apart"
    groups = drawn(backend, asked[:count], pairs, rewards)
    criterion = Criterion(config(loss="dpo", beta=BETA), [Example((), ((), ()), (CHOSEN, REJECTED))])
    result, gradients = work_gradients(backend, pair_passes(groups, used, criterion, backend.layout, Limits(2, 60)), criterion)
    assert result.loss == pytest.approx(expected, rel=LOSS)  # their sums of log-probs are float32's of another pass
    best = np.argmax(rewards, 1)[:, None]
    margins = np.take_along_axis(groups.log_ratios, best, 1) - np.take_along_axis(groups.log_ratios, 1 - best, 1)
    formula = -torch.nn.functional.logsigmoid(BETA * torch.tensor(margins, dtype=torch.float32)).mean()  # theirs
    assert result.loss == pytest.approx(formula.item(), abs=1e-6)
    assert relative_error(gradients, gradients_of(trainer)) < GRADIENT
