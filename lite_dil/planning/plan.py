"""Plan a run: whether it fits, why, and what would help, from the options and the model's config.json alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lite_dil.backends import registry
from lite_dil.base.display import unheard
from lite_dil.base.errors import UserError
from lite_dil.base.memory import Memory
from lite_dil.base.signs import CHOSEN
from lite_dil.batching.schedule import examples_taken, steps_of
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.dataset import epoch_rows, reader_of
from lite_dil.data.held_out import wanted
from lite_dil.data.prompts import read_prompts
from lite_dil.data.reader import refuse
from lite_dil.data.sources import EMBEDDED, is_local, looks_like_file, split_sources
from lite_dil.models.find import EMBEDDED_MODEL
from lite_dil.models.listing import ListedModel
from lite_dil.objectives.reward_table import is_reward
from lite_dil.objectives.table import objective_of
from lite_dil.planning import auto, fit
from lite_dil.planning.estimate import BYTES, AnyModel, Estimate, Load
from lite_dil.planning.known import read_model
from lite_dil.planning.memory import memory_here, memory_of, nvidia_gpu
from lite_dil.runs.history import read_metrics
from lite_dil.runs.rates import POLICY_RATE, REWARD_RATE, SAMPLED_RATE, Rate, Setting, known, named

_WEIGHTS = (".safetensors", ".bin")
CARDS = (8, 12, 16, 24)


@dataclass(frozen=True)
class Capacity:
    """What fits into a memory: `longest` is a --max-length, `examples` a number of examples of the config's --max-length."""

    name: str
    usable: int
    longest: int
    examples: int
    longest_auto: int
    examples_auto: int


@dataclass(frozen=True)
class Epoch:
    """An epoch's examples and duration in seconds; `at_most` if only --max-length is known, not the lengths.

    `steps` and `run_seconds` are those of the whole run. Evaluations and sample answers take more.
    """

    examples: int | None
    seconds: float | None
    at_most: bool
    rate: str
    steps: int | None = None
    run_seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """A run's plan, before it starts.

    Attributes:
        answers: responses per example.
        remedy: what would make it fit; None if it fits as it is.
        rooms: the capacity of this memory, then of common cards.
        download: bytes of the weights on the hub; None if they are here.
        remark: a note on the assumed backend.
        choice: the choice of --auto, in words.
    """

    config: ResolvedConfig
    model: fit.Model
    memory: Memory
    load: Load
    answers: int
    estimate: Estimate
    remedy: fit.Remedy | None
    rooms: tuple[Capacity, ...]
    download: int | None
    epoch: Epoch
    remark: str
    choice: str

    @property
    def fits(self) -> bool:
        """Whether the run fits as it is."""
        return self.remedy is None

    def as_json(self) -> dict[str, Any]:
        """Return it for JSON, with sizes in bytes."""
        shape, remedy = self.model.shape, self.remedy
        packed = self.config.load_in_4bit or shape.quantization is not None
        return {
            "model": self.config.model,
            "parameters": shape.parameters,
            "active_parameters": shape.active,
            "packed_share": shape.packed_share if packed else None,
            "backend": self.model.backend,
            "dtype": self.model.dtype,
            "memory": self.memory.usable,
            "fits": self.fits,
            "total": self.estimate.total,
            "components": self.estimate.components,
            "phase": self.estimate.phase,
            "computer_memory": self.estimate.host,
            "computer_memory_usable": self.memory.host if math.isfinite(self.memory.host) else None,
            "computer_memory_components": dict(self.estimate.host_parts),
            "options": {
                name: getattr(self.config, name) for name in (*auto.TUNABLE, "max_length", "load_in_4bit", "head_bits")
            },
            "remedy": remedy
            and {
                "flags": remedy.flags(),
                "fits": remedy.fits,
                "total": remedy.estimate.total,
                "computer_memory": remedy.estimate.host,
            },
            "room": [vars(room) for room in self.rooms],
            "download": self.download,
            "epoch": vars(self.epoch),
        }


