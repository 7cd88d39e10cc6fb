"""Which data each objective can be trained on."""

from __future__ import annotations

from lite_dil.base.errors import UserError
from lite_dil.base.signs import CHOSEN
from lite_dil.objectives.table import need, objective_of


def check_data(loss: str, form: str, signs: set[int], source: str, sampled: bool) -> None:
    """Raise UserError where the objective cannot be trained on this data.

    Args:
        form: "pairs", "unpaired" or "demonstrations".
        signs: those of its answers.
        source: the data's name, for the message.
        sampled: whether the model's own answers are added as rejected ones.
    """
    objective = objective_of(loss)
    if sampled and form != "demonstrations":
        raise UserError(
            f"--sample-rejected is for demonstrations (prompt, completion), and {source} has {form}, with rejected answers of "
            "its own; leave it out"
        )
    if objective.data == "chosen":
        if CHOSEN not in signs:
            raise UserError(f"--loss {loss} trains on good answers, and {source} has none")
        return
    others = f"--sample-rejected 1 draws the rejected side from the model, and --loss {' or '.join(need('chosen'))} needs none"
    if form == "demonstrations" and not sampled:
        wanted = "pairs (prompt, chosen, rejected)" if objective.data == "pairs" else "rejected answers as well as good ones"
        raise UserError(f"--loss {loss} needs {wanted}, and {source} has demonstrations alone; {others}")
    if form == "unpaired":
        if objective.data == "pairs":
            raise UserError(
                f"--loss {loss} needs pairs (prompt, chosen, rejected), and {source} has single answers with labels; on those "
                f"train {', '.join(need('sides'))}"
            )
        if len(signs) < 2:
            kind = "good" if CHOSEN in signs else "bad"
            raise UserError(f"--loss {loss} needs good and bad answers, and {source} has only {kind} ones (field 'label')")
