"""A run's figures in plain sentences: what it was, whether it went well, and what to look at."""

from __future__ import annotations

import math

from lite_dil.base.shell import command
from lite_dil.config.train_config import flag
from lite_dil.objectives.own import shown
from lite_dil.objectives.table import objective_of
from lite_dil.reports.health import complaints
from lite_dil.reports.pairs import by_longer
from lite_dil.reports.record import RunRecord, shared

_MEMORISED = 0.2  # share of the training loss's fall that the held-out loss may rise again before a warning
_GAP = 0.15  # between training and held-out accuracy, before a warning
_LONGER = 1.5  # times the tokens before training, before a warning
_BY_LENGTH, _ENOUGH = 0.15, 10  # between accuracies by length, and pairs of each kind, before a warning
_CUT = 0.1  # share of examples cut, before a warning
# Pairwise losses with a likelihood term on chosen responses, and its weight (docs/losses.md, docs/results.md).
_LIKELIHOOD = {"cpo": "cpo_lambda", "slic": "slic_lambda"}


def what(record: RunRecord) -> str:
    """Return a sentence or two on what the run is and how far it got."""
    config, facts, history = record.config, record.facts, record.history
    data = record.data("training") or {}
    kinds = {
        "pairs": "pairs of responses",
        "unpaired": "labelled responses",
        "demonstrations": "demonstrations",
        "prompts": "prompts, answered by itself,",
    }
    title = objective_of(config["loss"]).title
    steps = f"{history.step:,} of {facts['steps']:,} steps"
    rank = f" of rank {config['lora_r']}" if config["lora_r"] else f", continued from {config['init_adapter']},"
    kind = "A reward model, a head and a LoRA adapter" if record.reward else "A LoRA adapter"
    text = (
        f"{kind}{rank} for {config['model']}, trained with the loss "
        f"{shown(config['loss'])} ({title}) on {data.get('examples', 0):,} {kinds.get(data.get('form', ''), 'examples')} of "
        f"{config['data']}, on {facts['device']}. "
    )
    of = ["lite-dil", "reward"] if record.reward else []
    again = command(*of, "--resume", str(record.folder), *["--trust-remote-code"] * bool(config.get("trust_remote_code")))
    states = {
        "running": f"The run is in progress: {steps} when this was written.",
        "finished": f"It is finished: {steps}. {facts['why']}".rstrip(),
        "stopped": f"It was stopped after {steps}, and saved; {again} continues it.",
        "interrupted": f"It was interrupted by Ctrl-C after {steps}; steps after its last checkpoint are not saved.",
        "diverged": f"It diverged after {steps}: {facts['why']}",
        "failed": f"It ended with an error after {steps}: {facts['why']}",
    }
    return text + states[facts["state"]]


def outcome(record: RunRecord) -> str:
    """Return what was learned, with its uncertainty."""
    if record.reward:
        return _reward_outcome(record)
    parts = []
    chosen, place = record.figure("log_ratio/chosen")
    rejected, _ = record.figure("log_ratio/rejected")
    where = "held-out" if place == "held out" else "training"
    if record.accuracy:
        share, error, number = record.accuracy
        parts.append(
            f"In {share:.1%} of {number:,} held-out pairs (plus or minus {error:.1%}, one standard error) the chosen response "
            "gained more probability than the rejected one; chance is 50%."
        )
    elif (trained := record.history.train.recent("rewards/accuracies")) is not None and record.history.step > 1:
        parts.append(f"In {trained:.1%} of the last training pairs the chosen response gained more than the rejected one.")
    if chosen is not None:
        kind = "chosen" if rejected is not None else "good"
        text = f"The {where} {kind} responses became {_likelier(chosen, record)}"
        if rejected is not None:
            text += f", the rejected ones {_likelier(rejected, record)}"
        parts.append(f"{text}, by the mean log-ratio to {record.start}.")
    if place == "held out" and (said := str(shared(record.data("held out")))):
        parts.append(f"Beware: {said}.")
    return " ".join(parts) or "No step was logged yet."


