"""A model's shape, from its config.json alone: no weights, no array library."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lite_dil.base.errors import UserError
from lite_dil.models import model_config
from lite_dil.models.find import EMBEDDED_MODEL, resolve_model
from lite_dil.models.hub import fetch_config
from lite_dil.models.logits import LogitTransform, logit_transform

# The part of the embedded model's config that matters here, so that its folder need not exist.
EMBEDDED_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


_PLAIN_LOGITS = LogitTransform()


class Linear(NamedTuple):
    """A linear layer, with weight (outputs, inputs)."""

    outputs: int
    inputs: int
    bias: bool = False

    @property
    def weight(self) -> int:
        """Number of parameters of the weight alone."""
        return self.outputs * self.inputs

    @property
    def parameters(self) -> int:
        """Number of parameters of weight and bias."""
        return self.weight + self.outputs * self.bias


class Quantization(NamedTuple):
    """How the checkpoint's linear layers are quantised; `library` is "bitsandbytes" or "mlx"."""

    library: str
    bits: int
    group: int
    double: bool = False  # bitsandbytes: the groups' scales are quantised too
    skipped: tuple[str, ...] = ()  # patterns of the names of layers that are not quantised

    def leaves(self, name: str) -> bool:
        """Return whether a layer of this name is not quantised, as transformers decides it."""
        ends = r"(?:(?<=\.)|(?=\.|$))"
        return any(re.match(rf"(?:{pattern}){ends}", name) or name.endswith(pattern) for pattern in self.skipped)


@dataclass(frozen=True)
class _Family:
    """The layer structure of a model_type, and the defaults that its config may leave out."""

    norms: int = 2  # per layer, of the model's width
    bias: tuple[str | bool, str | bool] = ("attention_bias", "attention_bias")  # for q, k, v and for the output projection
    mlp_bias: str | bool = False
    qk_norm: str | bool = False  # "head": one weight per channel of a head; "all": one per channel of all heads
    joined: bool = False  # q, k, v are one layer, and gate and up are another
    rms: bool = True
    post_norms: bool = False  # the outputs of attention and MLP are normed, instead of or besides their inputs
    parallel: bool = False  # attention and MLP read the same normed input
    tied: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)

    def norms_queries(self, config: dict[str, Any]) -> bool:
        """Return whether queries and keys are normed, which in some models depends on the config."""
        return self.qk_norm in ("head", "all") or bool(self.qk_norm and config.get(str(self.qk_norm)))


