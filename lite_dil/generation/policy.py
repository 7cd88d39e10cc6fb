"""A model with its adapter, loaded to be used: where it comes from, and both in memory."""

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
from lite_dil.data.encoder import Encoder
from lite_dil.generation.asked import Asked, Several, answer_seed, answered, is_one, scored
from lite_dil.models.find import load_tokenizer, resolve_model
from lite_dil.models.options import ModelOptions, ResolvedAdapter
from lite_dil.runs.folder import RunFolder, checkpoint_of

if TYPE_CHECKING:
    from lite_dil.backends.options import LoadOptions
    from lite_dil.data.encoder import Example
    from lite_dil.generation.batch_generator import BatchGenerator

_BATCH_TOKENS = 16384  # prompts and room of the answers that are generated at once
_CLOSED = "this policy was closed, and its memory given back; load it again with dil.load"


@dataclass(frozen=True)
class AdapterSource:
    """Which adapter, on which model.

    Attributes:
        adapter: the folder of the adapter's files, None for the bare model.
        run: the run that made it, where it lies in one's folder.
        options: how the model is loaded.
        strength: multiplies the adapter.
    """

    adapter: Path | None
    run: RunFolder | None
    options: ModelOptions
    strength: float = 1.0


class Policy:
    """A language model with its LoRA adapter, in memory. Its reference is the same model with the adapter off.

    `lite_dil.load` makes one. A prompt is a text, which is one user turn where the model has a chat template and otherwise
    continued as it stands, or a list of chat messages with "role" and "content". In a ``with`` block it is closed at the end.

    Args:
        model: what `resolve_model` returned.
        options: by name, all that it was loaded with to be trained; None where it was loaded for inference.
        memory_before: MiB that the process had before the model was loaded.
        say: takes a line for people.

    Attributes:
        source: where the adapter comes from.
        trained: whether a run has trained the adapter since it was loaded or made anew.
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
        """What computes. Raises UserError where the policy was closed."""
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
        """Give the memory of the model and its adapter back; whatever else of the policy is asked for raises UserError."""
        if self._backend is not None:
            name, self._backend = self._backend.name, None
            registry.free(name)

    @overload
    def logps(self, prompts: Asked, responses: str) -> float: ...
    @overload
    def logps(self, prompts: Asked | Several, responses: list[str]) -> list[float]: ...
    def logps(self, prompts: Asked | Several, responses: str | list[str]) -> float | list[float]:
        """Return log pi(response | prompt) in nats, summed over the response's tokens, its end token among them.

        Args:
            prompts: one prompt, or a list of as many as there are responses.
            responses: a text, for which a number is returned, or a list of texts, for which a list is returned. Those to one
                prompt are computed with it once.

        Raises:
            UserError: the model cannot be asked this, as its template refuses it, or the lists differ in length.
            OutOfMemory: the device does not hold the longest of them alone.
        """
        found = self._sums(scored(self.encoder, prompts, responses))
        return found[0] if isinstance(responses, str) else found

    @overload
    def log_ratio(self, prompts: Asked, responses: str) -> float: ...
    @overload
    def log_ratio(self, prompts: Asked | Several, responses: list[str]) -> list[float]: ...
    def log_ratio(self, prompts: Asked | Several, responses: str | list[str]) -> float | list[float]:
        """Return log pi(response | prompt) - log pi_ref(response | prompt) in nats, summed; arguments as of `logps`.

        It is the policy's also inside `as_reference`, and exactly 0 before training.
        """
        examples, values = scored(self.encoder, prompts, responses), []
        for name in (POLICY, REFERENCE):
            with self.backend.using(name):
                values.append(self._sums(examples))
        found = [policy - reference for policy, reference in zip(*values, strict=True)]
        return found[0] if isinstance(responses, str) else found

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Compute as the reference inside the block: `logps`, `generate` and `stream`."""
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
        """Answer a prompt, or a list of them, in batches that memory holds.

        An answer is decided by its prompt, its number and the seed, not by the other prompts (but for rounding), and is that
        of ``lite-dil generate --chat`` with the same settings.

        Args:
            n: answers a prompt; where it is given, each prompt has a list of so many, else one text.
            max_new_tokens: of an answer at most, its end token counted.
            temperature: 0 takes the likeliest token each time, 1 draws as the model has it.
            top_p: draw from the likeliest tokens up to this share.

        Returns:
            The texts, without control tokens, in the order of the prompts.

        Raises:
            UserError: a prompt that the model cannot be asked, or settings that make no sense.
            OutOfMemory: the device does not hold a single answer.
        """
        from lite_dil.generation.batch_generator import Request, batched

        if n is not None and n < 1:
            raise UserError(f"generate: n is {n}; expected at least 1")
        if n is not None and n > 1 and temperature == 0:
            raise UserError(f"generate: {n} answers at temperature 0 are equal; give a temperature above 0")
        asked = answered(self.encoder, self.model, prompts, max_new_tokens)
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
        """Answer one prompt, and yield its text in pieces as they come; arguments and errors as of `generate`.

        It goes on as the policy or as the reference, whichever it was called as.
        """
        from lite_dil.generation.conversation import Prompt as Continued
        from lite_dil.generation.stream import Stream

        (asked,) = answered(self.encoder, self.model, [prompt], max_new_tokens)
        continued = Continued(asked.ids, max_new_tokens, 0)
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
        """Write the adapter into a new folder, in PEFT's format or mlx-lm's, whichever is the backend's own; return it.

        Raises UserError where there is no adapter, or where something is in the folder already.
        """
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is there already; give a new folder")
        if self.options is None and self.source.adapter is None:
            raise UserError("this policy is the bare model, without an adapter to save")
        replace_folder(path, self.backend.save_adapter)
        return path

    def fresh(self, seed: int | None = None) -> Policy:
        """Give the policy the adapter that it had when it was loaded, on the same base, which stays in memory; return it.

        With a `seed` the adapter is the one that a load with that seed has. What was trained since is kept nowhere but in the
        folders of its runs. Raises UserError where it was loaded for inference.
        """
        if self.options is None:
            raise UserError("this policy was loaded for inference (trainable=False); load it to be trained")
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
        """Note that a run changes the adapter from here on."""
        self.trained, self.run = True, run

    def _sums(self, examples: list[Example]) -> list[float]:
        from lite_dil.generation.scoring import token_logps

        prompts, responses = [each.prompt for each in examples], [each.responses for each in examples]
        found = token_logps(self.backend, prompts, responses, self._say)
        return [float(each.sum(dtype="float64")) for several in found for each in several]


