"""A plan as text: a few lines that say whether the model fits the card."""

from __future__ import annotations

import math
from textwrap import wrap

from lite_dil.base.display import duration
from lite_dil.base.memory import GIB, on_wsl
from lite_dil.base.text import count
from lite_dil.models.listing import ListedModel, packed_words
from lite_dil.objectives.reward_table import is_reward, name_of
from lite_dil.planning.auto import TUNABLE
from lite_dil.planning.drawing import Drawing
from lite_dil.planning.fit import gigabytes
from lite_dil.planning.plan import Plan
from lite_dil.planning.reward_models import uncounted

_WIDTH = 100
_LISTED = (
    "Made from transformers' own class of this model: weights by list, the rest by a rehearsal of its training step in which "
    "nothing takes memory; recurrent layers as torch computes them without kernels of their own."
)


def lines(plan: Plan) -> list[str]:
    """Return the lines of `lite-dil plan`."""
    blocks = [_wrapped(_about(plan)), _table(plan), _wrapped([_verdict(plan)]), _rooms(plan)]
    return [*(line for block in blocks for line in (*block, "")), *_wrapped([_download(plan), _time(plan)])]


def _wrapped(texts: list[str]) -> list[str]:
    """Break sentences into lines, never inside a flag or a path."""
    return [line for text in texts for line in wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)]


def _about(plan: Plan) -> list[str]:
    shape, config = plan.model.shape, plan.config
    packed = "4 bits" if config.load_in_4bit else f"{shape.quantization.bits} bits" if shape.quantization else ""
    weights = f"linear layers in {packed}, the rest in {plan.model.dtype}" if packed else plan.model.dtype
    active = f", {_count(shape.active)} active for a token" if shape.active < shape.parameters else ""
    if config.head_bits:
        weights += f", head in {config.head_bits} bits"
    wsl = plan.model.backend == "cuda" and on_wsl()
    how = plan.choice or f"gradient checkpointing {plan.model.mode(config)}"
    return [
        f"{config.model}: {_count(shape.parameters)} parameters{active}, {shape.layers} layers, width {shape.hidden:,}, "
        f"vocabulary {shape.vocabulary:,}; {weights}",
        *([f"4-bit: {packed_words(shape.packed_share)}."] if packed and shape.experts and plan.model.backend != "mlx" else []),
        f"Planned for {plan.model.backend}{plan.remark}: {plan.memory.text}. 1 GB = 2^30 bytes.",
        *([_LISTED] if isinstance(shape, ListedModel) else []),
        *(["On WSL the optimiser's state stays on the GPU, and more is lost between tensors."] if wsl else []),
        f"{'--auto takes ' if plan.choice else ''}{how}. The largest pass: {_examples(plan)}.",
        *([f"For lite-dil reward --reward-loss {name_of(config.loss)}."] if is_reward(config.loss) else []),
        *([_drawing(Drawing.of(config))] if config.online else []),
        *([f"Not counted: {', '.join(missing)}."] if (missing := uncounted(config)) else []),
    ]


def _examples(plan: Plan) -> str:
    """Return the content of the largest pass, in which each response with its prompt is as long as --max-length allows."""
    examples, tokens = len(plan.load.prompts), plan.load.longest
    if plan.config.online:
        answers = sum(map(len, plan.load.responses))
        return f"{count(answers, 'answer')} of {plan.load.responses[0][0]:,} tokens to {count(examples, 'prompt')}"
    kind = {1: "answer", 2: "pair"}.get(plan.answers, f"prompt with {plan.answers} answers")
    plural = {1: "answers", 2: "pairs"}.get(plan.answers, f"prompts with {plan.answers} answers")
    return f"{examples:,} {kind if examples == 1 else plural} of {tokens:,} tokens (prompt plus answer)"


def _drawing(drawing: Drawing) -> str:
    return (
        f"Drawn at once: {count(drawing.answers, 'answer')} of at most {drawing.tokens:,} tokens, to prompts of at most "
        f"{drawing.prompt:,}."
    )


