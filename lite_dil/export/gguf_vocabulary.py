"""A tokenizer as llama.cpp metadata: tokens, their kinds, merges or scores, and the pre-tokenizer.

A tokenizer that llama.cpp would not reproduce exactly is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.data.encoder import Encoder
from lite_dil.data.files import RowError

# The format's token kinds.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
EOS_IDS = "tokenizer.ggml.eos_token_ids"  # Ollama's own engine reads the list, llama.cpp eos, eot and eom

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Pre-tokenizer pattern -> (its name in llama.cpp, whether whole words of the vocabulary are then taken without merging). None
# is ByteLevel's own pattern, GPT-2's.
_SPLITS: dict[tuple[str | None, ...], tuple[str, bool]] = {
    (None,): ("gpt-2", False),
    ("digits", None): ("smollm", False),
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST,): ("llama-bpe", True),
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST,): ("qwen2", False),
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}|"
        + _REST.replace(r"[\r\n]*", r"[\r\n/]*"),
    ): ("tekken", True),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's content in a GGUF file.

    `model` is "gpt2" (byte-level BPE, with `merges`) or "llama" (SentencePiece, with `scores`); `special` maps bos, eos, unk,
    pad, and where training ended responses in another token than eos also eot, to their ids. `ends` are all tokens that end
    a response.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False
    add_bos: bool = False
    special: dict[str, int] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    chat_template: str | None = None

    def write(self, writer: Any) -> None:
        """Add it to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        if len(self.ends) > 1:
            writer.add_array(EOS_IDS, self.ends)
        writer.add_add_space_prefix(self.add_space_prefix)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)  # training's prompts have none behind them, even if the tokenizer puts one there
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read(tokenizer: Any, rows: int, say: Callable[[str], None], ends: Sequence[int] = ()) -> Vocabulary:
    """Return the vocabulary of a Hugging Face fast tokenizer for a model whose embedding table has `rows` rows.

    Args:
        ends: the tokens that end a response by the model's generation_config.json.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unknown(f"its model is {model['type']}, not BPE")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _unknown("its BPE has dropout or subword marks")
    added = {token["id"]: token for token in state["added_tokens"]}
    vocabulary = model["vocab"] | {token["content"]: index for index, token in added.items()}
    if max(vocabulary.values()) >= rows:
        raise UserError(f"the tokenizer has token ids up to {max(vocabulary.values())}, but the model's table has {rows} rows")
    for token in added.values():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _unknown(f"its token {token['content']!r} strips surrounding space (lstrip, rstrip or single_word)")

    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, NORMAL
    for index, token in added.items():
        types[index] = CONTROL if token["special"] else USER_DEFINED

    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    trained = [index for index in Encoder(tokenizer).end_ids() if index != ids["eos"]]
    ids |= dict(zip(("eot", "eom"), trained, strict=False))
    common: dict[str, Any] = {
        "add_bos": puts_bos(tokenizer),
        "ends": list(dict.fromkeys([ids["eos"], *trained, *ends])),
        "special": {name: int(index) for name, index in ids.items() if index is not None},
        "chat_template": tokenizer.get_chat_template() if tokenizer.chat_template else None,
    }
    if not model.get("byte_fallback"):
        pre = _byte_level_pre(tokenizer, state)
        return Vocabulary("gpt2", pre, tokens, types, merges=[" ".join(merge) for merge in merges], **common)
    prefix = _sentencepiece_prefix(state, say)
    scores = _scores(tokens, model["vocab"], {token["content"] for token in added.values()}, merges)
    for byte in range(256):
        if (index := model["vocab"].get(f"<0x{byte:02X}>")) is None:
            raise _unknown("it falls back to bytes but lacks some of the 256")
        types[index] = BYTE
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        types[unknown] = UNKNOWN
    return Vocabulary("llama", "default", tokens, types, scores=scores, add_space_prefix=prefix, **common)


def _unknown(reason: str) -> UserError:
    return UserError(
        f"this tokenizer cannot be written into a GGUF file exactly: {reason}. llama.cpp's own converter may know the model: "
        "--llama-cpp DIR"
    )


def puts_bos(tokenizer: Any) -> bool:
    """Return whether a runtime must put BOS before a prompt, so that it reads what training read.

    A chat template prints the BOS of its prompts itself, or training had none, even if the tokenizer puts one before a text.
    """
    if not around(tokenizer)[0]:
        return False
    encoder = Encoder(tokenizer)
    if not encoder.rendering.chats:
        return True
    try:
        return encoder.prompt([{"role": "user", "content": "a"}])[:1] == (tokenizer.bos_token_id,)
    except RowError:  # so no conversation was trained on
        return True


def around(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether the tokenizer puts BOS before a text and EOS after it."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    bos, eos = whole[:1] == [tokenizer.bos_token_id] != plain[:1], whole[-1:] == [tokenizer.eos_token_id] != plain[-1:]
    if whole != [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
        raise _unknown(f"it puts {whole} around {plain} instead of BOS and EOS")
    return bos, eos


def _parts(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, with sequences flattened."""
    if step is None:
        return []
    return [part for each in step[inner] for part in _parts(each, inner)] if step["type"] == "Sequence" else [step]


