"""Losses and LoRA gradients against TRL's own trainers: same text, same base, same adapter, float32.

TRL reads the rows as text, tokenises, collates and takes a training step; lite-dil does so on both backends. Where a reduction
differs, the case says by which terms of ours TRL's loss is written.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import bare_model, byte_level_tokenizer, config, load
from step_gradients import Adapter, common_name, random_adapter, relative_error, set_adapter, set_parameters, step_gradients
from steps import adapter

from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import Schedule
from lite_dil.cli.main import main
from lite_dil.config.train_config import TrainConfig
from lite_dil.data.dataset import load as load_data
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.mismatched import mismatched
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.reward_criterion import RewardCriterion
from lite_dil.training.passes import Passes
from lite_dil.training.reference_cache import open_cache


def has_trl() -> bool:
    try:
        return tuple(map(int, version("trl").split(".")[:2])) >= (1, 16)
    except PackageNotFoundError:
        return False


# TRL 1.15, at which unsloth stops, needs Triton, which torch for the CPU alone lacks; Python 3.10 has no later one either.
pytestmark = pytest.mark.skipif(not has_trl(), reason="needs TRL 1.16, of the dev extra on Python 3.11 or later")

LOSS, GRADIENT = 2e-5, 1e-4  # relative, float32
Term = tuple[float, dict[str, Any]]  # a weight and the options of one of our objectives

# All chosen answers of LEVEL have 5 tokens and their end token, so that a mean over tokens is one over answers of means.
RAGGED = [
    {"prompt": "what is the capital of France", "chosen": " Paris is", "rejected": " a small red house and a river"},
    {"prompt": "how do I make", "chosen": " good bread and tea do make a blue house", "rejected": " tea"},
    {"prompt": "the river is", "chosen": " red", "rejected": " blue and small"},
    {"prompt": "do you", "chosen": " make the tea of the house", "rejected": " is is is Paris"},
]
LEVEL = [
    {**row, "chosen": chosen}
    for row, chosen in zip(
        RAGGED, (" Paris is the red house", " bread and tea do make", " blue is blue and red", " I do I do I"), strict=True
    )
]


@cache
def encoder() -> Encoder:
    return Encoder(byte_level_tokenizer())


def encoded(rows: list[dict[str, Any]], folder: Path) -> list[Example]:
    """The rows as lite-dil reads them from a file."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(load_data(str(path), "train", encoder(), TrainConfig(max_length=64)).examples)


@pytest.fixture(scope="module", params=["cpu", "mlx"])
def backend(request: pytest.FixtureRequest, tiny: str) -> Any:
    """With one adapter for the whole module; steps are taken at rate 0."""
    loaded = load(request.param, tiny, max_grad_norm=1e9)
    set_adapter(loaded, random_adapter(adapter(loaded)))
    return loaded


@dataclass(frozen=True)
class Case:
    """A trainer of TRL with its settings, and TRL's loss as a sum of ours, given the batch."""

    trainer: str
    settings: dict[str, Any]
    ours: Callable[[Batch], list[Term]]
    rows: list[dict[str, Any]] = field(default_factory=lambda: RAGGED)


def same(**options: Any) -> Callable[[Batch], list[Term]]:
    return lambda batch: [(1.0, options)]


def per_token(batch: Batch) -> float:
    """What turns a mean over examples into one over all the good answers' tokens."""
    return batch.examples / float(batch.lengths[batch.chosen].sum())


def f_dpo(divergence: str, **options: Any) -> Case:
    trl = {"js": "js_divergence", "alpha": "alpha_divergence"}.get(divergence, divergence)
    coefficient = {"f_alpha_divergence_coef": 1 - options["divergence_alpha"]} if options else {}
    settings = {"loss_type": ["sigmoid"], "beta": 0.4, "f_divergence_type": trl, **coefficient}
    return Case("dpo", settings, same(loss="f-dpo", beta=0.4, divergence=divergence, **options))


def sft(weight: float) -> Term:
    return weight, {"loss": "sft"}


