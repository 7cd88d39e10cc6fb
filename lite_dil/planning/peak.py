"""Estimate the peak memory of a training step on a given backend."""

from __future__ import annotations

from lite_dil.backends.limits import check_options
from lite_dil.base.errors import UserError
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.listing import ListedModel
from lite_dil.models.shape import FAMILIES
from lite_dil.planning.estimate import AnyModel, Estimate, Load
from lite_dil.planning.estimate_listed import ListedStep
from lite_dil.planning.estimate_mlx import MLXStep
from lite_dil.planning.estimate_torch import TorchStep


def estimate(config: ResolvedConfig, shape: AnyModel, backend: str, dtype: str, load: Load) -> Estimate:
    """Return the peak of live bytes in training, once the optimiser has its state.

    Args:
        config: resolved (`TrainConfig.resolved`).
        backend: "cuda", "cpu", or "mlx" on Apple silicon.
        dtype: the compute dtype: "float32", "bfloat16" or "float16".
        load: the largest pass of the run.

    Raises:
        UserError: an option's memory is not known.
    """
    check_options(backend, config, config)
    if config.unsloth:
        raise UserError("plan does not know what the layers of --unsloth keep; leave it out")
    if backend == "mlx":
        if isinstance(shape, ListedModel):
            raise UserError(
                f"--model {config.model}: with --backend mlx plan knows dense models alone ({', '.join(FAMILIES)}); this is a "
                f"{shape.model_type}. Try a few --max-steps, or plan for an NVIDIA GPU with --backend cuda"
            )
        return MLXStep(config, shape, dtype, load).estimate()
    if isinstance(shape, ListedModel):
        return ListedStep(config, shape, backend, dtype, load).estimate()
    return TorchStep(config, shape, backend, dtype, load).estimate()