def _byte_level_pre(tokenizer: Any, state: dict[str, Any]) -> str:
    """Return llama.cpp's name for a byte-level BPE's pre-tokenizer."""
    # llama.cpp skips the NFC normalisation of some models (Qwen); texts are nearly always composed already.
    if any(part["type"] != "NFC" for part in _parts(state["normalizer"], "normalizers")):
        raise _unknown("its normalizer is not one that llama.cpp has for byte-level models")
    splits: list[str | None] = []
    byte_level = False
    for part in _parts(state["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
            splits.append(part["pattern"]["Regex"])
        elif part["type"] == "Digits" and part["individual_digits"]:
            splits.append("digits")
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            byte_level = True
            splits += [None] if part["use_regex"] else []
        else:
            raise _unknown(f"llama.cpp has no name for its pre-tokenizer {part}")
    if not byte_level or tuple(splits) not in _SPLITS:
        raise _unknown(f"llama.cpp has no name for its splitting pattern ({splits})")
    name, whole_words = _SPLITS[tuple(splits)]
    if bool(state["model"].get("ignore_merges")) != whole_words and not _merges_reach(tokenizer):
        raise _unknown(f"its ignore_merges is not {whole_words} as for {name!r}, and some of its words cannot be merged")
    return name


def _merges_reach(tokenizer: Any) -> bool:
    """Return whether merges alone produce every token, so that taking whole words changes nothing."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = False
    model = Tokenizer.from_str(json.dumps(state)).model
    added = {token["content"] for token in state["added_tokens"]}
    return all(len(model.tokenize(token)) == 1 for token in state["model"]["vocab"] if token not in added)


def _sentencepiece_prefix(state: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Return whether a SentencePiece-like tokenizer puts a space before a text."""
    normalizers, pre = _parts(state["normalizer"], "normalizers"), _parts(state["pre_tokenizer"], "pretokenizers")
    if [part["type"] for part in normalizers + pre] == ["Metaspace"] and pre[0]["replacement"] == "▁" and not pre[0]["split"]:
        if pre[0]["prepend_scheme"] == "first":
            say("note: llama.cpp puts a space after every control token, this tokenizer only at the start of a text")
        return pre[0]["prepend_scheme"] != "never"
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not pre and normalizers == [{"type": "Prepend", "prepend": "▁"}, replace]:
        return True
    if not pre and normalizers == [replace]:
        return False
    raise _unknown(f"its normalizer {state['normalizer']} and pre-tokenizer {state['pre_tokenizer']} are not SentencePiece's")


def _scores(tokens: list[str], vocab: dict[str, int], added: Iterable[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Return SentencePiece scores, by which llama.cpp merges any two neighbours that make a token, the highest score first.

    That equals the list of merges only if it has every way to make a token, and lists all ways to make one token together.
    """
    rank: dict[str, int] = {}
    last = ""
    for left, right in merges:
        made = left + right
        if made != last and made in rank:
            raise _unknown("its merges are not in the order of a SentencePiece model")
        last = made
        rank.setdefault(made, len(rank))
    known, plain = set(merges), vocab.keys() - set(added)
    for token in plain:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in known and pair[0] in plain and pair[1] in plain and not token.startswith("<0x"):
                raise _unknown(f"its merges lack a way to make {token!r} that SentencePiece would use")
    return [-float(rank[token]) if token in rank else 0.0 for token in tokens]