CASES = {
    "dpo": Case("dpo", {"loss_type": ["sigmoid"], "beta": 0.3}, same(loss="dpo", beta=0.3)),
    "ipo": Case("dpo", {"loss_type": ["ipo"], "beta": 0.7}, same(loss="ipo", beta=0.7)),
    "bce": Case("dpo", {"loss_type": ["bco_pair"], "beta": 1.0}, same(loss="bce", logp_reduction="sum")),
    "bce, beta 0.5": Case("dpo", {"loss_type": ["bco_pair"], "beta": 0.5}, same(loss="bce", logp_reduction="sum", beta=0.5)),
    "f-dpo, reverse KL": f_dpo("reverse_kl"),
    "f-dpo, forward KL": f_dpo("forward_kl"),
    "f-dpo, Jensen-Shannon": f_dpo("js"),
    "f-dpo, alpha": f_dpo("alpha", divergence_alpha=0.3),
    # TRL's likelihood term is a mean over all the tokens of the batch, ours a mean over the answers of theirs.
    "cpo, equal lengths": Case(
        "cpo", {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 0.7}, same(loss="cpo", beta=0.2, cpo_lambda=0.7), LEVEL
    ),
    "cpo": Case(
        "cpo",
        {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 0.7},
        lambda batch: [(1.0, {"loss": "cpo", "beta": 0.2, "cpo_lambda": 0.0}), sft(0.7 * per_token(batch))],
    ),
    "simpo": Case(
        "cpo",
        {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "simpo_gamma": 0.8},
        same(loss="simpo", beta=2.0, simpo_gamma=0.8),
    ),
    # relu(1 - beta (log pi_w - log pi_l)) is beta times slic's hinge with delta 1 / beta.
    "slic, equal lengths": Case(
        "cpo",
        {"loss_type": "hinge", "beta": 0.1, "cpo_alpha": 0.6},
        lambda batch: [(0.1, {"loss": "slic", "slic_delta": 10.0, "slic_lambda": 0.6 * per_token(batch) / 0.1})],
        LEVEL,
    ),
    "slic": Case(
        "cpo",
        {"loss_type": "hinge", "beta": 0.1, "cpo_alpha": 0.6},
        lambda batch: [(0.1, {"loss": "slic", "slic_delta": 10.0, "slic_lambda": 0.0}), sft(0.6 * per_token(batch))],
    ),
    "sft": Case(
        "sft",
        {},
        lambda batch: [sft(per_token(batch))],
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in RAGGED],
    ),
}