def _reward_outcome(record: RunRecord) -> str:
    """Return what a reward model learned, beside what length alone gives."""
    parts, held_out = [], record.history.held_out
    if record.accuracy:
        share, error, number = record.accuracy
        parts.append(
            f"In {share:.1%} of {number:,} held-out pairs (plus or minus {error:.1%}, one standard error) the chosen response "
            "scores higher than the rejected one; chance is 50%."
        )
    elif (trained := record.history.train.recent("accuracy")) is not None and record.history.step > 1:
        parts.append(f"In {trained:.1%} of the last training pairs the chosen response scored higher.")
    if (longer := held_out.last("eval_longer_accuracy")) is not None:
        parts.append(f'"The longer response is better" is right in {longer:.1%} of them.')
    if (correlation := held_out.last("eval_length_correlation")) is not None:
        parts.append(f"Scores correlate with the responses' numbers of tokens by {correlation:+.2f}.")
    if record.accuracy and (said := str(shared(record.data("held out")))):
        parts.append(f"Beware: {said}.")
    return " ".join(parts) or "No step was logged yet."


def _as_length(record: RunRecord) -> str:
    longer = record.history.held_out.last("eval_longer_accuracy")
    if not record.accuracy or longer is None or record.accuracy[0] - record.accuracy[1] > longer:
        return ""
    return (
        f'"The longer response is better" does as well as this reward model ({longer:.1%} against {record.accuracy[0]:.1%}, '
        f"within one standard error of {record.accuracy[1]:.1%}): a policy trained on it may learn length. What to try: more "
        "pairs, or pairs whose chosen response is as often the shorter one."
    )


def _likelier(value: float, record: RunRecord) -> str:
    return f"{'more' if value >= 0 else 'less'} likely by {abs(value):.3g} nats per {record.per}"


def warnings(record: RunRecord) -> list[str]:
    """Return what is damaged of the run's files, and the warnings, each with what to try."""
    found = [_skipped(record), _shared(record), _chosen_falls(record), _chance(record), *_memorised(record), _longer(record)]
    found += [*complaints(record.history.train, record.config).values(), _as_length(record), _by_length(record), _cut(record)]
    found += [_unseen(record)]
    return [*(f"{text}." for text in record.damage), *(text for text in found if text)]


def _shared(record: RunRecord) -> str:
    if not (warning := shared(record.data("held out")).warning):
        return ""
    return f"{warning}. What to try: remove these rows from --data or from --eval-data."


def _chosen_falls(record: RunRecord) -> str:
    value, place = record.figure("log_ratio/chosen")
    if value is None or round(value, 3) >= 0:
        return ""
    names = "chosen" if record.history.train.recent("log_ratio/rejected") is not None else "good"
    advice = f"a lower --learning-rate or fewer --epochs{_keeps_likely(record)}"
    where = "held out" if place == "held out" else "last training steps"
    return (
        f"The policy now gives the {names} responses less probability than {record.start}: {value:.3g} nats per {record.per} "
        f"({where}). If the rejected ones fall faster, accuracy and margin hide that; other texts gain the probability. "
        f"What to try: {advice}."
    )


def _keeps_likely(record: RunRecord) -> str:
    """Return which loss for this data, or which constant of this loss, supports the chosen responses' likelihood."""
    loss, form = record.config["loss"], (record.data("training") or {}).get("form")
    if objective_of(loss).data == "chosen":
        return ""
    if loss in _LIKELIHOOD:
        return f", or a higher {flag(_LIKELIHOOD[loss])}, the weight of the chosen responses' likelihood"
    others = ["sft"] if form == "unpaired" else [*_LIKELIHOOD, "sft"]
    return f", or --loss {' or '.join(others)}, with a term for the chosen responses' likelihood"


def _chance(record: RunRecord) -> str:
    if not record.accuracy:
        return ""
    share, _, number = record.accuracy
    # Two standard errors of a fair coin: those of the share itself are 0 when a few pairs are all right.
    limit = 0.5 + 1 / math.sqrt((record.data("held out") or {})["examples"])
    if share > limit:
        return ""
    return (
        f"The held-out accuracy is not distinguishable from chance: {share:.1%} of {number:,} pairs, where chance reaches "
        f"{min(limit, 1.0):.1%} (two standard errors above 50%). What to try: more held-out pairs to see more clearly, more "
        "data or steps, or a higher --learning-rate; lite-dil data shows whether the pairs contradict each other."
    )


def _memorised(record: RunRecord) -> list[str]:
    train, held_out = record.history.train, record.history.held_out
    found = []
    losses, last = held_out.get("eval_loss"), held_out.last("eval_loss")
    first, recent = (train.at(0, "loss") if train.number else None), train.recent("loss")
    if last is not None and first is not None and recent is not None and held_out.number > 1:
        best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        if last - losses[best] > _MEMORISED * max(first - recent, 0) > 0:
            found.append(
                f"The held-out loss was best at step {held_out.get('step')[best]:.0f} ({losses[best]:.4g}) and has risen to "
                f"{last:.4g} since, while the training loss fell: the run has begun to memorise its data. What to try: "
                "fewer --epochs, a lower --learning-rate, or the checkpoint nearest to the best step (--save-steps)."
            )
    trained = train.recent(record.accuracy_name)
    if not found and record.accuracy and trained is not None and record.history.step > 1:
        share, error, _ = record.accuracy
        if trained - share > max(_GAP, 3 * error):
            found.append(
                f"Training and held-out accuracy differ: {trained:.1%} of the last training pairs against {share:.1%} of the "
                "held-out ones. What to try: more data, fewer --epochs, or a smaller --lora-r."
            )
    return found


