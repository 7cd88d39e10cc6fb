"""Preferences as a benchmark: which answer a model prefers, by subset, and how far its own answers went from the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.base.shares import interval
from lite_dil.data.dataset import reader_of
from lite_dil.data.encoder import Encoder, Example, truncate
from lite_dil.data.files import RowError
from lite_dil.data.options import DataOptions
from lite_dil.data.reader import Problem, refuse
from lite_dil.data.sources import records, split_sources
from lite_dil.evaluation.statistics import compare_paired, holm, mean_interval, sentence
from lite_dil.evaluation.stored_model import StoredModel
from lite_dil.generation.batch_generator import Request

SUBSET = "subset"  # the column by which pairs are grouped
_BINS = 5  # of calibration


@dataclass(frozen=True)
class PreferencePairs:
    """Pairs as a model reads them: chosen first, then rejected; and the subset of each, "" for none."""

    examples: list[Example]
    subsets: list[str]


def read_pairs(source: str, encoder: Encoder, options: DataOptions) -> PreferencePairs:
    """Read pairs of any format that training takes, cut to ``--max-length``; their column "subset" groups them.

    Raises UserError for rows that cannot be used, unless `options.skip_bad_rows` leaves them out, and for data without pairs.
    """
    found = PreferencePairs([], [])
    for name, times in split_sources(source):
        if times != 1:
            raise UserError(f"--preferences {source}: each pair is used once; leave ={times:g} out")
        rows = records(name, "test", options.max_rows)
        subsets = {place: str(row.get(SUBSET) or "") for place, row in rows if isinstance(row, dict)}
        reader, problems, kept = reader_of(name, "test", options), list[Problem](), 0
        for row in reader:
            if row.form != "pairs":
                raise UserError(f"--preferences {name}: {row.place} has no chosen and rejected response; expected pairs")
            try:
                whole = encoder.encode(row)
            except RowError as error:
                problems.append(Problem(error.kind, row.place, str(error)))
                continue
            found.examples.append(truncate(whole, options.max_length)[0])
            found.subsets.append(subsets.get(row.place, ""))
            kept += 1
        problems = [*reader.problems, *problems]
        refuse(name, [] if options.skip_bad_rows and kept else problems, kept, "pairs of chosen and rejected")
    return found


def pair_logps(model: StoredModel, examples: Sequence[Example]) -> np.ndarray:
    """Return the summed log-probs of the chosen and the rejected response, in nats, (pairs, 2) float64."""
    asked = [(each.prompt, response) for each in examples for response in each.responses]
    return np.array([logp for logp, _ in model.log_likelihoods(asked)]).reshape(-1, 2)


@dataclass(frozen=True)
class PairReward:
    """What an adapter was trained to prefer by: beta times its log-ratio to the base, summed or averaged over the tokens.

    Attributes:
        note: what the figures by it do not say; "" for nothing.
    """

    beta: float
    mean: bool
    note: str = ""

    def margins(self, base: np.ndarray, tuned: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the reward of the chosen response less that of the rejected one, (pairs,), from sums in nats, (pairs, 2)."""
        ratio = (tuned - base) / lengths if self.mean else tuned - base
        return self.beta * (ratio[:, 0] - ratio[:, 1])


def preference_figures(
    pairs: PreferencePairs, base: np.ndarray, tuned: Mapping[str, np.ndarray], rewards: Mapping[str, PairReward]
) -> dict[str, dict[str, Any]]:
    """Return each adapter's figures on pairs, by its name. A tie is right by half, whatever the rule.

    Args:
        base, tuned: what `pair_logps` returned.
        rewards: each adapter's implicit reward.
    """
    lengths = np.array([[len(response) for response in each.responses] for each in pairs.examples], np.float64)
    groups = {"all": np.ones(len(lengths), bool)}
    groups |= {subset: np.array([each == subset for each in pairs.subsets]) for subset in sorted(set(pairs.subsets) - {""})}
    longer, by_base = _right(lengths[:, 0] - lengths[:, 1]), _prefers(base / lengths)
    margins = {name: rewards[name].margins(base, sums, lengths) for name, sums in tuned.items()}
    implicit = {name: _right(margin) for name, margin in margins.items()}
    own = {name: _prefers(sums / lengths) for name, sums in tuned.items()}
    told = {
        "accuracy by mean log-prob": (by_base, own, ("rose", "fell")),
        "implicit reward against the longer answer: accuracy": (longer, implicit, ("is higher", "is lower")),
    }
    said: dict[str, list[str]] = {name: [] for name in tuned}
    for what, (first, others, words) in told.items():
        found = {name: compare_paired(first, other, tests=len(tuned)) for name, other in others.items()}
        corrected = holm([each.p for each in found.values()])
        for (name, each), p in zip(found.items(), corrected, strict=True):
            said[name].append(sentence(f"{name}: {what}" if len(tuned) > 1 else what, each, p, words))
    return {
        name: {
            "beta": rewards[name].beta,
            "reduction": "mean" if rewards[name].mean else "sum",
            "subsets": [
                {
                    "subset": subset,
                    "pairs": int(some.sum()),
                    "implicit reward": _share(implicit[name][some]),
                    "mean log-prob": _share(own[name][some]),
                    "mean log-prob of the base": _share(by_base[some]),
                    "the longer answer": _share(longer[some]),
                }
                for subset, some in groups.items()
            ],
            "calibration": calibration(margins[name]),
            "sentences": [*said[name], *([rewards[name].note] if rewards[name].note else [])],
        }
        for name in tuned
    }


