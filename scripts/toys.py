"""Two toys on a CPU, each with a picture: what the objectives cover, and what they do if the two sides do not overlap.

    python scripts/toys.py --output docs              # docs/mass_covering.png and docs/overlap.png; needs matplotlib
    python scripts/toys.py --output docs --library mlx

**mass_covering.png**. The policy can only be one bell, of any place and width; pi_chosen has two, and rejected responses come
from pi_ref, a wide bell. A policy that could be pi_chosen would end there with every objective; this one has to give something
up. sft covers both modes and pays with mass between them, where pi_chosen has none. ukl equals sft: for a normalised
policy its second term is E_ref[pi / pi_ref] = 1, a constant. bce also covers. lsif does *not*: it minimises the squared error
of r, which counts where r is large, so it takes the higher mode and drops the other, like the reverse KL that is drawn as the
yardstick. basu and rulsif (at the table's defaults) cover if they start at the reference, as training does, and have a still
lower loss at one mode. "DIL covers mass" is true of ukl and bce here, not of the family.

**overlap.png**. A policy over three responses. pi_chosen gives half of its mass to one that has e^-100 under pi_ref, as whole
responses of a language model do, so it is never rejected. Plain gradient descent in float32, from the
reference. lsif's pull on it grows as e^f: it runs away within twenty steps and overflows. With a tangent cap the pull is
constant beyond the cap: no overflow, but nothing stops it either, and it ends with all of the policy's mass on that response.
ukl pulls evenly and ends with both chosen responses. rulsif and bce let go as f grows: no jump and no overflow, and after
thousands of steps they have hardly moved the response: stable, and slow exactly where there is no overlap.

tests/scripts/test_toys.py asserts each of these on torch and on MLX.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from lite_dil.objectives import table as objectives
from lite_dil.objectives.losses import namespace
from lite_dil.objectives.objective import Responses, Sides
from lite_dil.objectives.table import OBJECTIVES

Array = Any  # a torch.Tensor or an mlx.core.array
Loss = Callable[[Array], Array]  # parameters of shape (runs, ...) -> a loss per run, shape (runs,)

GRID = np.linspace(-6, 6, 121)
MODES, HEIGHTS, MODE_WIDTH = (-2.0, 2.0), (0.65, 0.35), 0.35
REFERENCE_WIDTH = 2.5
RARE = -100.0  # log pi_ref of the response that is never rejected


class Fit(NamedTuple):
    """A bell: its place and width, its probabilities on GRID, and its loss."""

    place: float
    width: float
    policy: np.ndarray
    loss: float

    @property
    def spread(self) -> float:
        """The standard deviation."""
        return float(np.sqrt(self.policy @ GRID**2 - (self.policy @ GRID) ** 2))

    @property
    def between(self) -> float:
        """The mass between the modes, where pi_chosen has almost none."""
        return float(self.policy[np.abs(GRID) < 1].sum())


class Descent(NamedTuple):
    """The log-ratio of the rare response and the loss at each step, up to the first non-finite value."""

    log_ratio: np.ndarray
    loss: np.ndarray
    overflowed: bool
    policy: np.ndarray


def array(library: str, x: np.ndarray) -> Array:
    if library == "mlx":
        import mlx.core as mx

        return mx.array(x.astype(np.float32))
    import torch

    return torch.tensor(x, dtype=torch.float32)


def log_softmax(x: Array) -> Array:
    return x - namespace(x).logsumexp(x, -1, True)


def value_and_gradient(library: str, loss: Loss) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return a function of numpy arrays that returns each run's loss and the gradient of their sum, in float32."""

    def in_torch(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        leaf = array(library, x).requires_grad_()
        value = loss(leaf)
        return value.detach().numpy(), torch.autograd.grad(value.sum(), leaf)[0].numpy()

    def in_mlx(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import mlx.core as mx

        def total(leaf: Array) -> tuple[Array, Array]:
            value = loss(leaf)
            return value.sum(), value

        (_, value), gradient = mx.value_and_grad(total)(array(library, x))
        return np.array(value), np.array(gradient)

    return in_mlx if library == "mlx" else in_torch


def adam(library: str, loss: Loss, start: np.ndarray, steps: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the result of Adam with a cosine rate that falls to 0, and each run's loss there."""
    step_of = value_and_gradient(library, loss)
    x, mean, square = start.astype(np.float64), np.zeros_like(start), np.zeros_like(start)
    for step in range(1, steps + 1):
        _, gradient = step_of(x)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient.astype(np.float64) ** 2
        size = rate * (1 + math.cos(math.pi * step / steps)) / 2
        x = x - size * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-12)
    return x, step_of(x)[0]


def sides(name: str, **options: Any) -> Sides:
    """Return an objective of the table with beta 1, `options`, and its other defaults."""
    config = SimpleNamespace(**{**dict.fromkeys(OBJECTIVES[name].options), "beta": 1.0, **options})
    form = OBJECTIVES[name].form(objectives.constants(name, config))
    assert isinstance(form, Sides)
    return form


def expected_loss(form: Sides, library: str, reference: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Loss:
    """Return the expectation over both sides as a function of logits; logits and probabilities have shape (runs, responses).

    A response of probability 0 is left out of its side, since it is never drawn: 0 times e^f is not 0 if e^f overflows.
    """
    reference_logps = array(library, np.log(reference))

    def side(weights: np.ndarray, of: Callable[[Responses], Array], logps: Array) -> Array:
        drawn = slice(None) if weights.all() else np.flatnonzero(weights.any(0)).tolist()
        log_ratio = (logps - reference_logps)[:, drawn]
        logps = logps[:, drawn]
        seen = Responses(log_ratio, logps, logps, logps, log_ratio[0, 0] * 0)
        return (array(library, weights[:, drawn]) * of(seen)).sum(-1)

    def loss(logits: Array) -> Array:
        logps = log_softmax(logits)
        good = side(chosen, form.chosen, logps)
        return good if form.rejected is None else good + side(rejected, form.rejected, logps)

    return loss


# --- one bell against two --------------------------------------------------------------------------------------------


def bell(place: float, width: float) -> np.ndarray:
    """Return a discretised Gaussian on GRID."""
    density = np.exp(-((GRID - place) ** 2) / (2 * width**2))
    return density / density.sum()


def two_bells() -> np.ndarray:
    return sum((height * bell(mode, MODE_WIDTH) for height, mode in zip(HEIGHTS, MODES, strict=True)), np.zeros(len(GRID)))


COVERING: dict[str, Sides | None] = {
    "sft": sides("sft"),
    "ukl": sides("ukl"),
    "bce": sides("bce"),
    "basu": sides("basu"),
    "rulsif": sides("rulsif"),
    "lsif": sides("lsif"),
    "reverse KL": None,  # KL(pi || pi_chosen), for comparison: not an objective, since it needs pi_chosen's density
}
STARTS = ((0.0, REFERENCE_WIDTH), (-2.0, 0.5), (-1.0, 1.0), (2.0, 0.5))


def mass_covering(library: str, steps: int = 300) -> dict[str, tuple[Fit, Fit]]:
    """Return for each objective the bell found from the reference, and the one with the lowest loss from any of STARTS."""
    chosen, reference = two_bells(), bell(0, REFERENCE_WIDTH)
    grid, start = array(library, GRID), np.array([[place, math.log(width)] for place, width in STARTS])
    target = array(library, np.log(chosen))

    def logits(parameters: Array) -> Array:
        return -((grid - parameters[:, :1]) ** 2) / 2 * namespace(parameters).exp(-2 * parameters[:, 1:])

    def reverse_kl(parameters: Array) -> Array:
        logps = log_softmax(logits(parameters))
        return (namespace(logps).exp(logps) * (logps - target)).sum(-1)

    found = {}
    for name, form in COVERING.items():
        if form is None:
            loss: Loss = reverse_kl
        else:
            of_logits = expected_loss(form, library, reference[None], chosen[None], reference[None])

            def loss(parameters: Array, of_logits: Loss = of_logits) -> Array:
                return of_logits(logits(parameters))

        ends, values = adam(library, loss, start, steps, rate=0.1)
        fits = [Fit(x[0], math.exp(x[1]), bell(x[0], math.exp(x[1])), float(v)) for x, v in zip(ends, values, strict=True)]
        found[name] = fits[0], min(fits, key=lambda fit: fit.loss)
    return found


# --- a side that does not overlap ------------------------------------------------------------------------------------

LIKED = np.array([[0.5, 0.5, 0.0]])
DISLIKED = np.array([[0.5, 0.0, 0.5]])  # pi_ref, except for the response that it never draws
CAP = 3.0
OVERLAP = {
    "lsif": sides("lsif"),
    f"lsif, log-ratio-cap {CAP:g}": sides("lsif", log_ratio_cap=CAP),
    "ukl": sides("ukl"),
    "bce": sides("bce"),
    "rulsif": sides("rulsif"),
}


def overlap(library: str, steps: int = 3000, rate: float = 0.1) -> dict[str, Descent]:
    """Run plain gradient descent from the reference for each of OVERLAP; nothing covers the second response."""
    reference = np.array([[0.5, math.exp(RARE), 0.5]])
    found = {}
    for name, form in OVERLAP.items():
        step_of = value_and_gradient(library, expected_loss(form, library, reference, LIKED, DISLIKED))
        logits, path, values = np.log(reference), [], []
        for _ in range(steps):
            value, gradient = step_of(logits)
            if not (np.isfinite(value).all() and np.isfinite(gradient).all()):
                break
            path.append(logits[0])
            values.append(value[0])
            logits = logits - rate * gradient
        logps = np.asarray(log_softmax(array(library, np.array(path))))
        found[name] = Descent(logps[:, 1] - RARE, np.array(values), len(path) < steps, np.exp(logps[-1]))
    return found


# --- pictures --------------------------------------------------------------------------------------------------------

COLOURS = {
    "sft": "#1b6ca8",
    "ukl": "#1b6ca8",
    "bce": "#2a9d62",
    "basu": "#8a5fbf",
    "rulsif": "#d98200",
    "lsif": "#c8352b",
    "reverse KL": "#555555",
}


def draw_mass_covering(found: dict[str, tuple[Fit, Fit]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    titles = ("Trained from the reference", "Lowest loss of any start")
    for column, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        panel.fill_between(GRID, two_bells(), color="#dddddd", label="pi_chosen")
        for name, fits in found.items():
            if name == "ukl":  # the same curve as sft
                continue
            panel.plot(
                GRID,
                fits[column].policy,
                color=COLOURS[name],
                linestyle="--" if name == "reverse KL" else "-",
                label="sft = ukl" if name == "sft" else name,
            )
        panel.set(title=title, xlabel="answer", xlim=(GRID[0], GRID[-1]), ylim=(0, None))
    panels[0].set_ylabel("probability")
    panels[1].legend(frameon=False)
    save(figure, path)


def draw_overlap(found: dict[str, Descent], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, run in found.items():
        colour, style = COLOURS[name.partition(",")[0]], "--" if "," in name else "-"
        for panel, values in zip(panels, (run.log_ratio, run.loss), strict=True):
            steps = np.arange(1, len(values) + 1)
            panel.plot(steps, values, color=colour, linestyle=style, label=name + (" (overflow)" if run.overflowed else ""))
            if run.overflowed:
                panel.plot(steps[-1], values[-1], marker="x", markersize=9, markeredgewidth=2, color=colour)
    panels[0].axhline(-RARE + math.log(LIKED[0, 1]), color="#999999", linewidth=1, linestyle=":")
    panels[0].text(1.1, -RARE - 2, "log(pi_chosen / pi_ref)", color="#666666", va="top")
    panels[0].set(title="log-ratio of the answer that nothing covers", xlabel="step", xscale="log")
    panels[1].set(title="loss", xlabel="step", xscale="log", yscale="symlog", ylim=(-3e4, 6))
    panels[0].legend(frameon=False, loc=(0.02, 0.36))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
    print(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--library", choices=("torch", "mlx"), default="torch")
    args = parser.parse_args()

    import matplotlib as mpl

    mpl.use("Agg")
    bells = mass_covering(args.library)
    for name, (near, best) in bells.items():
        for title, fit in (("from the reference", near), ("lowest", best)):
            print(
                f"{name:10} {title:18} place {fit.place:5.2f} width {fit.width:.2f} spread {fit.spread:.2f} "
                f"between {fit.between:.3f} loss {fit.loss:.4f}"
            )
    runs = overlap(args.library)
    for name, run in runs.items():
        end = "overflow" if run.overflowed else "finite"
        last = f"f {run.log_ratio[-1]:.2f}, loss {run.loss[-1]:.4g}, policy {run.policy.round(3)}"
        print(f"{name:22} {len(run.loss)} steps, {end}, {last}")
    args.output.mkdir(parents=True, exist_ok=True)
    draw_mass_covering(bells, args.output / "mass_covering.png")
    draw_overlap(runs, args.output / "overlap.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