def make(
    config: ResolvedConfig,
    given: Set[str],
    size: float | None = None,
    rate: float | None = None,
    like: Path | None = None,
    host: float | None = None,
) -> Plan:
    """Return the plan for `config`.

    Args:
        given: the options that --auto must not change.
        size: GB of the memory to plan for; None means the free memory here.
        rate: tokens per second, for the time of an epoch.
        like: the folder of an earlier run whose rate to use.
        host: GB of memory of the computer with an NVIDIA GPU; None means the free memory here when planning for this machine,
            and no limit otherwise.
    """
    shape = read_model(config.model, config.trust_remote_code)
    backend, remark = planned_backend(config.backend, size is not None)
    if host is not None and backend != "cuda":
        raise UserError(f"--host-memory is for an NVIDIA GPU; with --backend {backend} the computer's memory is --memory")
    config = replace(config, backend=backend)
    model = fit.Model(shape, backend, fit.planned_dtype(config, backend, here=size is None))
    memory = memory_here(backend, host) if size is None else memory_of(size, backend, host)
    count, answers = _examples(config, "data" in given)
    answers += config.sample_rejected or 0
    if config.online and rate is not None:
        raise UserError("--tokens-per-second is of given answers; give the folder of an on-policy run with --like")
    one = Load.worst(replace(config, batch_size=1), answers)
    choice = ""
    if config.auto:
        config = auto.pick(config, model, memory, one, given) or auto.frugal(config, model, one, memory, given)
        choice = auto.words(config)
    load = Load.worst(config, answers)
    found = model.estimate(config, load)
    remedy = None
    if not memory.holds(found.total, found.host):
        remedy = fit.find_remedy(config, model, memory, lambda c: Load.worst(c, answers))
    sizes = [("this memory", memory), *((f"{card} GB", memory_of(card, backend, host)) for card in CARDS)]
    least = auto.sparing(config, model, one)
    rooms = tuple(_room(name, config, least, model, memory, answers) for name, memory in sizes)
    kept = known(config.model, setting_of(config, model)) if size is None and not config.online else None
    epoch = _epoch(config, count, answers, rate, like, kept)
    return Plan(
        config, model, memory, load, answers, found, remedy, rooms, _download(config.model, shape), epoch, remark, choice
    )


def _room(
    name: str, config: ResolvedConfig, least: list[ResolvedConfig], model: fit.Model, memory: Memory, answers: int
) -> Capacity:
    """Return what fits into a memory with `config`, and with whichever of `least`, the choices of --auto, fits the most."""
    if math.isinf(memory.host):
        least = least[-1:]
    longest, *others = [fit.longest(c, model, memory, answers) for c in (config, *least)]
    examples, *more = [fit.most_examples(c, model, memory, answers) for c in (config, *least)]
    return Capacity(name, memory.usable, longest, examples, max(others), max(more))


def planned_backend(name: str, memory_given: bool) -> tuple[str, str]:
    """Return the backend to plan for, and a remark if it is neither requested nor this machine's."""
    if name != "auto":
        return name, ""
    try:
        here = registry.resolve("auto")
    except UserError:  # planning does not need an installed backend
        here = "cuda" if not memory_given and nvidia_gpu() else "cpu"
    if here == "cpu" and memory_given:
        return "cuda", " (nothing here uses a GPU yet; --backend cpu or mlx plans for those)"
    return here, ""


def setting_of(config: ResolvedConfig, model: fit.Model) -> Setting:
    """Return what the rate of a planned run depends on; the layout may be "auto"."""
    return Setting(named(config.model), model.backend, model.dtype, config.load_in_4bit, config.layout, kind_of(config))


def kind_of(config: ResolvedConfig) -> str:
    """Return which kind of training it is, for its rate."""
    return REWARD_RATE if is_reward(config.loss) else SAMPLED_RATE if config.online else POLICY_RATE


def with_rate(plan: Plan, rate: Rate) -> Plan:
    """Return the plan with the times that follow from a rate measured for it."""
    return replace(plan, epoch=_epoch(plan.config, plan.epoch.examples or 0, plan.answers, None, None, rate))


