"""--auto: of the settings that do not change the result, choose the fastest that fits into free memory."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.memory import Memory
from lite_dil.batching.schedule import computed_tokens, row_tokens
from lite_dil.config.train_config import FIELDS, SPLIT, ResolvedConfig, flag
from lite_dil.data.encoder import Example
from lite_dil.planning.estimate import AnyModel, Load, layout_for
from lite_dil.planning.fit import Model, find_remedy, gigabytes, most, planned_dtype, several
from lite_dil.planning.known import read_model
from lite_dil.planning.memory import memory_here

OFFLOADS = ("offload_embeddings", "offload_activations")  # in order of their cost in time
TUNABLE = ("batch_size", "gradient_accumulation_steps", "row_tokens", "gradient_checkpointing", *OFFLOADS)
ENOUGH = {"cpu": 512}  # tokens of a pass that keep the hardware busy; a GPU needs more
ENOUGH_GPU, MOST_GPU = 2048, 8192  # more than the second brings no gain
ROOM = 0.9  # share of the memory that passes may grow into


def choose(
    config: ResolvedConfig,
    shape: AnyModel,
    backend: str,
    dtype: str,
    memory: Memory,
    load: Load,
    given: Set[str] = frozenset(),
) -> ResolvedConfig:
    """Return `config` with the fastest split of a step, checkpointing and offloads that fit.

    A step keeps its batch_size * gradient_accumulation_steps examples, so that the result stays the same. From fast to slow:
    no recomputation, selective and full checkpointing, each with passes that keep the hardware busy; full with smaller passes;
    offloads. Passes on a GPU then grow while there is room.

    Args:
        config: resolved.
        load: the largest example, which no setting can split.
        given: the fields that must not change.

    Raises:
        UserError: nothing fits; the message says what would help.
    """
    model = Model(shape, backend, dtype)
    found = pick(config, model, memory, load, given)
    if found is not None:
        return found
    config = frugal(config, model, load, memory, given)
    least = model.estimate(config, load)
    short = []
    if least.total > memory.usable:
        short.append(f"{gigabytes(least.total)} GB are needed, and {gigabytes(memory.usable)} GB are free")
    if least.host > memory.host:
        needed = f"{gigabytes(least.host)} GB of the computer's own memory are needed"
        short.append(f"{needed}, and {gigabytes(memory.host)} GB are free")
    text = f"--auto: at least {'; '.join(short)}"
    kept = [flag(name) for name in ("gradient_checkpointing", "row_tokens", "batch_size", *OFFLOADS) if name in given]
    if kept:
        text += f" ({', '.join(kept)} as given)"
    remedy = find_remedy(config, model, memory, lambda c: several(cut(load, c.max_length), 1))
    raise UserError(f"{text}. {remedy.advice()}")


def pick(config: ResolvedConfig, model: Model, memory: Memory, load: Load, given: Set[str]) -> ResolvedConfig | None:
    """Return the result of `choose`, or None if nothing fits."""
    limit = _limit(config, given)
    tokens = load.tokens(layout_for(config, model.shape, model.backend))
    fixed = config.row_tokens if "row_tokens" in given else None
    busy = _between(ENOUGH.get(model.backend, ENOUGH_GPU) // tokens, limit)
    if fixed:
        busy = limit = _between(-(-fixed // tokens), limit)

    def fits(base: ResolvedConfig, count: int, memory: Memory) -> bool:
        return model.fits(_split(base, count, tokens, given), several(load, count), memory)

    def filled(base: ResolvedConfig, low: int, high: int, memory: Memory) -> ResolvedConfig:
        count = most(lambda number: fits(base, number, memory), low, high)
        return _split(base, count, tokens, given)

    modes, offloads = _modes(config, model, given), _offloads(config, model, given)
    ceiling = busy if model.backend == "cpu" else max(busy, _between(MOST_GPU // tokens, limit))
    for mode in modes:
        base = replace(config, **offloads[0], gradient_checkpointing=mode)
        if fits(base, busy, memory):
            return filled(base, busy + 1, ceiling, memory.part(ROOM))
    for offload in offloads:
        base = replace(config, **offload, gradient_checkpointing=modes[-1])
        if fits(base, lowest := busy if fixed else 1, memory):
            return filled(base, lowest, busy, memory)
    return None


def frugal(config: ResolvedConfig, model: Model, load: Load, memory: Memory, given: Set[str] = frozenset()) -> ResolvedConfig:
    """Return the setting of `choose` that needs the least GPU memory among those that fit into the computer's memory."""

    def needs(tried: ResolvedConfig) -> tuple[float, int]:
        found = model.estimate(tried, load)
        return max(found.host, memory.host), found.total

    return min(sparing(config, model, load, given), key=needs)


def sparing(config: ResolvedConfig, model: Model, load: Load, given: Set[str] = frozenset()) -> list[ResolvedConfig]:
    """Return the settings of `choose` that keep the least for the backward pass, by offload, with one example per pass."""
    tokens, mode = load.tokens(layout_for(config, model.shape, model.backend)), _modes(config, model, given)[-1]
    bases = [replace(config, **offload, gradient_checkpointing=mode) for offload in _offloads(config, model, given)]
    return [_split(base, 1, tokens, given) for base in bases]


