"""The model card of an exported reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lite_dil.base.files import replace_file
from lite_dil.base.redaction import redacted
from lite_dil.config.resume import trained_with
from lite_dil.generation.policy import AdapterSource
from lite_dil.models.names import is_hub_id, public_name
from lite_dil.objectives.reward_table import identity, reward_objective
from lite_dil.reports.card_words import code, public_sources
from lite_dil.rewards.description import read_description
from lite_dil.runs.history import read_history

_USE = """\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}]
text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()  # ends with the token that ends the turn
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
print(model(**inputs).logits[0, 0].item())
```"""


def write_reward_card(folder: Path, source: AdapterSource, architecture: str, pad: str, check: Any) -> None:
    """Write README.md into `folder`.

    Args:
        source: the reward model it was made from.
        architecture: the class in transformers.
        pad: the pad token.
        check: the comparison of these files with the trained model, a `lite_dil.export.reward.ScoreCheck`; None for none.
    """
    assert source.adapter is not None
    description, model = read_description(source.adapter), source.options.model
    objective = reward_objective(identity(description.loss))
    base = f"base_model: {model}\n" if is_hub_id(model) else ""
    parts = [
        f"---\n{base}library_name: transformers\npipeline_tag: text-classification\ntags:\n- lite-dil\n- reward-model\n---",
        f"# {code(public_name(model))} as a reward model",
        f"A {architecture} with one label, made by lite-dil: a LoRA adapter merged into {code(public_name(model))}, and a "
        "linear head. Higher is better; a score says nothing by itself, only beside that of another response to the same "
        "prompt. The base model's licence also applies to derived models.",
        "## Use",
        _USE,
        f"The score is read at the end token of the response, the last token that is not the pad token {code(pad)}: a text "
        "must end with it, and nothing may follow. A response that was cut has no score.",
        "## Training",
        f"Loss: {code(description.loss)}, {objective.title}: {code(objective.formula)} ({objective.source}).",
    ]
    if source.run:
        options = trained_with(source.adapter, source.run)
        parts.append(f"Data: {', '.join(map(code, public_sources(options['data'])[0]))}.")
        parts += _measured(source.run.path)
    if check is not None:
        parts += ["## Check of these files", f"{check}."]
    replace_file(folder / "README.md", redacted("\n\n".join(parts)) + "\n")


def _measured(run: Path) -> list[str]:
    """Return the run's held-out figures."""
    held_out = read_history(run / "metrics.jsonl").held_out
    accuracy, longer = held_out.last("eval_accuracy"), held_out.last("eval_longer_accuracy")
    correlation = held_out.last("eval_length_correlation")
    if accuracy is None:
        return ["Nothing was measured on held-out pairs."]
    text = f"On held-out pairs the chosen response scores higher in {accuracy:.1%}"
    if longer is not None:
        text += f"; the longer response is the chosen one in {longer:.1%}"
    if correlation is not None:
        text += f"; scores correlate with the number of tokens by {correlation:+.2f}"
    return [f"{text}."]
