"""Two language models whose ratio is known: pi_ref, and pi_chosen made from it; draws of both, and exact divergences.

pi_chosen is the same model with another system prompt, or at another temperature, so that log pi_chosen - log pi_ref of an
answer can be computed. An answer is its first K tokens, or those up to its end token: both sides are cut alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lite_dil.backends.types import POLICY, REFERENCE, Sampling
from lite_dil.base.hashing import digest
from lite_dil.generation.asked import encode_requests
from lite_dil.generation.policy import Policy

ROWS = 32  # of a pass and of a batch of draws
PLAIN = "You are a helpful assistant."  # the system prompt of pi_ref
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What pi_ref and pi_chosen are.

    Attributes:
        tokens: K, the most tokens of an answer.
        brief: the system prompt of pi_chosen; None for that of pi_ref.
        temperature: that of pi_chosen.
        null: whether pi_chosen is pi_ref: the noise floor.
    """

    tokens: int
    brief: str | None = "Answer in one short sentence."
    temperature: float = 1.0
    null: bool = False

    @property
    def name(self) -> str:
        """The name in files and on the page."""
        kind = "null" if self.null else "system" if self.brief else f"temperature-{self.temperature:g}"
        return f"{kind}-{self.tokens}"


@dataclass(frozen=True)
class Drawn:
    """Prompts with an answer of each side: token ids."""

    prompts: list[str]
    chosen: list[Ids]
    rejected: list[Ids]


class World:
    """pi_ref, pi_chosen and the trained policy pi, on one model."""

    def __init__(self, policy: Policy, setting: Setting) -> None:
        self.policy, self.setting = policy, setting

    def ids(self, question: str, chosen: bool = False) -> Ids:
        """Return the prompt's tokens, as pi_chosen or pi_ref reads it."""
        brief = self.setting.brief if chosen and not self.setting.null else None
        messages = [{"role": "system", "content": brief or PLAIN}, {"role": "user", "content": question}]
        (prompt,) = encode_requests(self.policy.encoder, self.policy.model, [messages], self.setting.tokens)
        return tuple(prompt.ids)

    def draw(self, questions: Sequence[str], seed: int, who: str) -> list[Ids]:
        """Return an answer to each question from "chosen", "reference" or "policy"."""
        chosen = who == "chosen"
        temperature = self.setting.temperature if chosen and not self.setting.null else 1.0
        found: list[Ids] = []
        with self.policy.backend.using(POLICY if who == "policy" else REFERENCE):
            for at in range(0, len(questions), ROWS):
                some = questions[at : at + ROWS]
                seeds = [int(digest("theorem", seed, who, at + i)[:15], 16) for i in range(len(some))]
                answers = self.policy.backend.generate(
                    [self.ids(question, chosen) for question in some],
                    self.setting.tokens,
                    self.policy.encoder.end_ids(),
                    seeds,
                    Sampling(temperature, 1.0),
                )
                found += [answer.whole for answer in answers]
        return found

    def pairs(self, questions: Sequence[str], seed: int) -> Drawn:
        """Return fresh answers of pi_chosen and of pi_ref to each question."""
        return Drawn(list(questions), self.draw(questions, seed, "chosen"), self.draw(questions, seed, "reference"))

    def next_logps(self, questions: Sequence[str], answers: Sequence[Ids], who: str) -> list[np.ndarray]:
        """Return the log-probs of all next tokens along each answer, (tokens, vocabulary), by the model's own logits."""
        chosen, found = who == "chosen", list[np.ndarray]()
        heat = self.setting.temperature if chosen and not self.setting.null else 1.0
        base = self.policy.backend.base  # type: ignore[attr-defined]
        with self.policy.backend.using(POLICY if who == "policy" else REFERENCE), torch.no_grad():
            for at in range(0, len(questions), ROWS):
                prompts = [self.ids(question, chosen) for question in questions[at : at + ROWS]]
                rows = [(*prompt, *answer) for prompt, answer in zip(prompts, answers[at : at + ROWS], strict=True)]
                longest = max(map(len, rows))
                padded = torch.tensor([row + (0,) * (longest - len(row)) for row in rows])  # causal: what is behind is unseen
                states = base.model(input_ids=padded, use_cache=False).last_hidden_state
                for state, prompt, row in zip(states, prompts, rows, strict=True):
                    logits = base.get_output_embeddings()(state[len(prompt) - 1 : len(row) - 1]).double()
                    found.append(torch.log_softmax(logits / heat, -1).float().numpy())
        return found


