"""``lite-dil export --format reward``: a reward model as AutoModelForSequenceClassification, compared with the trained one."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends import registry
from lite_dil.backends.head_files import HEAD_WEIGHTS
from lite_dil.backends.types import Sequences
from lite_dil.base.errors import UserError
from lite_dil.base.files import write
from lite_dil.base.install import install
from lite_dil.base.version import __version__
from lite_dil.config.reward_source import RewardModel, find_reward, head_on
from lite_dil.data.encoder import Example, encoder_of
from lite_dil.export import merge
from lite_dil.export.check import held_out
from lite_dil.export.exporting import CHECK_ROWS, ExportOptions
from lite_dil.generation import policy as policies
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.models import adapter_files, tensors
from lite_dil.models.find import folder_of, resolve_model
from lite_dil.models.model_config import read_config
from lite_dil.models.names import public_name
from lite_dil.models.spelling import text_only
from lite_dil.models.tensors import CODES, Planned, encode
from lite_dil.rewards.heads import HeadReward

# Allowed mean |difference| of scores by rounding, as a share of their standard deviation over the rows.
SCORE_TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class ScoreCheck:
    """Figures of a comparison of scores.

    Attributes:
        rows, responses: how many held-out rows, and responses of them, were compared.
        data: where the rows are from.
        mean, max: mean and maximum of |exported - trained| score.
        spread: the standard deviation of the trained model's scores.
        allowed: the allowed share of `mean` in `spread`.
        share: of the scores' variation, the slope of exported on trained scores: 1 for the trained model, 0 without its head.
    """

    rows: int
    responses: int
    data: str
    mean: float
    max: float
    spread: float
    allowed: float
    share: float
    faults: tuple[str, ...] = ()

    @property
    def tolerance(self) -> float:
        """The allowed mean difference."""
        return self.allowed * self.spread

    @property
    def ok(self) -> bool:
        """Whether the exported model is the trained one, as far as these scores show."""
        return bool(self.mean <= self.tolerance and not self.faults)  # false for NaN

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for export.json; figures that are not finite become None."""
        figures = asdict(self) | {"tolerance": self.tolerance, "ok": self.ok}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}

    def __str__(self) -> str:
        return (
            f"{self.responses} responses of {self.rows} rows of {self.data}, scored by transformers: scores differ by "
            f"{self.mean:.2g} on average (at most {self.tolerance:.2g} allowed), {self.max:.2g} at worst; their standard "
            f"deviation is {self.spread:.2g}"
        )


