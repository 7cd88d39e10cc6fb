"""A GGUF file as programs read it, for the check: by llama.cpp, which Ollama uses, or without it by transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends import registry
from lite_dil.backends.types import Sequences
from lite_dil.base.errors import UserError, first_line
from lite_dil.data.rendering import library_prompt
from lite_dil.export.gguf_vocabulary import EOS_IDS
from lite_dil.export.runtime import Fed, Runtime

# Texts of tokens that llama.cpp takes for ends by their names alone (llama-vocab.cpp), the frequent ones.
_ENDS = {"<|im_end|>", "<|eot_id|>", "<|end|>", "<|return|>", "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>"}
_Render = Callable[[list[dict[str, str]]], str]


def reader() -> str:
    """Return the installed reader of GGUF files. Raises UserError if there is none."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return "llama.cpp"
    if any(importlib.util.find_spec(module) is None for module in ("torch", "gguf", "accelerate")):
        raise UserError("checking a GGUF file needs llama-cpp-python or torch: pip install llama-cpp-python")
    return "transformers"


@contextmanager
def opened(
    path: Path,
    context: int,
    tokenizer: Any,
    say: Callable[[str], None],
    render: _Render | None = None,
    stops: Sequence[str] | None = None,
) -> Iterator[Runtime]:
    """Open a file for the check while the block lasts.

    Args:
        context: the most tokens that it will read at once.
        tokenizer: the model's own, which stands in where llama.cpp is not installed.
        render: lays out a conversation, as Ollama does by its Modelfile; None takes the file's own template.
        stops: the texts at which Ollama ends a response; None for other programs.

    Raises:
        UserError: no reader is installed, or the file cannot be loaded.
    """
    if reader() == "transformers":
        say(f"reading {path.name} with transformers (llama-cpp-python is not installed)")
        yield _Unread(path, registry.module("torch", "gguf").GgufModel(path), tokenizer, render, stops)
        return
    say(f"reading {path.name} with llama.cpp")
    file = open_file(path, n_ctx=context, logits_all=True)
    try:
        yield _LlamaCpp(file, tokenizer, render, stops)
    finally:
        file.close()


def open_file(path: Path, **options: Any) -> Any:
    """Open a GGUF file in llama.cpp without its log. `options` are llama_cpp.Llama's."""
    from llama_cpp import Llama, llama_log_set

    llama_log_set(silence(), None)  # type: ignore[arg-type]
    try:
        return Llama(str(path), verbose=False, **options)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: llama.cpp cannot load it ({first_line(error)})") from None


@cache
def silence() -> Any:
    """Return a log callback for llama.cpp that drops everything; it is kept alive, since the library calls it until exit."""
    from llama_cpp import llama_log_callback

    return llama_log_callback(lambda level, text, data: None)


