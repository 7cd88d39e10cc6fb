"""A model with its adapter, in memory: load it, score and generate responses, save it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lite_dil.backends import registry
from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import POLICY, REFERENCE, Sampling, never
from lite_dil.base import html
from lite_dil.base.errors import UserError
from lite_dil.base.files import replace_folder
from lite_dil.base.hashing import file_pieces, sha256
from lite_dil.base.memory import peak_rss_mb
from lite_dil.base.start import quiet_bars
from lite_dil.data.encoder import Encoder, encoder_of
from lite_dil.generation.asked import Asked, Several, answer_seed, encode_requests, encode_responses, is_one
from lite_dil.models.find import resolve_model
from lite_dil.models.options import ModelOptions, ResolvedAdapter
from lite_dil.runs.folder import RunFolder, say_unfinished

if TYPE_CHECKING:
    from lite_dil.backends.options import EngineOptions, LoadOptions
    from lite_dil.data.encoder import Example
    from lite_dil.generation.batch_generator import BatchGenerator

_BATCH_TOKENS = 16384  # prompts plus room for responses, generated in one batch
_CLOSED = "this policy was closed and its memory freed; load it again with dil.load"


@dataclass(frozen=True)
class AdapterSource:
    """An adapter and the model it is on.

    Attributes:
        adapter: the folder of the adapter's files, or None for the bare model.
        run: the run that made it, if it lies in a run's folder.
        options: how the model is loaded.
        strength: multiplies the adapter.
    """

    adapter: Path | None
    run: RunFolder | None
    options: ModelOptions
    strength: float = 1.0


class Policy:
    """A language model with its LoRA adapter, in memory. The reference is the same model with the adapter off.

    `lite_dil.load` returns one. A prompt is text, which is one user turn if the model has a chat template and is otherwise
    continued as it is, or a list of chat messages with "role" and "content". A ``with`` block closes the policy at its end.

    Args:
        model: the result of `resolve_model`.
        options: the options by name that it was loaded with for training; None if it was loaded for inference.
        memory_before: MiB that the process used before the model was loaded.
        say: shows a line to the user.

    Attributes:
        source: where the adapter comes from.
        trained: whether a run has trained the adapter since it was loaded or renewed.
        run: the folder of that run.
    """

    def __init__(
        self,
        backend: Backend,
        encoder: Encoder,
        source: AdapterSource,
        model: str,
        say: Callable[[str], None],
        options: LoadOptions | None = None,
        memory_before: float = 0.0,
    ) -> None:
        self._backend: Backend | None = backend
        self.encoder, self.source, self.model, self.options = encoder, source, model, options
        self.memory_before, self._say, self._reference = memory_before, say, False
        self.trained = False
        self.run: RunFolder | None = None

    @property
    def backend(self) -> Backend:
        """The backend. Raises UserError if the policy is closed."""
        if self._backend is None:
            raise UserError(_CLOSED)
        return self._backend

    @property
    def open(self) -> bool:
        """Whether it was not closed."""
        return self._backend is not None

    def __repr__(self) -> str:
        state = "closed" if self._backend is None else self.backend.description
        adapter = ", trained" if self.trained else f", adapter {self.source.adapter}" if self.source.adapter else ""
        return f"<Policy {self.source.options.model} on {state}{adapter}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows of it."""
        if self._backend is None:
            return html.facts("Policy", {"model": self.source.options.model, "state": "closed; load it again with dil.load"})
        state = f"trained by {self.run.path}" if self.run else "not trained since it was loaded or made anew"
        rows = {"model": self.source.options.model, "computes on": self._backend.description, "adapter": self._adapter()}
        rows |= {"state": state, "memory": f"at most {self._backend.peak_memory_mb():,.0f} MB so far"}
        return html.facts("Policy", rows)

    def _adapter(self) -> str:
        """Say which adapter it has."""
        if self.source.adapter:
            return str(self.source.adapter)
        if self.options is None:
            return "none: the bare model"
        options = self.options
        return options.init_adapter or f"LoRA on {options.target_modules}, rank {options.lora_r}, alpha {options.lora_alpha:g}"

    def __enter__(self) -> Policy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory of the model and its adapter; any later use of the policy raises UserError."""
        if self._backend is not None:
            name, self._backend = self._backend.name, None
            registry.free(name)

    @overload
    def logps(self, prompts: Asked, responses: str) -> float: ...
    @overload
    def logps(self, prompts: Asked | Several, responses: list[str]) -> list[float]: ...
    def logps(self, prompts: Asked | Several, responses: str | list[str]) -> float | list[float]:
        """Return log pi(response | prompt) in nats, summed over the response's tokens including its end token.

        Args:
            prompts: one prompt, or a list of one prompt per response.
            responses: a text, which returns a number, or a list of texts, which returns a list. Responses to one prompt share
                its computation.

        Raises:
            UserError: the model's template refuses a prompt or response, or the lists differ in length.
            OutOfMemory: the device does not hold the longest of them by itself.
        """
        found = self._sums(encode_responses(self.encoder, prompts, responses))
        return found[0] if isinstance(responses, str) else found

    @overload
    def log_ratio(self, prompts: Asked, responses: str) -> float: ...
    @overload
    def log_ratio(self, prompts: Asked | Several, responses: list[str]) -> list[float]: ...
    def log_ratio(self, prompts: Asked | Several, responses: str | list[str]) -> float | list[float]:
        """Return log pi(response | prompt) - log pi_ref(response | prompt) in nats, summed; arguments as for `logps`.

        It compares the policy with the reference even inside `as_reference`, and is exactly 0 before training.
        """
        examples, values = encode_responses(self.encoder, prompts, responses), []
        for name in (POLICY, REFERENCE):
            with self.backend.using(name):
                values.append(self._sums(examples))
        found = [policy - reference for policy, reference in zip(*values, strict=True)]
        return found[0] if isinstance(responses, str) else found

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Make `logps`, `generate` and `stream` use the reference inside the block."""
        before, self._reference = self._reference, True
        try:
            with self.backend.adapter_off():
                yield
        finally:
            self._reference = before

    @overload
    def generate(
        self,
        prompts: Asked,
        *,
        n: None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompts: Several,
        *,
        n: None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        prompts: Asked,
        *,
        n: int,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        prompts: Several,
        *,
        n: int,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[str]]: ...
    def generate(
        self,
        prompts: Asked | Several,
        *,
        n: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str | list[str] | list[list[str]]:
        """Generate responses to a prompt, or to a list of prompts, in batches that memory holds.

        A response depends on its prompt, its number and the seed, not on other prompts (except for rounding), and equals that
        of ``lite-dil generate --chat`` with the same settings.

        Args:
            n: responses per prompt; if given, each prompt gets a list of `n` texts, else one text.
            max_new_tokens: maximum tokens of a response, including its end token.
            temperature: 0 always takes the most likely token, 1 samples from the model's distribution.
            top_p: sample from the most likely tokens up to this total probability.

        Returns:
            The texts, without control tokens, in the order of the prompts.

        Raises:
            UserError: the model cannot take a prompt, or a setting is invalid.
            OutOfMemory: the device does not hold a single response.
        """
        from lite_dil.generation.batch_generator import Request, batched

        if n is not None and n < 1:
            raise UserError(f"generate: n is {n}; expected at least 1")
        if n is not None and n > 1 and temperature == 0:
            raise UserError(f"generate: {n} responses at temperature 0 are all the same; give a temperature above 0")
        asked = encode_requests(self.encoder, self.model, prompts, max_new_tokens)
        wanted = [
            Request(prompt.ids, max_new_tokens, answer_seed(seed, prompt, number))
            for prompt in asked
            for number in range(n or 1)
        ]
        places = {id(each): place for place, each in enumerate(wanted)}
        generator = self.generator(Sampling(temperature, top_p))
        texts = [""] * len(wanted)
        for batch in batched(wanted, _BATCH_TOKENS):
            for each, answer in zip(batch, generator.draw(batch), strict=True):
                place = places[id(each)]
                texts[place] = asked[place // (n or 1)].text(self.encoder, answer.ids)
        if n is None:
            return texts[0] if is_one(prompts) else texts
        rows = [texts[at : at + n] for at in range(0, len(texts), n)]
        return rows[0] if is_one(prompts) else rows

    def stream(
        self,
        prompt: Asked,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Generate a response to one prompt and yield its text in pieces; arguments and errors as for `generate`.

        It continues as the policy or as the reference, whichever it was at the call.
        """
        from lite_dil.generation.conversation import FittedPrompt
        from lite_dil.generation.stream import Stream

        (asked,) = encode_requests(self.encoder, self.model, [prompt], max_new_tokens)
        continued = FittedPrompt(asked.ids, max_new_tokens, 0)
        sampling = Sampling(temperature, top_p)
        stream = Stream(
            self.backend, self.encoder, continued, answer_seed(seed, asked, 0), sampling, reference=False, strip=asked.chat
        )
        return self._pieces(stream, REFERENCE if self._reference else POLICY)

    def _pieces(self, stream: Any, name: str) -> Iterator[str]:
        while not stream.done:
            with self.backend.using(name):
                piece = stream.step()
            if piece:
                yield piece

    def save(self, folder: str | Path) -> Path:
        """Write the adapter into a new folder, in the backend's own format (PEFT's or mlx-lm's), and return the folder.

        Raises UserError if there is no adapter, or if the folder already exists.
        """
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} already exists; give a new folder")
        if self.options is None and self.source.adapter is None:
            raise UserError("this policy is the bare model, without an adapter to save")
        replace_folder(path, self.backend.save_adapter)
        return path

    def fresh(self, seed: int | None = None) -> Policy:
        """Reset the adapter to what it was when the policy was loaded, and return the policy; the base stays in memory.

        With a `seed`, the adapter is the one of a load with that seed. What was trained since remains only in the run
        folders. Raises UserError if the policy was loaded for inference.
        """
        if self.options is None:
            raise UserError("this policy was loaded for inference (trainable=False); load it for training")
        if seed is not None:
            self.options = replace(self.options, seed=seed)
        self.backend.renew_policy(self.options)
        self.trained, self.run = False, None
        return self

    def generator(self, sampling: Sampling, stop: Callable[[], bool] = never) -> BatchGenerator:
        """Return what draws answers to tokens in batches that memory holds; `stop` ends answers as they are."""
        from lite_dil.generation.batch_generator import BatchGenerator

        return BatchGenerator(self.backend, self.encoder.end_ids(), self._say, sampling, stop)

    def begin_training(self, run: RunFolder) -> None:
        """Note that a run changes the adapter from now on."""
        self.trained, self.run = True, run

    def _sums(self, examples: list[Example]) -> list[float]:
        from lite_dil.generation.scoring import token_logps

        prompts, responses = [each.prompt for each in examples], [each.responses for each in examples]
        found = token_logps(self.backend, prompts, responses, self._say)
        return [float(each.sum(dtype="float64")) for several in found for each in several]


def load(
    source: AdapterSource,
    say: Callable[[str], None],
    training: LoadOptions | None = None,
    in_files: bool = False,
    engine: EngineOptions | None = None,
) -> Policy:
    """Load the model with its adapter for inference, or by options for `training`, which hold the initial adapter.

    `say` shows a line to the user; `in_files` is that of `registry.load`; `engine` has the layout of inference (plain).
    """
    say_unfinished(source.adapter, source.run, say)
    options, name = source.options, registry.resolve(source.options.backend)
    registry.prepare(name, options, training)
    quiet_bars()
    model = resolve_model(options.model, say)
    return load_found(source, name, model, encoder_of(model, options), say, training, in_files, engine)


def load_found(
    source: AdapterSource,
    backend: str,
    model: str,
    encoder: Encoder,
    say: Callable[[str], None],
    training: LoadOptions | None,
    in_files: bool = False,
    engine: EngineOptions | None = None,
) -> Policy:
    """Finish `load` after `model`, a result of `resolve_model`, was found and its tokenizer loaded."""
    registry.import_library(backend)  # `registry.load` tells what it remarks
    before = peak_rss_mb()
    of = source.adapter
    adapter = None if of is None else ResolvedAdapter(init_adapter=str(of), reference="base", lora_dropout=0.0)
    loaded = registry.load(backend, source.options, model, training or adapter, training or engine, say, in_files)
    loaded.set_strength(source.strength)
    say(f"{source.options.model} on {loaded.description}")
    return Policy(loaded, encoder, source, model, say, training, before)


def identity(source: AdapterSource) -> str:
    """Return a name for the model that responds: "base", or "tuned-" and 8 digits of a hash of adapter and strength."""
    if source.adapter is None:
        return "base"
    weights = (file_pieces(path) for path in sorted(source.adapter.glob("*.safetensors")))
    return f"tuned-{sha256(chain([str(source.strength).encode()], *weights))[:8]}"
