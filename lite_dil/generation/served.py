"""Draw responses from an OpenAI-compatible server that serves the current policy and returns token ids, as vLLM does.

The adapter changes with each step, so it is written and loaded by the server, under a new name, before each set of answers:
the server must read this machine's files, and load adapters while it runs (vLLM: ``--enable-lora``, and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment). What it returns is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request as Post
from urllib.request import urlopen
from uuid import uuid4

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import Generated
from lite_dil.base.errors import UserError
from lite_dil.base.files import make_folder, remove, replace_folder
from lite_dil.generation.batch_generator import Wanted
from lite_dil.generation.rollouts import Rollout

_TIMEOUT = 600  # seconds for an answer of the server
_AT_ONCE = 64  # requests: the server makes its batches of those that wait
_APART = 0.1  # nats per token by which its log-probs may differ on average: a guess, above what rounding in 16 bits makes
_T = TypeVar("_T")


class ServedPolicy:
    """The policy on a server, with the adapter that it had at the last `serve`.

    Args:
        url: of the server, http or https; its paths are below /v1.
        folder: in which adapters are written for the server; those it no longer needs are removed.
        ends: the tokens that end a response.
        vocabulary: the number of token ids.
    """

    def __init__(self, backend: Backend, url: str, folder: Path, ends: Sequence[int], vocabulary: int) -> None:
        self.backend, self.url, self.folder, self.ends = backend, url.rstrip("/").removesuffix("/v1"), folder.resolve(), ends
        self._own = uuid4().hex[:8]  # a server refuses a name that an earlier process has left there
        self._vocabulary, self._name = vocabulary, ""
        self._logps = dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]]()

    def serve(self, step: int) -> None:
        """Have the server load the current adapter, and drop the one before."""
        name = f"lite-dil-{self._own}-{step}"
        make_folder(self.folder)
        replace_folder(self.folder / name, self.backend.save_adapter)
        try:
            self._ask("load_lora_adapter", {"lora_name": name, "lora_path": str(self.folder / name)}, str)
        except UserError:
            remove(self.folder / name)
            raise
        before, self._name, self._logps = self._name, name, {}
        self._drop(before)

    def close(self) -> None:
        """Have the server drop the adapter."""
        name, self._name = self._name, ""
        self._drop(name)

    def draw(self, batch: Sequence[Wanted]) -> list[Generated]:
        """Return responses to the prompts, drawn at temperature 1 from the whole distribution; see `BatchGenerator.draw`.

        Each is a request of its own, with its own seed; a server that keeps prompts' keys and values computes a prompt once.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = [pool.submit(self._drawn, each) for each in batch]
            try:
                return [each.result() for each in asked]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error, those that have not been sent are not

    def check(self, prompts: Sequence[Sequence[int]], found: Sequence[Sequence[Rollout]]) -> None:
        """Raise UserError if the server's log-probs of its responses are not the policy's.

        Their mean difference shows a server with another model or adapter, and not a single response from elsewhere.

        Args:
            found: the responses with the policy's own log-probs, for each prompt.
        """
        apart = [
            np.abs(one.logps - np.array(self._logps[tuple(prompt), one.ids][: len(one.ids)]))
            for prompt, several in zip(prompts, found, strict=True)
            for one in several
        ]
        if (mean := float(np.concatenate(apart).mean())) > _APART:
            raise UserError(
                f"--sampler {self.url}: its log-probs differ from the policy's by {mean:.2g} nats per token on average: it "
                "serves another model, another quantisation or another adapter, so that its answers are not the policy's own"
            )

    def _drop(self, name: str) -> None:
        if name:
            remove(self.folder / name)
            self._ask("unload_lora_adapter", {"lora_name": name}, str)

    def _drawn(self, wanted: Wanted) -> Generated:
        asked = {
            "model": self._name,
            "prompt": list(wanted.prompt),
            "n": 1,
            "max_tokens": wanted.room,
            "seed": wanted.seed % 2**31,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,  # vLLM would take what it does not get from the checkpoint's generation_config.json
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(self.ends),
            "logprobs": 0,
            "return_token_ids": True,
        }
        choices = self._ask("completions", asked, lambda text: json.loads(text)["choices"])
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise UserError(f"--sampler {self.url}: expected `choices` with one object for n = 1, as vLLM returns")
        return self._answer(wanted, choices[0])

    def _answer(self, wanted: Wanted, choice: dict[str, Any]) -> Generated:
        """Return a choice as a response, and remember its log-probs."""
        ids, more = choice.get("token_ids"), choice.get("logprobs")
        logps = more.get("token_logprobs") if isinstance(more, dict) else None
        if not isinstance(ids, list) or not ids or not all(type(each) is int for each in ids):
            raise UserError(
                f"--sampler {self.url}: its choices have no token_ids. Text is never encoded again, since that may give other "
                "tokens; take a server that knows return_token_ids, such as vLLM"
            )
        if wrong := [each for each in ids if not 0 <= each < self._vocabulary]:
            raise UserError(
                f"--sampler {self.url}: token {wrong[0]} is not one of the model's {self._vocabulary}: it serves another model"
            )
        if not isinstance(logps, list) or len(logps) != len(ids) or not all(_is_logp(each) for each in logps):
            raise UserError(
                f"--sampler {self.url}: its choices have no logprobs.token_logprobs with one finite number for each token"
            )
        generated = Generated.of(ids, self.ends)
        if len(ids) > wanted.room or (generated.end is None and len(ids) < wanted.room):
            raise UserError(
                f"--sampler {self.url}: a choice of {len(ids)} tokens with finish_reason {choice.get('finish_reason')!r} "
                f"neither ends with one of the end tokens {list(self.ends)} nor is as long as max_tokens {wanted.room}"
            )
        self._logps[wanted.prompt, generated.whole] = logps
        return generated

    def _ask(self, path: str, content: dict[str, Any], read: Callable[[str], _T]) -> _T:
        """Post JSON to a path of the server and read its answer. Raises UserError if that fails."""
        where, data = f"{self.url}/v1/{path}", json.dumps(content).encode()
        try:
            with urlopen(_post(where, data), timeout=_TIMEOUT) as answer:  # noqa: S310
                return read(answer.read().decode())
        except HTTPError as error:
            said = error.read().decode(errors="replace").strip()[:300]
            raise UserError(f"--sampler {self.url}: /v1/{path} answers {error.code}: {said or error.reason}") from None
        except (OSError, HTTPException) as error:  # URLError is an OSError; a broken answer is an HTTPException
            reason = getattr(error, "reason", error)
            raise UserError(f"--sampler {self.url} cannot be reached: {str(reason) or type(reason).__name__}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--sampler {self.url}: /v1/{path} does not answer in JSON as an OpenAI server does") from None


def _is_logp(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9  # neither NaN nor infinite, which JSON of Python's has


def _post(where: str, data: bytes) -> Post:
    return Post(where, data, {"Content-Type": "application/json"})  # noqa: S310