@contextmanager
def old_names() -> Iterator[None]:
    """TRL sets by its default, and PEFT and TRL ask for, what transformers 5 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
        yield


def make_trainer(kind: str, model: str, rows: list[dict[str, Any]], folder: Path, **settings: Any) -> Any:
    """A trainer of TRL on the bare model, with a new adapter as wide as lite-dil's default."""
    import datasets
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    datasets.disable_progress_bars()
    made, arguments = {
        "dpo": (DPOTrainer, DPOConfig),
        "kto": (KTOTrainer, KTOConfig),
        "sft": (SFTTrainer, SFTConfig),
        "cpo": (CPOTrainer, CPOConfig),
    }[kind]
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = None  # CPOTrainer puts one in front of every prompt
    ours = config()
    with old_names():
        return made(
            model=bare_model(model),
            args=arguments(
                output_dir=str(folder),
                per_device_train_batch_size=len(rows),
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                max_length=64,
                **settings,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=ours.lora_r, lora_alpha=ours.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )


def trl_step(trainer: Any, values: Adapter) -> tuple[float, Adapter]:
    """TRL's training step on the whole of its data set, at these weights."""
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {common_name(name) for name in named} == values.keys()
    set_parameters(named, values)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    tokens = (inputs["labels"] != -100).sum() if "labels" in inputs else None  # what transformers' own loop hands to sft
    trainer.current_gradient_accumulation_steps = 1
    with old_names():
        loss = trainer.training_step(trainer.model, inputs, tokens)
    return loss.item(), {common_name(name): p.grad.numpy().T.copy() for name, p in named.items()}


def our_step(
    backend: Any, terms: list[Term], examples: list[Example], baseline: float = 0.0
) -> tuple[float, Adapter, np.ndarray]:
    """The loss, the gradients and the log-ratios of `terms` together."""
    total, gradients, f = 0.0, {}, np.zeros(0)
    for weight, options in terms:
        criterion = Criterion(config(**options), examples)
        result, taken = step_gradients(backend, [Batch.of(examples)], criterion, baseline)
        total += weight * result.loss
        gradients = {name: gradients.get(name, 0.0) + weight * value for name, value in taken.items()}
        f = result.policy - result.reference
    return total, gradients, f


@pytest.fixture(scope="module")
def trl_results(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[float, Adapter]]:
    """TRL's loss and gradients of a case, computed once for both backends."""

    @cache
    def results(name: str) -> tuple[float, Adapter]:
        case, folder = CASES[name], tmp_path_factory.mktemp("trl")
        trainer = make_trainer(case.trainer, tiny, case.rows, folder, **case.settings)
        shapes = {common_name(n): p.detach().numpy().T for n, p in trainer.model.named_parameters() if p.requires_grad}
        return trl_step(trainer, random_adapter(shapes))

    return results


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_trl(
    backend: Any, name: str, trl_results: Callable[[str], tuple[float, Adapter]], tmp_path: Path
) -> None:
    expected, expected_gradients = trl_results(name)
    examples = encoded(CASES[name].rows, tmp_path)
    loss, gradients, f = our_step(backend, CASES[name].ours(Batch.of(examples)), examples)
    assert np.abs(f).mean() > 0.5  # far enough from a fresh adapter for what is not linear in f
    assert loss == pytest.approx(expected, rel=LOSS)
    assert relative_error(gradients, expected_gradients) < GRADIENT


ANSWERS = [(row["prompt"], row[side]) for row, side in zip(RAGGED, ("chosen", "rejected", "chosen", "rejected"), strict=True)]
ANSWERS += [("a small house and", " you"), ("tea", " and bread of France is good")]


def labelled(labels: list[int]) -> list[dict[str, Any]]:
    return [{"prompt": p, "completion": c, "label": bool(label)} for (p, c), label in zip(ANSWERS, labels, strict=True)]


def kto_trainer(rows: list[dict[str, Any]], model: str, folder: Path, chosen_weight: float, rejected_weight: float) -> Any:
    """TRL's, with the weights that make its loss ours: we even out unequal numbers by 1 / (2 share of the side)."""
    good = sum(row["label"] for row in rows)
    return make_trainer(
        "kto",
        model,
        rows[::-1],  # TRL pairs a prompt with the answer before it, lite-dil with the one behind it
        folder,
        beta=0.2,
        desirable_weight=chosen_weight * len(rows) / (2 * good),
        undesirable_weight=rejected_weight * len(rows) / (2 * (len(rows) - good)),
    )


@pytest.mark.parametrize("sign", [1, -1], ids=["z0 above 0", "z0 cut at 0"])
@pytest.mark.parametrize(
    ("labels", "weights"), [([1, 0, 1, 0, 0, 1], (1.0, 1.0)), ([1, 0, 1, 1, 0, 1], (1.2, 0.7))], ids=["balanced", "weighted"]
)
def test_kto_equals_trl(
    backend: Any, sign: int, labels: list[int], weights: tuple[float, float], tiny: str, tmp_path: Path
) -> None:
    """As training does it: z0 from the whole step's mismatched rows, then the step in micro-batches, each of any mixture."""
    rows, (chosen_weight, rejected_weight) = labelled(labels), weights
    trainer = kto_trainer(rows, tiny, tmp_path / "trl", chosen_weight, rejected_weight)
    values = random_adapter(adapter(backend), scale=0.02 * sign)
    expected, expected_gradients = trl_step(trainer, values)
    expected_z0 = trainer._metrics["train"]["kl"][-1]
    assert (expected_z0 > 0.1) if sign > 0 else expected_z0 == 0

    settings = config(
        loss="kto",
        beta=0.2,
        chosen_weight=chosen_weight,
        rejected_weight=rejected_weight,
        batch_size=2,
        gradient_accumulation_steps=3,
        reference_cache="off",
    )
    examples = encoded(rows, tmp_path)
    schedule = Schedule(settings, examples, backend.layout, mismatched(examples, settings.loss, settings.max_length))
    before = adapter(backend)
    set_adapter(backend, values)
    try:
        cache = open_cache(settings, settings, tiny, backend.identity)
        z0 = Passes(backend, settings.logp_reduction, cache, print).baseline(schedule.others(1))
        result, gradients = step_gradients(backend, schedule.batches(1), Criterion(settings, examples), z0)
    finally:
        set_adapter(backend, before)
    assert len(schedule.batches(1)) == 3
    assert z0 == pytest.approx(expected_z0, rel=LOSS)
    assert result.loss == pytest.approx(expected, rel=LOSS)
    assert relative_error(gradients, expected_gradients) < GRADIENT


# TRL's names, and what both have under them.
LOGGED = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


@pytest.mark.parametrize(("loss", "names"), [("dpo", ("rewards/accuracies",)), ("kto", ("kl",))])
def test_a_run_logs_what_trl_logs(backend: Any, loss: str, names: tuple[str, ...], tiny: str, tmp_path: Path) -> None:
    """The first line of a run that goes on from an adapter, its step in micro-batches."""
    rows = RAGGED if loss == "dpo" else labelled([1, 0, 1, 0, 0, 1])
    trainer = (
        make_trainer("dpo", tiny, rows, tmp_path / "trl", loss_type=["sigmoid"], beta=0.2)
        if loss == "dpo"
        else kto_trainer(rows, tiny, tmp_path / "trl", 1.0, 1.0)
    )
    expected_loss, _ = trl_step(trainer, adapter(backend))
    encoded(rows, tmp_path)
    backend.save_adapter(tmp_path / "adapter")
    flags = [
        "--model", tiny, "--backend", backend.name, "--dtype", "float32", "--data", str(tmp_path / "rows.jsonl"),
        "--loss", loss, "--beta", "0.2", "--init-adapter", str(tmp_path / "adapter"), "--reference", "base",
        "--batch-size", "2", "--gradient-accumulation-steps", str(len(rows) // 2), "--max-steps", "1",
        "--report-samples", "0",
        "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(["train", *flags]) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(expected_loss, rel=LOSS)
    for name in (*LOGGED, *names):
        assert line[name] == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("centred", [None, 0.01])
def test_a_margin_is_trls(tmp_path: Path, centred: float | None) -> None:
    """From the rows of a file to the loss, on given scores, in float32 on both libraries."""
    import mlx.core as mx
    import torch
    from trl import RewardTrainer

    margins = [0.5, 0.0, -1.25, 3]
    path = tmp_path / "rows.jsonl"
    rows = [{**row, "margin": margin} for row, margin in zip(RAGGED, margins, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = list(load_data(str(path), "train", encoder(), TrainConfig(max_length=64), margins=True).examples)
    batch = Batch.of(examples)
    scores = np.random.default_rng(0).normal(0, 2, (len(batch.responses), 1)).astype(np.float32)
    criterion = RewardCriterion(config(loss="reward:bt", center_rewards_coefficient=centred), examples)
    given, losses = criterion.inputs(batch), []
    for array in (torch.from_numpy, mx.array):
        arrays = {name: array(value) for name, value in given.items()}
        losses.append(float(criterion(array(scores), None, arrays)) / batch.examples)

    class Model(torch.nn.Module):
        def forward(self, **inputs: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.from_numpy(np.concatenate([scores[batch.chosen], scores[batch.rejected]])))

    gather = SimpleNamespace(gather=lambda values: values, gather_for_metrics=lambda values: values)
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=centred),
        accelerator=gather,
        model=SimpleNamespace(training=False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    expected = RewardTrainer.compute_loss(trainer, Model().eval(), {"margin": torch.tensor(margins)}).item()
    assert losses == pytest.approx([expected] * 2, abs=1e-6)
    without = float(
        criterion(torch.from_numpy(scores), None, {n: torch.from_numpy(a) for n, a in given.items() if n != "margin"})
    )
    assert abs(without / batch.examples - expected) > 0.01
