"""Which data each objective can be trained on."""

from __future__ import annotations

from lite_dil.base.errors import UserError
from lite_dil.base.signs import CHOSEN
from lite_dil.objectives.table import losses_on, objective_of


def check_data(loss: str, form: str, signs: set[int], source: str, sampled: bool) -> None:
    """Raise UserError if the objective cannot be trained on this data.

    Args:
        form: "pairs", "unpaired" or "demonstrations".
        signs: the signs of its responses.
        source: the data's name, for the message.
        sampled: whether the model's own responses are added as rejected ones.
    """
    objective = objective_of(loss)
    if sampled and form != "demonstrations":
        raise UserError(
            f"--sample-rejected is for demonstrations (prompt, completion), and {source} has {form}, with its own rejected "
            "responses; leave it out"
        )
    if objective.data == "chosen":
        if CHOSEN not in signs:
            raise UserError(f"--loss {loss} trains on chosen responses, and {source} has none")
        return
    others = (
        f"--sample-rejected 1 draws the rejected side from the model, and --loss {' or '.join(losses_on('chosen'))} needs none"
    )
    if form == "demonstrations" and not sampled:
        wanted = "pairs (prompt, chosen, rejected)" if objective.data == "pairs" else "rejected responses besides chosen ones"
        raise UserError(f"--loss {loss} needs {wanted}, and {source} has only demonstrations; {others}")
    if form == "unpaired":
        if objective.data == "pairs":
            raise UserError(
                f"--loss {loss} needs pairs (prompt, chosen, rejected), and {source} has single responses with labels, for "
                f"which there are {', '.join(losses_on('sides'))}"
            )
        if len(signs) < 2:
            kind = "good" if CHOSEN in signs else "bad"
            raise UserError(f"--loss {loss} needs good and bad responses, and {source} has only {kind} ones (field 'label')")
