"""The table of objectives, the values of `--loss`. Flags, help, error messages and docs/losses.md are made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.objectives import losses, own
from lite_dil.objectives.losses import EXPONENT_LIMIT, Array, Bregman
from lite_dil.objectives.objective import Constants, Objective, Option, Pairs, Sides
from lite_dil.objectives.reward_table import REWARD_OPTIONS, is_reward, reward_objective

SIDE_WEIGHTS = ("chosen_weight", "rejected_weight")
OPTIONS = {
    "basu_alpha": Option("power of Basu's divergence: near 0 it is ukl, at 1 lsif", 0.5, low=1e-3),
    "relative_alpha": Option(
        "share of pi_chosen in the denominator of the relative ratio, which is at most 1 / this", 0.1, low=1e-3, high=0.999
    ),
    "denominator": Option(
        "which responses represent pi_ref: the rejected ones, or rejected and chosen together",
        "rejected",
        choices=("rejected", "both"),
    ),
    "log_ratio_cap": Option(
        "above this value of beta f the loss continues along its tangent line instead of exponentially; metrics say how often "
        "(capped)",
        None,
        low=1e-3,
        high=EXPONENT_LIMIT / 2,  # lsif takes e^2f
    ),
    "chosen_weight": Option("multiplies the chosen side of the loss, on top of the balancing of unequal numbers", 1.0),
    "rejected_weight": Option("multiplies the rejected side of the loss, on top of the balancing of unequal numbers", 1.0),
    "divergence": Option("the f-divergence that keeps the policy near its reference", "js", choices=losses.DIVERGENCES),
    "divergence_alpha": Option("alpha of --divergence alpha", 0.5, low=1e-3, high=0.999),
    "slic_delta": Option("margin, in nats", 1.0),
    "slic_lambda": Option("weight of the term that keeps the chosen responses' likelihood", 0.1),
    "cpo_lambda": Option("weight of the term that keeps the chosen responses' likelihood", 1.0),
    "simpo_gamma": Option("margin by which beta times the mean log-probs should differ", 1.0),
    "bpo_lambda": Option("power of the scaled Basu divergence", 0.5, low=1e-3),
}


def _bregman(make: Callable[[Constants], Bregman]) -> Callable[[Constants], Sides]:
    def form(c: Constants) -> Sides:
        member, beta = make(c), c["beta"]
        return Sides(lambda a: member.chosen(beta * a.log_ratio), lambda a: member.rejected(beta * a.log_ratio))

    return form


def _of_ratios(loss: Callable[..., Array], **constants: str) -> Callable[[Constants], Pairs]:
    """Make a loss of f_w and f_l; `constants` maps the function's parameters to options."""

    def form(c: Constants) -> Pairs:
        values = {parameter: c[option] for parameter, option in constants.items()}
        return Pairs(lambda chosen, rejected: loss(chosen.log_ratio, rejected.log_ratio, c["beta"], **values))

    return form


def _kto(c: Constants) -> Sides:
    # Half of each side: with equal numbers on both sides this is the mean over all responses, as in the paper.
    return Sides(
        lambda a: losses.kto_chosen(a.log_ratio, a.baseline, c["beta"]) / 2,
        lambda a: losses.kto_rejected(a.log_ratio, a.baseline, c["beta"]) / 2,
    )


def _above_cap(f: Array, c: Constants) -> tuple[Array, float] | None:
    return None if c["log_ratio_cap"] is None else (c["beta"] * f, c["log_ratio_cap"])


def _above_limit(f: Array, c: Constants) -> tuple[Array, float] | None:
    exponent = losses.f_divergence_exponent(f, c["divergence"], c["divergence_alpha"])
    return None if exponent is None else (exponent, EXPONENT_LIMIT)


_DIL = "Xiao et al., ICLR 2025, arXiv 2503.05079"
_MEAN = (
    "Averaged over the response's tokens, as in the authors' code; the paper writes the whole response ([why](#sum-or-mean))."
)
_CONSTANT = "The value here equals the definition up to a constant, which does not change the gradient"

