"""Write docs/losses.md from the table in lite_dil/objectives/table.py (a test fails if the page is stale).

python scripts/losses_page.py
"""

from __future__ import annotations

from pathlib import Path

from lite_dil.config.train_config import flag
from lite_dil.objectives.objective import Objective
from lite_dil.objectives.table import OBJECTIVES, OPTIONS

PAGE = Path(__file__).parent.parent / "docs" / "losses.md"
DATA = {
    "pairs": "pairs",
    "sides": "pairs, or single answers labelled good and bad",
    "chosen": "demonstrations",
}
INTRO = """\
# Losses

<!-- Made by scripts/losses_page.py from the table in lite_dil/objectives/table.py; change it there. -->

The values of `--loss`. x is a prompt, y_w a chosen and y_l a rejected response to it. The **log-ratio** `f(x, y) =
log pi_theta(y|x) - log pi_ref(y|x)` compares the model being trained with its reference, which is the same model with its
adapter switched off; `r = e^f`. An index names the response: `f_w`, `r_l`. With `--beta` other than 1, f stands for `beta
f` in the losses of the DIL family.

`--logp-reduction sum` uses f and log pi of the whole response, `mean` averages them over its tokens. The metrics hold f,
log-probs and the reward `beta f` of both sides for every loss, including those that do not use the reference.

## Sum or mean

The DIL paper defines the log-ratio of the whole response; its authors' code averages it over the response's tokens (for every
loss, including its "DPO"). The average is the default here for the DIL family: a sum grows with the length, and e^f of it
overflows. `--logp-reduction sum` is the paper's, and the only one that its theorem covers. Every other loss has the
default of its own paper.

## Which one

- **A first run:** lsif, the default. If its log-ratios run away (the run stops and says so, or `log_ratio/rejected`
  climbs to several nats): rulsif, which is bounded, or `--log-ratio-cap`.
- **Chosen responses must stay likely:** cpo, slic and sft have a term for it. ukl and bce moved least in our own run
  ([results.md](results.md)). dpo, ipo, simpo and bpo see only the difference between the two responses: watch
  `logps/chosen`.
- **Thumbs up and thumbs down without partners:** the DIL family or kto.
- **Demonstrations:** sft, or sft-occupancy; or the DIL family with `--sample-rejected 1`, which samples the rejected side
  from the model itself.
- **To compare with published results:** dpo, simpo, cpo, ipo, kto, slic with their papers' constants below.
- **Not sure:** `lite-dil compare` trains several on your data from the same start and shows the results side by side; what
  it showed on HH helpful is in [results.md](results.md).

## What the theory promises, and what it does not

For the DIL family the minimiser is `f = log(pi_chosen / pi_ref)`, that is `pi_theta = pi_chosen`, if the rejected responses
are drawn from pi_ref, f is the sum over the response and beta is 1 (tests/objectives/test_recovery.py). `--sample-rejected`
on demonstrations with `--logp-reduction sum` is this setting. With rejected responses from elsewhere each member has its
own minimiser; with averaged log-ratios there is no such theorem. [theorem.md](theorem.md) tries it on a language model.

dpo's own theory: `pi_ref (p / q)^(1 / beta)`, normalised,
for chosen responses from p and rejected ones from q, drawn independently.

Two toys (`python scripts/toys.py`), with a tabular policy and plain gradient descent, without the averages, AdamW and
gradient clipping of a real run:

![Four policies that can only be one bell, fitted to a distribution with two modes](mass_covering.png)

*Covering.* A policy that can only be one bell, fitted to a pi_chosen with modes of 65 % and 35 %, has to give something up.
sft covers both (spread 1.94) and pays with 36 % of its mass between them, where pi_chosen has 0.3 %. ukl equals sft
here: for a normalised policy and rejected responses from pi_ref its second term is a constant. bce covers as well. lsif does
not: it takes the higher mode (spread 0.49) and drops the other, much like reverse KL (0.35). basu and rulsif at their
defaults cover when they start at the reference, as training does, but have a lower loss at a single mode. So "DIL covers
mass" holds for ukl and bce here, not for the whole family. A policy that can represent pi_chosen ends there with all of
them.

![lsif, capped lsif, ukl, bce and rulsif where the two sides do not overlap](overlap.png)

*Overlap.* One response has half of pi_chosen's mass, e^-100 under pi_ref, and is never rejected. At rate 0.1 lsif
overflows after 17 steps. With a tangent cap at 3 there is no overflow, but nothing holds the response back: f grows by equal
steps, and after about 80 steps that response has all the mass. ukl pulls evenly and keeps both chosen ones (29 % and 71 %,
not 50 and 50). rulsif and bce never jump, and reach f = 6.3 and 5.0 of the optimal 99.3 after 3000 steps: stable, and
slow exactly where there is no overlap.

## Responses without partners

The DIL family has one expectation per side, `E_chosen[l_1(f)] + E_ref[l_-1(f)]`, and kto is a mean over responses: neither
needs pairs. Data of `prompt, completion, label` may hold good and bad labels in any numbers. Each side is weighted by its
share of the whole data set, not of the batch: over B responses the loss is
`(1/B) (sum_good l_1 / p_w + sum_bad l_-1 / p_l)`. For pairs this is the mean over pairs. `--chosen-weight` and
`--rejected-weight` multiply the two sides on top of that.
"""


def page() -> str:
    """Return the page."""
    rows = ["| loss | data | reference | f and log pi | beta | LoRA learning rate |", "|---|---|---|---|---|---|"]
    for name, objective in OBJECTIVES.items():
        reference = "yes" if objective.reference else "no"
        beta = "-" if objective.beta is None else f"{objective.beta:g}"
        rate = f"{objective.learning_rate:g}"
        data = DATA[objective.data]
        rows.append(f"| [{name}](#{name}) | {data} | {reference} | {objective.reduction} | {beta} | {rate} |")
    overview = (
        "## All of them, with their defaults\n\n"
        + "\n".join(rows)
        + "\n\nThe learning rates are from a sweep (docs/LOG.md).\n"
    )
    return "\n".join([INTRO, overview, _options(), *(_section(name, objective) for name, objective in OBJECTIVES.items())])


def _options() -> str:
    lines = ["## Options\n", "| option | default | | losses |", "|---|---|---|---|"]
    for option, spec in OPTIONS.items():
        default = "off" if spec.default is None else f"{spec.default}"
        owners = ", ".join(name for name, objective in OBJECTIVES.items() if option in objective.options)
        choices = f" ({' or '.join(spec.choices)})" if spec.choices else ""
        lines.append(f"| `{flag(option)}` | {default} | {spec.help}{choices} | {owners} |")
    return "\n".join(lines) + "\n"


def _section(name: str, objective: Objective) -> str:
    lines = [f"## {name}\n", f"*{objective.title[0].upper()}{objective.title[1:]}.* {objective.use}\n"]
    lines.append(f"    {objective.formula}\n")
    lines.append(f"- Source: {objective.source}.")
    if objective.note:
        lines.append(f"- {objective.note}")
    if objective.options:
        lines.append(f"- [Options](#options): {', '.join(f'`{flag(option)}`' for option in objective.options)}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
