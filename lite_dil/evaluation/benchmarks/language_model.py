"""A policy as lm-eval's language model. Its answers are those of lm-eval's own HFLM with the same adapter.

lm-eval is imported here at once, so that this file is imported only after `harness.require`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length

from lite_dil.backends.types import Done, Sampling
from lite_dil.base.display import Bar
from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.data.encoder import TokenIds
from lite_dil.evaluation.stored_model import BATCH_TOKENS, StoredModel
from lite_dil.generation.batch_generator import BatchGenerator, Request, batched
from lite_dil.generation.policy import Policy
from lite_dil.models.find import model_folder

# A request for a log-likelihood as lm-eval encodes it: its two texts, and the tokens of each.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]

_NEW_TOKENS = 256  # where a task does not say, as in HFLM
# Rope of these kinds gives a position the same angles whatever the length of the sequence.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
_OF_SAMPLING = ("top_p", "top_k", "min_p", "typical_p")  # which change nothing in greedy decoding


class PolicyLM(TemplateLM):
    """A policy, or its reference, that answers lm-eval's requests.

    Args:
        kept: the model.
        chat: whether the model's chat template is applied, whose end of turn then ends a generated text too.

    Attributes:
        truncated: the task and the number of each item of which a context was cut at its start, to fit the model's.
    """

    def __init__(self, kept: StoredModel, chat: bool) -> None:
        super().__init__()
        policy = kept.policy
        self.kept, self.policy, self.chat = kept, policy, chat
        self.tokenizer = policy.encoder.tokenizer
        self.truncated = set[tuple[str | None, int | None]]()
        self._cut = list[bool]()  # of the requests that were scored last
        config = _config(policy)
        self.max_length = resolve_max_length(config, self.tokenizer)
        # The last token of a sequence is predicted and not read: only its position must exist.
        self._longest = self.max_length + _has_fixed_rope(config)
        self._ends = _ends(policy, chat)
        self.adds_bos = self.tokenizer("a").input_ids[:1] == [self.prefix_token_id]

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The context of a continuation without one: BOS, or the token that ends a text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Its name, by which lm-eval tells templates apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenise a text, without a second BOS where it begins with one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages by the model's template, with the arguments of its adapter's run."""
        arguments = self.policy.encoder.rendering.arguments

        def render(messages: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **arguments,
                )
            )

        from jinja2.exceptions import TemplateError

        try:
            return render(chat_history)
        except TemplateError:  # a template without system messages
            return render([message for message in chat_history if message["role"] != "system"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether greedy decoding would give it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        self.truncated |= {_item(request) for request, cut in zip(requests, self._cut, strict=True) if cut}
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text in nats, in windows of the model's context, every token predicted once."""
        windows: list[TokenRequest] = []
        counts = []
        for (text,) in (request.args for request in requests):
            of_text = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *utils.make_disjoint_window(window)) for window in of_text]
            windows += found
            counts.append(len(found))
        values = iter(self._loglikelihood_tokens(windows))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        asked = [self._fitted(context, continuation) for _, context, continuation in requests]
        self._cut = [len(fitted) < len(given) for (_, given, _), (fitted, _) in zip(requests, asked, strict=True)]
        return self.kept.log_likelihoods(asked)

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[TokenIds, TokenIds]:
        """Return both, the context cut at its start to what the model takes."""
        if not continuation:
            raise UserError("a task has a continuation without a token, whose likelihood is not defined; leave the task out")
        room = self._longest - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the model's context of {self.max_length}"
            )
        return tuple(context[-room:]), tuple(continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text that continues each context, up to the task's stops or the end token."""
        wanted: dict[str, _Text] = {}
        keys = []
        repeats: dict[str, int] = {}
        for request in requests:
            text, cut = self._text(*request.args)
            self.truncated |= {_item(request)} if cut else set()
            first = digest("generate_until", text)
            number = repeats[first] = repeats.get(first, -1) + 1
            if text.sampling.temperature == 0:
                number = 0
            keys.append(digest(first, number) if number else first)
            wanted[keys[-1]] = text._replace(number=number)
        missing = {key: text for key, text in wanted.items() if key not in self.kept.store.known}
        done = len(wanted) - len(missing)
        with self.kept.bar(len(wanted), done) as bar, self.policy.backend.using(self.kept.adapter):
            for alike in _alike(missing):
                done = self._generate(alike, bar, done)
        return [str(self.kept.store.known[key]) for key in keys]

    def _generate(self, alike: dict[str, _Text], bar: Bar, done: int) -> int:
        """Generate texts with the same settings, batch by batch, and keep each batch; return how many are done."""
        first = next(iter(alike.values()))
        asked = [Request(each.ids, each.room, _seed(key)) for key, each in alike.items()]
        key_of = {id(request): key for request, key in zip(asked, alike, strict=True)}
        stops = [stop for stop in first.until if stop]
        generator = BatchGenerator(
            self.policy.backend,
            first.ends,
            self.kept.say,
            first.sampling,
            done=_stopped(self.tokenizer, stops) if stops else None,
        )
        for batch in batched(asked, BATCH_TOKENS):
            texts = (self.tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in generator.draw(batch))
            new = {
                key_of[id(request)]: postprocess_generated_text(text, stops, None)
                for request, text in zip(batch, texts, strict=True)
            }
            self.kept.store.add(new)
            done += len(new)
            bar.update(done, None)
        return done

    def _text(self, context: str, settings: dict[str, Any]) -> tuple[_Text, bool]:
        """Return a text to generate, and whether its context was cut. Raises UserError for settings it cannot honour."""
        given = dict(normalize_gen_kwargs(settings, _NEW_TOKENS))
        until = handle_stop_sequences(given.pop("until"), self.tokenizer.decode(self.eot_token_id))
        room = given.pop("max_gen_toks")
        sampled = given.pop("do_sample") and given.get("temperature", 0.0) > 0
        temperature = given.pop("temperature", 0.0) if sampled else 0.0
        top_p = given.pop("top_p", 1.0) if sampled else 1.0
        unknown = [name for name in given if sampled or name not in (*_OF_SAMPLING, "temperature")]
        if unknown:
            raise UserError(f"a task asks for {', '.join(unknown)} in generation, which lite-dil does not have; leave it out")
        limit = self.max_length - room
        if limit < 1:
            raise UserError(f"a task generates {room} tokens, and the model takes {self.max_length} in all; leave it out")
        ids = self.tok_encode(context)
        text = _Text(tuple(ids[-limit:]), room, tuple(until), Sampling(temperature, top_p), tuple(self._ends))
        return text, len(ids) > limit


class _Text(NamedTuple):
    """A text to generate: all that decides it besides the model."""

    ids: TokenIds
    room: int
    until: tuple[str, ...]
    sampling: Sampling
    ends: TokenIds
    number: int = 0  # of several samples


def _item(request: Instance) -> tuple[str | None, int | None]:
    return request.task_name, request.doc_id


def _alike(texts: Mapping[str, _Text]) -> list[dict[str, _Text]]:
    """Return the texts in groups of the same settings."""
    found: dict[Any, dict[str, _Text]] = {}
    for key, text in texts.items():
        found.setdefault((text.room, text.until, text.sampling), {})[key] = text
    return list(found.values())


def _stopped(tokenizer: Any, stops: Sequence[str]) -> Done:
    """Return whether the last tokens of a response hold one of `stops`."""
    # A stop may be spelled in other tokens than its own, of which HFLM allows two more.
    longest = max(len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops) + 2

    def stopped(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(list(ids[-longest:]))
        return any(stop in text for stop in stops)

    return stopped


def _seed(key: str) -> int:
    """Return what decides a sample."""
    return int(key[:16], 16)


def _config(policy: Policy) -> Any:
    """Return transformers' config of the model, which has what config.json leaves out."""
    from transformers import AutoConfig

    code = policy.source.options.trust_remote_code
    return AutoConfig.from_pretrained(model_folder(policy.model), trust_remote_code=code)


def _has_fixed_rope(config: Any) -> bool:
    """Return whether positions beyond the context exist, and change no other."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(part, dict) for part in rope.values()) else [rope]
    return bool(rope) and all(part.get("rope_type", "default") in _FIXED_ROPE for part in kinds)


def _ends(policy: Policy, chat: bool) -> list[int]:
    """Return the tokens that end a generated text: those of the checkpoint and, after its template, the template's."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(model_folder(policy.model)).eos_token_id
    except OSError:  # the checkpoint has no such file
        own = _config(policy).eos_token_id
    found = {int(policy.encoder.tokenizer.eos_token_id), *(own if isinstance(own, list) else [own])} - {None}
    return sorted(found | set(policy.encoder.end_ids() if chat else ()))