def _right(margin: np.ndarray) -> np.ndarray:
    """Return 1 where a margin is above 0, 0.5 where it is 0, else 0."""
    return np.where(margin == 0, 0.5, margin > 0)


def _prefers(values: np.ndarray) -> np.ndarray:
    return _right(values[:, 0] - values[:, 1])


def _share(right: np.ndarray) -> dict[str, float]:
    share = float(right.mean())
    low, high = interval(share, len(right))
    return {"mean": share, "low": low, "high": high}


def calibration(margin: np.ndarray) -> dict[str, Any]:
    """Return how often a model is right at each confidence, sigmoid(|margin|), and the mean distance of the two.

    Perfect calibration is 0: of the pairs that it is sure of by 0.8, it is right on 0.8.
    """
    sure = 1 / (1 + np.exp(-np.abs(margin)))
    right = _right(margin)
    place = np.minimum(((sure - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    bins = [
        {
            "pairs": int((place == number).sum()),
            "confidence": float(sure[place == number].mean()),
            "right": float(right[place == number].mean()),
        }
        for number in range(_BINS)
        if (place == number).any()
    ]
    error = sum(each["pairs"] * abs(each["confidence"] - each["right"]) for each in bins) / len(margin)
    return {"error": float(error), "bins": bins}


@dataclass(frozen=True)
class DrawnTexts:
    """A model's own answers to prompts, at temperature 1: their tokens with the end token, and whether they have one."""

    ids: list[tuple[int, ...]]
    ended: list[bool]

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each, without the end token."""
        return np.array([len(ids) - ended for ids, ended in zip(self.ids, self.ended, strict=True)], np.float64)


def draw_texts(model: StoredModel, prompts: Sequence[tuple[int, ...]], tokens: int, seed: int) -> DrawnTexts:
    """Return an answer of at most `tokens` tokens to each prompt."""
    found = model.draw([Request(prompt, tokens, int(digest(seed, prompt)[:16], 16)) for prompt in prompts])
    return DrawnTexts([answer.whole for answer in found], [answer.end is not None for answer in found])


def distance_figures(
    tuned: StoredModel, base: StoredModel, prompts: Sequence[tuple[int, ...]], answers: DrawnTexts, own: DrawnTexts
) -> dict[str, Any]:
    """Return the KL from the reference on an adapter's own answers, in nats per answer, and how their length changed.

    The KL is the mean of log pi - log pi_ref, which may come out below 0 by chance.

    Args:
        answers, own: of the base and of the adapter, to the prompts.
    """
    asked = list(zip(prompts, own.ids, strict=True))
    policy, reference = (np.array([logp for logp, _ in model.log_likelihoods(asked)]) for model in (tuned, base))
    ratio, longer = policy - reference, own.lengths - answers.lengths
    (kl_low, kl_high), (low, high) = mean_interval(ratio), mean_interval(longer)
    return {
        "answers": len(prompts),
        "kl": {"mean": float(ratio.mean()), "low": kl_low, "high": kl_high},
        "length": {
            "base": float(answers.lengths.mean()),
            "tuned": float(own.lengths.mean()),
            "difference": float(longer.mean()),
            "low": low,
            "high": high,
        },
        "cut": {"base": answers.ended.count(False), "tuned": own.ended.count(False)},
    }