_GEMMA_3 = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
FAMILIES = {
    "llama": _Family(mlp_bias="mlp_bias"),
    "mistral": _Family(bias=(False, False), defaults={"num_key_value_heads": 8}),
    "qwen2": _Family(bias=(True, False)),
    "qwen3": _Family(qk_norm="head", defaults={"head_dim": 128}),
    "gemma": _Family(tied=True, defaults={"head_dim": 256}),
    "gemma2": _Family(norms=4, post_norms=True, tied=True, defaults={"head_dim": 256, "num_key_value_heads": 4}),
    "gemma3_text": _Family(norms=4, post_norms=True, qk_norm="head", tied=True, defaults=_GEMMA_3),
    "phi3": _Family(bias=(False, False), joined=True),
    "smollm3": _Family(mlp_bias="mlp_bias", tied=True, defaults={"num_key_value_heads": 4}),
    "granite": _Family(mlp_bias="mlp_bias"),
    "cohere": _Family(norms=1, qk_norm="use_qk_norm", rms=False, parallel=True, tied=True),
    "olmo2": _Family(qk_norm="all", post_norms=True),
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder with gated MLPs, in numbers.

    Attributes:
        head_width: channels of one attention head.
        norms: norms per layer, of the model's width.
        qk_norm: parameters in the norms of one layer's queries and keys; 0 if there are none.
        rms: whether the norms are RMS norms.
        post_norms: half of the norms, or all if there are two, are on the outputs of attention and MLP.
        joined: q, k and v are one linear layer, and gate and up are another.
        parallel: attention and MLP read the same normed input, and their outputs are added.
        attention_cap: attention scores are capped (Gemma 2), which needs the whole score matrix in the plain layout.
        transform: what is done to the logits.
        dtype: the checkpoint's dtype.
        max_positions: the longest sequence that the model was made for, in tokens.
        long_rope: tokens beyond which the rope depends on the sequence length; None if it never does.
        side: linear layers that are loaded with the decoder and not used (a vision tower).
        side_rest: other parameters of that unused part.
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: int = 0
    norms: int = 2
    rms: bool = True
    post_norms: bool = False
    joined: bool = False
    parallel: bool = False
    attention_cap: bool = False
    transform: LogitTransform = _PLAIN_LOGITS
    dtype: str = "float32"
    max_positions: int = 0
    long_rope: int | None = None
    quantization: Quantization | None = None
    side: tuple[Linear, ...] = ()
    side_rest: int = 0

    # As `lite_dil.models.listing.ListedModel` has them.
    packs_rows = selective = True
    experts_each = experts = largest_expert = 0
    experts_stored_in = None

    @classmethod
    def of(cls, config: dict[str, Any], where: str = "config.json") -> ModelShape:
        """Read the shape from a config.json; `where` names it in messages."""
        model_config.check(config, where)
        text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
        kind = text.get("model_type")
        if (family := FAMILIES.get(kind or "")) is None:
            raise UserError(
                f"{where}: model_type is {kind!r}, whose layers plan does not know; it knows {', '.join(FAMILIES)}. "
                "Training may still work: try a few --max-steps"
            )
        text = {**family.defaults, **{name: value for name, value in text.items() if value is not None}}
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if missing := [name for name in needed if name not in text]:
            raise UserError(f"{where}: {', '.join(missing)} missing; is it the config.json of a language model?")
        for name in (*needed, "num_key_value_heads", "head_dim"):  # a list has one for each layer
            if isinstance(text.get(name), list):
                raise UserError(f"{where}: {name} is {text[name]}; plan knows models whose layers are all alike")
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        kv_heads, width = text.get("num_key_value_heads", heads), text.get("head_dim", hidden // heads)
        if heads % kv_heads or ("head_dim" not in text and hidden % heads):
            raise UserError(
                f"{where}: {heads} num_attention_heads do not go with {kv_heads} num_key_value_heads and a hidden_size of "
                f"{hidden}; expected heads that divide the width and are a multiple of the key-value heads"
            )

        def asked(option: str | bool) -> bool:
            return bool(text.get(option, False)) if isinstance(option, str) else option

        side, rest = _vision(config, hidden, where)
        return cls(
            model_type=str(kind),
            layers=text["num_hidden_layers"],
            hidden=hidden,
            intermediate=text["intermediate_size"],
            heads=heads,
            kv_heads=kv_heads,
            head_width=width,
            vocabulary=text["vocab_size"],
            tied=bool(text.get("tie_word_embeddings", family.tied)),
            qkv_bias=asked(family.bias[0]),
            output_bias=asked(family.bias[1]),
            mlp_bias=asked(family.mlp_bias),
            qk_norm=(2 if family.qk_norm == "head" else heads + kv_heads) * width if family.norms_queries(text) else 0,
            norms=family.norms,
            rms=family.rms,
            post_norms=family.post_norms,
            joined=family.joined,
            parallel=family.parallel,
            attention_cap=bool(text.get("attn_logit_softcapping", 50.0 if kind == "gemma2" else None)),
            transform=logit_transform(text),
            dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
            max_positions=int(text.get("max_position_embeddings", 0)),
            long_rope=read_long_rope(text),
            quantization=read_quantization(config, where),
            side=side,
            side_rest=rest,
        )

    def linears(self) -> dict[str, Linear]:
        """Return the linear layers of one decoder layer by name."""
        q, kv, h, m = self.queries, self.keys, self.hidden, self.intermediate
        attention = {
            "self_attn.q_proj": Linear(q, h, self.qkv_bias),
            "self_attn.k_proj": Linear(kv, h, self.qkv_bias),
            "self_attn.v_proj": Linear(kv, h, self.qkv_bias),
        }
        mlp = {"mlp.gate_proj": Linear(m, h, self.mlp_bias), "mlp.up_proj": Linear(m, h, self.mlp_bias)}
        if self.joined:
            attention = {"self_attn.qkv_proj": Linear(q + 2 * kv, h, self.qkv_bias)}
            mlp = {"mlp.gate_up_proj": Linear(2 * m, h, self.mlp_bias)}
        output, down = Linear(h, q, self.output_bias), Linear(h, m, self.mlp_bias)
        return {**attention, "self_attn.o_proj": output, **mlp, "mlp.down_proj": down}

    @property
    def adaptable(self) -> dict[str, tuple[int, int]]:
        """Return the (out, in) shapes of all linear layers by name."""
        each = self.linears().items()
        return {
            f"layers.{number}.{name}": (linear.outputs, linear.inputs)
            for number in range(self.layers)
            for name, linear in each
        }

    def left_whole(self) -> list[Linear]:
        """Return the linear layers that a quantised checkpoint leaves in 16 bits."""
        if self.quantization is None or not self.quantization.skipped:
            return []
        names = (
            (f"model.layers.{number}.{name}", linear)
            for number in range(self.layers)
            for name, linear in self.linears().items()
        )
        return [linear for name, linear in names if self.quantization.leaves(name)]

    @property
    def active(self) -> int:
        """Parameters that compute a token: all."""
        return self.parameters

    @property
    def packed_share(self) -> float:
        """Return the share of the parameters that 4 bits pack."""
        whole = sum(linear.weight for linear in self.left_whole())
        return (self.layers * sum(linear.weight for linear in self.linears().values()) - whole) / self.parameters

    @property
    def queries(self) -> int:
        """Query channels of all heads."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Key channels of all heads, the same number as value channels."""
        return self.kv_heads * self.head_width

    @property
    def table(self) -> int:
        """Parameters of the embedding table, the same number as in the output head."""
        return self.vocabulary * self.hidden

    @property
    def norm_parameters(self) -> int:
        """Parameters of all norms."""
        return self.layers * (self.norms * self.hidden + self.qk_norm) + self.hidden

    @property
    def linear_parameters(self) -> int:
        """Parameters of the decoder's linear layers, biases included."""
        return self.layers * sum(linear.parameters for linear in self.linears().values())

    @property
    def parameters(self) -> int:
        """Parameters of the whole model as it is loaded; a tied head counts once."""
        side = sum(linear.parameters for linear in self.side) + self.side_rest
        return self.linear_parameters + self.norm_parameters + self.table * (1 if self.tied else 2) + side


def read_shape(model: str) -> ModelShape:
    """Return the shape of a model: a folder, a config.json, a hub id (only its config.json is fetched), or the embedded model.

    Raises:
        UserError: it cannot be found or read, or its kind of layers is unknown.
    """
    if model == EMBEDDED_MODEL:
        return ModelShape.of(EMBEDDED_CONFIG)
    return ModelShape.of(model_config.read_config(config_file(model), f"--model {model}"), f"--model {model}")


def config_file(model: str) -> Path:
    """Return the config.json of a folder or a hub id, fetched alone, or of itself. Raises UserError where there is none."""
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return path
    name = resolve_model(model)
    return path / "config.json" if path.is_dir() else fetch_config(name)


def read_quantization(config: dict[str, Any], where: str) -> Quantization | None:
    """Return how a checkpoint's linear layers are quantised. Raises UserError for ways that plan does not know."""
    if isinstance(mlx := config.get("quantization"), dict):  # mlx-lm repeats it as quantization_config
        if any(isinstance(value, dict) for value in mlx.values()):
            raise UserError(f"{where}: its layers are quantised in different ways, which plan does not know")
        return Quantization("mlx", int(mlx["bits"]), int(mlx["group_size"]))
    if not isinstance(packed := config.get("quantization_config"), dict):
        return None
    if packed.get("quant_method") == "bitsandbytes" and packed.get("load_in_4bit"):
        skipped = _skipped(packed.get("llm_int8_skip_modules"), where)
        return Quantization("bitsandbytes", 4, 64, bool(packed.get("bnb_4bit_use_double_quant")), skipped)
    if packed.get("quant_method") == "mxfp4":  # of gpt-oss; training unpacks it
        return None
    kind = packed.get("quant_method") or "an unknown method"
    raise UserError(f"{where}: its weights are quantised by {kind}; plan knows bitsandbytes' 4 bits and MLX's")


def _skipped(value: Any, where: str) -> tuple[str, ...]:
    """Return the patterns of the names of layers that are not quantised."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: llm_int8_skip_modules is {value!r}; expected a list of names")
    for name in value:
        try:
            re.compile(name)
        except re.error as error:
            raise UserError(
                f"{where}: llm_int8_skip_modules has {name!r}; expected the name of a layer or a regular expression ({error})"
            ) from None
    return tuple(value)


def read_long_rope(text: dict[str, Any]) -> int | None:
    """Return the tokens beyond which a text model's rope depends on the sequence length; None if it never does."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    for part in rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]:
        if part.get("rope_type", part.get("type")) in ("dynamic", "longrope"):
            trained = part.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
            return int(trained or text.get("max_position_embeddings", 0))
    return None


def _vision(config: dict[str, Any], hidden: int, where: str) -> tuple[tuple[Linear, ...], int]:
    """Return the linear layers of a model's vision tower (Gemma 3's SigLIP), and its other parameters."""
    if not isinstance(vision := config.get("vision_config"), dict):
        return (), 0
    if config.get("model_type") != "gemma3":
        raise UserError(f"{where}: model_type is {config.get('model_type')!r}, whose vision tower plan does not know")
    defaults = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16}
    h, m, layers, image, patch = ({**defaults, **vision}[name] for name in defaults)
    layer = (*[Linear(h, h, True)] * 4, Linear(m, h, True), Linear(h, m, True))
    embeddings = h * 3 * patch**2 + h + (image // patch) ** 2 * h
    projector = h * hidden + h
    return layer * layers, layers * 4 * h + embeddings + 2 * h + projector