def fitted(config: ResolvedConfig, examples: Sequence[Example], given: Set[str] | None) -> tuple[ResolvedConfig, str]:
    """Return the choice of --auto for these examples on this machine, and a line that describes it.

    Args:
        given: the options that must not change; None means those that are not at their default.
    """
    if given is None:
        given = {name for name in TUNABLE if getattr(config, name) != FIELDS[name].default}
    shape, memory = read_model(config.model, config.trust_remote_code), memory_here(config.backend)
    model = Model(shape, config.backend, planned_dtype(config, config.backend))
    if config.online:
        chosen = _for_drawn(config, examples, model, memory, given)
    else:
        load = largest_example(examples, config, layout_for(config, shape, config.backend))
        chosen = choose(config, shape, model.backend, model.dtype, memory, load, given)
    return chosen, f"--auto: {words(chosen)} ({memory.text})"


def _for_drawn(
    config: ResolvedConfig, prompts: Sequence[Example], model: Model, memory: Memory, given: Set[str]
) -> ResolvedConfig:
    """Return the choice for answers that are not drawn yet, each as long as it may be: whole groups in a pass if they fit."""
    assert config.samples and config.max_new_tokens  # resolved
    prompt = max(len(each.prompt) for each in prompts)
    short = replace(config, max_length=prompt + config.max_new_tokens)  # what drawing takes into account

    def chosen(answers: int) -> ResolvedConfig:
        load = Load((prompt,), ((config.max_new_tokens or 1,) * answers,))
        found = choose(short, model.shape, model.backend, model.dtype, memory, load, given)
        return replace(found, max_length=config.max_length, row_tokens=row_tokens(found))

    try:
        return chosen(config.samples)
    except UserError:
        return chosen(1)


def words(config: ResolvedConfig) -> str:
    """Return a description of the choice."""
    mode = "nothing recomputed" if config.gradient_checkpointing == "off" else f"{config.gradient_checkpointing} checkpointing"
    offloads = "".join(f", {flag(name)}" for name in OFFLOADS if getattr(config, name))
    examples = config.batch_size * config.gradient_accumulation_steps
    return f"{mode}{offloads}, passes of up to {row_tokens(config)} tokens, {examples} examples per step as configured"


def largest_example(examples: Sequence[Example], config: ResolvedConfig, layout: str) -> Load:
    """Return the load of the smallest possible pass: an example as long as the longest, with the longest responses.

    Responses that --sample-rejected has not drawn yet count at their maximum length.
    """
    answers = max((tuple(map(len, e.responses)) for e in examples), key=sum)
    tokens = max(computed_tokens([e], layout) for e in examples)
    if layout == "plain":
        prompt = max(len(e.prompt) + max(map(len, e.responses)) for e in examples) - max(answers)
    else:
        prompt = tokens - sum(answers)
    prompt = max(1, prompt)
    if config.sample_rejected:
        drawn = min(config.sample_max_tokens or config.max_length, max(1, config.max_length - prompt))
        answers = (*answers, *(drawn,) * config.sample_rejected)
    return Load((prompt,), (answers,))


def cut(load: Load, length: int) -> Load:
    """Return an example's load under another --max-length, cut like `lite_dil.data.encoder.truncate`."""
    prompt, answers = load.prompts[0], load.responses[0]
    prompt = min(prompt, max(1, length - max(answers)))
    return Load((prompt,), (tuple(min(n, length - prompt) for n in answers),))


def _between(count: int, limit: int) -> int:
    return max(1, min(count, limit))


def _limit(config: ResolvedConfig, given: Set[str]) -> int:
    """Return how many examples a pass may have: all of a step's, unless the user set the split."""
    free = given.isdisjoint(SPLIT)
    return config.batch_size * (config.gradient_accumulation_steps if free else 1)


def _split(config: ResolvedConfig, count: int, tokens: int, given: Set[str]) -> ResolvedConfig:
    """Return the config with passes of at most `count` examples of `tokens` tokens, or of more if they are shorter."""
    changes: dict[str, Any] = {}
    if given.isdisjoint(SPLIT):
        whole = config.batch_size * config.gradient_accumulation_steps
        changes |= {"batch_size": whole, "gradient_accumulation_steps": 1}
    if "row_tokens" not in given:
        changes["row_tokens"] = count * tokens
    return replace(config, **changes)


def _modes(config: ResolvedConfig, model: Model, given: Set[str]) -> list[str]:
    if "offload_activations" in given and config.offload_activations:
        return ["full"]  # activation offloading needs it
    if "gradient_checkpointing" in given:
        return [config.gradient_checkpointing]
    return ["off", "selective", "full"] if model.shape.selective else ["off", "full"]


def _offloads(config: ResolvedConfig, model: Model, given: Set[str]) -> list[dict[str, Any]]:
    """Return the sets of offloads to try, from none to all."""
    sets: list[dict[str, Any]] = [{name: False for name in OFFLOADS if name not in given}]
    for name in OFFLOADS:
        needs_full = name == "offload_activations" and _modes(config, model, given)[-1] != "full"
        if name in model.can_offload(config) and name not in given and not needs_full:
            sets += [others | {name: True} for others in sets]
    return sets