def _table(plan: Plan) -> list[str]:
    estimate = plan.estimate
    parts, with_head = estimate.components, ", with a head" if is_reward(plan.config.loss) else ""
    logits = "" if parts["logits"] else "none at the fullest moment"
    reference = "the initial adapter" if parts["reference"] else "the same model, its adapter off"
    shown = [
        (
            "weights",
            estimate.weights,
            f"frozen; {gigabytes(parts['experts'])} GB are experts" if parts["experts"] else "frozen",
        ),
        (
            "adapter",
            parts["adapter"],
            (f"LoRA of rank {rank}, float32" if (rank := plan.config.lora_r) else "the initial one, float32") + with_head,
        ),
        ("gradients", parts["gradients"], f"of the adapter{' and its head' if with_head else ''} alone"),
        ("optimiser", parts["optimizer"], "AdamW's state"),
        *([("drawn answers", parts["cache"], "their keys and values")] if parts["cache"] else []),
        ("activations", parts["activations"], "kept for the backward pass"),
        *([("logits chunk", parts["logits"], logits)] if not with_head else []),
        ("temporaries", parts["temporaries"], f"at the fullest moment: {estimate.phase}"),
        *([("reference", parts["reference"], reference)] if not with_head else []),
        *([("rewards", parts["rewards"], "models that reward")] if parts["rewards"] else []),
        ("fragmentation", parts["reserve"], "lost between tensors"),
    ]
    rows = [f"  {name:14}{size / GIB:8.2f} GB   {note}" for name, size, note in shown]
    rows.append(f"  {'total':14}{estimate.total / GIB:8.2f} GB   of {plan.memory.usable / GIB:.2f} GB")
    if estimate.host:
        limit = f" of {gigabytes(plan.memory.host)}" if math.isfinite(plan.memory.host) else ""
        what = ", ".join(f"{gigabytes(size)} {name}" for name, size in estimate.host_parts if size)
        rows.append(f"  and {gigabytes(estimate.host)}{limit} GB of the computer's own memory: {what}")
    return rows


def _verdict(plan: Plan) -> str:
    spare = plan.memory.usable - plan.estimate.total
    if plan.remedy is None:
        return f"It fits, with {gigabytes(spare)} GB to spare."
    missing = [f"{gigabytes(-spare)} GB"] if spare < 0 else []
    if (more := plan.estimate.host - plan.memory.host) > 0:
        missing.append(f"{gigabytes(more)} GB of the computer's own memory")
    packed = plan.config.load_in_4bit or plan.model.shape.quantization is not None
    if packed and (experts := plan.estimate.experts) and plan.estimate.weights > plan.memory.usable:
        missing[0] += f" (experts take {gigabytes(experts)} GB, which 4 bits leave at 16)"
    advice = f"It does not fit: {' and '.join(missing)} are missing. {plan.remedy.advice()}."
    if plan.remedy.fits and set(plan.remedy.changes) <= set(TUNABLE):
        advice += " --auto finds such a setting itself."
    return advice


def _rooms(plan: Plan) -> list[str]:
    kind = {1: "answers", 2: "pairs"}.get(plan.answers, "prompts")
    rows = [
        f"Room for: the longest --max-length that fits, or how many {kind} of {plan.config.max_length:,} tokens in one pass.",
        f"  {'':14}{'with these options':>24}{'with --auto':>24}",
        f"  {'memory':14}" + 2 * f"{'--max-length':>14}{kind:>10}",
    ]
    for room in plan.rooms:
        cells = [f"{n:,}" if n else "-" for n in (room.longest, room.examples, room.longest_auto, room.examples_auto)]
        rows.append("  {:14}{:>14}{:>10}{:>14}{:>10}".format(room.name, *cells))
    if plan.model.backend == "mlx":
        rows.append("  (along a curve through a few estimates)")
    if any(room.longest_auto == plan.model.shape.max_positions for room in plan.rooms):
        rows.append(f"  {plan.model.shape.max_positions:,} tokens are all that the model was made for.")
    return rows


def _download(plan: Plan) -> str:
    if plan.download is None:
        return "Download: none, the weights are here."
    return f"Download: {gigabytes(plan.download)} GB of weights, once."


def _time(plan: Plan) -> str:
    epoch = plan.epoch
    steps = (
        f"Steps: {epoch.steps:,}, over {count(epoch.examples, 'example')} an epoch. " if epoch.steps and epoch.examples else ""
    )
    if not epoch.rate:
        return f"{steps}Time: not known; --measure takes a few steps here, --like RUN_FOLDER uses the rate of an earlier run."
    if epoch.run_seconds is None:
        return f"Time: at {epoch.rate}; of a run not known without --data FILE."
    most, lengths = (
        ("at most ", "all were of --max-length") if epoch.at_most else ("", "the examples are as long as those measured")
    )
    return f"{steps}Time at {epoch.rate}: {most}{duration(epoch.run_seconds)}, if {lengths}; evaluations take more."


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.0f} million"