def _skipped(record: RunRecord) -> str:
    number = int(sum(value for value in record.history.train.get("skipped_steps") if math.isfinite(value)))
    if number <= max(3, record.history.step // 50):
        return ""
    return (
        f"{number:,} of {record.history.step:,} steps were skipped because float16 overflowed. A few at the start are "
        "normal, until the loss scale is found. What to try: --dtype bfloat16 if the hardware has it, or a lower "
        "--learning-rate."
    )


def answer_lengths(record: RunRecord) -> tuple[float, float] | None:
    """Return the mean number of tokens of the sample answers before and after, or None without answers."""
    samples = record.samples
    if not samples:
        return None
    before, after = (sum(getattr(s, name) for s in samples) / len(samples) for name in ("before_tokens", "after_tokens"))
    return before, after


def _longer(record: RunRecord) -> str:
    if not (means := answer_lengths(record)) or means[1] <= _LONGER * max(means[0], 10):
        return ""
    tokens = (record.data("training") or {}).get("tokens", {})
    text = f"The sample answers got much longer: {means[0]:.0f} tokens before, {means[1]:.0f} after (means)"
    if "chosen" in tokens and "rejected" in tokens and tokens["chosen"]["mean"] > tokens["rejected"]["mean"]:
        text += (
            f". The chosen responses of the data are longer than the rejected ones ({tokens['chosen']['mean']:.0f} against "
            f"{tokens['rejected']['mean']:.0f} tokens), which teaches that"
        )
    if objective_of(record.config["loss"]).data == "chosen":
        return f"{text}. What to try: shorter chosen responses, since the loss learns their lengths."
    advice = "" if record.per == "token" else ", or --logp-reduction mean"
    return f"{text}. What to try: chosen and rejected responses of similar lengths{advice}."


def _by_length(record: RunRecord) -> str:
    if record.pairs is None:
        return ""
    better, worse = sorted(by_longer(record.pairs), key=lambda share: share.accuracy, reverse=True)
    if min(better.pairs, worse.pairs) < _ENOUGH:
        return ""
    # The gap's standard error if both had the same accuracy: a share of 100 % would have none by itself.
    both = (better.accuracy * better.pairs + worse.accuracy * worse.pairs) / (better.pairs + worse.pairs)
    error = math.sqrt(both * (1 - both) * (1 / better.pairs + 1 / worse.pairs))
    if better.accuracy - worse.accuracy <= max(_BY_LENGTH, 3 * error):
        return ""
    advice = "" if record.reward or record.per == "token" else ", or --logp-reduction mean"
    who = "reward model" if record.reward else "policy"
    return (
        f"The {who} seems to go by length: it is right in {better.accuracy:.1%} of the {better.pairs:,} held-out pairs whose "
        f"chosen response is the {better.name} one, and in {worse.accuracy:.1%} of the {worse.pairs:,} where it is the "
        f"{worse.name} one. What to try: more training pairs whose chosen response is the {worse.name} one{advice}."
    )


def _cut(record: RunRecord) -> str:
    data = record.data("training") or {}
    prompts, responses = data.get("prompts_cut", 0), data.get("answers_cut", 0)
    if left_out := data.get("without_end", 0):
        return (
            f"--max-length cut a response of {left_out:,} examples before its end token; they were left out of the training. "
            "What to try: a larger --max-length; lite-dil data shows which cuts none."
        )
    if max(prompts, responses) <= _CUT * data.get("examples", 0):
        return ""
    return (
        f"--max-length cut {prompts:,} prompts, at their start, and the responses of {responses:,} of {data['examples']:,} "
        "examples: the model cannot learn what was cut, and responses without an end teach it to ramble. What to try: a "
        "larger --max-length; lite-dil data shows which cuts none."
    )


def _unseen(record: RunRecord) -> str:
    if record.data("held out"):
        return ""
    return (
        "There is no held-out data, so these figures are for responses that the run was trained on and say little about new "
        "prompts. What to try: --eval-data FILE."
    )
