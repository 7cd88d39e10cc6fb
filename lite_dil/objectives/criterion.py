"""A config's objective on a data set: from the log-probs of a batch to the loss that a backend differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.config.train_config import TrainConfig
from lite_dil.data.dataset import ExampleStore
from lite_dil.data.encoder import Example, truncate
from lite_dil.data.reader import CHOSEN
from lite_dil.objectives.losses import Array, log_ratio
from lite_dil.objectives.table import OBJECTIVES, Answers, Pairs, constants, need


class Criterion:
    """The objective of `config` with the weights that belong to a data set.

    A loss of the DIL family is ``E_chosen[l_1] + E_ref[l_-1]``. Each expectation is estimated with the share that its side has
    in the whole data, never in a batch, so that a batch may hold any mixture of good and bad answers (and splitting a step
    changes nothing). The loss is a mean over examples: pairs, or answers without a partner.
    """

    def __init__(self, config: TrainConfig, examples: Sequence[Example]) -> None:
        self.objective = OBJECTIVES[config.loss]
        self.constants = constants(config.loss, config)
        self.form = self.objective.form(self.constants)
        self.reduction = config.logp_reduction or self.objective.reduction
        signs = [example.signs for example in examples]
        chosen = sum(side.count(CHOSEN) for side in signs)
        rejected = sum(map(len, signs)) - chosen
        if isinstance(self.form, Pairs):
            chosen = rejected = sum(side.count(CHOSEN) * (len(side) - side.count(CHOSEN)) for side in signs)
        elif self.constants.get("denominator") == "both":
            rejected += chosen
        self.chosen_weight = self.constants.get("chosen_weight", 1.0) * len(examples) / max(chosen, 1)
        self.rejected_weight = self.constants.get("rejected_weight", 1.0) * len(examples) / max(rejected, 1)

    def inputs(self, batch: Batch, baseline: float = 0.0) -> dict[str, np.ndarray]:
        """Return what the loss needs beside log-probs, as arrays for a backend to convert.

        Among them ``chosen`` and ``rejected``, indices into the batch's responses, of the same shape (pairs,) for an objective
        of pairs; and ``token_weights`` (tokens,) float32 only where the objective has them: a backend that finds it adds
        ``weighted_logps`` (responses,), the log-probs summed with these weights, before it calls the loss.

        Args:
            baseline: kto's z0, from the whole optimiser step.
        """
        chosen, rejected = batch.pairs if isinstance(self.form, Pairs) else (batch.chosen, batch.rejected)
        if self.constants.get("denominator") == "both":
            rejected = np.arange(len(batch.responses))
        arrays = {
            "lengths": batch.lengths,
            "chosen": chosen,
            "rejected": rejected,
            "baseline": np.array(baseline, np.float32),
        }
        if self.objective.token_weights:
            weights = [self.objective.token_weights(len(response)) for response in batch.responses]
            arrays["token_weights"] = np.concatenate(weights).astype(np.float32)
        return arrays

    def __call__(self, policy: Array, reference: Array, inputs: dict[str, Any]) -> Array:
        """Return the loss summed over the batch's examples, a scalar; to be divided by the step's number of examples.

        Args:
            policy: (responses,) summed log-probs of the answers in nats, with a gradient.
            reference: (responses,) the reference's.
            inputs: what `inputs` returned, as arrays of the same library as the other two.
        """
        mean = policy / inputs["lengths"]
        figures = {
            "log_ratio": log_ratio(policy, reference, inputs["lengths"], self.reduction),
            "logps": mean if self.reduction == "mean" else policy,
            "mean_logps": mean,
            "weighted_logps": inputs.get("weighted_logps"),
        }

        def answers(index: Array) -> Answers:
            sides = {name: None if values is None else values[index] for name, values in figures.items()}
            return Answers(**sides, baseline=inputs["baseline"])

        chosen, rejected = answers(inputs["chosen"]), answers(inputs["rejected"])
        if isinstance(self.form, Pairs):
            return self.chosen_weight * self.form.loss(chosen, rejected).sum()
        total = self.chosen_weight * self.form.chosen(chosen).sum()
        if self.form.rejected is not None:
            total = total + self.rejected_weight * self.form.rejected(rejected).sum()
        return total


def check_data(config: TrainConfig, form: str, signs: set[int], source: str) -> None:
    """Raise UserError where the objective cannot be trained on data of this form; `signs` are those of its answers."""
    name, objective = config.loss, OBJECTIVES[config.loss]
    sampled = config.sample_rejected is not None
    if sampled and form != "demonstrations":
        raise UserError(
            f"--sample-rejected is for demonstrations (prompt, completion), and {source} has {form}, with rejected answers of "
            "its own; leave it out"
        )
    if objective.data == "chosen":
        if CHOSEN not in signs:
            raise UserError(f"--loss {name} trains on good answers, and {source} has none")
        return
    others = f"--sample-rejected 1 draws the rejected side from the model, and --loss {' or '.join(need('chosen'))} needs none"
    if form == "demonstrations" and not sampled:
        wanted = "pairs (prompt, chosen, rejected)" if objective.data == "pairs" else "rejected answers as well as good ones"
        raise UserError(f"--loss {name} needs {wanted}, and {source} has demonstrations alone; {others}")
    if form == "unpaired":
        if objective.data == "pairs":
            raise UserError(
                f"--loss {name} needs pairs (prompt, chosen, rejected), and {source} has single answers with labels; on those "
                f"train {', '.join(need('sides'))}"
            )
        if len(signs) < 2:
            kind = "good" if CHOSEN in signs else "bad"
            raise UserError(f"--loss {name} needs good and bad answers, and {source} has only {kind} ones (field 'label')")


def mismatched(examples: Sequence[Example], config: TrainConfig) -> Sequence[Example]:
    """Return for each example its prompt with the answers of the next example that has another prompt: kto's rows for z0.

    They are fixed for the data set, so that the reference's log-probs of them are computed once.
    """
    count, partner = len(examples), np.full(len(examples), -1)
    prompts = np.fromiter((hash(example.prompt) for example in examples), np.int64, count)
    for i in [*range(count - 1, -1, -1)] * 2:  # twice, because the last one's may be among the first
        following = (i + 1) % count
        partner[i] = following if prompts[following] != prompts[i] else partner[following]
    if -1 in partner:
        raise UserError(f"--loss {config.loss} compares answers to different prompts, and all of the data has the same one")
    found = ExampleStore()
    for example, other in zip(examples, partner.tolist(), strict=True):
        found.append(truncate(replace(examples[other], prompt=example.prompt, place=example.place), config.max_length)[0])
    return found