def _examples(config: ResolvedConfig, chosen: bool) -> tuple[int, int]:
    """Return the number of examples in an epoch, 0 if --data is not a local file, and the number of responses of each.

    The embedded data is counted if the user has `chosen` it.

    Data on the hub is not downloaded.
    """
    sources = split_sources(config.data)
    if config.online:
        local = chosen and all(name == EMBEDDED or is_local(name) or looks_like_file(name) for name, _ in sources)
        return len(read_prompts(config.data, config, config.chat, unheard, alike=True)) if local else 0, config.samples or 1
    if not chosen if config.data == EMBEDDED else not all(is_local(name) or looks_like_file(name) for name, _ in sources):
        return 0, 1 if config.sample_rejected else 2  # --sample-rejected is for demonstrations
    good_only, total, answers = objective_of(config.loss).data == "chosen", 0, 0
    for name, weight in sources:
        reader = reader_of(name, "train", config)
        kept = 0
        for row in reader:
            kept += not good_only or CHOSEN in row.signs
            answers = max(answers, len(row.signs))
        refuse(name, [] if config.skip_bad_rows and kept else reader.problems, kept)
        whole, rest = epoch_rows(kept, weight)
        total += whole * kept + rest
    return total - (0 if config.eval_data else wanted(total, config.eval_fraction)), answers


def _download(name: str, shape: AnyModel) -> int | None:
    """Return the bytes of the weights on the hub, before quantisation; None if there is nothing to download."""
    if name == EMBEDDED_MODEL or any(path.suffix in _WEIGHTS for path in Path(name).glob("*")):
        return None
    if name.count("/") == 1 and not Path(name).exists():
        from huggingface_hub import try_to_load_from_cache

        files = ("model.safetensors", "model.safetensors.index.json")
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return None
    if isinstance(shape, ListedModel):
        return _stored(shape)
    if (packed := shape.quantization) is None:
        return shape.parameters * BYTES.get(shape.dtype, 2)
    linear = shape.layers * sum(linear.weight for linear in shape.linears().values())
    if packed.library == "mlx":
        linear += shape.table * (1 if shape.tied else 2)
    scales = linear // packed.group * (4 if packed.library == "mlx" else 1)
    return linear * packed.bits // 8 + scales + (shape.parameters - linear) * 2


def _stored(shape: ListedModel) -> int:
    """Return the bytes of a listed model's files, with its towers."""
    each = BYTES.get(shape.dtype, 2)
    whole = (shape.parameters + sum(linear.parameters for linear in shape.tower) + shape.tower_rest) * each
    if shape.experts_stored_in:
        return whole - int(shape.experts * (each - shape.experts_stored_in / 8))
    if (own := shape.quantization) is None:
        return whole
    packed = sum(shape.linears()[name].weight for name in shape.packed)
    return whole - packed * each + packed * own.bits // 8 + packed // own.group * (4 if own.library == "mlx" else 1)


def _epoch(
    config: ResolvedConfig, count: int, answers: int, rate: float | None, like: Path | None, kept: Rate | None
) -> Epoch:
    seconds, at_most, name = 0.0, False, ""  # seconds of an example
    if like:
        figures = _measured(like)
        seconds, name = 1 / figures["examples_per_second"], f"{figures['tokens_per_second']:,.0f} tokens/s in {like}"
    elif rate is not None:  # every response counts with its prompt, as in metrics.jsonl
        seconds, at_most, name = answers * config.max_length / rate, True, f"{rate:,.0f} tokens/s"
    elif kept is not None:
        seconds, name = 1 / kept.examples_per_second, str(kept)
    if not count:
        return Epoch(None, None, at_most, name)
    repeats = config.num_iterations or 1
    _, steps = steps_of(config, count, repeats)
    if not name:
        return Epoch(count, None, at_most, name, steps)
    taken = examples_taken(config, count) * (1 if config.max_steps else repeats)
    return Epoch(count, count * seconds * repeats, at_most, name, steps, taken * seconds)


def _measured(folder: Path) -> dict[str, float]:
    """Return the median rates of an earlier run."""
    names = ("tokens_per_second", "examples_per_second")
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"--like {folder}: metrics.jsonl cannot be read: it is not there")
    try:
        found = read_metrics(folder)
    except (OSError, UserError) as error:
        raise UserError(f"--like {folder}: {error}") from None
    figures = {name: [float(line[name]) for line in found if line.get(name)] for name in names}
    if not all(figures.values()):
        raise UserError(f"--like {folder}: metrics.jsonl holds no {' and '.join(names)}; is it the folder of a training run?")
    return {name: statistics.median(values) for name, values in figures.items()}
