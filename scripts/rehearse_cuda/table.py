"""The attention table: what fits which card, from the results of `attention --all`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from rehearse_cuda.cases import BRAIN, CARDS, HALF, WIDTHS, Case, cases
from rehearse_cuda.results import Result, Results

LEGEND = """Forward / backward: `own` is torch's own blocks, two numbers are smaller blocks of queries x keys, `plain` is the
plain layout; with a soft cap after the semicolon, if different. A window changes nothing: the kernels take it as data."""
Place = tuple[int, str, int, bool]  # card, type, width, and whether it has a soft cap


def attention_table(results: Results) -> str:
    """Return the table in Markdown, a row per card and type; "?" if there is no result yet."""
    found = {_place(case): results.latest(case) for case in cases(("attention",), everything=True)}
    lines = ["| | " + " | ".join(map(str, WIDTHS)) + " |", "|---" * (len(WIDTHS) + 1) + "|"]
    for card, (dtype, short) in product(CARDS, ((HALF, "fp16"), (BRAIN, "bf16"))):
        if (card, dtype, WIDTHS[0], False) in found:
            row = [_both(found, card, dtype, width) for width in WIDTHS]
            lines.append(f"| sm_{card}, {short} | " + " | ".join(row) + " |")
    missing = sum(result is None for result in found.values())
    left = [f"{missing} of {len(found)} cases have no result yet."] if missing else []
    return "\n".join([*lines, "", LEGEND, *left])


def _place(case: Case) -> Place:
    return case.card, case.settings["dtype"], case.settings["width"], bool(case.settings["cap"])


def _both(found: Mapping[Place, Result | None], card: int, dtype: str, width: int) -> str:
    """Return the results without and with a soft cap."""
    plain, capped = (words(found[card, dtype, width, cap]) for cap in (False, True))
    return plain if plain == capped else f"{plain}; {capped}"


def words(result: Result | None) -> str:
    """Return the blocks of a result's kernels, forward and backward."""
    if result is None:
        return "?"
    if not result.ok:
        return "FAILED"
    if not result.figures["fits"]:
        return "plain"
    blocks = result.figures["blocks"]
    pairs = (("fwd_BLOCK_M", "fwd_BLOCK_N"), ("bwd_BLOCK_M1", "bwd_BLOCK_N1"))
    sizes = [f"{blocks[queries]} x {blocks[keys]}" if queries in blocks else "own" for queries, keys in pairs]
    return "own" if sizes == ["own", "own"] else " / ".join(sizes)