def different_tokens(path: Path, tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Return the `texts` that llama.cpp, with the file's tokenizer, splits into other tokens than `tokenizer`.

    Nothing is added to the texts, and control tokens in them are read as such. Needs llama-cpp-python.
    """
    file = open_file(path, vocab_only=True)
    try:
        return [
            text
            for text in texts
            if file.tokenize(text.encode(), add_bos=False, special=True) != tokenizer(text, add_special_tokens=False).input_ids
        ]
    finally:
        file.close()


class _LlamaCpp:
    """A file in llama.cpp, and its generation loop in llama-cpp-python."""

    name = "llama.cpp"

    def __init__(self, file: Any, tokenizer: Any, render: _Render | None, stops: Sequence[str] | None) -> None:
        self.file, self.tokenizer, self.render, self.stops = file, tokenizer, render, stops

    def logps(self, sequences: Sequences) -> list[np.ndarray]:
        """Return each response's log-probs, (tokens,) float32."""
        found = []
        for prompt, response in sequences:
            self.file.reset()
            self.file.eval([*prompt, *response])
            found.append(_log_softmax_at(self.file.scores[len(prompt) - 1 : len(prompt) + len(response) - 1], response))
        return found

    def prompt(self, prompt: Fed) -> list[int]:
        """Return the tokens of a text or a conversation, with what llama.cpp puts around them."""
        text = prompt if isinstance(prompt, str) else (self.render or self._render)(prompt)
        return list(self.file.tokenize(text.encode(), add_bos=True, special=True))  # true: if the file says so

    def end_ids(self) -> set[int]:
        """Return the tokens that end a generation."""
        from llama_cpp import llama_vocab_is_eog

        vocab, texts = self.file._model.vocab, set(self.stops or ())
        ends = {token for token in range(self.file.n_vocab()) if llama_vocab_is_eog(vocab, token)}
        return ends if self.stops is None else {token for token in ends if self._text(token) in texts}

    def ends_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Return whether a generation in which `tokens` are forced ends with the last of them."""
        from llama_cpp import LogitsProcessorList

        drawn = 0

        def force(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
            nonlocal drawn
            drawn += 1
            if drawn > len(tokens):
                return scores
            forced = np.full_like(scores, -np.inf)
            forced[tokens[drawn - 1]] = 0
            return forced

        self.file.reset()
        found = self.file.create_completion(
            list(prompt),
            max_tokens=len(tokens) + 2,
            temperature=0.0,
            stop=list(self.stops or ()),
            logits_processor=LogitsProcessorList([force]),
        )
        return bool(found["choices"][0]["finish_reason"] == "stop" and drawn == len(tokens))

    def _render(self, messages: list[dict[str, str]]) -> str:
        bos, eos = (self._text(token) if token >= 0 else "" for token in (self.file.token_bos(), self.file.token_eos()))
        special = {"bos_token": bos, "eos_token": eos}
        text = library_prompt(self.tokenizer, messages, self.file.metadata["tokenizer.chat_template"], **special)
        # llama.cpp's own programs drop the template's BOS where the tokenizer puts one.
        return text.removeprefix(bos) if self.file.metadata.get("tokenizer.ggml.add_bos_token") == "true" else text

    def _text(self, token: int) -> str:
        return str(self.file._model.token_get_text(token))


class _Unread:
    """A file that transformers computes; its metadata say what llama.cpp would feed it and where it would end."""

    name = "llama.cpp"

    def __init__(self, path: Path, model: Any, tokenizer: Any, render: _Render | None, stops: Sequence[str] | None) -> None:
        self.logps, self.tokenizer, self.stops = model.logps, tokenizer, stops
        self.fields = metadata(path)
        self.render = render or self._render

    def prompt(self, prompt: Fed) -> list[int]:
        """Return the tokens of a text or a conversation, with what llama.cpp puts around them by the metadata."""
        text = prompt if isinstance(prompt, str) else self.render(prompt)
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        bos, eos = (
            [self.fields[f"tokenizer.ggml.{name}_token_id"]] if self.fields.get(f"tokenizer.ggml.add_{name}_token") else []
            for name in ("bos", "eos")
        )
        return [*bos, *ids, *eos]

    def end_ids(self) -> set[int]:
        """Return the tokens that end a generation."""
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        ids: set[int] = {self.fields[key] for key in keys if key in self.fields}
        tokens, stops = self.fields["tokenizer.ggml.tokens"], self.stops
        ids |= {token for token, text in enumerate(tokens) if text in _ENDS} | set(self.fields.get(EOS_IDS, []))
        return ids if stops is None else {token for token in ids if tokens[token] in stops}

    def ends_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Return None: llama.cpp's loop is not here."""

    def _render(self, messages: list[dict[str, str]]) -> str:
        text = library_prompt(self.tokenizer, messages, self.fields["tokenizer.chat_template"])
        return text.removeprefix(self.tokenizer.bos_token or "") if self.fields.get("tokenizer.ggml.add_bos_token") else text


def metadata(path: Path) -> Mapping[str, Any]:
    """Return what a file says of its model, by the format's names."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def _log_softmax_at(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Return the log-probs of `ids` (tokens,) under `logits` (tokens, vocabulary)."""
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return (logits[np.arange(len(ids)), list(ids)] - total).astype(np.float32)
