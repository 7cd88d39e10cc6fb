"""Before a model is downloaded and loaded: whether a mixture of experts can fit at all, of which 4 bits pack only a part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lite_dil.base.errors import UserError, first_line
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.listing import ListedModel, packed_words
from lite_dil.planning.estimate import Load
from lite_dil.planning.estimate_listed import ListedStep
from lite_dil.planning.fit import gigabytes, planned_dtype
from lite_dil.planning.known import has_experts, read_model
from lite_dil.planning.memory import memory_here

_SHORTEST = Load((1,), ((1, 1),))


def check_experts(config: ResolvedConfig, say: Callable[[str], None]) -> None:
    """Compare the weights of a mixture of experts under --4bit with the free memory, from config.json alone.

    Args:
        config: with the backend that is used.
        say: shows a line to the user, also where the weights cannot be planned: training may work all the same.

    Raises:
        UserError: a GPU does not hold them. A computer's memory may grow by swapping, so there it is said only.
    """
    if not config.load_in_4bit or config.backend == "mlx":
        return
    try:
        text = _too_large(config)
    except Exception as error:  # listing runs the model's own code, which may raise anything
        say(f"Not checked before loading whether the weights fit: {first_line(error)}")
        return
    if text and config.backend == "cuda":
        raise UserError(f"{text}. Take a model without experts or with fewer, or a larger GPU; lite-dil plan shows what fits")
    if text:
        say(text)


def _too_large(config: ResolvedConfig) -> str:
    """Return in words how a mixture's weights exceed the free memory, or "" if they do not."""
    if not has_experts(config.model):
        return ""
    model = read_model(config.model, config.trust_remote_code)
    if not isinstance(model, ListedModel) or not model.experts:
        return ""
    backend, dtype = config.backend, planned_dtype(config, config.backend)
    step = ListedStep(replace(config, init_adapter=None), model, backend, dtype, _SHORTEST)
    weights, free = sum(step.weights().values()), memory_here(backend).usable
    if weights <= free:
        return ""
    return (
        f"--model {config.model}: its weights take {gigabytes(weights)} GB with --4bit, and {gigabytes(free)} GB are free: "
        f"{packed_words(model.packed_share)}"
    )