class RewardExport:
    """One export: `make` fills the folder `made`.

    Raises UserError if this model cannot be a sequence classifier of transformers, or what is installed does not allow it.
    """

    def __init__(
        self, options: ExportOptions, source: AdapterSource, work: Path, made: Path, say: Callable[[str], None]
    ) -> None:
        assert source.adapter is not None
        self.options, self.made, self.say = options, made, say
        if any(importlib.util.find_spec(module) is None for module in ("torch", "transformers")):
            raise UserError(f"--format reward needs torch and transformers: {install('cpu')}")
        if source.strength != 1:
            raise UserError(
                f"--strength {source.strength:g}: a reward model's head belongs to its whole adapter; leave it out"
            )
        if source.options.trust_remote_code:
            raise UserError("--format reward: a model with Python files of its own has no sequence classifier")
        self.source = source
        self.model = resolve_model(source.options.model, say)
        config = read_config(folder_of(self.model) / "config.json", f"--model {source.options.model}")
        if "text_config" in config:
            raise UserError(f"--format reward: {source.options.model} is more than a text model; not offered")
        self.architecture = registry.module("torch", "classifier").class_name(folder_of(self.model))
        self.reward = _reward_of(source)
        self.encoder = encoder_of(self.model, source.options)
        self.ends = set(self.encoder.end_ids())
        self.pad, self.pad_id = pad_token(self.encoder.tokenizer, self.ends, int(config["vocab_size"]))
        self.checkpoint = merge.Checkpoint.open(folder_of(self.model), source.options.model)
        self.files = adapter_files.read_files(source.adapter, text_only(config))
        self.weight, self.bias = _head(source.adapter, self.reward.description.scale)

    def make(self) -> ScoreCheck | None:
        """Fill the folder; return the comparison with the trained model, or None with --no-check."""
        rows = None
        if not self.options.no_check:  # before loading the model, which is slow
            count = self.options.check_rows or CHECK_ROWS
            rows = held_out(self.source, self.encoder, count, self.options.check_data, self.say)
        config = self.source.options
        quantised = self.checkpoint.packed or config.load_in_4bit
        expected, computed = None, set[str]()
        policy: Policy | None = None
        if rows or quantised:
            policy = policies.load(AdapterSource(None, None, config), self.say)
        try:
            if policy and rows:
                computed.add(policy.backend.dtype_name)
                expected = _expected(head_on(policy, self.reward, self.say), rows[0], self.ends)
            dtype = self._write(policy if quantised else None)
        finally:
            if policy:
                policy.close()
        check = self._check(rows[1], *expected, computed | {dtype}) if rows and expected else None
        facts = {
            "lite_dil": __version__,
            "format": "reward",
            "model": public_name(config.model),
            "loss": self.reward.description.loss,
            "pad_token": self.pad,
            "bias": self.bias,
            "check": check.as_dict() if check else None,
        }
        write(self.made / "export.json", json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return check

    def _write(self, policy: Policy | None) -> str:
        """Write the folder; return the type of its weights. `policy` has the quantised base, if there is one."""
        original = self.options.merge_into == "original"
        if original and self.checkpoint.packed:
            raise UserError(f"--merge-into original: {self.source.options.model} itself is quantised; give the 16-bit model")
        quantised = {}
        if policy and not original:
            quantised = registry.module(policy.backend.name, "export").dense(policy.backend)
        wanted, adapter = self.options.weights_dtype, adapter_files.float_adapter(self.files)
        planned = merge.plan(self.checkpoint, adapter, quantised, wanted, self.source.options.model)
        planned = [tensor for tensor in planned if tensor.name != "lm_head.weight"]
        dtype = wanted or self.checkpoint.dtype
        planned.append(Planned("score.weight", CODES[dtype], self.weight.shape, lambda: encode(self.weight, CODES[dtype])))
        self.say(f"merging the adapter into {len(adapter.weights)} layers, with the head as score.weight")
        merge.write(self.made, planned, self.checkpoint, wanted, sorted(self.ends), self.encoder.rendering.arguments)
        _edit(
            self.made / "config.json",
            architectures=[self.architecture],
            id2label={"0": "reward"},
            label2id={"reward": 0},
            num_labels=1,
            pad_token_id=self.pad_id,
        )
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (self.made / name).is_file():
                _edit(self.made / name, pad_token=self.pad)
        if self.bias:
            self.say(
                f"transformers' head has no bias: the trained model's, {self.bias:.6g}, is missing from every score alike"
            )
        return dtype

    def _check(self, data: str, expected: np.ndarray, sequences: Sequences, rows: int, types: set[str]) -> ScoreCheck:
        self.say(f"checking reward on {rows} rows of {data} ...")
        found = registry.module("torch", "classifier").scores(self.made, sequences)
        expected = expected - self.bias
        difference, spread = np.abs(found - expected), float(expected.std())
        x, y = expected - expected.mean(), found - found.mean()
        share = float(x @ y / (x @ x)) if spread else 1.0
        rounded = types | ({"float16"} if self.source.options.load_in_4bit else set())
        allowed = max(SCORE_TOLERANCES[name] for name in rounded)
        return ScoreCheck(rows, len(found), data, float(difference.mean()), float(difference.max()), spread, allowed, share)


def pad_token(tokenizer: Any, ends: Collection[int], vocabulary: int) -> tuple[str, int]:
    """Return a token to pad with, and its id: one that no response ends with, and that the model has an embedding of.

    transformers reads the state of the last token that is not the pad token. Where the pad token is the end token, as in many
    checkpoints, that is the token before it.

    Raises UserError if the tokenizer has no such token.
    """
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    candidates = [tokenizer.pad_token, *_PADS, tokenizer.unk_token, *added, tokenizer.bos_token]
    for token in candidates:
        number = added.get(token) if token else None
        if number is not None and number not in ends and number < vocabulary:
            return token, number
    raise UserError(
        "--format reward: the tokenizer has no special token but those that end a response, and transformers would read the "
        "token before a padded response's end; add a pad token to the model and train on that"
    )


def _reward_of(source: AdapterSource) -> RewardModel:
    given = {name: value for name, value in vars(source.options).items() if value is not None}
    return find_reward(str(source.adapter), given)


def _head(folder: Path, scale: float) -> tuple[np.ndarray, float]:
    """Return the weight of the head's reward, (1, width) float32, and its bias."""
    found = tensors.load_float32(folder / HEAD_WEIGHTS)
    return found["weight"][:1] * np.float32(scale), float(found["bias"][0]) * scale


def _expected(head: HeadReward, examples: list[Example], ends: Collection[int]) -> tuple[np.ndarray, Sequences, int]:
    """Return the trained model's scores, the sequences scored, and how many rows they are of."""
    whole = [each for each in examples if all(response[-1] in ends for response in each.responses)]
    if not whole:
        raise UserError(
            "--format reward: every row to check with was cut before its end token; give others: --check-data FILE"
        )
    scores = np.concatenate(head.scores(whole))[:, 0]
    return scores, [(each.prompt, response) for each in whole for response in each.responses], len(whole)


def _edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    write(path, json.dumps(content | fields, indent=2, ensure_ascii=False) + "\n")
