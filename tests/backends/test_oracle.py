"""Every objective end to end: what a backend's step reports, against float64 numpy written from the papers' formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bare_model, config, examples, load, oracle_logps
from step_gradients import Adapter, random_adapter, relative_error, set_adapter, step_gradients
from steps import adapter

from lite_dil.batching.batch import Batch
from lite_dil.config.train_config import TrainConfig
from lite_dil.data.encoder import Example
from lite_dil.data.mismatched import mismatched
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.table import OBJECTIVES
from lite_dil.training.passes import Passes
from lite_dil.training.reference_cache import open_cache

exp, log = np.exp, np.log


def bounded_exp(x: np.ndarray, cap: float) -> np.ndarray:
    """e^x, and its tangent above `cap`."""
    return np.where(x > cap, exp(cap) * (1 + x - cap), exp(np.minimum(x, cap)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + exp(-x))


def relative(f: np.ndarray, alpha: float) -> np.ndarray:
    return 1 / (alpha + (1 - alpha) * exp(-f))


@dataclass(frozen=True)
class Case:
    """Options of an objective, and its formulas of arrays of answers or of pairs.

    A formula takes dictionaries with f and logp, each as the objective reduces it, and mean, sum and weighted, which are log
    pi averaged, summed and weighted by the tokens left; `z0` is kto's.
    """

    loss: str
    options: dict[str, Any]
    chosen: Callable[..., np.ndarray] | None = None  # one side: a loss of an answer
    rejected: Callable[..., np.ndarray] | None = None
    pair: Callable[..., np.ndarray] | None = None  # of two
    mean: bool = False  # over the tokens


def dil(name: str, first: Callable[..., Any], second: Callable[..., Any], beta: float = 1.0, **options: Any) -> Case:
    return Case(name, {"beta": beta, **options}, lambda a: first(beta * a["f"]), lambda a: second(beta * a["f"]), mean=True)


def logistic(margin: np.ndarray) -> np.ndarray:
    return -log(sigmoid(margin))


def f_dpo(divergence: str, slope: Callable[..., Any], **options: Any) -> Case:
    return Case(
        "f-dpo",
        {"beta": 0.4, "divergence": divergence, **options},
        pair=lambda good, bad: logistic(0.4 * (slope(exp(good["f"])) - slope(exp(bad["f"])))),
    )


def bpo(good: dict[str, np.ndarray], bad: dict[str, np.ndarray]) -> np.ndarray:
    ratio = exp(-0.2 * (good["f"] - bad["f"]))
    return ratio**1.3 / (4 * 1.3) - ratio**-0.3 / (4 * 0.3)


CASES = {
    "lsif": dil("lsif", lambda f: -exp(f), lambda f: exp(2 * f) / 2, beta=0.7),
    "lsif, capped": dil("lsif", lambda f: -bounded_exp(f, 0.1), lambda f: bounded_exp(2 * f, 0.2) / 2, log_ratio_cap=0.1),
    "ukl": dil("ukl", lambda f: -f, exp),
    "bce": dil("bce", lambda f: log(1 + exp(-f)), lambda f: log(1 + exp(f)), beta=1.5),
    "basu": dil("basu", lambda f: -(1.3 * exp(0.3 * f) - 1) / 0.3, lambda f: exp(1.3 * f), basu_alpha=0.3),
    "rulsif": dil(
        "rulsif",
        lambda f: -relative(f, 0.2) + 0.2 * relative(f, 0.2) ** 2 / 2,
        lambda f: 0.8 * relative(f, 0.2) ** 2 / 2,
        relative_alpha=0.2,
    ),
    "dpo": Case("dpo", {"beta": 0.3}, pair=lambda good, bad: logistic(0.3 * (good["f"] - bad["f"]))),
    "f-dpo, reverse KL": f_dpo("reverse_kl", lambda r: log(r) + 1),
    "f-dpo, forward KL": f_dpo("forward_kl", lambda r: -1 / r),
    "f-dpo, Jensen-Shannon": f_dpo("js", lambda r: log(2 * r / (1 + r))),
    "f-dpo, alpha": f_dpo("alpha", lambda r: (1 - r**-0.3) / 0.3, divergence_alpha=0.3),
    "ipo": Case("ipo", {"beta": 0.7}, pair=lambda good, bad: (good["f"] - bad["f"] - 1 / 1.4) ** 2, mean=True),
    "slic": Case(
        "slic",
        {"slic_delta": 2.0, "slic_lambda": 0.3},
        pair=lambda good, bad: np.maximum(0, 2 - good["logp"] + bad["logp"]) - 0.3 * good["logp"],
    ),
    "kto": Case(
        "kto",
        {"beta": 0.2},
        lambda a, z0: (1 - sigmoid(0.2 * (a["f"] - z0))) / 2,
        lambda a, z0: (1 - sigmoid(0.2 * (z0 - a["f"]))) / 2,
    ),
    "cpo": Case(
        "cpo",
        {"beta": 0.2, "cpo_lambda": 0.7},
        pair=lambda good, bad: logistic(0.2 * (good["logp"] - bad["logp"])) - 0.7 * good["mean"],
    ),
    "simpo": Case(
        "simpo",
        {"beta": 1.5, "simpo_gamma": 0.4},
        pair=lambda good, bad: logistic(1.5 * (good["logp"] - bad["logp"]) - 0.4),
        mean=True,
    ),
    "bpo": Case("bpo", {"beta": 0.2, "bpo_lambda": 0.3}, pair=bpo),
    "sft": Case("sft", {}, lambda a: -a["sum"]),
    "sft-occupancy": Case("sft-occupancy", {}, lambda a: -a["weighted"]),
}
SIDES = [name for name, case in CASES.items() if case.rejected]


def test_oracle_has_every_objective() -> None:
    assert {case.loss for case in CASES.values()} == set(OBJECTIVES)


def settings(name: str, **changes: Any) -> TrainConfig:
    case = CASES[name]
    return config(loss=case.loss, reference_cache="off", **case.options, **changes)


def unpaired(signs: Sequence[int], seed: int = 5) -> list[Example]:
    """Answers without partners."""
    return [Example(e.prompt, (e.responses[0],), (sign,)) for e, sign in zip(examples(len(signs), seed), signs, strict=True)]


# The whole data has 5 good answers and 2 bad ones; the step takes 3 and 1 of them.
UNPAIRED = unpaired([1, -1, 1, 1, -1, 1, 1])
STEP = UNPAIRED[:4]
DATA = {
    "pairs": (examples(5, 3), examples(5, 3)[:3]),
    "unpaired": (UNPAIRED, STEP),
    "demonstrations": (unpaired([1] * 4), unpaired([1] * 4)[:3]),
}


def answers(policy: np.ndarray, reference: np.ndarray, batch: Batch, mean: bool) -> dict[str, np.ndarray]:
    """What the formulas see of each answer, from the log-probs of all response tokens."""
    out: dict[str, list[float]] = {name: [] for name in ("f", "logp", "mean", "sum", "weighted")}
    start = 0
    for response in batch.responses:
        n = len(response)
        own, base = (x[start : start + n].astype(np.float64) for x in (policy, reference))
        start += n
        divisor = n if mean else 1
        out["f"].append((own - base).sum() / divisor)
        out["logp"].append(own.sum() / divisor)
        out["mean"].append(own.mean())
        out["sum"].append(own.sum())
        out["weighted"].append(sum((n - k) / n * own[k] for k in range(n)))
    return {name: np.array(values) for name, values in out.items()}


def expected_loss(
    case: Case,
    data: list[Example],
    batch: Batch,
    policy: np.ndarray,
    reference: np.ndarray,
    z0: float,
    changes: dict[str, Any],
) -> float:
    """The loss of a step on `batch`, whose data set is `data`."""
    seen = answers(policy, reference, batch, case.mean)

    def of(index: Any) -> dict[str, np.ndarray]:
        return {name: values[index] for name, values in seen.items()}

    good, bad = np.flatnonzero(batch.signs == 1), np.flatnonzero(batch.signs == -1)
    if case.pair:
        return float(case.pair(of(good), of(bad)).mean())  # each prompt's good answer comes first
    given = (z0,) if case.loss == "kto" else ()
    examples_in_step = len(batch.prompts)
    signs = np.array([sign for example in data for sign in example.signs])
    answers_each = len(signs) / len(data)  # 2 for pairs
    total = changes.get("chosen_weight", 1.0) * case.chosen(of(good), *given).sum() / ((signs == 1).mean() * answers_each)
    if case.rejected:
        both = changes.get("denominator") == "both"
        share = 1.0 if both else (signs == -1).mean()
        values = case.rejected(of(np.arange(len(batch.signs)) if both else bad), *given)
        total += changes.get("rejected_weight", 1.0) * values.sum() / (share * answers_each)
    return float(total / examples_in_step)


@pytest.fixture(scope="module")
def both_backends(tiny: str) -> dict[str, Any]:
    """With the same adapter; steps are taken at rate 0."""
    loaded = {name: load(name, tiny, max_grad_norm=1e9) for name in ("cpu", "mlx")}
    for backend in loaded.values():
        set_adapter(backend, random_adapter(adapter(backend), seed=5))  # one by which kto's z0 is above 0
    return loaded


@pytest.fixture(scope="module")
def reference_logps(tiny: str) -> Callable[[Batch], np.ndarray]:
    bare = bare_model(tiny)

    def logps(batch: Batch) -> np.ndarray:
        with torch.no_grad():
            return oracle_logps(bare, batch).numpy()

    return logps


def rows() -> list[Any]:
    """Every objective on each form of data that it can be trained on, and the options of those of two sides."""
    made = []
    for name, case in CASES.items():
        forms = ["pairs"] if case.pair else ["pairs", "unpaired"] if case.rejected else ["pairs", "demonstrations"]
        made += [pytest.param(name, form, {}, id=f"{name}-{form}") for form in forms]
        if case.rejected:
            weights = {"chosen_weight": 0.6, "rejected_weight": 1.7}
            made += [pytest.param(name, form, weights, id=f"{name}-{form}-weighted") for form in forms]
            if case.loss != "kto":
                both = {"denominator": "both", **weights}
                made += [pytest.param(name, form, both, id=f"{name}-{form}-both") for form in forms]
    return made


@pytest.mark.parametrize(("name", "form", "changes"), rows())
def test_oracle_loss_and_gradients(
    both_backends: dict[str, Any],
    reference_logps: Callable[[Batch], np.ndarray],
    tiny: str,
    name: str,
    form: str,
    changes: dict[str, Any],
) -> None:
    case, (data, taken) = CASES[name], DATA[form]
    batch, options = Batch.of(taken), settings(name, **changes)
    reference = reference_logps(batch)
    gradients: dict[str, Adapter] = {}
    for backend in both_backends.values():
        z0, baseline = 0.0, 0.0
        if case.loss == "kto":
            others = Batch.of(mismatched(taken, options.loss, options.max_length))
            f = answers(backend.token_logps(others), reference_logps(others), others, mean=False)["f"]
            z0 = max(0.0, f.mean())
            cache = open_cache(options, options, tiny, backend.identity)
            baseline = Passes(backend, options.logp_reduction, cache, print).baseline([others])
            assert z0 > 0.05
            assert baseline == pytest.approx(z0, rel=1e-4)
        result, gradients[backend.name] = step_gradients(backend, [batch], Criterion(options, data), baseline)
        expected = expected_loss(case, data, batch, backend.token_logps(batch), reference, z0, changes)
        assert result.loss == pytest.approx(expected, rel=2e-5, abs=1e-5)
    assert relative_error(gradients["mlx"], gradients["cpu"]) < 1e-4

    # The slope of the oracle along a random direction that is not across the gradient, by central differences.
    backend, draw, before = both_backends["cpu"], np.random.default_rng(0), adapter(both_backends["cpu"])
    direction = {k: g * draw.uniform(0, 2, g.shape) for k, g in gradients["cpu"].items()}
    length = np.sqrt(sum((d**2).sum() for d in direction.values()))
    slope = sum((g * direction[k]).sum() for k, g in gradients["cpu"].items()) / length
    sides = []
    try:
        for step in (0.002, -0.002):
            set_adapter(backend, {k: v + (step / length * direction[k]).astype(np.float32) for k, v in before.items()})
            policy = backend.token_logps(batch)
            sides.append(expected_loss(case, data, batch, policy, reference, z0, changes))
    finally:
        set_adapter(backend, before)
    assert slope == pytest.approx((sides[0] - sides[1]) / 0.004, rel=0.01)


# Three micro-batches of a step: one without bad answers, one without good ones, one of both.
PARTS = [[0, 2, 3], [1, 4], [5, 6, 7, 8]]
MIXED = unpaired([1, -1, 1, 1, -1, 1, -1, 1, 1], seed=7)


def parts_of(data: list[Example], parts: list[list[int]]) -> list[Batch]:
    return [Batch.of([data[i] for i in part]) for part in parts]


@pytest.mark.parametrize("name", [*SIDES, "sft", "sft-occupancy"])
def test_any_split_of_unpaired_data_gives_one_step(both_backends: dict[str, Any], backend_name: str, name: str) -> None:
    """Also of a batch without good or without bad answers; kto's z0 belongs to the whole step."""
    backend = both_backends[backend_name]
    data = MIXED if CASES[name].rejected else [example for example in MIXED if example.signs == (1,)]
    parts = PARTS if CASES[name].rejected else [[0], [1, 2, 3, 4, 5]]
    criterion, z0 = Criterion(settings(name), data), 0.3 if name == "kto" else 0.0
    whole, expected = step_gradients(backend, [Batch.of(data)], criterion, z0)
    split, gradients = step_gradients(backend, parts_of(data, parts), criterion, z0)
    assert split.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-5)
    assert relative_error(gradients, expected) < 1e-4


@pytest.mark.parametrize("name", ["kto", "sft-occupancy"])
def test_a_compiled_step_of_mlx_is_the_same(both_backends: dict[str, Any], tiny: str, name: str) -> None:
    """Its arrays are filled up, and a trace must not keep one step's indices, weights or baseline for the next."""
    compiled = load("mlx", tiny, max_grad_norm=1e9, compile=True)
    set_adapter(compiled, adapter(both_backends["mlx"]))
    data = unpaired([1, 1, 1, -1] if CASES[name].rejected else [1] * 4, seed=9)
    criterion = Criterion(settings(name), data)
    for parts, z0 in (([[0, 1], [2, 3]], 0.3), ([[1, 0], [2, 3]], 0.6)):
        batches = parts_of(data, parts)
        expected_result, expected = step_gradients(both_backends["mlx"], batches, criterion, z0)
        result, gradients = step_gradients(compiled, batches, criterion, z0)
        assert result.loss == pytest.approx(expected_result.loss, rel=1e-5, abs=1e-5)
        assert relative_error(gradients, expected) < 1e-4
