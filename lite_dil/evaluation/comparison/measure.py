"""Measurements of a trained model: held-out log-probs, and generated answers with their KL."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.shares import standard_error
from lite_dil.base.signs import CHOSEN
from lite_dil.batching.batch import Batch
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.dataset import load
from lite_dil.data.encoder import Example
from lite_dil.evaluation.comparison.files import (
    ANSWERS_FILE,
    REFERENCE_FILE,
    Answer,
    read_answers,
    read_measured,
    write_answers,
    write_measured,
)
from lite_dil.generation.policy import Policy

ANSWERS_AT_ONCE = 8  # prompts per batch: finished batches are kept, and a GPU has memory for their keys and values


class Probe:
    """Measures a trained model, and its reference, which is the same model with its adapter off.

    Args:
        prompts: the number of held-out prompts to answer, each once.
        tokens: the maximum length of an answer; one that has not ended by then is cut.
    """

    def __init__(self, policy: Policy, config: ResolvedConfig, prompts: int, tokens: int) -> None:
        self.backend, self.encoder, self.tokens = policy.backend, policy.encoder, tokens
        self.together, self.model = config.batch_size, config.model
        assert config.eval_data is not None  # a comparison always has eval_data
        self.examples = load(config.eval_data, "test", self.encoder, config).examples
        self.prompts = list(dict.fromkeys(example.prompt for example in self.examples))[:prompts]
        self.ends = self.encoder.end_ids()

    def logps(self, examples: Sequence[Example], reference: bool = False) -> list[list[float]]:
        """Return the summed log-probs of each example's responses, in nats."""
        found: list[list[float]] = []
        with self.backend.adapter_off() if reference else nullcontext():
            for start in range(0, len(examples), self.together):
                some = examples[start : start + self.together]
                values = self.backend.sequence_logps(Batch.of(some)).tolist()
                for example in some:
                    found.append(values[: len(example.responses)])
                    del values[: len(example.responses)]
        return found

    def answers(self, path: Path, seed: int, reference: bool = False) -> list[Answer]:
        """Return an answer to each prompt, sampled at temperature 1; answers that `path` holds already are reused.

        Each has its text, its tokens without the end token, whether it ended by itself, and, of the policy, its log-ratio
        f = log pi - log pi_ref in nats, the end token included where it was drawn.
        """
        done = read_answers(path, seed) if path.exists() else []
        for start in range(len(done), len(self.prompts), ANSWERS_AT_ONCE):
            prompts = self.prompts[start : start + ANSWERS_AT_ONCE]
            seeds = [int(np.random.SeedSequence((seed, start + i)).generate_state(1)[0]) for i in range(len(prompts))]
            with self.backend.adapter_off() if reference else nullcontext():
                drawn = self.backend.generate(prompts, self.tokens, self.ends, seeds)
            ratios: list[float | None] = [None] * len(prompts)
            if not reference:
                scored = [Example(prompt, (one.whole,), (CHOSEN,)) for prompt, one in zip(prompts, drawn, strict=True)]
                both = zip(self.logps(scored), self.logps(scored, reference=True), strict=True)
                ratios = [policy[0] - base[0] for policy, base in both]
            for prompt, (ids, end), ratio in zip(prompts, drawn, ratios, strict=True):
                texts = [self.encoder.tokenizer.decode(part, skip_special_tokens=True).strip() for part in (prompt, ids)]
                answer = {"prompt": texts[0], "answer": texts[1], "tokens": len(ids), "ended": end is not None}
                done.append({**answer, "log_ratio": ratio, "seed": seed})
            write_answers(path, done)
        return done


def measure_reference(probe: Probe, folder: Path, seed: int) -> dict[str, Any]:
    """Return the reference's measurements, made once for all runs and kept in `folder`."""
    path, of = folder / REFERENCE_FILE, {"model": probe.model, "seed": seed}
    if not path.exists():
        logps = probe.logps(probe.examples, reference=True)
        answers = probe.answers(folder / ANSWERS_FILE, seed, reference=True)
        sides = {side: of_side(probe.examples, logps, sign) for side, sign in (("chosen", True), ("rejected", False))}
        figures = {f"logps/{side}": float(values.mean()) for side, values in sides.items() if len(values)}
        write_measured(path, {**of, "logps": logps, "figures": figures | _lengths(answers), "samples": len(answers)})
    return read_measured(path, **of)


def measure(probe: Probe, reference: dict[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """Return a trained model's figures, their standard errors, and the numbers of held-out examples and answers."""
    examples = probe.examples
    figures, errors = held_out_figures(examples, probe.logps(examples), reference["logps"])
    answers = probe.answers(folder / ANSWERS_FILE, seed)
    figures["kl"], errors["kl"] = mean_and_error(np.array([answer["log_ratio"] for answer in answers]))
    return {"figures": figures | _lengths(answers), "errors": errors, "held_out": len(examples), "samples": len(answers)}


def held_out_figures(
    examples: Sequence[Example], policy: list[list[float]], reference: list[list[float]]
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Return means over the held-out responses, and the standard errors of some, by name.

    ``logps/*`` are sums over a response's tokens, ``change/*`` their difference from the reference's, ``log_ratio/*`` that
    difference per token; ``margin`` is the chosen response's change minus the rejected one's, of a pair (without pairs: of the
    means); ``accuracy`` is the share of pairs whose chosen response gained more in total, ``accuracy_per_token`` per token.
    """
    ratios = [(np.array(p) - np.array(r)).tolist() for p, r in zip(policy, reference, strict=True)]
    lengths = [list(map(len, example.responses)) for example in examples]
    figures: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    for side, chosen in (("chosen", True), ("rejected", False)):
        change = of_side(examples, ratios, chosen)
        if len(change):
            figures[f"logps/{side}"] = float(of_side(examples, policy, chosen).mean())
            figures[f"change/{side}"], errors[f"change/{side}"] = mean_and_error(change)
            figures[f"log_ratio/{side}"] = float((change / of_side(examples, lengths, chosen)).mean())
    pairs = [
        (f[i], f[j], n[i], n[j])
        for example, f, n in zip(examples, ratios, lengths, strict=True)
        for i, good in enumerate(example.signs)
        for j, bad in enumerate(example.signs)
        if good == CHOSEN != bad
    ]
    if pairs:
        f_w, f_l, n_w, n_l = np.array(pairs).T
        figures["margin"], errors["margin"] = mean_and_error(f_w - f_l)
        figures["accuracy"], errors["accuracy"] = _share_and_error(f_w > f_l)
        figures["accuracy_per_token"], errors["accuracy_per_token"] = _share_and_error(f_w / n_w > f_l / n_l)
    elif {"change/chosen", "change/rejected"} <= figures.keys():
        figures["margin"] = figures["change/chosen"] - figures["change/rejected"]
    return figures, errors


def of_side(examples: Sequence[Example], values: Sequence[Sequence[float]], chosen: bool) -> np.ndarray:
    """Return the values of the chosen or of the rejected responses, (responses,)."""
    return np.array(
        [
            value
            for example, some in zip(examples, values, strict=True)
            for sign, value in zip(example.signs, some, strict=True)
            if (sign == CHOSEN) == chosen
        ]
    )


def _share_and_error(right: np.ndarray) -> tuple[float, float]:
    share = float(right.mean())
    return share, standard_error(share, len(right))


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean and its standard error, None for a single value."""
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def _lengths(answers: list[Answer]) -> dict[str, float]:
    return {
        "length": float(np.mean([answer["tokens"] for answer in answers])),
        "ended": float(np.mean([answer["ended"] for answer in answers])),
    }