def taken(logps: Sequence[np.ndarray], answers: Sequence[Ids]) -> np.ndarray:
    """Return the summed log-prob of each answer, (answers,), from `World.next_logps`."""
    return np.array([each[np.arange(len(a)), a].sum(dtype=np.float64) for each, a in zip(logps, answers, strict=True)])


def divergence(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """Return an unbiased estimate of KL(first, second) for each prompt, in nats an answer.

    It sums the exact KL of the next token along one answer drawn from `first`, which has less variance than the log-ratio.
    """
    return np.array([(np.exp(p.astype(np.float64)) * (p - q)).sum() for p, q in zip(first, second, strict=True)])


@dataclass
class Held:
    """Fresh prompts on which a policy is measured against pi_chosen."""

    world: World
    drawn: Drawn
    seed: int

    @cached_property
    def known(self) -> dict[str, list[np.ndarray]]:
        """The next-token log-probs of pi_chosen and pi_ref along the answers of both."""
        sides = {"chosen": self.drawn.chosen, "rejected": self.drawn.rejected}
        return {
            f"{who}/{side}": self.world.next_logps(self.drawn.prompts, answers, who)
            for side, answers in sides.items()
            for who in ("chosen", "reference")
        }

    def true_ratios(self, side: str) -> np.ndarray:
        """Return log pi_chosen - log pi_ref of the answers of a side."""
        answers = getattr(self.drawn, side)
        return taken(self.known[f"chosen/{side}"], answers) - taken(self.known[f"reference/{side}"], answers)

    def start(self) -> dict[str, list[float]]:
        """Return the divergences between pi_chosen and pi_ref, and the true ratio of both sides, for each prompt."""
        known = self.known
        return {
            "kl_forward": divergence(known["chosen/chosen"], known["reference/chosen"]).tolist(),
            "kl_reverse": divergence(known["reference/rejected"], known["chosen/rejected"]).tolist(),
            "true/chosen": self.true_ratios("chosen").tolist(),
            "true/rejected": self.true_ratios("rejected").tolist(),
        }

    def measure(self) -> dict[str, list[float]]:
        """Return KL(pi_chosen, pi), KL(pi, pi_chosen) and the learned log-ratio of both sides, for each prompt."""
        prompts, found = self.drawn.prompts, dict[str, list[float]]()
        for side in ("chosen", "rejected"):
            answers = getattr(self.drawn, side)
            logps = self.world.next_logps(prompts, answers, "policy")
            ratio = taken(logps, answers) - taken(self.known[f"reference/{side}"], answers)
            found[f"learned/{side}"] = ratio.tolist()
            if side == "chosen":
                found["kl_forward"] = divergence(self.known["chosen/chosen"], logps).tolist()
        own = self.world.draw(prompts, self.seed, "policy")
        policy, chosen = (self.world.next_logps(prompts, own, who) for who in ("policy", "chosen"))
        return found | {"kl_reverse": divergence(policy, chosen).tolist()}


def questions(path: Path, longest: int) -> list[str]:
    """Return the distinct first questions of a JSON Lines file's prompts that have at most `longest` characters, in order."""
    found = dict[str, None]()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            prompt = json.loads(line)["prompt"]
            text = prompt if isinstance(prompt, str) else next(each["content"] for each in prompt if each["role"] == "user")
            if len(text) <= longest:
                found[text.strip()] = None
    return list(found)
