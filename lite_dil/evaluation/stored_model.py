"""A model in an evaluation: what it makes of given responses, and the responses it draws, are computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from lite_dil.backends.types import Generated, Sampling
from lite_dil.base.display import Bar
from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.data.encoder import TokenIds
from lite_dil.evaluation.store import Result, ResultStore
from lite_dil.generation.batch_generator import BatchGenerator, Request, batched
from lite_dil.generation.policy import Policy
from lite_dil.generation.scoring import token_hits

BATCH_TOKENS = 16384  # prompts plus room for responses, generated in one batch
_SCORED_TOKENS = 32768  # scored before they are kept


@dataclass(frozen=True)
class StoredModel:
    """The base or an adapter on it, with its results.

    Attributes:
        policy: loaded with a layout that shares prompts, so that the responses to a prompt share it.
        adapter: the name of the adapter on the policy's backend; "reference" is the base.
        store: has the results that are known, and takes new ones.
        bar: shows progress: `Display.bar`.
        say: tells the user if memory holds less than a pass.
    """

    policy: Policy
    adapter: str
    store: ResultStore
    bar: Callable[[int, int], AbstractContextManager[Bar]]
    say: Callable[[str], None]

    def log_likelihoods(self, asked: Sequence[tuple[TokenIds, TokenIds]]) -> list[tuple[float, bool]]:
        """Return the log-prob of each response to its prompt, summed in nats, and whether greedy decoding would give it.

        Raises UserError if one is not finite.
        """
        keys = [digest("loglikelihood", *each) for each in asked]
        wanted: dict[TokenIds, dict[TokenIds, str]] = {}
        for (prompt, response), key in zip(asked, keys, strict=True):
            if key not in self.store.known:
                wanted.setdefault(prompt, {})[response] = key
        prompts = sorted(wanted, key=lambda prompt: (-len(prompt), prompt))
        missing = sum(map(len, wanted.values()))
        done = len(set(keys)) - missing
        with self.bar(missing + done, done) as bar, self.policy.backend.using(self.adapter):
            for part in _parts(prompts, wanted):
                responses = [list(wanted[prompt]) for prompt in part]
                found = token_hits(self.policy.backend, part, responses, self.say)
                new: dict[str, Result] = {}
                for prompt, several in zip(part, found, strict=True):
                    for key, hits in zip(wanted[prompt].values(), several, strict=True):
                        new[key] = float(hits[:, 0].sum(dtype="float64")), bool(hits[:, 1].all())
                self._keep(new)
                done += len(new)
                bar.update(done, None)
        return [self.store.known[key] for key in keys]  # type: ignore[misc]  # these keys have nothing else

    def draw(self, asked: Sequence[Request]) -> list[Generated]:
        """Return responses at temperature 1, from the whole distribution."""
        ends = self.policy.encoder.end_ids()
        keys = [digest("draw", each.prompt, each.room, each.seed, tuple(ends)) for each in asked]
        missing = {each: key for each, key in zip(asked, keys, strict=True) if key not in self.store.known}
        done = len(set(keys)) - len(missing)
        generator = BatchGenerator(self.policy.backend, ends, self.say, Sampling(1.0))
        with self.bar(len(missing) + done, done) as bar, self.policy.backend.using(self.adapter):
            for batch in batched(list(missing), BATCH_TOKENS):
                self.store.add({missing[each]: answer for each, answer in zip(batch, generator.draw(batch), strict=True)})
                done += len(batch)
                bar.update(done, None)
        return [self.store.known[key] for key in keys]  # type: ignore[misc]  # these keys have nothing else

    def _keep(self, new: Mapping[str, Result]) -> None:
        try:
            self.store.add(new)
        except ValueError as error:
            raise UserError(f"{self.adapter}: {error}; the weights of the model or of its adapter are damaged") from None


def _parts(prompts: Sequence[TokenIds], wanted: Mapping[TokenIds, Mapping[TokenIds, str]]) -> Iterator[list[TokenIds]]:
    """Yield prompts, some at a time."""
    part, tokens = list[TokenIds](), 0
    for prompt in prompts:
        part.append(prompt)
        tokens += len(prompt) + sum(map(len, wanted[prompt]))
        if tokens >= _SCORED_TOKENS:
            yield part
            part, tokens = [], 0
    if part:
        yield part
