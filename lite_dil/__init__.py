"""Preference training of language models by Direct Imitation Learning (DIL) with (Q)LoRA, on one small machine.

    import lite_dil as dil

    policy = dil.load("Qwen/Qwen3-4B", bits=4)
    run = dil.train(policy, dil.read("prefs.jsonl"), loss="lsif", max_steps=200)
    print(run.metrics[-1], policy.generate("Why is the sky blue?"))

The names in `__all__` are the stable ones; docs/api.md shows them at work. Each is imported when it is first used.
"""

import logging
from typing import TYPE_CHECKING

from lite_dil.base.version import __version__

if TYPE_CHECKING:
    from lite_dil.api.comparing import Compared, compare
    from lite_dil.api.evaluating import evaluate
    from lite_dil.api.loading import load
    from lite_dil.api.reading import Data, read
    from lite_dil.api.rewards import Reward, load_reward, train_reward
    from lite_dil.api.training import train
    from lite_dil.base.errors import OutOfMemory, TrainingDiverged, UserError
    from lite_dil.base.observer import Event, Observer
    from lite_dil.cli.progress import Terminal
    from lite_dil.generation.policy import Policy
    from lite_dil.objectives.own import PairLoss, SideLoss
    from lite_dil.recipes.evaluation import Evaluated
    from lite_dil.recipes.run import Run
else:
    _PLACES = {
        "Compared": "lite_dil.api.comparing",
        "Data": "lite_dil.api.reading",
        "Evaluated": "lite_dil.recipes.evaluation",
        "Event": "lite_dil.base.observer",
        "Observer": "lite_dil.base.observer",
        "OutOfMemory": "lite_dil.base.errors",
        "PairLoss": "lite_dil.objectives.own",
        "Policy": "lite_dil.generation.policy",
        "Reward": "lite_dil.api.rewards",
        "Run": "lite_dil.recipes.run",
        "SideLoss": "lite_dil.objectives.own",
        "Terminal": "lite_dil.cli.progress",
        "TrainingDiverged": "lite_dil.base.errors",
        "UserError": "lite_dil.base.errors",
        "compare": "lite_dil.api.comparing",
        "evaluate": "lite_dil.api.evaluating",
        "load": "lite_dil.api.loading",
        "load_reward": "lite_dil.api.rewards",
        "read": "lite_dil.api.reading",
        "train": "lite_dil.api.training",
        "train_reward": "lite_dil.api.rewards",
    }

    def __getattr__(name):
        if name not in _PLACES:
            raise AttributeError(f"module 'lite_dil' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(_PLACES[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_PLACES})


__all__ = [
    "Compared",
    "Data",
    "Evaluated",
    "Event",
    "Observer",
    "OutOfMemory",
    "PairLoss",
    "Policy",
    "Reward",
    "Run",
    "SideLoss",
    "Terminal",
    "TrainingDiverged",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "load",
    "load_reward",
    "read",
    "train",
    "train_reward",
]

logging.getLogger("lite_dil").addHandler(logging.NullHandler())