OBJECTIVES: dict[str, Objective] = {
    "lsif": Objective(
        title="least-squares importance fitting",
        data="sides",
        form=_bregman(lambda c: losses.lsif(c["log_ratio_cap"])),
        reduction="mean",
        beta=1.0,
        learning_rate=1e-4,
        formula="-r_w + r_l^2 / 2",
        use="The paper's first choice, and the default. It raises the chosen responses and holds the rejected ones by the "
        "square of their ratio. It is not bounded below: if the two sides hardly overlap it can run away. "
        "`--log-ratio-cap` stops the overflow, though not the drift; rulsif is bounded.",
        source=f"{_DIL}, Table 1 and eq. 18-24; h(r) = (r - 1)^2 / 2",
        note=f"{_MEAN} {_CONSTANT} (here -1/2 at f = 0; the definition gives 1/2 more).",
        options=("denominator", "log_ratio_cap", *SIDE_WEIGHTS),
        capped=_above_cap,
    ),
    "ukl": Objective(
        title="unnormalised Kullback-Leibler",
        data="sides",
        form=_bregman(lambda c: losses.ukl(c["log_ratio_cap"])),
        reduction="mean",
        beta=1.0,
        learning_rate=1e-4,
        formula="-f_w + r_l",
        use="Maximum likelihood of the chosen responses, held back by the ratio of the rejected ones: the one closest to sft, "
        "and gentle. The chosen side never saturates.",
        source=f"{_DIL}, Table 1; h(r) = r log r - r",
        note=f"{_MEAN} The authors' code uses -log pi(y_w) in place of -f_w. The two differ by the constant log pi_ref(y_w), "
        "which does not change the gradient; the paper's is used here, so that the loss is 1 at the start and comparable "
        "between data sets.",
        options=("denominator", "log_ratio_cap", *SIDE_WEIGHTS),
        capped=_above_cap,
    ),
    "bce": Objective(
        title="binary cross-entropy",
        data="sides",
        form=_bregman(lambda c: losses.bce()),
        reduction="mean",
        beta=1.0,
        learning_rate=1e-4,
        formula="log(1 + 1/r_w) + log(1 + r_l)",
        use="A logistic classifier of chosen against rejected whose logit is the log-ratio. Both sides saturate, so that it "
        "is the calmest of the family on noisy data.",
        source=f"{_DIL}, Table 1; h(r) = r log r - (r + 1) log(r + 1)",
        note=_MEAN,
        options=("denominator", *SIDE_WEIGHTS),
    ),
    "basu": Objective(
        title="Basu's power divergence",
        data="sides",
        form=_bregman(lambda c: losses.basu(c["basu_alpha"], c["log_ratio_cap"])),
        reduction="mean",
        beta=1.0,
        learning_rate=1e-4,
        formula="-((1 + alpha) r_w^alpha - 1) / alpha + r_l^(1 + alpha)",
        use="Between ukl (alpha near 0) and lsif (alpha = 1): take it if lsif is too wild and ukl too mild.",
        source=f"Sugiyama et al. 2012 (density-ratio matching under the Bregman divergence), within {_DIL}, eq. 18-24; "
        "h(r) = (r^(1 + alpha) - r) / alpha",
        note=f"{_MEAN} The papers give no default for alpha; 0.5 is ours.",
        options=("basu_alpha", "denominator", "log_ratio_cap", *SIDE_WEIGHTS),
        capped=_above_cap,
    ),
    "rulsif": Objective(
        title="relative unconstrained least-squares importance fitting",
        data="sides",
        form=_bregman(lambda c: losses.rulsif(c["relative_alpha"])),
        reduction="mean",
        beta=1.0,
        learning_rate=1e-4,
        formula="-g_w + alpha g_w^2 / 2 + (1 - alpha) g_l^2 / 2,  g = 1 / (alpha + (1 - alpha) / r)",
        use="lsif on the ratio to a mixture that holds a share alpha of the chosen responses: bounded, so that it cannot run "
        "away. If the two sides hardly overlap it is stable, and slow.",
        source="Yamada et al. 2013, arXiv 1106.4729",
        note="Not in the DIL paper. It has the same default reduction as the paper's losses.",
        options=("relative_alpha", "denominator", *SIDE_WEIGHTS),
    ),
    "dpo": Objective(
        title="direct preference optimisation",
        data="pairs",
        form=_of_ratios(losses.dpo),
        reduction="sum",
        beta=0.1,
        learning_rate=1e-4,
        formula="-log sigmoid(beta (f_w - f_l))",
        use="The field's standard. It sees only the difference of the two log-ratios, so that both may fall; watch "
        "`logps/chosen`.",
        source="Rafailov et al. 2023, arXiv 2305.18290, eq. 7; by contrastive predictive coding in the DIL paper, eq. 25-27",
        note="The DIL authors' code averages the log-ratios of its \"DPO\" as well; here they are summed, as in DPO's paper.",
    ),
    "f-dpo": Objective(
        title="DPO with an f-divergence",
        data="pairs",
        form=_of_ratios(losses.f_dpo, divergence="divergence", alpha="divergence_alpha"),
        reduction="sum",
        beta=0.1,
        learning_rate=1e-4,
        formula="-log sigmoid(beta (g'(r_w) - g'(r_l))),  g' = f | -1/r | f - log(1 + r) | (1 - r^-alpha) / alpha "
        "for --divergence reverse_kl | forward_kl | js | alpha",
        use="DPO that trades alignment against diversity: reverse_kl is dpo, forward_kl keeps the most diversity, js and "
        "alpha lie between.",
        source="Wang et al. 2024, arXiv 2309.16240, Table 1",
        note="The paper names no default; js is its balanced choice. 1/r and r^-alpha overflow at ordinary log-ratios of "
        f"whole responses: above an exponent of {EXPONENT_LIMIT:g} they always continue along their tangent, and the metric "
        f"`capped` counts how often.",
        options=("divergence", "divergence_alpha"),
        capped=_above_limit,
    ),
    "ipo": Objective(
        title="identity preference optimisation",
        data="pairs",
        form=_of_ratios(losses.ipo),
        reduction="mean",
        beta=0.1,
        learning_rate=1e-4,
        formula="(f_w - f_l - 1 / (2 beta))^2",
        use="Pulls the difference of the log-ratios to a target instead of pushing it without end. A small beta is a far "
        "target.",
        source="Azar et al. 2023, arXiv 2310.12036, eq. 17 (beta is its tau)",
        note="The paper sums the log-ratio over the response; its authors later said to average it over the tokens, which is "
        "the default here (and in TRL).",
    ),
    "slic": Objective(
        title="sequence likelihood calibration",
        data="pairs",
        form=lambda c: Pairs(
            lambda chosen, rejected: losses.slic(chosen.logps, rejected.logps, c["slic_delta"], c["slic_lambda"])
        ),
        reduction="sum",
        beta=None,
        learning_rate=1e-4,
        formula="max(0, delta - log pi(y_w) + log pi(y_l)) - lambda log pi(y_w)",
        use="A hinge on the likelihoods with a maximum-likelihood term beside it; needs no reference.",
        source="Zhao et al. 2023, arXiv 2305.10425, eq. 5",
        note="As in the paper's comparison, the chosen response stands for the paper's separate reference response. Its delta "
        "is 1; lambda 0.1 is ours, from the range that the SimPO paper (arXiv 2405.14734) searches.",
        options=("slic_delta", "slic_lambda"),
        reference=False,
    ),
    "kto": Objective(
        title="Kahneman-Tversky optimisation",
        data="sides",
        form=_kto,
        reduction="sum",
        beta=0.1,
        learning_rate=1e-4,
        formula="1 - sigmoid(beta (f_w - z0)) on good responses, 1 - sigmoid(beta (z0 - f_l)) on bad ones, "
        "z0 = max(0, mean f of responses to other prompts)",
        use="For unpaired thumbs up and thumbs down. Saturates on both sides.",
        source="Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8",
        note="z0 is the mean over one such response for each example of the whole optimiser step, without a gradient: "
        "splitting the step into passes changes nothing. The paper balances unequal numbers of good and bad responses by its "
        "lambdas, to a ratio of 1 to 4/3; here they are already balanced to 1, and --chosen-weight and --rejected-weight are "
        "the lambdas on top.",
        options=SIDE_WEIGHTS,
        baseline=True,
    ),
    "cpo": Objective(
        title="contrastive preference optimisation",
        data="pairs",
        form=lambda c: Pairs(
            lambda chosen, rejected: losses.cpo(chosen.logps, rejected.logps, chosen.mean_logps, c["beta"], c["cpo_lambda"])
        ),
        reduction="sum",
        beta=0.1,
        learning_rate=1e-4,
        formula="-log sigmoid(beta (log pi(y_w) - log pi(y_l))) - lambda log pi(y_w) / |y_w|",
        use="dpo with a uniform reference and a likelihood term; needs no reference.",
        source="Xu et al. 2024, arXiv 2401.08417, eq. 5",
        note="The paper writes the likelihood term for the whole response; TRL averages it over all tokens of a batch's "
        "chosen responses. Here it is averaged over each response's own, so that splitting a step changes nothing.",
        options=("cpo_lambda",),
        reference=False,
    ),
    "simpo": Objective(
        title="simple preference optimisation",
        data="pairs",
        form=lambda c: Pairs(lambda chosen, rejected: losses.simpo(chosen.logps, rejected.logps, c["beta"], c["simpo_gamma"])),
        reduction="mean",
        beta=2.0,
        learning_rate=1e-4,
        formula="-log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma)",
        use="Ranks responses by what generation maximises, the mean log-prob; needs no reference, and nothing in it keeps the "
        "chosen responses likely.",
        source="Meng et al. 2024, arXiv 2405.14734, eq. 6",
        note="beta 2 and gamma 1 are the paper's for Llama 3 8B base; it tunes both for each model.",
        options=("simpo_gamma",),
        reference=False,
    ),
    "bpo": Objective(
        title="Bregman preference optimisation (scaled Basu)",
        data="pairs",
        form=_of_ratios(losses.bpo, power="bpo_lambda"),
        reduction="sum",
        beta=0.1,
        learning_rate=1e-4,
        formula="R^(1 + lambda) / (4 (1 + lambda)) - R^-lambda / (4 lambda),  R = e^(-beta (f_w - f_l))",
        use="Ratio matching of preferences that weighs confident pairs more than dpo does.",
        source="Kim et al. 2025, arXiv 2505.19601",
        note="The scale 4 is the paper's; lambda 0.5 is ours.",
        options=("bpo_lambda",),
    ),
    "sft": Objective(
        title="behaviour cloning",
        data="chosen",
        form=lambda c: Sides(lambda a: -a.logps),
        reduction="sum",
        beta=None,
        learning_rate=1e-4,
        formula="-log pi(y_w)",
        use="For demonstrations alone, and the baseline for everything above: it covers all that the demonstrations do.",
        source="Sun 2024, arXiv 2403.12017, eq. 7",
        note="Summed over the response's tokens, as written; many trainers average over all tokens of a batch "
        "(`--logp-reduction mean` averages over each response's).",
        reference=False,
    ),
    "sft-occupancy": Objective(
        title="behaviour cloning, weighted by occupancy",
        data="chosen",
        form=lambda c: Sides(lambda a: -a.weighted_logps),
        reduction="sum",
        beta=None,
        learning_rate=1e-4,
        formula="-sum_k (n - k) / n log pi(y_k),  k = 0 .. n - 1",
        use="sft that weighs a response's first tokens most, because every later one depends on them.",
        source="Sun 2024, arXiv 2403.12017, eq. 12",
        note="The paper's own indices would give the end-of-turn token weight 0, and the model would not learn to stop; here "
        "it has 1/n.",
        reference=False,
        token_weights=losses.occupancy_weights,
    ),
}


