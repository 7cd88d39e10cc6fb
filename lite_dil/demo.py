"""What the demo shows: answers to held-out questions before and after, side by side, and the held-out figures."""

from __future__ import annotations

import json

from rich.table import Table

from lite_dil.data import EMBEDDED, read_rows
from lite_dil.progress import Display
from lite_dil.train import Trained

SHOWN, MEASURED = 6, 20
MAX_NEW_TOKENS = 128


def show(trained: Trained, display: Display) -> None:
    """Print the comparison, and write every answer to samples.jsonl in the run's folder.

    Before and after come from one model in memory: the adapter off, and on.
    """
    encoder, backend = trained.encoder, trained.backend
    rows = read_rows(EMBEDDED, "test")[:MEASURED]
    questions = [row.prompt[-1]["content"] for row in rows if not isinstance(row.prompt, str)]
    prompts = [
        encoder.prompt_ids(encoder.chat_prompt(row.prompt), chat=True) for row in rows if not isinstance(row.prompt, str)
    ]
    end_ids = encoder.end_ids()
    display.say(f"answering {len(prompts)} held-out questions, adapter off and on ...")
    with backend.adapter_off():
        before = backend.generate(prompts, MAX_NEW_TOKENS, end_ids)
    after = backend.generate(prompts, MAX_NEW_TOKENS, end_ids)
    texts = [[encoder.tokenizer.decode(answer.ids).strip() for answer in side] for side in (before, after)]

    table = Table(show_lines=True, title="held-out questions")
    for heading in ("question", "before", "after"):
        table.add_column(heading, overflow="fold", ratio=1 if heading == "question" else 2)
    for question, *answers in list(zip(questions, *texts, strict=True))[:SHOWN]:
        table.add_row(*(_plain(text) for text in (question, *answers)))
    display.console.print(table)

    path = trained.folder.path / "samples.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for question, old, new in zip(questions, *texts, strict=True):
            file.write(json.dumps({"prompt": question, "before": old, "after": new}, ensure_ascii=False) + "\n")

    lengths = [sum(len(answer.ids) for answer in side) / len(side) for side in (before, after)]
    display.say(f"answer length: {lengths[0]:.0f} tokens before, {lengths[1]:.0f} after (mean of {len(prompts)})")
    if figures := trained.evaluation:
        display.say(
            f"held-out pairs: accuracy {figures['eval_rewards/accuracies']:.3f} (the chosen answer gained more than the "
            f"rejected one), log-ratio {figures['eval_log_ratio/chosen']:+.3f} chosen, "
            f"{figures['eval_log_ratio/rejected']:+.3f} rejected, nats a token"
        )
    display.say(f"all answers in {path}; the adapter in {trained.folder.adapter}")


def _plain(text: str, limit: int = 400) -> str:
    from rich.markup import escape

    return escape(text if len(text) <= limit else f"{text[:limit].rstrip()} ...")