def load(source: AdapterSource, say: Callable[[str], None], training: LoadOptions | None = None) -> Policy:
    """Load the model and put the adapter on it.

    Args:
        say: takes a line for people.
        training: how it is trained, its first adapter among that; None loads it for inference, with the source's adapter.
    """
    checkpoint = checkpoint_of(source.adapter) if source.adapter else None
    if checkpoint and source.run and not source.run.adapter.exists() and checkpoint == source.run.latest():
        say(f"{source.run.path} has not ended: its newest checkpoint, {checkpoint.name}, is used")
    options = source.options
    name = registry.resolve(options.backend)
    registry.prepare(name, options, training)
    quiet_bars()
    model = resolve_model(options.model, say)
    return load_found(source, name, model, Encoder(load_tokenizer(model)), say, training)


def load_found(
    source: AdapterSource,
    backend: str,
    model: str,
    encoder: Encoder,
    say: Callable[[str], None],
    training: LoadOptions | None,
) -> Policy:
    """Do the last part of `load`: its `model`, as `resolve_model` returned it, was found and its tokenizer loaded."""
    if remark := registry.import_library(backend):
        say(remark)
    before = peak_rss_mb()
    loaded = registry.load(backend, source.options, model, training or _adapter(source), training, say)
    loaded.set_strength(source.strength)
    say(f"{source.options.model} on {loaded.description}")
    return Policy(loaded, encoder, source, model, say, training, before)


def _adapter(source: AdapterSource) -> ResolvedAdapter | None:
    if source.adapter is None:
        return None
    return ResolvedAdapter(init_adapter=str(source.adapter), reference="base", lora_dropout=0.0)


def identity(source: AdapterSource) -> str:
    """Return a name for what answers: "base", or "tuned-" and 8 digits that name the adapter's weights and its strength."""
    if source.adapter is None:
        return "base"
    weights = (file_pieces(path) for path in sorted(source.adapter.glob("*.safetensors")))
    return f"tuned-{sha256(chain([str(source.strength).encode()], *weights))[:8]}"
