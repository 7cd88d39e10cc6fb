"""How long a training on the data of ``lite-dil data`` takes, where the model's rate on this machine is known."""

from __future__ import annotations

from typing import Any

from lite_dil.base.display import duration
from lite_dil.base.text import count
from lite_dil.batching.schedule import examples_taken, steps_of
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.dataset import epoch_rows
from lite_dil.runs.rates import known


def time_of(config: ResolvedConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Return the steps of a run on this data, its seconds without evaluations, or None, and the rate they follow from.

    Args:
        found: a report of `lite_dil.data.inspect.findings` on usable data. Each of its responses counts with its prompt, as in
            a rate; rows that a source's weight repeats count as often as an epoch takes them.
    """
    rows = sum(source["kept"] for source in found["sources"])
    epoch = sum(whole * source["kept"] + rest for source in found["sources"] for whole, rest in [_taken(source)])
    held_out = found["held_out"]
    trained = epoch - (held_out["in_training"]["of"] if held_out and not held_out["sources"] else 0)
    _, steps = steps_of(config, trained)
    prompts, responses = found["all_rows"]["computed"] - found["all_rows"]["trained"], sum(found["answers"].values()) / rows
    tokens = found["all_rows"]["trained"] + prompts * responses
    rate = known(config.model)
    seconds = tokens / rows * examples_taken(config, trained) / rate.tokens_per_second if rate else None
    return {"steps": steps, "seconds": seconds, "rate": str(rate) if rate else ""}


def _taken(source: dict[str, Any]) -> tuple[int, int]:
    return epoch_rows(source["kept"], source["weight"])


def in_words(time: dict[str, Any]) -> str:
    """Return a line that says it."""
    steps = f"training takes {count(time['steps'], 'step')}"
    if time["seconds"] is None:
        return f"{steps}; lite-dil plan FILE --measure says how long that takes here"
    return f"{steps}, about {duration(time['seconds'])} at {time['rate']}; evaluations take more"