def _needs_answers(constants: Constants) -> Sides | Pairs:
    raise UserError("--loss rloo trains on answers that it draws itself, by their reward: lite-dil train --reward")


# Objectives on the policy's own answers, which a reward compares.
ONLINE: dict[str, Objective] = {
    "rloo": Objective(
        title="policy gradient with leave-one-out advantages",
        data="prompts",
        form=_needs_answers,
        reduction="sum",
        beta=0.05,
        learning_rate=1e-4,
        formula="-(1/K) sum_i A_i log pi(y_i),  A_i = v_i - mean of the siblings' v,  v = r - beta f",
        use="Maximises E[r] - beta KL(pi, pi_ref) by the policy's own answers; the optimum is pi_ref e^(r / beta) / Z.",
        source="Ahmadian et al. 2024, arXiv 2402.14740",
        note="The KL term is in the reward, and advantages are not divided by the group's deviation: both other ways have "
        "another gradient than the objective's.",
    ),
}

# The Bregman family of the DIL paper: losses of each side's density ratio.
DIL_FAMILY = ("lsif", "ukl", "bce", "basu", "rulsif")


def objective_of(loss: str) -> Objective:
    """Return the row of a loss by its name in a run's files; for a user-defined loss, the row that its identity describes."""
    if is_reward(loss):
        return reward_objective(loss)
    if own.is_own(loss):
        return own.objective_of_identity(loss)
    return ONLINE[loss] if loss in ONLINE else OBJECTIVES[loss]


def options_of(loss: str) -> Mapping[str, Option]:
    """Return the options among which those of a loss are: a reward model's have their own defaults."""
    return REWARD_OPTIONS if is_reward(loss) else OPTIONS


def constants(name: str, config: Any) -> dict[str, Any]:
    """Return the objective's beta and options from a config's attributes, or its defaults if those are None."""
    objective = objective_of(name)
    given = {option: getattr(config, option) for option in objective.options}
    known = options_of(name)
    filled = {option: known[option].default if value is None else value for option, value in given.items()}
    beta = config.beta if config.beta is not None else objective.beta
    return {"beta": 1.0 if beta is None else beta, **filled}


def losses_on(kinds: str) -> list[str]:
    """Return the names of the objectives whose `data` is one of the space-separated kinds."""
    return [name for name, objective in OBJECTIVES.items() if objective.data in kinds.split()]
